"""What a caller of ``step(wait=False)`` holds: a future of the round, and a handle to steer it until it
begins.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from enum import Enum
from typing import TYPE_CHECKING, Any

from shoal.runtime.futures import MPFuture

if TYPE_CHECKING:
    from shoal.averaging.report import RoundReport
    from shoal.p2p.identity import PeerID


class AveragingStage(Enum):
    """How far a step has come."""

    IDLE = "idle"
    """Still queued behind an earlier step."""
    LOOKING_FOR_GROUP = "looking for group"
    AWAITING_TRIGGER = "awaiting trigger"
    """The group stands; ``allow_allreduce()`` lets it begin."""
    RUNNING_ALLREDUCE = "running all-reduce"
    FINISHED = "finished"


class StepControl(MPFuture[Any]):
    """A step of averaging that runs in the background.

    It is a :class:`concurrent.futures.Future` that can be awaited too. Its result is the dictionary of
    gathered data,
    ``{PeerID: data}``; a step that failed raises :class:`~shoal.errors.AllreduceException` with the reason,
    and leaves the averaged tensors as they were. Whatever waits for it is woken after the averages have been
    written to the tensors. Callbacks may block and may run further steps.

    :param scheduled_time: when all-reduce is expected to begin, in :func:`~shoal.utils.get_dht_time` seconds
    :param deadline: when the search for a group ends, in the same seconds; None: never
    :param weight: this peer's weight in the average
    :param trigger: tells the background process that all-reduce may begin
    """

    def __init__(
        self,
        *,
        scheduled_time: float,
        deadline: float | None,
        weight: float,
        needs_trigger: bool,
        trigger: Callable[[], object],
    ) -> None:
        super().__init__(dispatch=_run_on_its_own_thread)
        self._stage = AveragingStage.IDLE
        self._scheduled_time = scheduled_time
        self._deadline = deadline
        self._weight = weight
        self._triggered = not needs_trigger
        self._trigger = trigger
        self._call: Future[Any] | None = None
        self._report: RoundReport | None = None

    @property
    def stage(self) -> AveragingStage:
        return AveragingStage.FINISHED if self.done() else self._stage

    @property
    def scheduled_time(self) -> float:
        return self._scheduled_time

    @property
    def deadline(self) -> float | None:
        return self._deadline

    @property
    def weight(self) -> float:
        return self._weight

    @property
    def triggered(self) -> bool:
        """Whether all-reduce may begin as soon as the group stands."""
        return self._triggered

    @property
    def began_allreduce(self) -> bool:
        return self.done() or self._stage is AveragingStage.RUNNING_ALLREDUCE

    @property
    def report(self) -> RoundReport | None:
        """What happened; None until the step has finished."""
        return self._report

    def allow_allreduce(self) -> None:
        """Let all-reduce begin as soon as the group stands. Calling it again is harmless."""
        if not self._triggered:
            self._triggered = True
            self._trigger()

    def cancel(self) -> bool:
        """Withdraw from the step, at any time until its round is decided; groupmates learn it at once.

        :returns: False if the step has finished already
        """
        if self.cancelled():
            return True
        if not super().cancel():
            return False
        self.set_running_or_notify_cancel()
        if self._call is not None:
            self._call.cancel()
        return True

    # for the averager

    def follow(self, call: Future[Any]) -> None:
        """``call`` runs the step in the background process; cancelling the step cancels it."""
        self._call = call

    def reach(self, stage: AveragingStage) -> None:
        self._stage = stage

    def succeed(self, report: RoundReport, gathered: dict[PeerID, Any]) -> None:
        self._report = report
        with contextlib.suppress(InvalidStateError):  # cancelled in the same moment
            self.set_result(gathered)

    def fail(self, error: BaseException, report: RoundReport | None = None) -> None:
        self._report = report
        with contextlib.suppress(InvalidStateError):  # cancelled in the same moment
            self.set_exception(error)

    def __repr__(self) -> str:
        return f"<StepControl {self.stage.value}, weight {self._weight:g}>"


def _run_on_its_own_thread(callback: Callable[[], None]) -> None:
    # Not on the thread that finishes steps: a callback that waits for another step would wait for itself.
    try:
        threading.Thread(target=callback, name="shoal-step-callback", daemon=True).start()
    except RuntimeError:  # the interpreter is ending: no thread can be started any more, and none is held up
        callback()
