"""Which tensors are averaged now: those that were given, or those that a source finds, once they are known to fit.

Reads properties of tensors and memory addresses, never their values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from shoal.averaging.partition import Layout
from shoal.averaging.trainer.holders import are_temporary
from shoal.averaging.trainer.sources import HeldTensors, TensorSource
from shoal.averaging.trainer.tensor_checks import check_tensor, lacks_storage, overlaps_itself, shared_memory
from shoal.averaging.trainer.writable import first_read_only
from shoal.errors import InvalidStateError, InvalidValueError, UsageError
from shoal.utils.dtypes import name_of


class Unchanged(NamedTuple):
    """Tensors that can still be averaged."""

    tensors: HeldTensors
    places: object
    """Another object whenever one of them lies elsewhere, or otherwise, than at the last look."""
    moved: bool
    """Whether that is so now."""
    temporary: bool
    """Whether a function of the user's has made them just now, and nothing else has them."""


class CurrentTensors:
    """The tensors of one averager, as they are at each call.

    :param tensors: that have passed :func:`~.schema.check_tensors`
    :param labels: what errors call each of them
    :param source: where they are found anew; None: they stay the same objects. Referred to weakly.
    :raises InvalidValueError: the memory of a tensor is read-only
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        layout: Layout,
        labels: Sequence[str],
        source: TensorSource | None,
    ) -> None:
        self._layout = layout
        self._labels = labels
        self._given = HeldTensors.of(tensors) if source is None else None
        self._source = None if source is None else weakref.ref(source)
        self._known = list(map(_appearance, tensors))
        """Of the tensors of a source: as they were when they were checked last."""
        self._found = list(map(_recall, tensors)) if source is not None and source.runs_users_code else []
        self._seen: list[tuple[object, ...] | None] = [None] * len(tensors)
        self._check_writable(tensors, range(len(tensors)), InvalidValueError)

    @property
    def tensors(self) -> HeldTensors:
        """The tensors themselves.

        :raises UsageError: of a source: they are not what they were, or cannot be averaged; names the tensor
        """
        if self._given is not None:
            return self._given
        source = None if self._source is None else self._source()
        if source is None:
            raise InvalidStateError("the averager is gone, and with it the source of its tensors")
        found = source.find().tensors
        # One at a time, as of unchanged().
        new = [index for index, tensor in enumerate(found) if not self._is_known(index, tensor)]
        for index in new:
            check_tensor(self._labels[index], found[index])
            self._check_unchanged(index, found[index])
        self._check_writable(found, new, InvalidStateError)
        for index in new:
            self._known[index] = _appearance(found[index])
        if source.runs_users_code:
            self._found = list(map(_recall, found))
        return found

    def _is_known(self, index: int, tensor: torch.Tensor) -> bool:
        """Whether it is as it was when it was checked last."""
        appearance = _appearance(tensor)
        return appearance is not None and appearance == self._known[index]

    def _check_writable(
        self, tensors: Sequence[torch.Tensor], indices: Sequence[int], error: type[UsageError]
    ) -> None:
        read_only = first_read_only([tensors[index] for index in indices])
        if read_only is not None:
            place, reason = read_only
            raise error(
                f"{self._labels[indices[place]]} must be in memory that can be written, and {reason}; "
                "pass a copy: tensor.clone()"
            )

    def known(self) -> Sequence[torch.Tensor]:
        """The tensors as far as they are known without the user's code, for a look at where they lie: those of a
        function as it returned them last, where they still exist. Needs no lock.
        """
        if self._given is not None:
            return self._given
        source = None if self._source is None else self._source()
        if source is None or source.runs_users_code:
            return [tensor for recall in self._found if (tensor := recall()) is not None]
        try:
            return source.find().tensors
        except UsageError:  # a round will say so
            return ()

    def unchanged(self) -> Unchanged:
        """The tensors as they are now, once it is known that they can be averaged still: those that lie where they
        lay are not looked at again.
        """
        held = self.tensors
        temporary = bool(self._found) and are_temporary(held)  # now: before there are more references
        # One at a time: thousands of objects that live at once would start a full garbage collection.
        changed = [index for index, tensor in enumerate(held) if _place(tensor.data) != self._seen[index]]
        if not changed:
            return Unchanged(held, self._seen, False, temporary)
        tensors = [tensor.data for tensor in held]
        for index in changed:
            self._check_unchanged(index, tensors[index])
        self._check_writable(tensors, changed, InvalidStateError)
        # Two tensors that share memory would each have their own average written over the other's.
        sharing = shared_memory(tensors, self._labels)
        if sharing is not None:
            raise InvalidStateError(f"{sharing} now; give it storage of its own")
        self._seen = list(map(_place, tensors))
        return Unchanged(held, self._seen, True, temporary)

    def _check_unchanged(self, index: int, tensor: torch.Tensor) -> None:
        slot = self._layout.slots[index]
        if tuple(tensor.shape) != slot.shape or tensor.dtype != slot.dtype.torch_dtype:
            raise InvalidStateError(
                f"{self._labels[index]} was {slot.dtype} {list(slot.shape)} when the"
                f" averager was made, and is {name_of(tensor.dtype)} {list(tensor.shape)} now;"
                " shapes and dtypes can't change"
            )
        if tensor.layout != torch.strided:
            raise InvalidStateError(f"{self._labels[index]} is no longer dense, but {tensor.layout}")
        if lacks_storage(tensor):
            raise InvalidStateError(
                f"{self._labels[index]} has a storage of {tensor.untyped_storage().nbytes()} bytes now, which "
                "does not hold its elements; a round needs them all"
            )
        if overlaps_itself(tensor):
            raise InvalidStateError(
                f"{self._labels[index]} has elements that share memory now (strides {tensor.stride()}); "
                "give it storage of its own"
            )


def _recall(tensor: torch.Tensor) -> Callable[[], torch.Tensor | None]:
    """Gives a tensor while it exists; a parameter always, since it could not be swapped any more otherwise."""
    return partial(_itself, tensor) if isinstance(tensor, torch.nn.Parameter) else weakref.ref(tensor)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _appearance(tensor: object) -> tuple[object, ...] | None:
    """All that the checks of a tensor by itself depend on; None: it is of no usual type, and checked each time.

    Not the object: one that was freed and a new one may have the same identity, and a weak reference to a tensor
    would stand in the way of ``torch.utils.swap_tensors``.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return None
    assert isinstance(tensor, torch.Tensor)
    if tensor.is_nested:
        return None
    return *_place(tensor), tensor.grad_fn is None, tensor.is_inference()


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that the checks of :meth:`CurrentTensors.unchanged` depend on, and how elements lie in memory."""
    if tensor.layout != torch.strided:
        return (tensor.layout,)
    return (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.storage_offset(),
        tensor.untyped_storage().nbytes(),
        tensor.is_neg(),
    )
