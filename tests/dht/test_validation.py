from __future__ import annotations

import dataclasses
import pickle
from dataclasses import replace
from typing import Any

import msgspec
import pydantic
import pytest

from shoal.dht.schema import SchemaValidator
from shoal.dht.validation import (
    CompositeValidator,
    DHTRecord,
    ProtectedKeyValidator,
    RecordValidatorBase,
    SignatureValidator,
    is_protected,
    protected_key,
)
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.p2p.identity import Identity
from shoal.utils.serializer import MSGPackSerializer

dumps = MSGPackSerializer.dumps


def record(key: Any = "key", value: Any = 1, subkey: Any = None, expiration: float = 100.0) -> DHTRecord:
    return DHTRecord(dumps(key), None if subkey is None else dumps(subkey), dumps(value), expiration)


def signed(validator: RecordValidatorBase, plain: DHTRecord) -> DHTRecord:
    return replace(plain, value=validator.sign_value(plain))


class Tagger(RecordValidatorBase):
    """Adds a letter to each value, and demands it."""

    def __init__(self, letter: bytes, priority: int) -> None:
        self.letter = letter
        self._priority = priority

    @property
    def priority(self) -> int:
        return self._priority

    def validate(self, record: DHTRecord) -> bool:
        return record.value.endswith(self.letter)

    def sign_value(self, record: DHTRecord) -> bytes:
        return record.value + self.letter

    def strip_value(self, record: DHTRecord) -> bytes:
        return record.value[:-1]


class Raiser(RecordValidatorBase):
    def validate(self, record: DHTRecord) -> bool:
        raise ZeroDivisionError("oh")


# ---- composition


def test_validators_are_applied_in_the_order_of_priority() -> None:
    composite = CompositeValidator([Tagger(b"b", 2), Tagger(b"a", 1)])
    plain = DHTRecord(b"k", None, b"value", 1.0)
    assert composite.sign_value(plain) == b"valueab"
    assert composite.validate(signed(composite, plain))
    assert composite.strip_value(signed(composite, plain)) == b"value"
    assert composite.explain(replace(plain, value=b"valueba")) == "Tagger refused it"


def test_a_validator_that_raises_refuses() -> None:
    assert "ZeroDivisionError: oh" in (CompositeValidator([Raiser()]).explain(record()) or "")


def test_only_validators_are_taken() -> None:
    with pytest.raises(InvalidTypeError, match="RecordValidatorBase"):
        CompositeValidator([lambda record: True])  # type: ignore[list-item]


# ---- owned records


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("in_subkey", [False, True])
def test_only_the_owner_can_write(as_text: bool, in_subkey: bool) -> None:
    owner, other = SignatureValidator(), SignatureValidator()
    marker: Any = owner.local_public_key.decode() if as_text else owner.local_public_key
    plain = record(subkey=marker) if in_subkey else record(key=("name", marker))
    good = signed(owner, plain)
    assert other.validate(good)
    assert other.strip_value(good) == plain.value
    for forged in (
        plain,
        signed(other, plain),
        replace(good, value=dumps(2) + good.value[len(plain.value) :]),
        replace(good, expiration_time=101.0),
        replace(good, key=good.key + b"x"),
        replace(good, value=good.value[:-1]),
        replace(good, value=b""),
    ):
        assert not other.validate(forged)


def test_a_signature_covers_the_subkey() -> None:
    owner = SignatureValidator()
    good = signed(owner, record(key=owner.local_public_key, subkey="a"))
    assert owner.validate(good)
    assert not owner.validate(replace(good, subkey=dumps("b")))
    assert not owner.validate(replace(good, subkey=None))


def test_records_without_an_owner_are_left_alone() -> None:
    validator = SignatureValidator()
    plain = record()
    assert validator.sign_value(plain) == plain.value == validator.strip_value(plain)
    assert validator.validate(plain)


def test_two_owners_are_refused() -> None:
    first, second = SignatureValidator(), SignatureValidator()
    both = record(key=first.local_public_key, subkey=second.local_public_key)
    assert "2 different owners" in (first.explain(signed(first, both)) or "")
    same = record(key=first.local_public_key, subkey=first.local_public_key)
    assert first.validate(signed(first, same))


def test_signature_validators_merge_and_travel() -> None:
    validator = SignatureValidator(b"\7" * 32)
    assert validator.local_public_key == SignatureValidator(b"\7" * 32).local_public_key
    copy = pickle.loads(pickle.dumps(validator))
    assert copy.local_public_key == validator.local_public_key
    composite = CompositeValidator([validator, SignatureValidator()])
    assert composite.validate(signed(composite, record(key=validator.local_public_key)))


# ---- protected records


def test_protected_records_are_signed_by_their_peer(identities: list[Identity]) -> None:
    mine, theirs = (ProtectedKeyValidator(identity) for identity in identities[:2])
    plain = record(protected_key("group"), {"a": (1,)}, identities[0].peer_id.to_bytes())
    good = signed(mine, plain)
    assert theirs.explain(good) is None
    assert theirs.strip_value(good) == plain.value
    assert signed(theirs, plain) == plain  # a node never signs for another peer
    for forged in (
        plain,
        replace(good, expiration_time=101.0),
        replace(good, key=dumps(protected_key("other group"))),
        replace(good, subkey=dumps(identities[1].peer_id.to_bytes())),
        replace(good, value=good.value[:5] + b"x" + good.value[6:]),
        replace(good, value=b"x" * 64),
        replace(good, value=b""),
    ):
        assert "does not match" in (theirs.explain(forged) or "")


@pytest.mark.parametrize("subkey", ["text", b"short", b"x" * 38, 5, (1,)])
def test_other_subkeys_under_a_protected_key(identities: list[Identity], subkey: Any) -> None:
    validator = ProtectedKeyValidator(identities[0])
    assert "not the bytes of a PeerID" in (validator.explain(record(protected_key("g"), 1, subkey)) or "")


def test_one_spelling_of_a_peer_only(identities: list[Identity]) -> None:
    raw = identities[0].peer_id.to_bytes()
    validator = ProtectedKeyValidator(identities[0])
    spelled = DHTRecord(dumps(protected_key("g")), b"\xc5\x00\x26" + raw, dumps(1), 1.0)  # bin 16 for bin 8
    assert "not the bytes of a PeerID" in (validator.explain(spelled) or "")


def test_a_protected_key_needs_a_subkey(identities: list[Identity]) -> None:
    validator = ProtectedKeyValidator(identities[0])
    assert "needs a sub-key" in (validator.explain(record(protected_key("g"))) or "")


def test_which_keys_are_protected() -> None:
    assert is_protected(dumps(protected_key("g")))
    assert is_protected(dumps(protected_key("g" * 1000)))
    assert is_protected(b"\xc6" + (4 + 17).to_bytes(4, "big") + protected_key("abcd"))
    for key in ("g", b"g", protected_key("g").decode(), (protected_key("g"),), b"", 0xC4):
        assert not is_protected(dumps(key))
    assert not is_protected(b"")


# ---- schemas


class Status(msgspec.Struct):
    step: int
    loss: float


class MsgspecSchema(msgspec.Struct):
    status: Status
    scores: dict[bytes, float]


@dataclasses.dataclass
class DataclassSchema:
    status: Status
    scores: dict[bytes, float]


class PydanticStatus(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    step: int
    loss: float


class PydanticSchema(pydantic.BaseModel):
    status: PydanticStatus
    scores: dict[pydantic.StrictBytes, pydantic.StrictFloat]


SCHEMAS = [
    MsgspecSchema,
    DataclassSchema,
    PydanticSchema,
    {"status": Status, "scores": dict[bytes, float]},
    {"status": PydanticStatus, "scores": dict[bytes, float]},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_values_must_match_the_schema(schema: Any) -> None:
    validator = SchemaValidator(schema)
    assert validator.explain(record("status", {"step": 1, "loss": 0.5})) is None
    assert validator.explain(record("scores", 0.5, b"me")) is None
    for bad, reason in [
        (record("status", {"step": "1", "loss": 0.5}), "step"),
        (record("status", {"step": 1}), "loss"),
        (record("status", "text"), "status|Struct|object|valid"),
        (record("status", {"step": 1, "loss": 0.5}, "me"), "must not have a sub-key"),
        (record("scores", 0.5), "needs a sub-key"),
        (record("scores", "much", b"me"), "float|number"),
        (record("scores", 0.5, 7), "bytes"),
        (replace(record("status"), value=b"\xc1"), "not a serialized value"),
    ]:
        explained = validator.explain(bad)
        assert explained is not None
        assert any(part in explained for part in reason.split("|")), explained


def test_unknown_keys() -> None:
    assert SchemaValidator({"a": int}).validate(record("b", "text"))
    assert "not in the schema" in (
        SchemaValidator({"a": int}, allow_extra_keys=False).explain(record("b")) or ""
    )


def test_prefix() -> None:
    validator = SchemaValidator({"a": int}, prefix="run")
    assert not validator.validate(record("run_a", "text"))
    assert validator.validate(record("a", "text"))


def test_several_schemas_act_as_one() -> None:
    composite = CompositeValidator(
        [
            SchemaValidator({"a": int}, allow_extra_keys=False),
            SchemaValidator({"a": str, "b": int}, allow_extra_keys=False),
        ]
    )
    assert composite.validate(record("a", 1))
    assert composite.validate(record("a", "text"))
    assert not composite.validate(record("a", 0.5))
    assert composite.validate(record("b", 1))
    assert not composite.validate(record("c", 1))


def test_schema_validators_travel() -> None:
    validator = SchemaValidator(MsgspecSchema, allow_extra_keys=False)
    validator.merge_with(SchemaValidator(PydanticSchema, prefix="p"))
    copy = pickle.loads(pickle.dumps(validator))
    assert copy.validate(record("p_scores", 0.5, b"me"))
    assert not copy.validate(record("scores", "much", b"me"))
    assert not copy.validate(record("other", 1))


def test_schema_mistakes() -> None:
    with pytest.raises(InvalidTypeError, match="schema must be a mapping"):
        SchemaValidator(5)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="schema must have annotated fields"):
        SchemaValidator(type("Empty", (), {}))
    with pytest.raises(InvalidTypeError, match="no type that msgspec checks"):
        SchemaValidator({"a": 5})


def test_signature_and_schema_together() -> None:
    owner = SignatureValidator()
    composite = CompositeValidator([SchemaValidator({"scores": dict[bytes, float]}), owner])
    plain = record("scores", 0.5, b"me" + owner.local_public_key)
    assert composite.explain(signed(composite, plain)) is None
    assert composite.explain(plain) is not None
    wrong = record("scores", "much", b"me" + owner.local_public_key)
    assert "schema" in (composite.explain(signed(composite, wrong)) or "")
