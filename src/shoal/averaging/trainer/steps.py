"""The steps of one averager in the user process: each is handed to the background process, and ends with its outcome.
Those under way are here in a table, by number, and so is the report of the last one that has ended.

Holds no reference to the averager itself, so that an averager that nobody refers to any more is collected.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from shoal.averaging.checks import OrderOfTimes, check_scheduled_time
from shoal.averaging.commands import AllowAllreduce, Reschedule, RunStep, StepOutcome
from shoal.averaging.config import default_start
from shoal.averaging.group import MAX_GATHER_BYTES
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.report import StepReport
from shoal.averaging.timeouts import STEP_TIMEOUT
from shoal.averaging.trainer.control import Steering, StepControl, check_weight
from shoal.errors import (
    AllreduceException,
    DeadlineExceeded,
    InDoubt,
    InvalidTypeError,
    InvalidValueError,
    MatchmakingException,
)
from shoal.p2p.identity import PeerID
from shoal.runtime.workers import Strand
from shoal.utils.checks import check_choice, check_flag, check_number
from shoal.utils.timed import dht_clock

if TYPE_CHECKING:
    from shoal.averaging.commands import AveragingStage
    from shoal.averaging.trainer.late import LateAverage
    from shoal.averaging.trainer.tensors import TensorStore
    from shoal.runtime.futures import MPFuture
    from shoal.runtime.process import ServiceHandle

logger = logging.getLogger(__name__)

_FAILED = "%s: averaging failed, tensors are unchanged: %s"
LONELY_ROUNDS = 5
"""After as many failures in a row the log says it louder."""
MANY_WAITING = 5
"""From as many steps on that wait behind another one, the log says so."""

WhenBusy: TypeAlias = Literal["queue", "current"]
"""What ``step()`` does while an earlier step is under way: queue another one behind it, or return that one."""
WHEN_BUSY: tuple[str, ...] = get_args(WhenBusy)


class Steps:
    """Makes steps and concludes them."""

    def __init__(
        self,
        store: TensorStore,
        settings: MatchmakingConfig,
        prefix: str,
        late: LateAverage,
        order: OrderOfTimes | None = None,
    ) -> None:
        self._store = store
        self.late = late
        """Hears which steps end in doubt."""
        self.strand = Strand(f"shoal-steps {prefix}")
        """Where the averager's own calls are concluded: it is never held up by callbacks of users."""
        self._controls: dict[int, StepControl] = {}
        """Under way, by number, in their order."""
        self.last_report: StepReport | None = None
        """Of the last step that has finished."""
        self._settings = settings
        self._prefix = prefix
        self._order = order or OrderOfTimes(prefix, {})
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        """Between threads that begin steps, and the end of a step."""
        self._awaited: set[int] = set()
        """Steps that a caller waits for inside ``step(wait=True)``."""
        self._has_warned_of_queue = False
        self.failures_in_a_row = 0
        self.when_over: Callable[[int, bool], object] = lambda step, is_sure: None
        """Hears that a step ends here without an average, and whether its round is sure to have ended, too."""

    def submit(
        self,
        handle: ServiceHandle,
        serializer: Any,
        *,
        gather: Any,
        scheduled_time: float | None,
        weight: float | None,
        timeout: float | None,
        allow_retries: bool,
        require_trigger: bool,
        when_busy: WhenBusy,
        wait: bool,
    ) -> tuple[StepControl, bool]:
        """Check what the user asks for, and send it on its way; parameters as of ``DecentralizedAverager.step``.

        :param serializer: encodes what members gather, and decodes what they have gathered
        :returns: the step, and whether it is a new one
        """
        check_choice("when_busy", when_busy, WHEN_BUSY)
        now = dht_clock()
        if timeout is not None:
            timeout = check_number("timeout", timeout, above=0)
            self._order.check(STEP_TIMEOUT, timeout)
        deadline = None if timeout is None else now + timeout
        if scheduled_time is None:
            scheduled_time = default_start(now, deadline, self._settings)
        else:
            scheduled_time = check_scheduled_time(scheduled_time, deadline)
        weight = check_weight(1.0 if weight is None else weight)
        allow_retries = check_flag("allow_retries", allow_retries)
        require_trigger = check_flag("require_trigger", require_trigger)
        encoded = _encode(serializer, gather)
        with self._lock:
            current = self._current() if when_busy == "current" else None
            number = next(self._numbers) if current is None else current
            if wait:
                # Under the lock: else the step could end first, and not say that it failed, since nobody waits for it.
                self._awaited.add(number)
            if current is not None:
                return self._controls[current], False
            command = RunStep(
                number,
                weight,
                encoded,
                # Steady time: the clock of the DHT may be set while the step waits.
                dht_clock.to_steady(float(scheduled_time)),
                None if deadline is None else dht_clock.to_steady(deadline),
                allow_retries,
                require_trigger,
            )
            return self._send(handle, serializer, command, timeout), True

    # what the background process says of them

    def reach(self, step: int, stage: AveragingStage) -> None:
        """The step has come to ``stage``, if it is still under way."""
        if step in self._controls:
            self._controls[step].reach(stage)

    def bind(self, step: int) -> None:
        """This peer has given its word for the step, which cannot be cancelled any more."""
        if step in self._controls:
            self._controls[step].bind()

    def under_way(self, step: int) -> StepControl:
        """:raises AllreduceException: the step has ended"""
        control = self._controls.get(step)
        if control is None or control.done():
            raise AllreduceException("the step has ended")
        return control

    def _current(self) -> int | None:
        """The number of the earliest step that is under way."""
        return next((number for number, control in self._all_under_way() if not control.done()), None)

    def _all_under_way(self) -> list[tuple[int, StepControl]]:
        return list(self._controls.items())

    def _send(
        self, handle: ServiceHandle, serializer: Any, command: RunStep, timeout: float | None
    ) -> StepControl:
        self._store.mark_stream()
        control = StepControl(
            scheduled_time=dht_clock.from_steady(command.scheduled_time),
            deadline=None if command.deadline is None else dht_clock.from_steady(command.deadline),
            weight=command.weight,
            needs_trigger=command.needs_trigger,
            steering=Steering(
                trigger=lambda: handle.call(AllowAllreduce(command.step)),
                reschedule=lambda time: handle.call(Reschedule(command.step, dht_clock.to_steady(time))),
                would_wait_for_itself=lambda: self._store.held_by_this_thread,
            ),
        )
        self._controls[command.step] = control
        try:
            call: MPFuture[StepOutcome] = handle.call(command, timeout=timeout)
        except BaseException:
            del self._controls[command.step]
            self._awaited.discard(command.step)
            raise
        control.follow(call)
        self._warn_of_a_long_queue()
        conclude = partial(self._conclude, control, command.step, serializer)
        # Past the dispatch of MPFuture: callbacks of users may be waiting on that thread for this very step.
        call.when_done(lambda call: self.strand.submit(partial(conclude, call)))
        return control

    def wait_for(self, control: StepControl, is_own: bool) -> dict[PeerID, Any] | None:
        """What the members gathered; None if the step failed: then the log says why.

        :param is_own: nobody else waits for the step: an interrupted wait cancels it
        """
        try:
            gathered: dict[PeerID, Any] = control.result()
        except AllreduceException:
            return None
        except BaseException:
            if is_own:
                control.cancel()  # Ctrl+C: groupmates need not wait
            raise
        finally:
            del control  # the error that it holds refers to this frame
        return gathered

    def _conclude(self, control: StepControl, step: int, serializer: Any, call: Any) -> None:
        """The call of a step is done: the step ends, whatever happens. Runs on the averager's own strand."""
        with self._lock:
            self._controls.pop(step, None)
            is_awaited = step in self._awaited
            self._awaited.discard(step)
        try:
            self._hand_on(control, step, serializer, is_awaited, call)
        except BaseException as e:
            control.fail(e)  # nobody would do it later
            raise

    def _hand_on(self, control: StepControl, step: int, serializer: Any, wait: bool, call: Any) -> None:
        if call.cancelled():
            self.when_over(step, False)
            if not control.cancelled():
                reason = "the averager was shut down during the step"
                if wait:
                    logger.warning(_FAILED, self._prefix, reason)
                control.fail(AllreduceException(reason))
            return
        error = call.exception()
        if error is not None:
            self.when_over(step, not isinstance(error, DeadlineExceeded))
            # Once the tensors were taken, only the background process knows whether this peer has voted since.
            if isinstance(error, DeadlineExceeded) and (control.is_bound or control.began_allreduce):
                self._give_up_in_doubt(control, step, wait, error)
            else:
                control.fail(error)
            return
        outcome: StepOutcome = call.result()
        report = self._keep(outcome.report)
        if report.failure is None:
            self.failures_in_a_row = 0
            gathered = {PeerID.from_bytes(peer): data for peer, data in outcome.gathered}
            control.succeed(
                report, {peer: _decode(serializer, peer, data) for peer, data in gathered.items()}
            )
            return
        self.when_over(step, True)
        kind = AllreduceException if outcome.found_group else MatchmakingException
        self._fail(control, report, wait, (InDoubt if report.in_doubt else kind)(report.failure))

    def _give_up_in_doubt(self, control: StepControl, step: int, wait: bool, error: DeadlineExceeded) -> None:
        """The background process does not answer, and may have voted: the others may commit."""
        voted = "had voted" if control.is_bound else "may have voted"
        doubt = InDoubt(f"this peer {voted} on the round, and others may have committed: {error}")
        doubt.__cause__ = error
        report = self._keep(StepReport(step, failure=str(doubt), attempts=1, in_doubt=True))
        self._fail(control, report, wait, doubt)

    def _keep(self, report: StepReport) -> StepReport:
        """The report with what was learned of earlier steps; from now on it is the last one."""
        self.last_report = report = replace(report, doubt=self.late.take_news())
        return report

    def _fail(self, control: StepControl, report: StepReport, wait: bool, error: AllreduceException) -> None:
        failure = str(error)
        if report.in_doubt:
            self.late.doubt(report.step, failure)
        self.failures_in_a_row += 1
        self._warn(failure, wait)
        control.fail(error, report)

    def _warn_of_a_long_queue(self) -> None:
        if self._has_warned_of_queue or len(self._controls) <= MANY_WAITING:
            return
        under_way = [(number, control) for number, control in self._all_under_way() if not control.done()]
        if len(under_way) <= MANY_WAITING:
            return
        self._has_warned_of_queue = True
        number, first = under_way[0]
        logger.warning(
            "%s: %d steps wait behind step %d (stage: %s): step(wait=False) is called faster than steps end, and the "
            "queue has no limit. Call it when the last one is done(), or as step(wait=False, when_busy='current'), "
            "which returns the step under way",
            self._prefix,
            len(under_way) - 1,
            number,
            first.stage.value,
        )

    def _warn(self, failure: str, wait: bool) -> None:
        """A step that its caller waits for has a line for each failure; another one hands out its error, and is worth
        a line where many fail in a row, since nobody may look at them.
        """
        failures = self.failures_in_a_row
        if failures >= LONELY_ROUNDS and (wait or failures % LONELY_ROUNDS == 0):
            logger.error(
                "%s: averaging failed %d times in a row: this peer has trained alone for %d rounds; tensors are "
                "unchanged; the last time: %s",
                self._prefix,
                failures,
                failures,
                failure,
            )
        elif wait:
            logger.warning(_FAILED, self._prefix, failure)


def _encode(serializer: Any, gather: Any) -> bytes:
    if not all(callable(getattr(serializer, name, None)) for name in ("dumps", "loads")):
        raise InvalidTypeError(f"serializer must be a class with dumps() and loads(), got {serializer!r}")
    try:
        encoded = serializer.dumps(gather)
    except (InvalidTypeError, InvalidValueError) as e:
        raise type(e)(f"gather: {e}") from None
    if not isinstance(encoded, bytes | bytearray):
        raise InvalidTypeError(
            f"serializer must make bytes of gather, got {type(encoded).__name__} from {serializer!r}"
        )
    if len(encoded) > MAX_GATHER_BYTES:
        raise InvalidValueError(
            f"gather must take at most {MAX_GATHER_BYTES:,} bytes when encoded, got {len(encoded):,}"
        )
    return bytes(encoded)


def _decode(serializer: Any, peer: PeerID, data: bytes) -> Any:
    """What a member gathered; None if it cannot be read, since by now its tensors have been averaged."""
    try:
        return serializer.loads(data)
    except BaseException as e:  # noqa: BLE001 - serializers and their classes are users' code: may call sys.exit()
        logger.warning("what %s gathered cannot be read, None is returned for it: %s", peer, e)
        return None
