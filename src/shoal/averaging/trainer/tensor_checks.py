"""Which tensors can be averaged in place. Reads their properties and memory addresses, never their values."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn.parameter import is_lazy

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.dtypes import AVERAGED, name_of

_ALLOWED = "must be a dense torch.Tensor of " + ", ".join(AVERAGED)


def check_tensors(tensors: Sequence[torch.Tensor], labels: Sequence[str]) -> None:
    """Whether tensors are fit for averaging in place; errors call them by their ``labels``.

    Allowed: dense floating tensors on any device, of any shape (0-dimensional and empty included) and
    strides, leaf parameters that require grad, no two of which share memory.

    :raises InvalidTypeError: another kind of tensor, or none; says what is allowed, and what to pass
    :raises InvalidValueError: one that cannot be written, or shares memory
    """
    for label, tensor in zip(labels, tensors, strict=True):
        check_tensor(label, tensor)
    sharing = shared_memory(tensors, labels)
    if sharing is not None:
        raise InvalidValueError(f"{sharing}; each element must be given once")


def check_tensor(label: str, tensor: object) -> None:
    """As :func:`check_tensors` for one of them, by itself."""
    check_kind(label, tensor)
    assert isinstance(tensor, torch.Tensor)
    _check_memory(label, tensor)


def check_kind(label: str, tensor: object) -> None:
    """Whether a tensor's type, layout and dtype can be averaged, wherever its elements lie.

    :raises InvalidTypeError: they cannot, or it is no tensor
    """
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"{label} {_ALLOWED}, got {type(tensor).__name__}{_advice_for(tensor)}")
    if is_lazy(tensor):
        raise InvalidTypeError(
            f"{label} is {type(tensor).__name__} and has no shape yet; run the model once before, so that it is made"
        )
    _check_kind(label, tensor)


def _advice_for(given: object) -> str:
    """What to pass in place of something that is no tensor."""
    if given is None:
        return ": a gradient is None before the first backward() and after zero_grad()"
    if isinstance(given, dict) and "params" in given:
        return ": pass [p for group in optimizer.param_groups for p in group['params']]"
    if isinstance(given, Mapping):
        return ": pass that dictionary itself, if it holds tensors by name"
    if isinstance(given, list | tuple):
        return ": pass one flat list, [tensor for part in parts for tensor in part]"
    if hasattr(given, "__array_interface__"):
        return ": pass torch.from_numpy(array), which shares the array's memory"
    return ""


def _check_kind(label: str, tensor: torch.Tensor) -> None:
    """:raises InvalidTypeError: a dtype or layout that is not averaged, or a tensor without memory of its own"""
    if is_distributed(tensor):
        raise InvalidTypeError(
            f"{label} {_ALLOWED}, got a DTensor: pass what this process holds of it, lambda: [p.to_local() for p in "
            "model.parameters()], and give each rank a prefix of its own"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InvalidTypeError(f"{label} {_ALLOWED}, got a {kind} tensor")
    if name_of(tensor.dtype) not in AVERAGED:
        if isinstance(tensor, torch.nn.Parameter):
            advice = (
                "pass the parameters that are trained, [p for p in model.parameters() if p.requires_grad]"
            )
        else:
            advice = "leave it out"
            if not tensor.is_floating_point():  # float8 is
                advice += ", e.g. with `if tensor.is_floating_point()`"
        raise InvalidTypeError(f"{label} {_ALLOWED}, got {name_of(tensor.dtype)}: {advice}")
    if tensor.device.type == "meta":
        raise InvalidTypeError(f"{label} {_ALLOWED}, got one on the meta device, which has no values")
    if tensor.numel() and memory_of(tensor) is None:
        raise InvalidTypeError(
            f"{label} {_ALLOWED}, got {type(tensor).__name__}, which has no memory of its own: pass the tensors in it"
        )


def is_distributed(tensor: torch.Tensor) -> bool:
    # Its module is slow to import, and there already where such a tensor can be.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _check_memory(label: str, tensor: torch.Tensor) -> None:
    """:raises InvalidValueError: the elements cannot be written, each for itself"""
    if tensor.is_neg():
        raise InvalidValueError(f"{label} is a view that negates what it shows; pass tensor.resolve_neg()")
    if tensor.is_inference():
        raise InvalidValueError(
            f"{label} was made in inference mode; such a tensor can't be written outside of it"
        )
    if tensor.grad_fn is not None:
        raise InvalidValueError(
            f"{label} was computed by autograd (grad_fn={tensor.grad_fn.name()});"
            " averaged tensors must be leaves, such as parameters: pass the leaf, or tensor.detach()"
        )
    if overlaps_itself(tensor):
        raise InvalidValueError(
            f"{label} has elements that share memory (shape {tuple(tensor.shape)}, strides"
            f" {tensor.stride()}); pass a copy"
        )
    if lacks_storage(tensor):
        raise InvalidValueError(
            f"{label} has a storage of {tensor.untyped_storage().nbytes()} bytes, which does not hold its elements; "
            "give it memory first"
        )


def memory_of(tensor: torch.Tensor) -> tuple[str, int] | None:
    """The device and the address of a tensor's storage; None: it has none, as a wrapper around other tensors."""
    try:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return str(tensor.device), 0
        address = storage.data_ptr()
    except (RuntimeError, NotImplementedError):  # so say subclasses that hold none
        return None
    return (str(tensor.device), address) if address else None


def same_elements(tensor: torch.Tensor) -> object:
    """Equal for two tensors that show the same memory in the same way."""
    if is_lazy(tensor):
        return id(tensor)
    memory = memory_of(tensor) if tensor.layout == torch.strided and not tensor.is_nested else None
    if memory is None or tensor.numel() == 0:
        return id(tensor)
    return memory, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def lacks_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie beyond the end of its storage, as after ``untyped_storage().resize_(0)``."""
    if tensor.numel() == 0:
        return False
    end = (tensor.storage_offset() + extent(tensor)) * tensor.itemsize
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
    if tensor.numel() > extent(tensor):
        return True  # more elements than places; counting them could take more memory than there is
    reach = 0
    for stride, size in strides:
        if stride <= reach:
            # The quick test, whether each stride exceeds all smaller dimensions, can't tell: count places.
            return int(_places(tensor, 0, extent(tensor)).sum()) != tensor.numel()
        reach += stride * (size - 1)
    return False


def extent(tensor: torch.Tensor) -> int:
    """Elements of memory from a non-empty tensor's first to its last."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _places(tensor: torch.Tensor, offset: int, count: int) -> torch.Tensor:
    """For each of ``count`` elements of memory, whether it belongs to the tensor, which starts at ``offset``."""
    places = torch.zeros(count, dtype=torch.bool)
    # Written by index, not through a strided view: torch refuses to write to a view that overlaps itself.
    indices = torch.tensor(offset)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        indices = indices.unsqueeze(-1) + stride * torch.arange(size)
    places[indices.reshape(-1)] = True
    return places


def shared_memory(tensors: Sequence[torch.Tensor], labels: Sequence[str]) -> str | None:
    """Which two tensors have an element in common, for people; None: no two."""
    for first, second in _pairs_with_crossing_extents(tensors):
        if tensors[first] is tensors[second]:
            return f"{labels[second]} is {labels[first]} again"
        if _share_memory(tensors[first], tensors[second]):
            return f"{labels[second]} shares memory with {labels[first]}"
    return None


def memory_in_common(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Whether a tensor of ``first`` has an element in common with one of ``second``."""
    tensors, border = (*first, *second), len(first)
    return any(
        index < border <= other
        and (tensors[index] is tensors[other] or _share_memory(tensors[index], tensors[other]))
        for index, other in _pairs_with_crossing_extents(tensors)
    )


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
        (str(t.device), t.data_ptr(), t.data_ptr() + extent(t) * t.itemsize, index)
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
    places = max(extent(first), offset + extent(second))
    return bool((_places(first, 0, places) & _places(second, offset, places)).any())
