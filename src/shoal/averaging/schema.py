"""Which tensors can be averaged, and what peers must have in common to average them.

A schema is the shapes, dtypes and codecs of a list of tensors, in order. Peers group together only if their
schemas are equal, which they see by a hash. Where a tensor lives (CPU, CUDA) and its strides are no part of
it. Reads tensors' properties and memory addresses, never their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy

from shoal.averaging.agreement import HEADER, Agreement
from shoal.compression.base import DTYPE_NAMES, FLOATING_DTYPES, CompressionBase
from shoal.errors import InvalidTypeError, InvalidValueError

_ALLOWED = "averaged tensors must be dense torch.Tensors of " + ", ".join(FLOATING_DTYPES)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What peers must agree on for one tensor; ``codec`` is the wire id of the codec that its parts travel
    with.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    codec: int = 0

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) if self.shape else "scalar"
        return f"{DTYPE_NAMES[self.dtype]} {size} codec {self.codec}"


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
                TensorSpec(tuple(t.shape), t.dtype, wire_id) for t, wire_id in zip(tensors, ids, strict=True)
            )
        )

    def to_bytes(self) -> bytes:
        """The canonical form: a line of text for each tensor."""
        return "".join(f"{line}\n" for line in (HEADER, *map(str, self.specs))).encode()

    def agreement(self, part_size_bytes: int, min_group_size: int, min_vector_size: int = 0) -> Agreement:
        """What the peers of a group have in common: the schema, and the settings that would otherwise fail each of
        their rounds, or form groups that a member's own settings forbid.
        """
        return Agreement(self.to_bytes().decode(), part_size_bytes, min_group_size, min_vector_size)


def validate_tensors(averaged_tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors of any iterable, in order, once they are known to be fit for averaging in place.

    Allowed: dense floating tensors on any device, of any shape (0-dimensional and empty included) and
    strides, leaf parameters that require grad. Raises :class:`InvalidTypeError` or :class:`InvalidValueError`
    naming the index, what it is and what is allowed.
    """
    if isinstance(averaged_tensors, torch.Tensor):
        raise InvalidTypeError(
            "averaged_tensors is a single tensor; it must be a list or other iterable of tensors"
        )
    if not isinstance(averaged_tensors, Iterable):
        raise InvalidTypeError(
            f"averaged_tensors is {type(averaged_tensors).__name__}; it must be an iterable of tensors"
        )
    tensors = tuple(averaged_tensors)
    if not tensors:
        raise InvalidValueError("averaged_tensors is empty; there must be at least one tensor")
    for index, tensor in enumerate(tensors):
        _validate(index, tensor)
    sharing = shared_memory(tensors)
    if sharing is not None:
        raise InvalidValueError(f"{sharing}; each element must be given once")
    return tensors


def _validate(index: int, tensor: object) -> None:
    name = f"averaged_tensors[{index}]"
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"{name} is {type(tensor).__name__}; {_ALLOWED}")
    if is_lazy(tensor):
        raise InvalidTypeError(
            f"{name} is {type(tensor).__name__} and has no shape yet; run the model once before, so that it is made"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InvalidTypeError(f"{name} is a {kind} tensor; {_ALLOWED}")
    if tensor.dtype not in DTYPE_NAMES:
        raise InvalidTypeError(f"{name} has dtype {tensor.dtype}; {_ALLOWED}")
    if tensor.device.type == "meta":
        raise InvalidTypeError(f"{name} is on the meta device and has no values; {_ALLOWED}")
    if tensor.is_neg():
        raise InvalidValueError(f"{name} is a view that negates what it shows; pass tensor.resolve_neg()")
    if tensor.is_inference():
        raise InvalidValueError(
            f"{name} was made in inference mode; such a tensor can't be written outside of it"
        )
    if tensor.grad_fn is not None:
        raise InvalidValueError(
            f"{name} was computed by autograd (grad_fn={tensor.grad_fn.name()});"
            " averaged tensors must be leaves, such as parameters: pass the leaf, or tensor.detach()"
        )
    if overlaps_itself(tensor):
        raise InvalidValueError(
            f"{name} has elements that share memory (shape {tuple(tensor.shape)}, strides"
            f" {tensor.stride()}); pass a copy"
        )
    if lacks_storage(tensor):
        raise InvalidValueError(
            f"{name} has a storage of {tensor.untyped_storage().nbytes()} bytes, which does not hold its elements; "
            "give it memory first"
        )


def lacks_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie beyond the end of its storage, as after ``untyped_storage().resize_(0)``."""
    if tensor.numel() == 0:
        return False
    end = (tensor.storage_offset() + _extent(tensor)) * tensor.itemsize
    return end > tensor.untyped_storage().nbytes()


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor share memory, as those of an expanded one do."""
    if tensor.is_contiguous():
        return False
    strides = sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )
    if tensor.numel() == 0:
        return False
    if tensor.numel() > _extent(tensor):
        return True  # more elements than places; counting them could take more memory than there is
    reach = 0
    for stride, size in strides:
        if stride <= reach:
            # The quick test, whether each stride exceeds all smaller dimensions, can't tell: count places.
            return int(_places(tensor, 0, _extent(tensor)).sum()) != tensor.numel()
        reach += stride * (size - 1)
    return False


def _extent(tensor: torch.Tensor) -> int:
    """Elements of memory from a non-empty tensor's first to its last."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _places(tensor: torch.Tensor, offset: int, extent: int) -> torch.Tensor:
    """For each element of memory, whether it belongs to the tensor, which starts at ``offset``."""
    places = torch.zeros(extent, dtype=torch.bool)
    # Written by index, not through a strided view: torch refuses to write to a view that overlaps itself.
    indices = torch.tensor(offset)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        indices = indices.unsqueeze(-1) + stride * torch.arange(size)
    places[indices.reshape(-1)] = True
    return places


def shared_memory(tensors: Sequence[torch.Tensor]) -> str | None:
    """Which two tensors have an element in common, for people; None: no two."""
    for first, second in _pairs_with_crossing_extents(tensors):
        if tensors[first] is tensors[second]:
            return f"averaged_tensors[{second}] is averaged_tensors[{first}] again"
        if _share_memory(tensors[first], tensors[second]):
            return f"averaged_tensors[{second}] shares memory with averaged_tensors[{first}]"
    return None


def _pairs_with_crossing_extents(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Pairs of indices, the smaller first, of tensors whose ranges of addresses cross, or that are one
    object.
    """
    by_identity: dict[int, int] = {}
    for index, tensor in enumerate(tensors):
        first = by_identity.setdefault(id(tensor), index)
        if first != index:
            yield first, index
    ranges = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + _extent(t) * t.itemsize, index)
        for index, t in enumerate(tensors)
        if t.numel() > 0
    )
    active: list[tuple[str, int, int, int]] = []
    for entry in ranges:
        active = [other for other in active if other[0] == entry[0] and other[2] > entry[1]]
        for other in active:
            yield min(other[3], entry[3]), max(other[3], entry[3])
        active.append(entry)


def _share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors whose address ranges cross have an element in common (interleaved columns have
    none).
    """
    if first.data_ptr() > second.data_ptr():
        first, second = second, first
    distance = second.data_ptr() - first.data_ptr()
    if first.itemsize != second.itemsize or distance % first.itemsize:
        return True
    offset = distance // first.itemsize
    extent = max(_extent(first), offset + _extent(second))
    return bool((_places(first, 0, extent) & _places(second, offset, extent)).any())
