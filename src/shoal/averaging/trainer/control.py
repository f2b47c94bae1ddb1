"""What a caller of ``step(wait=False)`` holds: a future of the round, and a handle to steer it until it
begins.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import InvalidStateError as FutureIsDone
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.averaging.checks import check_scheduled_time
from shoal.averaging.commands import AveragingStage
from shoal.averaging.group import MAX_WEIGHT
from shoal.errors import InvalidStateError
from shoal.runtime.futures import MPFuture
from shoal.utils.checks import check_number

if TYPE_CHECKING:
    from shoal.averaging.report import StepReport
    from shoal.p2p.identity import PeerID


@dataclass(frozen=True)
class Steering:
    """How a step's wishes reach the background process."""

    trigger: Callable[[], object]
    """All-reduce may begin."""
    reschedule: Callable[[float], object]
    """All-reduce is expected to begin at another time (DHT seconds)."""
    would_wait_for_itself: Callable[[], bool] = lambda: False
    """Whether this thread holds the lock of the tensors, which the step needs."""


class StepControl(MPFuture[Any]):
    """A step of averaging that runs in the background.

    It is a :class:`concurrent.futures.Future` that can be awaited too. Its result is the dictionary of
    gathered data,
    ``{PeerID: data}``; a step that failed raises :class:`~shoal.errors.AllreduceException` with the reason,
    and leaves the averaged tensors as they were. Whatever waits for it is woken after the averages have been
    written to the tensors; with ``apply_when="called"``, when the average waits for ``apply_average()``. Callbacks
    may block and may run further steps.

    :param scheduled_time: when all-reduce is expected to begin, in :func:`~shoal.utils.get_dht_time` seconds
    :param deadline: when the search for a group ends, in the same seconds; None: never
    :param weight: this peer's weight in the average
    """

    def __init__(
        self,
        *,
        scheduled_time: float,
        deadline: float | None,
        weight: float,
        needs_trigger: bool,
        steering: Steering,
    ) -> None:
        super().__init__(dispatch=_run_on_its_own_thread)
        self._lock = threading.RLock()  # between the user, who steers, and the round, which begins
        self._stage = AveragingStage.IDLE
        self._scheduled_time = scheduled_time
        self._deadline = deadline
        self._weight = weight
        self._triggered = not needs_trigger
        self._steering: Steering | None = (
            steering  # None: it has ended, and refers to nothing of the averager
        )
        self._is_bound = False
        self._call: Future[Any] | None = None
        self._report: StepReport | None = None

    @property
    def stage(self) -> AveragingStage:
        """How far the step has come."""
        return AveragingStage.FINISHED if self.done() else self._stage

    @property
    def scheduled_time(self) -> float:
        """When all-reduce is expected to begin, in :func:`~shoal.utils.get_dht_time` seconds: until then a group
        that is not full waits for further peers. May be set until all-reduce begins, and matters until the group
        stands.

        :raises InvalidStateError: on setting, when all-reduce has begun
        :raises InvalidValueError: on setting, not finite, more than a day ahead, or after the deadline
        """
        return self._scheduled_time

    @scheduled_time.setter
    def scheduled_time(self, scheduled_time: float) -> None:
        scheduled_time = check_scheduled_time(scheduled_time, self._deadline)
        with self._settable("scheduled_time"):
            self._scheduled_time = float(scheduled_time)
            steering = self._steering
        if steering is not None:
            steering.reschedule(self._scheduled_time)

    @property
    def deadline(self) -> float | None:
        """When the search for a group ends at the latest, in :func:`~shoal.utils.get_dht_time` seconds; None: never."""
        return self._deadline

    @property
    def weight(self) -> float:
        """This peer's weight in the average. May be set until all-reduce begins: the round takes it together with the
        tensors. 0: contributes nothing.

        :raises InvalidStateError: on setting, when all-reduce has begun
        :raises InvalidValueError: on setting, negative, or beyond 1e300
        """
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        weight = check_weight(weight)
        with self._settable("weight"):
            self._weight = weight

    @property
    def triggered(self) -> bool:
        """Whether all-reduce may begin as soon as the group is complete."""
        return self._triggered

    @property
    def began_allreduce(self) -> bool:
        """Whether the tensors and the weight were taken; False again while, after a failure, another group is
        looked for. Stays as it is when the step has finished.
        """
        return self._stage is AveragingStage.RUNNING_ALLREDUCE

    @property
    def report(self) -> StepReport | None:
        """What happened; None until the step has finished, and if it was cancelled."""
        return self._report

    def allow_allreduce(self) -> None:
        """Let all-reduce begin as soon as the group is complete. Calling it again is harmless."""
        self.check_process()
        steering = self._steering
        if not self._triggered:
            self._triggered = True
            if steering is not None:
                steering.trigger()

    def result(self, timeout: float | None = None) -> Any:
        """As of Future, and :raises InvalidStateError: inside ``get_tensors()``, whose lock the step needs to end."""
        self._check_wait(timeout)
        try:
            return super().result(timeout)
        finally:
            del self  # as Future does: the error that it holds would refer to this frame, and thereby to it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As of Future, and :raises InvalidStateError: inside ``get_tensors()``, whose lock the step needs to end."""
        self._check_wait(timeout)
        return super().exception(timeout)

    def cancel(self) -> bool:
        """Withdraw from the step; groupmates learn it at once.

        Possible until this peer has told its group that it holds the whole average, which binds it to commit together
        with the others, or the round is decided; and again if that round fails and another group is looked for.

        :returns: True: the step is cancelled, and will write nothing to the tensors; False: it has finished, or is
          bound, and its outcome is about to follow
        """
        self.check_process()
        with self._lock:  # of several threads that cancel, one is the first
            if self.cancelled():
                return True
            if self._is_bound or not super().cancel():
                return False
            self.set_running_or_notify_cancel()
            call = self._call
        self._let_go()
        if call is not None:
            call.cancel()
        return True

    # for the averager

    # what the averager tells its steps

    def follow(self, call: MPFuture[Any]) -> None:
        """``call`` runs the step in the background process; cancelling the step cancels it."""
        self._call = call
        self._explain = call.why_late

    def reach(self, stage: AveragingStage) -> None:
        """The step has come to ``stage``, and can be cancelled."""
        with self._lock:
            self._stage = stage
            self._is_bound = False

    def bind(self) -> None:
        """This peer has given its word: until the step reaches another stage it can't be cancelled any more."""
        with self._lock:
            self._is_bound = True

    @property
    def is_bound(self) -> bool:
        """Whether the round may commit with this peer, whatever it wishes."""
        return self._is_bound

    def begin_allreduce(self) -> float:
        """From now on the weight is settled; returns it."""
        self.reach(AveragingStage.RUNNING_ALLREDUCE)
        return self._weight

    def succeed(self, report: StepReport, gathered: dict[PeerID, Any]) -> None:
        """The step ends with what its group gathered, unless it was cancelled in the same moment."""
        self._report = report
        with contextlib.suppress(FutureIsDone):
            self.set_result(gathered)
        self._let_go()

    def fail(self, error: BaseException, report: StepReport | None = None) -> None:
        """The step ends with ``error``, unless it was cancelled in the same moment."""
        self._report = report
        with contextlib.suppress(FutureIsDone):
            self.set_exception(error)
        self._let_go()

    def _let_go(self) -> None:
        """A step that has ended keeps neither the averager's process nor what was sent alive."""
        self._call = None
        self._explain = None
        self._steering = None

    def _check_wait(self, timeout: float | None) -> None:
        steering = self._steering
        if timeout != 0 and not self.done() and steering is not None and steering.would_wait_for_itself():
            raise InvalidStateError(
                "waiting for a step inside get_tensors() would wait for a lock that this thread holds; "
                "leave the block first"
            )

    @contextlib.contextmanager
    def _settable(self, name: str) -> Iterator[None]:
        self.check_process()
        with self._lock:
            if self.done() or self.began_allreduce:
                raise InvalidStateError(f"{name} can't be set any more: the step is {self.stage.value}")
            yield

    def __repr__(self) -> str:
        return f"<StepControl {self.stage.value}, weight {self._weight:g}>"


def check_weight(weight: Any) -> float:
    """:raises InvalidTypeError: not a number; :raises InvalidValueError: negative, or too large to be summed up"""
    return float(check_number("weight", weight, minimum=0, maximum=MAX_WEIGHT))


def _run_on_its_own_thread(callback: Callable[[], None]) -> None:
    # Not on the thread that finishes steps: a callback that waits for another step would wait for itself.
    try:
        threading.Thread(target=callback, name="shoal-step-callback", daemon=True).start()
    except RuntimeError:  # the interpreter is ending: no thread can be started any more, and none is held up
        callback()
