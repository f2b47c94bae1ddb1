"""The user's tensors and the lock around them: the only file that reads and writes their values.

A round takes a *snapshot* of the tensors into an arena (:class:`~.partition.Layout`), and, when it commits,
*applies* the average that came of it. Both run in the host process, under the lock, for as long as copying
takes. Between them the trainer may change the tensors; what it adds is kept.

Neither uses torch's intra-op thread pool for tensors on the CPU (numpy's copies, and pieces too small for the
pool), so that the trainer keeps its cores. Writes go through ``tensor.data``, which has a version counter of
its own: autograd does not see them, and a round may land between forward and backward.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from shoal.averaging.allreduce.reduction import is_finite
from shoal.averaging.partition import Layout
from shoal.averaging.schema import lacks_storage, overlaps_itself, shared_memory
from shoal.compression.base import DTYPE_NAMES, UINT8, tensor_array
from shoal.errors import DeadlineExceeded, InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.utils import figures

Area: TypeAlias = torch.Tensor | memoryview | bytearray
"""An arena of ``layout.nbytes`` bytes: a one-dimensional uint8 CPU tensor, or writable memory."""

CHUNK_NBYTES = 1 << 20
LOOK_SECONDS = 0.05
"""While waiting for the lock: time between two looks at whether that still makes sense."""
MERGE_ELEMENTS = 1 << 15
"""What is computed on at a time: the most elements for which torch does not wake its intra-op threads."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = {size: np.dtype(f"i{size}") for size in _INTEGERS}
_CPU = torch.device("cpu")

Bits: TypeAlias = npt.NDArray[Any]
"""The elements of a tensor in the CPU's memory, as integers of their size: a flat view that can be written."""


class HeldTensors(tuple[torch.Tensor, ...]):
    """The averaged tensors as users see them: ``tensors[0] += 1`` works, replacing one of them is an error."""

    __slots__ = ()

    def __setitem__(self, index: Any, value: Any) -> None:
        if value is not self[index]:  # what in-place operators assign is the tensor itself
            raise InvalidTypeError(
                f"tensors[{index!r}] = ... would put another object in place of an averaged tensor; "
                f"write into it: tensors[{index!r}].copy_(value)"
            )


class TensorStore:
    """The averaged tensors of one averager, referred to as objects: their storage may be replaced between
    rounds.

    :param tensors: as returned by :func:`~.schema.validate_tensors`
    """

    def __init__(self, tensors: Sequence[torch.Tensor], layout: Layout) -> None:
        self.tensors = HeldTensors(tensors)
        self.layout = layout
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._holder_name = ""
        self._held_since = 0.0
        self._depth = 0
        self._seen: list[tuple[object, ...] | None] = [None] * len(self.tensors)
        self._cuda: dict[torch.device, CudaCopier] = {}
        for device in {tensor.device for tensor in self.tensors if tensor.is_cuda}:
            self._cuda_copier(device)

    @contextmanager
    def hold(
        self, timeout: float | None = None, abandoned: Callable[[], bool] | None = None
    ) -> Iterator[HeldTensors]:
        """Hold the lock (re-entrant) and yield the tensors.

        :param timeout: seconds to wait for it
        :param abandoned: whether nobody needs it any more; asked while waiting, and when it is held
        :raises DeadlineExceeded: it was not free in time; says who has held it for how long
        :raises InvalidStateError: the wait was abandoned
        """
        limit = threading.TIMEOUT_MAX if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        if not self._acquire(limit, abandoned):
            held = time.monotonic() - self._held_since
            raise DeadlineExceeded(
                f"the lock of the averaged tensors was not free within {timeout:g} s:"
                f" thread {self._holder_name!r} has held it for {figures.duration(held)}"
            )
        try:
            if self._depth == 0:
                self._holder = threading.get_ident()
                self._holder_name = threading.current_thread().name
                self._held_since = time.monotonic()
            self._depth += 1
            yield self.tensors
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._holder = None
            self._lock.release()

    def _acquire(self, limit: float, abandoned: Callable[[], bool] | None) -> bool:
        if abandoned is None:
            return self._lock.acquire(timeout=limit)
        deadline = time.monotonic() + limit
        while not abandoned():
            left = deadline - time.monotonic()
            if self._lock.acquire(timeout=max(0.0, min(left, LOOK_SECONDS))):
                if not abandoned():
                    return True
                self._lock.release()
            elif left <= LOOK_SECONDS:
                return False
        raise InvalidStateError("nobody needs the averaged tensors any more")

    @property
    def held_by_this_thread(self) -> bool:
        return self._holder == threading.get_ident()

    def mark_stream(self) -> None:
        """Remember this thread's current CUDA streams as the trainer's: copies are ordered after what it has
        enqueued there.

        Call it on the trainer's thread whenever a step is triggered and when the lock was held by it; without
        it, each device's default stream counts.
        """
        for copier in self._cuda.values():
            copier.mark_stream()

    def snapshot(
        self, area: Area, *, timeout: float | None = None, abandoned: Callable[[], bool] | None = None
    ) -> None:
        """Copy every tensor into the arena under the lock.

        Raises :class:`DeadlineExceeded` if the lock is not free in time, :class:`InvalidStateError` if the wait for it
        was ``abandoned``, or naming the tensor if one has changed its shape or dtype, has lost its memory, or shares
        it with another one now. Says nothing of NaN: see :func:`first_non_finite`.
        """
        targets = self._slots(area)  # before the lock: whoever waits for it, waits for copies alone
        with self.hold(timeout, abandoned):
            for tensor, target in zip(self._unchanged(), targets, strict=True):
                if _is_plain(tensor):
                    np.copyto(target, tensor_array(tensor, target.dtype))
                elif tensor.is_cuda:
                    self._cuda_copier(tensor.device).read(tensor, _elements(target, tensor.dtype))
                else:
                    _elements(target, tensor.dtype).view(tensor.shape).copy_(tensor)

    def apply(
        self,
        snapshot: Area,
        average: Area,
        alpha: float = 1.0,
        *,
        abandoned: Callable[[], bool] | None = None,
    ) -> None:
        """Move every tensor by ``alpha`` times what the round changed, under the lock.

        Where ``alpha`` is 1 and an element still has the bits that it had in the snapshot (so that a NaN
        equals itself, and 0.0 is not -0.0), the average itself is written. Elsewhere the element becomes
        ``element + alpha * (average - snapshot)``, computed in float32 or wider, which is infinite only if the result
        is beyond the range. Where the snapshot was not finite (its weight was 0), there is no way to go: the average
        itself is written, unless the trainer has put a finite value there since, which stays. Raises as
        :meth:`snapshot` does, but for the time, before anything was written.
        """
        merge = _Merge(alpha)
        before, after = self._slots(snapshot), self._slots(average)
        with (
            self.hold(None, abandoned),
            np.errstate(all="ignore"),
        ):  # the trainer's own infinities are not ours
            for tensor, old, new in zip(self._unchanged(), before, after, strict=True):
                if _is_plain(tensor):
                    merge(tensor_array(tensor, old.dtype), old, new, tensor.dtype)
                elif tensor.is_cuda:
                    old_elements, new_elements = _elements(old, tensor.dtype), _elements(new, tensor.dtype)
                    self._cuda_copier(tensor.device).merge(tensor, old_elements, new_elements, alpha)
                else:
                    flat = tensor.to("cpu", copy=True).reshape(-1).contiguous()
                    merge(tensor_array(flat, old.dtype), old, new, tensor.dtype)
                    tensor.copy_(flat.view(tensor.shape))

    def _slots(self, area: Area) -> list[Bits]:
        """Where in an arena each tensor's elements lie."""
        memory = tensor_array(self._area(area), UINT8)
        return [
            memory[slot.offset : slot.offset + slot.nbytes].view(_BITS[slot.dtype.itemsize])
            for slot in self.layout.slots
        ]

    def _area(self, area: Area) -> torch.Tensor:
        tensor = area if isinstance(area, torch.Tensor) else _as_tensor(area)
        if tensor.dtype != torch.uint8 or tensor.shape != (self.layout.nbytes,):
            raise InvalidValueError(
                f"an arena must have {self.layout.nbytes} bytes; this one is"
                f" {list(tensor.shape)} {tensor.dtype}"
            )
        return tensor

    def _unchanged(self) -> list[torch.Tensor]:
        """The tensors as they are now, outside of autograd, once it is known that they can be averaged still: those
        that lie where they lay are not looked at again.
        """
        tensors = [tensor.data for tensor in self.tensors]
        seen: list[tuple[object, ...] | None] = [_place(tensor) for tensor in tensors]
        if seen == self._seen:
            return tensors
        for index, (place, former) in enumerate(zip(seen, self._seen, strict=True)):
            if place != former:
                self._check_unchanged(index, tensors[index])
        # Two tensors that share memory would each have their own average written over the other's.
        sharing = shared_memory(tensors)
        if sharing is not None:
            raise InvalidStateError(f"{sharing} now; give it storage of its own")
        self._seen = seen
        return tensors

    def _check_unchanged(self, index: int, tensor: torch.Tensor) -> None:
        slot = self.layout.slots[index]
        if tuple(tensor.shape) != slot.shape or tensor.dtype != slot.dtype:
            raise InvalidStateError(
                f"averaged_tensors[{index}] was {DTYPE_NAMES[slot.dtype]} {list(slot.shape)} when the"
                f" averager was made, and is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} now;"
                " shapes and dtypes can't change"
            )
        if tensor.layout != torch.strided:
            raise InvalidStateError(f"averaged_tensors[{index}] is no longer dense, but {tensor.layout}")
        if lacks_storage(tensor):
            raise InvalidStateError(
                f"averaged_tensors[{index}] has a storage of {tensor.untyped_storage().nbytes()} bytes now, which "
                "does not hold its elements; a round needs them all"
            )
        if overlaps_itself(tensor):
            raise InvalidStateError(
                f"averaged_tensors[{index}] has elements that share memory now (strides {tensor.stride()}); "
                "give it storage of its own"
            )

    def _cuda_copier(self, device: torch.device) -> CudaCopier:
        if device not in self._cuda:
            self._cuda[device] = CudaCopier(device)
        return self._cuda[device]


class CudaCopier:
    """Copies between the tensors of one CUDA device and arenas, through pinned memory, in chunks."""

    CHUNK_NBYTES = 4 << 20

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._trainer_stream: torch.cuda.Stream = torch.cuda.default_stream(device)
        self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned: list[torch.Tensor] = []

    def mark_stream(self) -> None:
        self._trainer_stream = torch.cuda.current_stream(self._device)

    def read(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a tensor to flat CPU memory; back when it is there."""
        # A stream of our own, so that the trainer's next kernels need not wait for the bus. It waits for an event
        # that is recorded on the trainer's stream now.
        self._copy_stream.wait_stream(self._trainer_stream)
        with torch.cuda.device(self._device), torch.cuda.stream(self._copy_stream):
            source = tensor.contiguous().view(-1)
            arrived: tuple[torch.cuda.Event, torch.Tensor, torch.Tensor] | None = None
            for number, (piece, goal) in enumerate(
                zip(self._split(source), self._split(target), strict=True)
            ):
                staged = self._staging(number % 2, piece)
                staged.copy_(piece, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._copy_stream)
                self._unload(arrived)
                arrived = (event, staged, goal)
            self._unload(arrived)

    def merge(self, tensor: torch.Tensor, old: torch.Tensor, new: torch.Tensor, alpha: float) -> None:
        """As :func:`_merge` for the whole tensor; back when it is done."""
        # On the trainer's own stream: each element is read and written between two of the trainer's kernels.
        stream = self._trainer_stream
        used: list[torch.cuda.Event | None] = [None, None]
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            flat = tensor.contiguous().view(-1)
            pieces = zip(self._split(flat), self._split(old), self._split(new), strict=True)
            for number, (piece, old_piece, new_piece) in enumerate(pieces):
                turn = number % 2
                previous = used[turn]
                if previous is not None:
                    previous.synchronize()
                moved = []
                for slot, source in ((turn, old_piece), (2 + turn, new_piece)):
                    staged = self._staging(slot, source)
                    np.copyto(_bytes(staged), _bytes(source))
                    moved.append(staged.to(self._device, non_blocking=True))
                event = used[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
                _merge(piece, moved[0], moved[1], alpha)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))
            stream.synchronize()

    def _split(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        return _pieces(flat, self.CHUNK_NBYTES // flat.itemsize)

    def _staging(self, slot: int, like: torch.Tensor) -> torch.Tensor:
        while len(self._pinned) <= slot:
            self._pinned.append(torch.empty(self.CHUNK_NBYTES, dtype=torch.uint8, pin_memory=True))
        return self._pinned[slot][: like.numel() * like.itemsize].view(like.dtype)

    @staticmethod
    def _unload(arrived: tuple[torch.cuda.Event, torch.Tensor, torch.Tensor] | None) -> None:
        if arrived is not None:
            event, staged, goal = arrived
            event.synchronize()
            np.copyto(_bytes(goal), _bytes(staged))


def first_non_finite(layout: Layout, area: Area) -> int | None:
    """Index of the first tensor of a snapshot that has NaN or infinite elements; needs no lock."""
    source = area if isinstance(area, torch.Tensor) else _as_tensor(area)
    for section in layout.sections:
        view = source[section.offset : section.offset + section.nbytes].view(section.dtype)
        for number, piece in enumerate(_pieces(view, MERGE_ELEMENTS)):
            if not is_finite(piece):
                element = number * MERGE_ELEMENTS + int(piece.isfinite().logical_not().nonzero()[0])
                place = section.offset + element * section.dtype.itemsize
                return bisect_right(layout.slots, place, key=lambda slot: slot.offset) - 1
    return None


class _Merge:
    """:func:`_merge` on the CPU, in chunks; those that the trainer did not touch are only copied."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._scratch = {size: np.empty(MERGE_ELEMENTS, dtype=f"f{size}") for size in (4, 8)}

    def __call__(self, bits: Bits, old: Bits, new: Bits, dtype: torch.dtype) -> None:
        for chunk in _slices(len(bits), CHUNK_NBYTES // bits.itemsize):
            if self._alpha == 1 and _equal(bits[chunk], old[chunk]):
                np.copyto(bits[chunk], new[chunk])
                continue
            for piece in _slices(chunk.stop, MERGE_ELEMENTS, chunk.start):
                if bits.itemsize == 2:
                    current, before, after = (_elements(array[piece], dtype) for array in (bits, old, new))
                    _merge(current, before, after, self._alpha)
                else:
                    self._merge_wide(bits[piece], old[piece], new[piece])

    def _merge_wide(self, bits: Bits, old_bits: Bits, new_bits: Bits) -> None:
        """For float32 and float64, where numpy takes half the time."""
        alpha, moved = self._alpha, self._scratch[bits.itemsize][: len(bits)]
        current, old, new = (array.view(moved.dtype) for array in (bits, old_bits, new_bits))
        np.subtract(new, old, out=moved)
        if alpha != 1:
            np.multiply(moved, alpha, out=moved)
        np.add(moved, current, out=moved)
        finite = np.isfinite(moved)
        if not finite.all():
            half = old.dtype.type(0.5)  # of finite values: differences of halves stay in range
            carefully = 2 * (current * half + alpha * (new * half - old * half))
            rescued = np.where(np.isfinite(current), current, new)
            np.copyto(moved, np.where(np.isfinite(old), carefully, rescued), where=~finite)
        if alpha == 1:
            np.copyto(moved, new, where=np.equal(bits, old_bits))
        np.copyto(current, moved)


def _equal(first: Bits, second: Bits) -> bool:
    head = 256  # an optimizer's step changes nearly every element: seldom is more than this looked at in vain
    if first[:head].tobytes() != second[:head].tobytes():
        return False
    return len(first) <= head or np.array_equal(first, second)


def _merge(current: torch.Tensor, old: torch.Tensor, new: torch.Tensor, alpha: float) -> None:
    """The rule of :meth:`TensorStore.apply` for flat tensors on one device; writes to ``current``."""
    wide = torch.float64 if current.dtype == torch.float64 else torch.float32
    moved = torch.sub(new.to(wide), old.to(wide)).mul_(alpha).add_(current)
    finite = moved.isfinite()
    if current.is_cuda or not bool(finite.all()):  # to look at CUDA's would hold up its stream
        now, before, after = current.to(wide) / 2, old.to(wide) / 2, new.to(wide) / 2
        carefully = 2 * (now + alpha * (after - before))
        rescued = torch.where(current.isfinite(), current, new).to(wide)
        moved = torch.where(finite, moved, torch.where(old.isfinite(), carefully, rescued))
    if alpha != 1:
        current.copy_(moved)
        return
    integers = _INTEGERS[current.itemsize]
    untouched = torch.eq(current.view(integers), old.view(integers))
    current.copy_(torch.where(untouched, new, moved.to(current.dtype)))


def _slices(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def _pieces(flat: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    return (flat[piece] for piece in _slices(flat.numel(), size))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is its elements in order, readable by the CPU."""
    return tensor.device == _CPU and tensor.is_contiguous() and not tensor.is_neg()


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that the checks of :meth:`TensorStore._unchanged` depend on."""
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
    )


def _elements(bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits).view(dtype)


def _as_tensor(area: memoryview | bytearray) -> torch.Tensor:
    view = memoryview(area)
    return torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)


def _bytes(flat: torch.Tensor) -> npt.NDArray[Any]:
    return flat.view(torch.uint8).numpy()
