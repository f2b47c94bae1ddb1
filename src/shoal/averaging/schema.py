"""What peers must have in common to average tensors.

A schema is the shapes, dtypes and codecs of a list of tensors, in order. Peers group together only if their
schemas are equal, which they see by a hash. Where a tensor lives (CPU, CUDA) and its strides are no part of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.averaging.agreement import HEADER, Agreement
from shoal.averaging.elements import is_native
from shoal.averaging.formats import PLAIN_ID
from shoal.errors import InvalidValueError
from shoal.utils.dtypes import DType, dtype_of

if TYPE_CHECKING:
    import torch

    from shoal.compression.base import CompressionBase


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What peers must agree on for one tensor; ``codec`` is the wire id of the codec that its parts travel
    with.
    """

    shape: tuple[int, ...]
    dtype: DType
    codec: int = 0

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) if self.shape else "scalar"
        return f"{self.dtype} {size} codec {self.codec}"


@dataclass(frozen=True)
class TensorSchema:
    """The specs of a list of tensors, in order."""

    specs: tuple[TensorSpec, ...]

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[torch.Tensor], codecs: Sequence[CompressionBase] | None = None
    ) -> TensorSchema:
        """The schema of validated tensors; ``codecs``: one for each tensor (default: no compression)."""
        ids = [0] * len(tensors) if codecs is None else [codec.compression_type for codec in codecs]
        if len(ids) != len(tensors):
            raise InvalidValueError(f"{len(ids)} codecs were given for {len(tensors)} tensors")
        return cls(
            tuple(
                TensorSpec(tuple(t.shape), dtype_of(t), wire_id)
                for t, wire_id in zip(tensors, ids, strict=True)
            )
        )

    @property
    def is_plain(self) -> bool:
        """Whether averaging these tensors takes no torch: neither codecs nor halves."""
        return all(spec.codec == PLAIN_ID and is_native(spec.dtype) for spec in self.specs)

    def to_bytes(self) -> bytes:
        """The canonical form: a line of text for each tensor."""
        return "".join(f"{line}\n" for line in (HEADER, *map(str, self.specs))).encode()

    def agreement(self, part_size_bytes: int, min_group_size: int, min_vector_size: int = 0) -> Agreement:
        """What the peers of a group have in common: the schema, and the settings that would otherwise fail each of
        their rounds, or form groups that a member's own settings forbid.
        """
        return Agreement(self.to_bytes().decode(), part_size_bytes, min_group_size, min_vector_size)
