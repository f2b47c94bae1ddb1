"""Tensors in shared memory that users fill: what they hand over to an averager instead of having it copy theirs.

One block of memory has both areas of a round (:class:`~.partition.Layout`): the tensors of the user are the first, and
the average comes to the second. The block belongs to the object, and to each of its tensors: it is given back when the
last of them is gone.
"""

from __future__ import annotations

import math
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

from shoal.averaging.partition import Layout
from shoal.averaging.schema import TensorSchema, TensorSpec
from shoal.averaging.trainer.occupancy import Occupancy
from shoal.averaging.trainer.sources import HeldTensors, Tensors, label_of, take_tensors
from shoal.averaging.trainer.tensor_checks import check_kind
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.runtime.memory import SharedMemory
from shoal.utils.checks import Count, check_flag
from shoal.utils.dtypes import AVERAGED, dtype_of, name_of

if TYPE_CHECKING:
    from collections.abc import Sequence

Spec: TypeAlias = tuple[Iterable[int] | int, torch.dtype]
"""Shape and dtype of a tensor."""

_SIZE = Count(minimum=0)
_MADE: weakref.WeakSet[SharedBuffers] = weakref.WeakSet()
"""All that are still there."""


class SharedBuffers:
    """Tensors that live in shared memory, for an averager that averages them where they are.

    An averager copies its tensors when a round begins, so that they may change meanwhile. A program with buffers for
    what is averaged (gradients, the difference from the last average) needs no such copy::

        buffers = SharedBuffers.like(model.parameters())
        for parameter, buffer in zip(model.parameters(), buffers.tensors):
            parameter.grad = buffer
        averager = DecentralizedAverager(buffers, dht, prefix="run", start=True)

    A round needs two sizes of the tensors then, instead of three, and copies nothing when it begins.

    **Do not write to the tensors from a step's trigger to its outcome.** They are what the round sends. The trigger is
    ``allow_allreduce()``, or ``step()`` if it was called without ``require_trigger``; the outcome is the end of the
    step. With ``apply_when="called"`` it is the return of ``apply_average()``. Two outcomes come before the round has
    let go of the tensors: after ``cancel()``, and after a step that ended in doubt, call :meth:`wait_until_free` before
    you write.

    A round that commits copies the average to the same addresses, so that views and other references stay right. One
    that fails changes nothing. An average that turns out late to be committed, of a step that had ended in doubt, is
    not written: its owner may have changed the tensors since, and no copy tells what the round began with.

    A write at the wrong time that torch counts (an operation in place on one of the ``tensors``) fails the step, and
    the average is not written. With ``debug=True`` every other write is noticed, too, from the moment on in which the
    round takes the tensors; one between the trigger and that moment only changes what is averaged.

    As long as this object is there, no averager can be made of its tensors without it: that one would copy an average
    to them while a round reads them.

    The tensors stay valid when the averager is shut down, and another one may take the buffers then. In a forked child
    they are the same memory. Each has a storage of its own, so that ``torch.save`` and ``deepcopy`` take it alone.

    :param specs: shape and dtype of each tensor, or these by name; dtypes as of an averager's tensors
    :param debug: compare a digest (SHA-256) of each tensor, taken when the round takes them, before the average is
      written. Costs about 1.5 s for each GB of tensors and round.
    :raises InvalidValueError: (a ValueError) no tensors, a negative size, far too many elements, or a name twice
    :raises InvalidTypeError: (a TypeError) no shapes and dtypes, or a dtype that can't be averaged
    :raises OSError: the system has no room for the memory
    """

    def __init__(
        self, specs: Iterable[Spec] | Mapping[str, Spec] | Iterable[tuple[str, Spec]], *, debug: bool = False
    ) -> None:
        names, wanted = _check_specs(specs)
        self._make(tuple(map(label_of, names)), wanted, debug)

    @classmethod
    def like(cls, examples: torch.nn.Module | Tensors, *, debug: bool = False) -> SharedBuffers:
        """Buffers with the shapes, dtypes and names of ``examples``, in the CPU's memory, full of zeros.

        :param examples: a module (those of its parameters that require grad), an iterable of tensors, or tensors by
          name
        :param debug: as of the class
        """
        try:
            named, source = take_tensors(examples)
            for label, tensor in zip(named.labels, named.tensors, strict=True):
                check_kind(label, tensor)
        except (InvalidTypeError, InvalidValueError) as e:
            raise type(e)(f"examples: {e}") from None
        if source is not None and source.runs_users_code:
            raise InvalidTypeError(f"examples must be tensors or a module, got {examples!r}")
        buffers = cls.__new__(cls)
        buffers._make(
            named.labels,
            [TensorSpec(tuple(tensor.shape), dtype_of(tensor)) for tensor in named.tensors],
            debug,
        )
        return buffers

    def _make(self, labels: tuple[str, ...], specs: Sequence[TensorSpec], debug: bool) -> None:
        self._debug = check_flag("debug", debug)
        self._labels = labels
        self._layout = Layout.from_schema(TensorSchema(tuple(specs)))
        self._pid = os.getpid()
        if self.nbytes > sys.maxsize:
            raise InvalidValueError(f"specs must fit into memory, got tensors of {self.nbytes // 2:,} bytes")
        self._memory = SharedMemory.create(max(1, 2 * self._layout.nbytes))
        self._tensors = HeldTensors(_tensors_in(self._memory, self._layout))
        self._occupancy = Occupancy()
        _MADE.add(self)

    @property
    def debug(self) -> bool:
        """As given."""
        return self._debug

    @property
    def tensors(self) -> HeldTensors:
        """Ordinary tensors of the CPU, in the order of the specs; the same objects each time."""
        return self._tensors

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory: twice those of the tensors, and some that align them."""
        return 2 * self._layout.nbytes

    @property
    def in_use(self) -> bool:
        """Whether a round reads the tensors, or an average of it is still to be written: they must not change now."""
        self._check_process()
        return self._occupancy.is_read

    def wait_until_free(self, timeout: float | None = None) -> None:
        """Wait until no round reads the tensors any more.

        Only a step that was cancelled or has ended in doubt ends before its round has let go of them. With
        ``apply_when="called"``, an average that waits for ``apply_average()`` counts, too.

        :param timeout: seconds; None: as long as it takes
        :raises TimeoutError: not free in time
        """
        self._check_process()
        self._occupancy.wait(timeout)

    @property
    def _place(self) -> tuple[int, int]:
        """The address of the tensors, and their bytes."""
        addresses = (tensor.data_ptr() for tensor in self._tensors if tensor.numel())
        return min(addresses, default=0), self._layout.nbytes

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise InvalidStateError(
                f"these buffers belong to process {self._pid}, and this is process {os.getpid()}, which was forked "
                "from it: their tensors are the same memory in both; average them there, or make buffers here"
            )

    def __repr__(self) -> str:
        return (
            f"<SharedBuffers: {len(self._tensors)} tensors, {self._layout.numel} elements{self._occupancy}>"
        )

    def __reduce__(self) -> NoReturn:
        raise InvalidTypeError(
            "SharedBuffers can't be pickled or copied: their memory belongs to this process; pickle or copy their "
            "tensors, and make SharedBuffers where they are averaged"
        )


def check_outside(tensors: Iterable[torch.Tensor], labels: Iterable[str]) -> None:
    """Whether tensors of an averager that copies them lie outside of all buffers: it would write while a round of
    another averager reads them.

    :raises InvalidValueError: one does not
    """
    areas = [range(begin, begin + nbytes) for begin, nbytes in (buffers._place for buffers in list(_MADE))]
    for label, tensor in zip(labels, tensors, strict=True):
        is_elsewhere = tensor.device.type != "cpu" or not tensor.numel()
        if not is_elsewhere and any(tensor.data_ptr() in area for area in areas):
            raise InvalidValueError(
                f"{label} lies in SharedBuffers, which rounds read where they are: pass the SharedBuffers object "
                "itself, or tensors of your own"
            )


def _check_specs(specs: Any) -> tuple[list[Any], list[TensorSpec]]:
    """The names, or numbers, of the tensors, and their specs."""
    if isinstance(specs, Mapping):
        items = list(specs.items())
    elif isinstance(specs, Iterable) and not isinstance(specs, str | bytes | torch.Tensor | torch.nn.Module):
        items = list(_enumerated(specs))
    else:
        raise InvalidTypeError(
            f"specs must be an iterable of (shape, dtype), or these by name, got {type(specs).__name__}; for buffers "
            "like other tensors, call SharedBuffers.like(tensors)"
        )
    if not items:
        raise InvalidValueError("specs must hold at least one (shape, dtype), got none")
    names = [name for name, _ in items]
    if len(set(names)) < len(names):
        raise InvalidValueError(f"specs must have each name once, got {names!r}")
    return names, [_check_spec(f"specs[{name!r}]", spec) for name, spec in items]


def _enumerated(specs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for index, spec in enumerate(specs):
        is_named = isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str)
        yield spec if is_named else (index, spec)


def _check_spec(name: str, spec: Any) -> TensorSpec:
    if isinstance(spec, torch.Tensor):
        raise InvalidTypeError(
            f"{name} must be (shape, dtype), got a tensor; call SharedBuffers.like(tensors) instead"
        )
    if not (isinstance(spec, tuple | list) and len(spec) == 2):
        raise InvalidTypeError(f"{name} must be (shape, dtype), got {spec!r}")
    shape, dtype = spec
    averaged = AVERAGED.get(name_of(dtype)) if isinstance(dtype, torch.dtype) else None
    if averaged is None:
        raise InvalidTypeError(f"the dtype of {name} must be one of {', '.join(AVERAGED)}, got {dtype!r}")
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    return TensorSpec(tuple(_SIZE.check(f"a size in the shape of {name}", size) for size in sizes), averaged)


def _tensors_in(memory: SharedMemory, layout: Layout) -> Iterator[torch.Tensor]:
    # A slice of its own keeps the mapping: closing the SharedMemory releases its own view, and a tensor refers to the
    # object alone. Storages of their own: torch.save() writes all of a tensor's storage.
    block = memory.buffer[:]
    with torch.inference_mode(False):
        for slot in layout.slots:
            if not slot.count:
                yield torch.empty(slot.shape, dtype=slot.dtype.torch_dtype)
                continue
            flat = torch.frombuffer(
                block, dtype=slot.dtype.torch_dtype, count=math.prod(slot.shape), offset=slot.offset
            )
            yield flat.view(slot.shape).data  # no view of another tensor, with a count of updates of its own
