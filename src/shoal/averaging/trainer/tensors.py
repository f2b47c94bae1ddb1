"""The user's tensors and the lock around them. With :mod:`.batches`, the only file that reads and writes their values.

A round takes a *snapshot* of the tensors into an arena (:class:`~.partition.Layout`), and, when it commits,
*applies* the average that came of it. Both run in the user process, under the lock, for as long as copying
takes. Between them the trainer may change the tensors; what it adds is kept.

Neither uses torch's intra-op thread pool for tensors on the CPU (numpy's copies, and tensors or pieces too small for
the pool), so that the trainer keeps its cores. Writes go through ``tensor.data`` or other views of its memory, which
have version counters of their own: autograd does not see them, and a round may land between forward and backward.
(:mod:`.pending` has averages written when the user calls, and tells autograd.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from shoal.averaging.partition import Layout, TensorSlot
from shoal.averaging.trainer.batches import Batch, Located, Runs, is_plain
from shoal.averaging.trainer.chunk_size import READ_NBYTES, WRITE_NBYTES, ChunkSize
from shoal.averaging.trainer.cuda_copies import CudaCopier
from shoal.averaging.trainer.current import CurrentTensors, Unchanged
from shoal.averaging.trainer.finite_scan import FiniteScan
from shoal.averaging.trainer.locks import MemoryGuard
from shoal.averaging.trainer.lost_updates import UpdateWatch
from shoal.averaging.trainer.merging import BITS, Bits, Merge, elements
from shoal.averaging.trainer.sources import HeldTensors, TensorSource
from shoal.compression.base import UINT8, tensor_array
from shoal.errors import InvalidStateError, InvalidValueError

logger = logging.getLogger(__name__)

Area: TypeAlias = torch.Tensor | memoryview | bytearray
"""An arena of ``layout.nbytes`` bytes: a one-dimensional uint8 CPU tensor, or writable memory."""

Memory: TypeAlias = npt.NDArray[np.uint8]
"""The bytes of an arena."""


class TensorStore:
    """The averaged tensors of one averager, referred to as objects: their storage may be replaced between
    rounds. With a source, the objects too: they are found anew whenever they are read or written.

    :param tensors: that have passed :func:`~.schema.check_tensors`
    :param labels: what errors call each of them; default: by number
    :param source: referred to weakly; its owner is the averager, to which it may refer
    :param name: of the averager, for people
    :param watch: notices updates while the lock is held here; default: with no advice
    :raises InvalidValueError: the memory of a tensor is read-only
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        layout: Layout,
        labels: Sequence[str] | None = None,
        source: TensorSource | None = None,
        *,
        name: str = "",
        watch: UpdateWatch | None = None,
    ) -> None:
        self.layout = layout
        self.labels = labels or tuple(f"averaged_tensors[{index}]" for index in range(len(tensors)))
        self._current = CurrentTensors(tensors, layout, self.labels, source)
        self._guard = MemoryGuard(self._current.known, name)
        self._watch = UpdateWatch(name, labels=self.labels) if watch is None else watch
        self._name = name
        self._has_warned_of_temporary = False
        self._runs = Runs(layout)
        self._cuda: dict[torch.device, CudaCopier] = {}
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            self._cuda_copier(device)

    @property
    def tensors(self) -> HeldTensors:
        """The tensors as they are now.

        :raises UsageError: of a source: they are not what they were, or cannot be averaged; names the tensor
        """
        return self._current.tensors

    @contextmanager
    def hold(
        self, timeout: float | None = None, abandoned: Callable[[], bool] | None = None
    ) -> Iterator[HeldTensors]:
        """As :meth:`lock`, and yield the tensors; raises what :attr:`tensors` does, too."""
        with self.lock(timeout, abandoned):
            yield self.tensors

    def lock(
        self, timeout: float | None = None, abandoned: Callable[[], bool] | None = None
    ) -> AbstractContextManager[None]:
        """Hold the lock (re-entrant); parameters and errors as of :meth:`.MemoryGuard.hold`."""
        return self._guard.hold(timeout, abandoned)

    @contextmanager
    def hold_for_trainer(self) -> Iterator[HeldTensors]:
        """As :meth:`hold`, on the trainer's thread: what it enqueues meanwhile comes before the next copy."""
        with self.hold() as tensors:
            try:
                yield tensors
            finally:
                self.mark_stream()

    @property
    def held_by_this_thread(self) -> bool:
        return self._guard.held_by_this_thread

    def check_not_held(self, call: str) -> None:
        """:raises InvalidStateError: this thread holds the lock, for which ``call`` would wait"""
        if self.held_by_this_thread:
            raise InvalidStateError(
                f"{call} inside get_tensors() would wait for a lock that this thread holds; "
                "leave the block first or use wait=False"
            )

    def mark_stream(self) -> None:
        """Remember this thread's current CUDA streams as the trainer's: copies are ordered after what it has
        enqueued there.

        Call it on the trainer's thread whenever a step is triggered and when the lock was held by it; without
        it, each device's default stream counts.
        """
        for copier in self._cuda.values():
            copier.mark_stream()

    def snapshot(
        self,
        area: Area,
        *,
        checks_finite: bool = False,
        timeout: float | None = None,
        abandoned: Callable[[], bool] | None = None,
    ) -> int | None:
        """Copy every tensor into the arena under the lock.

        Raises :class:`DeadlineExceeded` if the lock is not free in time, :class:`InvalidStateError` if the wait for it
        was ``abandoned``, or naming the tensor if one has changed its shape or dtype, has lost its memory, or shares
        it with another one now.

        :param checks_finite: look for NaN and infinity in what was copied
        :returns: the index of the first tensor that has any, if they are looked for
        """
        # Before the lock: others wait for it only while tensors are copied, and looked at in the cache.
        memory = self._memory(area)
        scan = FiniteScan(self.layout, self._area(area)) if checks_finite else None
        with self._hold_unchanged(timeout, abandoned) as now:
            self._guard.begin_round()
            copying = _Copying(memory, scan, ChunkSize(READ_NBYTES))
            for located in self._runs.locate(now.tensors, now.places):
                self._copy_run(located, now.tensors, copying)
        return None if scan is None else scan.finish()

    def _copy_run(self, located: Located, tensors: HeldTensors, copying: _Copying) -> None:
        for batch in located.batches(tensors, copying.size):
            if batch.is_there():
                whole = batch.run.whole
                batch.gather(_bits(copying.memory, whole))
                copying.follow(whole.offset + whole.nbytes)
            else:
                self._copy_each(batch.run.indices, tensors, copying)
        if not located.flats:
            self._copy_each(located.run.indices, tensors, copying)
        if self._watch.checks_copies:
            for index in located.run.indices:
                tensor, copy = tensors[index].data, _bits(copying.memory, self.layout.slots[index])
                self._watch.check_copy(index, tensor, elements(copy, tensor.dtype))

    def _copy_each(self, indices: range, tensors: HeldTensors, copying: _Copying) -> None:
        for index in indices:
            slot = self.layout.slots[index]
            self._copy(tensors[index].data, slot, copying)

    def _copy(self, tensor: torch.Tensor, slot: TensorSlot, copying: _Copying) -> None:
        """Copy one tensor to where it lies in the arena."""
        target = _bits(copying.memory, slot)
        if is_plain(tensor):
            source = tensor_array(tensor, target.dtype)
            for chunk in copying.size.slices(len(target), target.itemsize):
                np.copyto(target[chunk], source[chunk])
                copying.follow(slot.offset + chunk.stop * target.itemsize)
        elif tensor.is_cuda:
            self._cuda_copier(tensor.device).read(tensor, elements(target, tensor.dtype))
        else:
            elements(target, tensor.dtype).view(tensor.shape).copy_(tensor)
        copying.follow(slot.offset + slot.nbytes)

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
        before, after = self._memory(snapshot), self._memory(average)
        # The trainer's own infinities are not ours to report.
        with self._hold_unchanged(None, abandoned) as now, np.errstate(all="ignore"):
            self._guard.end_round()
            if now.temporary:
                self._warn_of_temporary()
            with self._watch.writing(now.tensors):
                movement = _Movement(before, after, Merge(alpha), ChunkSize(WRITE_NBYTES))
                for located in self._runs.locate(now.tensors, now.places):
                    self._move_run(located, now.tensors, movement)

    def _warn_of_temporary(self) -> None:
        if not self._has_warned_of_temporary:
            self._has_warned_of_temporary = True
            logger.warning(
                "%s: averaged_tensors, the function, returned tensors that nothing else has, so that their averages "
                "reach nothing: copies (clone(), float(), cpu()) or results of a computation. It must return the "
                "tensors that are trained, or views of them (detach(), to_local(), [:10])",
                self._name,
            )

    def _move_run(self, located: Located, tensors: HeldTensors, movement: _Movement) -> None:
        if not located.flats or self._watch.compares:
            self._move_each(located.run.indices, tensors, movement)
            return
        for batch in located.batches(tensors, movement.size):
            counts = batch.counts_of_updates()
            result = movement.result(batch) if batch.is_there() else None
            # What was updated meanwhile, without the lock, is read once more.
            if result is not None and batch.is_there() and batch.counts_of_updates() == counts:
                batch.scatter(result)
            else:
                self._move_each(batch.run.indices, tensors, movement)

    def _move_each(self, indices: range, tensors: HeldTensors, movement: _Movement) -> None:
        for index in indices:
            move = partial(self._move, slot=self.layout.slots[index], movement=movement)
            self._watch.write(index, tensors[index].data, move)

    def _move(self, tensor: torch.Tensor, slot: TensorSlot, movement: _Movement) -> None:
        """Apply an average to one tensor."""
        old, new = (_bits(area, slot) for area in movement.areas)
        if is_plain(tensor):
            movement.merge_all(tensor_array(tensor, old.dtype), old, new, tensor.dtype)
        elif tensor.is_cuda:
            old_elements, new_elements = elements(old, tensor.dtype), elements(new, tensor.dtype)
            self._cuda_copier(tensor.device).merge(tensor, old_elements, new_elements, movement.merge.alpha)
        else:
            flat = tensor.to("cpu", copy=True).reshape(-1).contiguous()
            movement.merge_all(tensor_array(flat, old.dtype), old, new, tensor.dtype)
            tensor.copy_(flat.view(tensor.shape))

    @contextmanager
    def _hold_unchanged(
        self, timeout: float | None, abandoned: Callable[[], bool] | None
    ) -> Iterator[Unchanged]:
        """Hold the lock of the memory where the tensors lie now, and yield :meth:`.CurrentTensors.unchanged`."""
        while True:
            with self.lock(timeout, abandoned):
                now = self._current.unchanged()
                # Where they lie now, another averager's tensors may lie too, whose lock is not held yet.
                if not now.moved or not self._guard.look_around():
                    yield now
                    return

    def _memory(self, area: Area) -> Memory:
        return tensor_array(self._area(area), UINT8)

    def _area(self, area: Area) -> torch.Tensor:
        tensor = area if isinstance(area, torch.Tensor) else _as_tensor(area)
        if tensor.dtype != torch.uint8 or tensor.shape != (self.layout.nbytes,):
            raise InvalidValueError(
                f"an arena must have {self.layout.nbytes} bytes, got {list(tensor.shape)} {tensor.dtype}"
            )
        return tensor

    def _cuda_copier(self, device: torch.device) -> CudaCopier:
        if device not in self._cuda:
            self._cuda[device] = CudaCopier(device)
        return self._cuda[device]


class _Copying(NamedTuple):
    """What :meth:`TensorStore.snapshot` does to all tensors alike."""

    memory: Memory
    scan: FiniteScan | None
    size: ChunkSize

    def follow(self, stop: int) -> None:
        """The first ``stop`` bytes of the arena are filled."""
        if self.scan is not None:
            self.scan.follow(stop)


class _Movement(NamedTuple):
    """What :meth:`TensorStore.apply` does to all tensors alike."""

    before: Memory
    after: Memory
    merge: Merge
    size: ChunkSize

    @property
    def areas(self) -> tuple[Memory, Memory]:
        return self.before, self.after

    def merge_all(self, bits: Bits, old: Bits, new: Bits, dtype: torch.dtype) -> None:
        """Change ``bits``, of any number, in place."""
        for chunk in self.size.slices(len(bits), bits.itemsize):
            self.merge(bits[chunk], old[chunk], new[chunk], dtype)

    def result(self, batch: Batch) -> Bits:
        """What the tensors of a batch become."""
        old, new = (_bits(area, batch.run.whole) for area in self.areas)
        current = np.empty_like(old)
        batch.gather(current)
        if self.merge.is_untouched(current, old):
            return new
        for one in batch.slices():  # most of them may be
            self.merge(current[one], old[one], new[one], batch.run.whole.dtype.torch_dtype)
        return current


def _bits(memory: Memory, slot: TensorSlot) -> Bits:
    return memory[slot.offset : slot.offset + slot.nbytes].view(BITS[slot.dtype.itemsize])


def _as_tensor(area: memoryview | bytearray) -> torch.Tensor:
    view = memoryview(area)
    return torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)
