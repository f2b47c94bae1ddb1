"""The steps of one averager, seen from the host: how one is handed to the background process, and what is made of its
outcome.

Holds no reference to the averager itself, so that an averager that nobody refers to any more is collected.
"""

from __future__ import annotations

import itertools
import logging
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.averaging.checks import OrderOfTimes, check_flag, check_number, check_scheduled_time
from shoal.averaging.commands import AllowAllreduce, Reschedule, RunStep, StepOutcome
from shoal.averaging.config import default_start
from shoal.averaging.control import Steering, StepControl, check_weight
from shoal.averaging.group import MAX_GATHER_BYTES
from shoal.averaging.matchmaking.core import MatchmakingConfig
from shoal.averaging.timeouts import STEP_TIMEOUT
from shoal.errors import AllreduceException, InvalidTypeError, InvalidValueError, MatchmakingException
from shoal.p2p.identity import PeerID
from shoal.utils.timed import dht_clock

if TYPE_CHECKING:
    from shoal.averaging.hostside import TensorKeeper
    from shoal.runtime.futures import MPFuture
    from shoal.runtime.process import ServiceHandle

logger = logging.getLogger(__name__)

_FAILED = "%s: averaging failed, tensors are unchanged: %s"
LONELY_ROUNDS = 5
"""After as many failures in a row the log says it louder."""


class Steps:
    """Makes steps and concludes them."""

    def __init__(
        self,
        keeper: TensorKeeper,
        settings: MatchmakingConfig,
        prefix: str,
        order: OrderOfTimes | None = None,
    ) -> None:
        self._keeper = keeper
        self._settings = settings
        self._prefix = prefix
        self._order = order or OrderOfTimes(prefix, {})
        self._numbers = itertools.count()
        self.failures_in_a_row = 0

    def begin(
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
        wait: bool,
    ) -> StepControl:
        """Check what the user asks for, and send it on its way; parameters as of ``DecentralizedAverager.step``.

        :param serializer: encodes what members gather, and decodes what they have gathered
        """
        now = dht_clock()
        if timeout is not None:
            check_number("timeout", timeout, above=0)
            self._order.check(STEP_TIMEOUT, timeout)
        deadline = None if timeout is None else now + timeout
        if scheduled_time is None:
            scheduled_time = default_start(now, deadline, self._settings)
        else:
            check_scheduled_time(scheduled_time, deadline)
        if weight is None:
            weight = 1.0
        check_weight(weight)
        check_flag("allow_retries", allow_retries)
        check_flag("require_trigger", require_trigger)
        command = RunStep(
            next(self._numbers),
            float(weight),
            _encode(serializer, gather),
            dht_clock.to_steady(float(scheduled_time)),
            None if deadline is None else dht_clock.to_steady(deadline),
            allow_retries,
            require_trigger,
        )
        self._keeper.store.mark_stream()
        control = StepControl(
            scheduled_time=float(scheduled_time),
            deadline=deadline,
            weight=command.weight,
            needs_trigger=require_trigger,
            steering=Steering(
                trigger=lambda: handle.call(AllowAllreduce(command.step)),
                reschedule=lambda time: handle.call(Reschedule(command.step, dht_clock.to_steady(time))),
                would_wait_for_itself=lambda: self._keeper.store.held_by_this_thread,
            ),
        )
        self._keeper.controls[command.step] = control
        try:
            call: MPFuture[StepOutcome] = handle.call(command)
        except BaseException:
            del self._keeper.controls[command.step]
            raise
        control.follow(call)
        conclude = partial(self._conclude, control, command.step, serializer, wait)
        # Past the dispatch of MPFuture: callbacks of users may be waiting on that thread for this very step.
        Future.add_done_callback(call, lambda call: self._keeper.strand.submit(partial(conclude, call)))
        return control

    def _conclude(self, control: StepControl, step: int, serializer: Any, wait: bool, call: Any) -> None:
        """The call of a step is done: the step ends, whatever happens. Runs on the averager's own strand."""
        self._keeper.controls.pop(step, None)
        try:
            self._hand_on(control, serializer, wait, call)
        except BaseException as e:
            control.fail(e)  # nobody would do it later
            raise

    def _hand_on(self, control: StepControl, serializer: Any, wait: bool, call: Any) -> None:
        if call.cancelled():
            if not control.cancelled():
                reason = "the averager was shut down during the step"
                if wait:
                    logger.warning(_FAILED, self._prefix, reason)
                control.fail(AllreduceException(reason))
            return
        error = call.exception()
        if error is not None:
            control.fail(error)
            return
        outcome: StepOutcome = call.result()
        self._keeper.last_report = outcome.report
        failure = outcome.report.failure
        if failure is None:
            self.failures_in_a_row = 0
            gathered = {PeerID.from_bytes(peer): data for peer, data in outcome.gathered}
            control.succeed(
                outcome.report, {peer: _decode(serializer, peer, data) for peer, data in gathered.items()}
            )
            return
        self.failures_in_a_row += 1
        self._warn(failure, wait)
        kind = AllreduceException if outcome.found_group else MatchmakingException
        control.fail(kind(failure), outcome.report)

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
        raise InvalidTypeError(f"serializer={serializer!r}: a class with dumps() and loads() is allowed")
    try:
        encoded = serializer.dumps(gather)
    except (InvalidTypeError, InvalidValueError) as e:
        raise type(e)(f"gather: {e}") from None
    if not isinstance(encoded, bytes | bytearray):
        raise InvalidTypeError(
            f"serializer={serializer!r}: its dumps() made {type(encoded).__name__} of gather; bytes are allowed"
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
