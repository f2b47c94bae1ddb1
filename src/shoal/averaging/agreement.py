"""What the peers of a group have to have in common, and in what two peers differ. Pure.

Peers declare a hash of it. A peer that sees another hash asks for what is behind it, to say what differs.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, NamedTuple

import msgspec

from shoal.averaging.formats import codec_name
from shoal.averaging.group import SCHEMA_HASH_BYTES
from shoal.utils.structs import CompactStruct
from shoal.utils.text import printable

MAX_TENSORS_TEXT = 900_000
"""Characters of the tensors' description that one message holds; some 30,000 tensors."""
MAX_VALUE = 64
HEADER = "shoal tensors 1"


class Agreement(CompactStruct, frozen=True):
    """What the peers of a group have in common.

    :ivar tensors: the canonical form of the :class:`~shoal.averaging.schema.TensorSchema`: a line for each tensor
    """

    tensors: Annotated[str, msgspec.Meta(max_length=MAX_TENSORS_TEXT)]
    part_size_bytes: int
    min_group_size: int
    min_vector_size: int

    def digest(self) -> bytes:
        """The hash that peers declare: the first :data:`~shoal.averaging.group.SCHEMA_HASH_BYTES` of a SHA-256."""
        settings = (
            f"parts of {self.part_size_bytes}, groups of at least {self.min_group_size}, "
            f"spans of at least {self.min_vector_size}\n"
        )
        return hashlib.sha256(self.tensors.encode() + settings.encode()).digest()[:SCHEMA_HASH_BYTES]


class _Tensor(NamedTuple):
    """One line of the canonical form; whatever another peer wrote there."""

    dtype: str
    shape: str
    codec: str

    @classmethod
    def parse(cls, line: str) -> _Tensor:
        dtype, _, rest = line.partition(" ")
        shape, _, codec = rest.partition(" codec ")
        return cls(*(printable(part, MAX_VALUE) for part in (dtype, shape, codec)))

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def find_differences(own: Agreement, other: Agreement) -> list[str]:
    """Everything in which two peers differ, with both values, for people; the own value first."""
    found = _tensor_differences(_tensors(own), _tensors(other))
    for name in ("part_size_bytes", "min_group_size", "min_vector_size"):
        here, there = getattr(own, name), getattr(other, name)
        if here != there:
            found.append(f"{name} is {here} here, {there} there")
    return found


def _tensors(agreement: Agreement) -> list[_Tensor]:
    return [_Tensor.parse(line) for line in agreement.tensors.split("\n")[1:] if line]


def _tensor_differences(own: list[_Tensor], other: list[_Tensor]) -> list[str]:
    if len(own) != len(other):
        text = f"averaged_tensors has {len(own):,} tensors here, {len(other):,} there"
        pairs = zip(own, other, strict=False)
        index = next((index for index, (here, there) in enumerate(pairs) if here[:2] != there[:2]), None)
        if index is not None:
            text += f"; averaged_tensors[{index}] is {own[index]} here, {other[index]} there"
        return [text]
    found = []
    for field, name in enumerate(("dtype", "shape", "codec")):
        indices = [index for index in range(len(own)) if own[index][field] != other[index][field]]
        if indices:
            here, there = (_shown(field, tensors[indices[0]][field]) for tensors in (own, other))
            more = f" (and so on: {len(indices):,} tensors differ in it)" if len(indices) > 1 else ""
            found.append(f"the {name} of averaged_tensors[{indices[0]}] is {here} here, {there} there{more}")
    return found


def _shown(field: int, value: str) -> str:
    if field != 2:
        return value
    name = codec_name(int(value)) if value.isdecimal() and len(value) <= 3 else None
    return name or f"number {value}"
