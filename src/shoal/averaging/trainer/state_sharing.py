"""State sharing in the user process: calls ``get_current_state()`` on a thread of its own, makes memory for what is
downloaded, and hands it to the user.

Refers to the averager weakly, so that one that nobody refers to any more is collected.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import InvalidStateError as FutureIsDone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from shoal.averaging.report import StateReport
from shoal.averaging.state.capture import GROWTH, capture_state, expected_nbytes
from shoal.averaging.state.encoding import Capture
from shoal.averaging.state.manifest import Manifest
from shoal.averaging.state.messages import pack_entries, unpack_entries
from shoal.averaging.state_commands import (
    AllocateState,
    CaptureFailed,
    CaptureState,
    LoadedState,
    LoadState,
    MemoryRefused,
    SetStateSharing,
    ShowProgress,
    StateCaptured,
)
from shoal.averaging.trainer.tensors import TensorStore
from shoal.compression.base import CompressionBase
from shoal.errors import DeadlineExceeded, InvalidStateError, UsageError
from shoal.p2p.identity import PeerID
from shoal.runtime import pickling
from shoal.runtime.descriptors import WithDescriptors
from shoal.runtime.futures import MPFuture
from shoal.runtime.memory import SharedMemory
from shoal.runtime.workers import SerialThread
from shoal.utils import figures

if TYPE_CHECKING:
    from shoal.averaging.state.progress import ProgressBar
    from shoal.runtime.process import ServiceHandle

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 30.0
"""Seconds for which a copy waits for the averager's lock."""
SWITCH_TIMEOUT = 10.0

DownloadedState = tuple[Any, list[torch.Tensor]]


class HasState(Protocol):
    """The averager, as far as it matters here."""

    serializer: Any

    def get_current_state(self) -> Any: ...


class LockNotFree(DeadlineExceeded):
    """The averager's lock was held by somebody else for as long as a copy waits for it."""


class _Download:
    """One download under way: its memory, and the bar that shows it."""

    def __init__(self, bar: ProgressBar | None) -> None:
        self.memory: SharedMemory | None = None
        self.bar = bar

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
        if self.bar is not None:
            self.bar.stop()


class StateSharing:
    """What an averager shares and loads, in the user process. Methods may be called on any thread."""

    def __init__(
        self,
        averager: HasState,
        store: TensorStore,
        *,
        prefix: str,
        compression: CompressionBase,
        allowed: bool | None,
    ) -> None:
        """``allowed`` None: :meth:`settle` says."""
        self._averager = weakref.ref(averager)
        self._serializer = averager.serializer
        self._store = store
        self._prefix = prefix
        self.compression = compression
        self._lock = threading.Lock()
        self._allowed = allowed
        self._priority = 0.0
        self._handle: ServiceHandle | None = None
        self._reserve = expected_nbytes(store.tensors)
        self._thread = SerialThread(f"shoal-state {prefix}")
        self._downloads: dict[int, _Download] = {}
        self._last_download = 0
        self.last_loaded: StateReport | None = None
        self.when_loaded: Callable[[], object] = lambda: None
        """Called when a state has come, before the user has it."""

    @property
    def allowed(self) -> bool | None:
        """Whether the user allows sharing; None: as is the default for a peer of this mode."""
        return self._allowed

    @property
    def priority(self) -> float:
        return self._priority

    def settle(self, *, default: bool) -> None:
        """The peer's mode is known, and with it whether it shares its state if the user has said nothing."""
        with self._lock:
            self._allowed = default if self._allowed is None else self._allowed

    def attach(self, handle: ServiceHandle) -> None:
        """The averager's service is there; what the user has wished meanwhile is told to it."""
        with self._lock:
            self._handle = handle
            handle.call(SetStateSharing(bool(self._allowed), self._priority))

    def close(self) -> None:
        """The averager is shut down."""
        with self._lock:
            self._handle = None
        self._thread.stop()

    def switch(self, *, allowed: bool | None = None, priority: float | None = None) -> None:
        """Change the user's wishes; back when the background process acts accordingly.

        :raises PeerProcessDied: the background process has ended
        """
        with self._lock:
            self._allowed = self._allowed if allowed is None else allowed
            self._priority = self._priority if priority is None else priority
            if self._handle is None:
                return
            done = self._handle.call(SetStateSharing(bool(self._allowed), self._priority))
        with contextlib.suppress(CancelledError):  # shut down meanwhile
            done.result(SWITCH_TIMEOUT)

    def carry_out(self, command: object) -> object:
        """Carry out a request of the service; never blocks, since rounds use the same thread."""
        match command:
            case CaptureState():
                answer: Future[object] = Future()
                self._thread.submit(partial(_settle, answer, self._capture_for_service))
                return answer
            case AllocateState(number, nbytes):
                return self._allocate(number, nbytes)
            case ShowProgress(number, donor, received, total):
                download = self._downloads.get(number)
                if download is not None and download.bar is not None:
                    download.bar.update(donor, received, total)
                return None
        raise InvalidStateError(f"the user process has no command {type(command).__name__}")

    # as a donor

    def capture(self) -> Capture:
        """Copy the current state, under the averager's lock. Raises whatever ``get_current_state()`` raises,
        UsageError if what it returned is no state, LockNotFree if the lock is not free in time.
        """
        averager = self._averager()
        if averager is None:
            raise InvalidStateError("the averager is gone")
        capture = capture_state(
            averager.get_current_state,
            hold=self._hold,
            serializer=averager.serializer,
            compression=self.compression,
            reserve=self._reserve,
        )
        self._reserve = capture.layout().nbytes + GROWTH
        return capture

    def _capture_for_service(self) -> WithDescriptors | CaptureFailed:
        """Whatever becomes of the copy, the donor is told, and its user why there is none."""
        try:
            capture = self.capture()
        except LockNotFree as e:
            return self._failed("its lock was not free", e)
        except BaseException as e:  # noqa: BLE001 - of the user's get_current_state(): may be anything, SystemExit too
            return self._failed("get_current_state() failed", e)
        with capture.memory as memory:
            try:
                formats = pickling.dumps(capture.formats, "its codecs")
                captured = StateCaptured(memory.nbytes, pack_entries(capture.entries), formats)
                return WithDescriptors(captured, [os.dup(memory.fd)])
            except BaseException as e:  # noqa: BLE001 - of the user's codecs, which are pickled
                return self._failed("its copy could not be handed to the background process", e)

    def _failed(self, what: str, error: BaseException) -> CaptureFailed:
        # A traceback leads to the line of the user's that failed; what Shoal itself says needs none.
        trace = None if isinstance(error, UsageError | TimeoutError) else error
        logger.warning(
            "%s: other peers cannot download this one's state, because %s: %s: %s",
            self._prefix,
            what,
            type(error).__name__,
            error,
            exc_info=trace,
        )
        return CaptureFailed(type(error).__name__)

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._store.lock(LOCK_TIMEOUT))
            except DeadlineExceeded as e:
                raise LockNotFree(str(e)) from None
            yield

    # as a joiner

    def load(
        self, handle: ServiceHandle, timeout: float | None, *, progress: bool
    ) -> MPFuture[DownloadedState | None]:
        """Begin a download. The future's result is the state, or None after a warning that says why there is none."""
        bar = self._make_bar() if progress else None
        with self._lock:
            self._last_download += 1
            number = self._last_download
            self._downloads[number] = _Download(bar)
        try:
            call: MPFuture[LoadedState] = handle.call(LoadState(number, timeout, progress), timeout=timeout)
        except BaseException:
            self._downloads.pop(number).close()
            raise
        outer: MPFuture[DownloadedState | None] = MPFuture(lambda: call.cancel() or True)
        # Past the dispatch of MPFuture: callbacks of users may be waiting on that thread for this very state.
        call.when_done(partial(_on_own_thread, partial(self._finish, number, outer)))
        return outer

    def _make_bar(self) -> ProgressBar:
        from shoal.averaging.state.progress import ProgressBar  # most programs never draw one

        return ProgressBar(self._prefix)

    def _allocate(self, number: int, nbytes: int) -> WithDescriptors | MemoryRefused:
        download = self._downloads.get(number)
        if download is None:
            return MemoryRefused("the download has ended here")
        if download.memory is not None:
            download.memory.close()
            download.memory = None
        available = available_memory()
        if available is not None and nbytes > available:
            sizes = figures.size(nbytes), figures.size(available)
            return MemoryRefused("its state takes {}, and {} of memory are free".format(*sizes))
        try:
            download.memory = memory = SharedMemory.create(nbytes)
            return WithDescriptors(True, [os.dup(memory.fd)])
        except OSError as e:
            return MemoryRefused(f"there is no memory for its state of {figures.size(nbytes)}: {e}")

    def _finish(
        self, number: int, outer: MPFuture[DownloadedState | None], call: Future[LoadedState]
    ) -> None:
        """The download is done: hand its result on."""
        download = self._downloads.pop(number)
        try:
            if outer.cancelled():
                return
            if call.cancelled():
                raise InvalidStateError("the averager was shut down during the download")
            result = self._state_of(call.result(), download)
            if result is not None:
                self.when_loaded()
        except BaseException as e:  # noqa: BLE001 - those that wait for the state get it
            with contextlib.suppress(FutureIsDone):  # cancelled in the same moment
                outer.set_exception(e)
        else:
            with contextlib.suppress(FutureIsDone):
                outer.set_result(result)
        finally:
            download.close()

    def _state_of(self, loaded: LoadedState, download: _Download) -> DownloadedState | None:
        if loaded.failure is not None:
            logger.warning("%s: no state was loaded: %s", self._prefix, loaded.failure)
            return None
        assert download.memory is not None
        manifest = Manifest(unpack_entries(loaded.entries))
        if download.bar is not None:
            donor = str(PeerID.from_bytes(loaded.donor))
            download.bar.complete(donor, manifest.nbytes)
        metadata, *tensors = tensors_in(manifest, download.memory.buffer)
        try:
            state = self._serializer.loads(bytes(metadata.numpy())), tensors
        except Exception as e:  # noqa: BLE001 - serializers and classes registered with them are users' code
            logger.warning("%s: no state was loaded: its metadata cannot be read: %s", self._prefix, e)
            return None
        self.last_loaded = StateReport(
            str(PeerID.from_bytes(loaded.donor)), manifest.nbytes, loaded.seconds, loaded.age
        )
        return state


def _settle(answer: Future[object], work: Callable[[], object]) -> None:
    try:
        answer.set_result(work())
    except BaseException as e:  # noqa: BLE001 - the edge of the thread: the service raises it
        answer.set_exception(e)


def tensors_in(manifest: Manifest, memory: memoryview) -> list[torch.Tensor]:
    """All tensors of a decoded state, where they lie: the memory lives as long as any of them."""
    # Of a slice, which keeps the mapping: the tensor keeps its object alone, and that of a SharedMemory is released.
    block = torch.frombuffer(memory[:], dtype=torch.uint8)
    tensors = []
    for entry, dtype, count, offset in zip(
        manifest.entries, manifest.dtypes, manifest.counts, manifest.offsets, strict=True
    ):
        tensors.append(
            block[offset : offset + count * dtype.itemsize].view(dtype.torch_dtype).view(entry.shape)
        )
    return tensors


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be taken without swapping; None where the system does not say.

    :param root: where ``proc`` and ``sys`` are found
    """
    if sys.platform != "linux":
        return _physical_memory()
    try:
        fields = _fields(root / "proc/meminfo")
        free = fields["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        return _physical_memory()
    groups = root / "sys/fs/cgroup"
    rooms = [
        _room(groups, "memory.max", "memory.current", "inactive_file"),
        _room(groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]
    return min([free, *(room for room in rooms if room is not None)])


def _room(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Bytes that a control group (version 2 or 1) leaves; what it has of files that nobody reads counts as free."""
    try:
        bound = (group / limit).read_text().strip()
        if bound == "max":
            return None
        room = int(bound) - int((group / used).read_text())
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):
        room += _fields(group / "memory.stat").get(reclaimable, 0)
    return max(0, room)


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _on_own_thread(work: Callable[[Future[LoadedState]], None], call: Future[LoadedState]) -> None:
    try:
        threading.Thread(target=work, args=(call,), name="shoal-state-loaded", daemon=True).start()
    except RuntimeError:  # the interpreter is ending: no thread can be started any more, and none is held up
        work(call)
