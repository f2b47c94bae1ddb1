"""The user process's end of an averager: copies between the user's tensors and the arena when the background process
asks for it, and what happens when its service has begun or ends.

Holds no reference to the averager itself, so that an averager that nobody refers to any more is collected.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import CancelledError
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.averaging.commands import (
    ApplyAverage,
    AttachArena,
    AverageWritten,
    BoundByWord,
    ReachStage,
    TakeSnapshot,
)
from shoal.averaging.partition import Layout
from shoal.averaging.state_commands import StateCommand
from shoal.averaging.trainer.control import StepControl
from shoal.averaging.trainer.pending import ApplyWhen, AverageWriter
from shoal.averaging.trainer.state_sharing import StateSharing
from shoal.averaging.trainer.tensors import TensorStore, first_non_finite
from shoal.errors import (
    AllreduceException,
    DeadlineExceeded,
    InvalidStateError,
    InvalidValueError,
    PeerProcessDied,
)
from shoal.runtime.memory import SharedMemory
from shoal.runtime.workers import Strand

if TYPE_CHECKING:
    from shoal.averaging.report import StepReport
    from shoal.runtime.futures import MPFuture
    from shoal.runtime.process import ServiceHandle

logger = logging.getLogger(__name__)

UNRESPONSIVE_TIMEOUT = 0.5
"""Seconds that the end of an averager waits for a background process that is stopped, or does not answer."""
LOCK_TIMEOUT = 30.0
"""Seconds for which a round waits for the lock before its snapshot; groupmates wait with it."""


class TensorKeeper:
    """The tensors of one averager, their arena, and the steps that are under way.

    ``strand`` is where the averager's own calls are concluded: it is never held up by callbacks of users.
    """

    def __init__(
        self,
        store: TensorStore,
        layout: Layout,
        alpha: float,
        auxiliary: bool,
        states: StateSharing,
        name: str,
        apply_when: ApplyWhen = "ready",
    ) -> None:
        self.store = store
        self.layout = layout
        self.states = states
        self.writer = AverageWriter(store, self._write, on_call=apply_when == "called")
        self._name = name
        self.strand = Strand(f"shoal-steps {name}")
        self._auxiliary = auxiliary
        self.controls: dict[int, StepControl] = {}
        self.creation: MPFuture[ServiceHandle] | None = None
        """Of the service itself, once the DHT is ready."""
        self.last_report: StepReport | None = None
        self._alpha = alpha
        self._memory: SharedMemory | None = None
        self._is_ending = False

    def create_memory(self) -> SharedMemory:
        """The shared memory of both areas: the snapshot, and the average behind it."""
        self._memory = SharedMemory.create(max(1, 2 * self.layout.nbytes))
        return self._memory

    def begin_to_end(self) -> None:
        """From now on nothing waits for the lock of the tensors: whoever ends the averager may hold it."""
        self._is_ending = True

    def close(self) -> None:
        self.states.close()
        lost = self.writer.drop()
        if lost is not None:
            logger.warning(
                "%s: shut down before the average of step %d was applied: the tensors lack it; call apply_average() "
                "before shutdown()",
                self._name,
                lost,
            )
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def handle(self, command: object) -> object:
        """Carry out a request of the service; runs on a thread of the averager, one request after the other."""
        match command:
            case ReachStage(step, stage):
                if step in self.controls:
                    self.controls[step].reach(stage)
            case TakeSnapshot(step):
                return self._begin_allreduce(step)
            case BoundByWord(step):
                if step in self.controls:
                    self.controls[step].bind()
            case ApplyAverage(step):
                return self._deliver(step)
            case StateCommand():
                self.states.handle(command)
            case _:
                raise InvalidStateError(f"the user process has no command {type(command).__name__}")
        return None

    def _area(self, number: int) -> memoryview:
        if self._memory is None:
            raise InvalidStateError("the averager was shut down")
        size = self.layout.nbytes
        return self._memory.buffer[number * size : (number + 1) * size]

    def _begin_allreduce(self, step: int) -> float:
        """Copy the tensors, and settle the weight, which is returned."""
        control = self._control(step)
        weight = control.begin_allreduce()
        if not self._auxiliary:
            self._take_snapshot(control, check=weight > 0)
        return weight

    def _control(self, step: int) -> StepControl:
        control = self.controls.get(step)
        if control is None or control.done():
            raise AllreduceException("the step has ended")
        return control

    def _deliver(self, step: int) -> bool:
        # Of those that were cancelled in the moment when they got bound nobody awaits an average any more.
        self._control(step)
        return self.writer.deliver(step, abandoned=lambda: self._is_ending)

    def _write(self) -> None:
        self.store.apply(self._area(0), self._area(1), self._alpha, abandoned=lambda: self._is_ending)

    def _take_snapshot(self, control: StepControl, check: bool) -> None:
        area = self._area(0)
        try:
            # The next step's request waits behind this one, on the same thread.
            self.store.snapshot(
                area, timeout=LOCK_TIMEOUT, abandoned=lambda: control.done() or self._is_ending
            )
        except DeadlineExceeded as e:
            logger.warning("withdrawing from a round, whose other members wait: %s", e)
            raise AllreduceException(f"withdrawn from the round: {e}") from e
        if not check:  # nothing of it is sent: a peer whose training has diverged may ask for the average
            return
        index = first_non_finite(self.layout, area)
        if index is not None:
            raise InvalidValueError(
                f"{self.store.labels[index]} has NaN or infinite elements; nothing was sent"
            )


def attach_arena(started: MPFuture[ServiceHandle], keeper: TensorKeeper, creation: Any) -> None:
    """The service was made: give it the shared memory, and then the averager has started."""
    try:
        handle: ServiceHandle = creation.result()
        memory = keeper.create_memory()
        keeper.states.attach(handle)
        keeper.writer.notify_written = partial(_notify_written, handle)
        handle.call(AttachArena(memory.nbytes), descriptors=[memory.fd]).result()
    except CancelledError:
        started.set_exception(InvalidStateError("the averager was shut down before it had started"))
    except BaseException as e:  # noqa: BLE001 - whoever waits for the start gets it
        started.set_exception(e)
    else:
        started.set_result(handle)


def _notify_written(handle: ServiceHandle) -> None:
    with contextlib.suppress(
        PeerProcessDied, InvalidStateError
    ):  # it has ended, and nothing there waits any more
        handle.call(AverageWritten())


def close_in_background(creation: MPFuture[ServiceHandle], keeper: TensorKeeper) -> None:
    """As :func:`close`, for the garbage collector: it may run on the very thread that would receive the answer."""
    with contextlib.suppress(RuntimeError):  # the interpreter is ending, and the background process with it
        threading.Thread(
            target=close, args=(creation, keeper), name="shoal-averager-end", daemon=True
        ).start()


def close(creation: MPFuture[ServiceHandle], keeper: TensorKeeper, timeout: float = 5.0) -> None:
    """End the service in the background process, if it came to be and that still runs."""
    keeper.begin_to_end()
    try:
        # Of a creation that waits for the DHT, which may have ended well in the moment when that was cancelled.
        if creation.why_late() is not None:
            timeout = min(timeout, UNRESPONSIVE_TIMEOUT)
        made = keeper.creation if creation.cancel() else creation
        if made is not None and not made.cancel() and made.exception(timeout) is None:
            made.result().close().result(timeout)
    except TimeoutError:
        logger.warning(
            "the averager did not end within %g s; it ends with its background process at the latest", timeout
        )
    except (PeerProcessDied, InvalidStateError, CancelledError) as e:
        logger.debug("the averager's background process had ended before: %s", e)
    finally:
        keeper.close()
