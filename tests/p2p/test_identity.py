"""Identities: libp2p's form of PeerIDs, signatures, and key files that are private from their first moment."""

from __future__ import annotations

import copy
import os
import pickle
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.p2p import identity as identity_module
from shoal.p2p.identity import Identity, PeerID, verify

ALICE = Identity.generate(b"a" * 32)
BOB = Identity.generate(b"b" * 32)


@pytest.mark.parametrize(
    ("seed", "text"),
    [  # as other implementations of libp2p print them
        (0, "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"),
        (1, "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"),
    ],
)
def test_peer_ids_are_those_of_libp2p(seed: int, text: str) -> None:
    peer_id = Identity.generate(seed.to_bytes(32, "big")).peer_id
    assert str(peer_id) == text
    assert repr(peer_id) == f"<PeerID {text}>"


@given(st.binary(min_size=32, max_size=32))
def test_every_form_of_a_peer_id_leads_back_to_it(key: bytes) -> None:
    peer_id = PeerID.from_public_key(key)
    assert peer_id.public_key == key
    assert peer_id.to_base58().startswith("12D3KooW")
    assert PeerID.from_base58(str(peer_id)) == peer_id
    assert PeerID.from_bytes(peer_id.to_bytes()) == peer_id
    assert pickle.loads(pickle.dumps(peer_id)) == peer_id
    assert copy.deepcopy(peer_id) == peer_id
    assert len({peer_id, PeerID.from_public_key(key)}) == 1


def test_peer_ids_are_ordered_by_their_bytes_and_cannot_be_changed() -> None:
    keys = [bytes([value]) * 32 for value in (3, 1, 2)]
    ordered = sorted(PeerID.from_public_key(key) for key in keys)
    assert [peer_id.public_key for peer_id in ordered] == sorted(keys)
    assert ordered[0] < ordered[1] <= ordered[2] > ordered[1] >= ordered[0]
    assert ALICE.peer_id != str(ALICE.peer_id)
    with pytest.raises(AttributeError):
        ordered[0]._raw = ordered[1]._raw  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del ordered[0]._raw
    with pytest.raises(TypeError):
        ordered[0] < b""  # type: ignore[operator]  # noqa: B015


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3KooW",
        str(ALICE.peer_id) + "1",
        "1" + str(ALICE.peer_id),
        str(ALICE.peer_id)[:-1] + "0",  # no character of base58
        "Q" + str(ALICE.peer_id)[1:],  # another number: not the prefix
        "z" * 52,
        "1" * 52,
        "é" * 52,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA key
        "x" * 100_000,
    ],
)
def test_bad_text_of_a_peer_id(text: str) -> None:
    with pytest.raises(InvalidValueError, match="text must be") as caught:
        PeerID.from_base58(text)
    assert len(str(caught.value)) < 300


def test_bad_bytes_of_a_peer_id() -> None:
    good = ALICE.peer_id.to_bytes()
    for raw in (b"", good[:-1], good + b"\0", b"\1" + good[1:], b"x" * 38):
        with pytest.raises(InvalidValueError, match="raw must be"):
            PeerID.from_bytes(raw)
    with pytest.raises(InvalidValueError, match="of 32 bytes, got 31"):
        PeerID.from_public_key(b"k" * 31)
    with pytest.raises(InvalidTypeError):
        PeerID(str(ALICE.peer_id))  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError):
        PeerID.from_base58(good)  # type: ignore[arg-type]


@given(st.text(max_size=60))
def test_any_text_is_a_peer_id_or_refused(text: str) -> None:
    with pytest.raises(InvalidValueError):
        PeerID.from_base58(text)


def test_seeds() -> None:
    assert Identity.generate(b"a" * 32).peer_id == ALICE.peer_id
    assert Identity.generate().peer_id != Identity.generate().peer_id
    with pytest.raises(InvalidValueError, match="seed"):
        Identity.generate(b"short")


def test_a_signature_is_bound_to_signer_domain_and_message() -> None:
    signature = ALICE.sign(b"domain", b"message")
    assert len(signature) == 64
    assert verify(ALICE.peer_id, b"domain", b"message", signature)
    assert not verify(BOB.peer_id, b"domain", b"message", signature)
    assert not verify(ALICE.peer_id, b"other", b"message", signature)
    assert not verify(ALICE.peer_id, b"domain", b"other", signature)
    # The border between domain and message counts.
    assert not verify(ALICE.peer_id, b"domainm", b"essage", signature)
    for wrong in (b"", signature[:-1], signature + b"\0", bytes(64)):
        assert not verify(ALICE.peer_id, b"domain", b"message", wrong)


@pytest.mark.parametrize("domain", [b"", b"d" * 256])
def test_domains_have_a_length(domain: bytes) -> None:
    with pytest.raises(InvalidValueError, match="domain"):
        ALICE.sign(domain, b"")


def test_the_private_key_is_not_shown() -> None:
    assert repr(ALICE) == f"<Identity {ALICE.peer_id}>"


def test_a_key_file_is_made_once_and_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "key"
    created = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["key"]
    assert Identity.load_or_create(str(path)).peer_id == created.peer_id
    assert created.peer_id != Identity.load_or_create(tmp_path / "another").peer_id


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_a_key_file_is_private_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    modes = []

    def watch(path: Path) -> None:
        modes.extend(stat.S_IMODE(os.stat(path / name).st_mode) & 0o177 for name in os.listdir(path))

    real_open, real_link = os.open, os.link

    def watched_open(*args: object, **kwargs: object) -> int:
        descriptor = real_open(*args, **kwargs)  # type: ignore[arg-type]
        watch(tmp_path)
        return descriptor

    def watched_link(*args: object, **kwargs: object) -> None:
        watch(tmp_path)
        real_link(*args, **kwargs)  # type: ignore[arg-type]
        watch(tmp_path)

    monkeypatch.setattr(identity_module.os, "open", watched_open)
    monkeypatch.setattr(identity_module.os, "link", watched_link)
    before = os.umask(umask)
    try:
        Identity.load_or_create(tmp_path / "key")
    finally:
        os.umask(before)
    assert len(modes) >= 4
    assert set(modes) == {0}


def test_whoever_links_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    winners = []
    real_link = os.link

    def late_link(*args: object, **kwargs: object) -> None:
        monkeypatch.setattr(identity_module.os, "link", real_link)
        winners.append(Identity.load_or_create(path))  # as another process would, at the worst moment
        real_link(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(identity_module.os, "link", late_link)
    assert Identity.load_or_create(path).peer_id == winners[0].peer_id
    assert os.listdir(tmp_path) == ["key"]


def test_many_create_one_key_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "key"
    barrier = threading.Barrier(8)
    found = []

    def create() -> None:
        barrier.wait()
        found.append(Identity.load_or_create(path).peer_id)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert os.listdir(tmp_path) == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666])
def test_a_key_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(InvalidValueError, match=f"mode {mode:04o}.*chmod 600 {path}"):
        Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_damaged_key_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "key"
    Identity.load_or_create(path)
    good = path.read_bytes()
    damaged = [
        b"",
        good[:-1],
        good + b"\0",
        b"\x09" + good[1:],
        b"-----BEGIN PRIVATE KEY-----",
        bytes(len(good)),
    ]
    damaged += [good[:10] + bytes([good[10] ^ 1]) + good[11:], good[:-1] + bytes([good[-1] ^ 1])]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InvalidValueError, match=r"identity_path: .*damaged"):
            Identity.load_or_create(path)
        assert path.read_bytes() == content


def test_paths_that_cannot_be_key_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="not a regular file"):
        Identity.load_or_create(tmp_path)
    with pytest.raises(InvalidValueError, match=f"no directory {tmp_path / 'nowhere'}"):
        Identity.load_or_create(tmp_path / "nowhere" / "key")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InvalidValueError, match="not a regular file"):
        Identity.load_or_create(tmp_path / "pipe")


def test_a_key_of_another_user_is_not_taken_for_ones_own(tmp_path, monkeypatch):
    """As root, who can read all files."""
    path = tmp_path / "peer.key"
    Identity.load_or_create(path)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(
        InvalidValueError, match=rf"belongs to another user \(uid {owner}, not {owner + 1}\).*chown"
    ):
        Identity.load_or_create(path)
