"""The averager in the background process: takes the user's steps one after the other, finds groups, runs rounds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

from shoal.averaging.allreduce.exchange import Arena
from shoal.averaging.allreduce.round import Round, RoundResult, RoundTimeouts
from shoal.averaging.allreduce.rounds import Rounds
from shoal.averaging.background.arena import map_arena, populate
from shoal.averaging.background.slow_peers import SlowPeers
from shoal.averaging.background.state_sharing import StateService
from shoal.averaging.commands import (
    AllowAllreduce,
    ApplyAverage,
    AttachArena,
    AverageWritten,
    AveragingStage,
    BoundByWord,
    GetGroupBits,
    ReachStage,
    Reschedule,
    RunStep,
    SetGroupBits,
    StepOutcome,
    TakeSnapshot,
)
from shoal.averaging.config import AveragerConfig, retry_pause, retry_start
from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.load_balancing import load_balance_peers
from shoal.averaging.matchmaking.matchmaker import Matchmaker
from shoal.averaging.matchmaking.story import SearchStory
from shoal.averaging.partition import Layout, Partition
from shoal.averaging.report import RoundReport
from shoal.averaging.router import Router
from shoal.averaging.schema import TensorSchema
from shoal.averaging.state_commands import StateCommand
from shoal.dht.service import DHTService
from shoal.errors import AllreduceException, InvalidStateError, MatchmakingException
from shoal.runtime.memory import SharedMemory
from shoal.runtime.presence import UserProcessAbsent
from shoal.runtime.service import ServiceContext
from shoal.utils.timed import dht_clock, steady_time

logger = logging.getLogger(__name__)

WARN_AFTER_ATTEMPTS = 3
"""From as many failed groups in one step on, each failure is a warning."""

_NOT_APPLIED = (
    "found no group: until the deadline the average of an earlier step was not applied; call apply_average()"
)

T = TypeVar("T")


@dataclass
class Step:
    """One step while it runs: what was asked, and what has happened so far.

    ``start_time`` (steady seconds) is when its all-reduce is expected to begin.
    """

    command: RunStep
    start_time: float = field(init=False)
    is_searching: bool = False
    triggered: asyncio.Event = field(default_factory=asyncio.Event)
    report: RoundReport = field(init=False)

    def __post_init__(self) -> None:
        self.start_time = self.command.scheduled_time
        self.report = RoundReport(self.command.step)
        if not self.command.needs_trigger:
            self.triggered.set()

    def spend(self, **seconds: float) -> None:
        """Add seconds to phases of the report."""
        phases = self.report.phases
        total = {name: round(getattr(phases, name) + value, 6) for name, value in seconds.items()}
        self.report = replace(self.report, phases=replace(phases, **total))


class StepFailed(AllreduceException):
    """A round failed because of this peer's own tensors: another group would fare no better."""


class AveragerService:
    """Carries out the commands of one averager; see :mod:`.commands`."""

    def __init__(
        self, context: ServiceContext, config: AveragerConfig, schema: TensorSchema, dht_service: str
    ) -> None:
        dht = context.find(dht_service)
        if not isinstance(dht, DHTService):
            raise InvalidStateError(f"service {dht_service!r} is no DHT")
        self._context = context
        self._config = config
        self._layout = Layout.from_schema(schema)
        elements = self._layout.numel
        self._min_span_nbytes = (
            -(-config.min_vector_size * self._layout.data_nbytes // elements) if elements else 0
        )
        """Owned bytes are what is divided; with tensors of several dtypes an element counts with its mean size."""
        self._timeouts = RoundTimeouts(
            config.allreduce_timeout, config.effective_sender_timeout, config.effective_reducer_timeout
        )
        self._node = dht.node
        self._host = dht.node.host
        router = Router.of(self._host)
        self._rounds = Rounds(router, config.prefix, sender_timeout=config.effective_sender_timeout)
        agreement = schema.agreement(
            config.part_size_bytes, config.matchmaking.min_group_size, config.min_vector_size
        )
        self._matchmaker = Matchmaker(
            dht.node,
            router,
            prefix=config.prefix,
            schema_hash=agreement.digest(),
            agreement=agreement,
            config=config.matchmaking,
            mode=config.mode,
            bandwidth=config.bandwidth,
            initial_bits=config.initial_group_bits,
        )
        self._states = StateService(
            context,
            dht.node,
            router,
            config.prefix,
            declare_period=config.declare_state_period,
            next_chunk_timeout=config.next_chunk_timeout,
            max_state_age=config.max_state_age,
        )
        self._memory: SharedMemory | None = None
        self._arena: Arena | None = None
        self._populating: asyncio.Future[None] | None = None
        self._slow_peers = SlowPeers(config.prefix)
        self._steps: dict[int, Step] = {}
        self._turn = asyncio.Lock()
        self._arena_is_free = asyncio.Event()
        """Cleared while an average waits in the arena for the user's call."""
        self._arena_is_free.set()

    async def handle(self, command: object, descriptors: Sequence[int]) -> object:
        match command:
            case AttachArena(nbytes):
                self._attach(nbytes, descriptors)
                self._states.start()
                return None
            case StateCommand():
                return await self._states.handle(command, descriptors)
            case RunStep():
                return await self._run_step(command)
            case AllowAllreduce(step):
                if step in self._steps:
                    self._steps[step].triggered.set()
                return None
            case Reschedule(step, scheduled_time):
                self._reschedule(step, scheduled_time)
                return None
            case AverageWritten():
                self._arena_is_free.set()
                return None
            case GetGroupBits():
                return self._matchmaker.bits
            case SetGroupBits(bits):
                self._matchmaker.set_bits(bits)
                return None
        raise InvalidStateError(f"an averager has no command {type(command).__name__}")

    async def close(self) -> None:
        self._rounds.close()
        await asyncio.gather(self._matchmaker.close(), self._states.close())
        if self._populating is not None:
            await self._populating
        self._arena = None
        if self._memory is not None:
            self._memory.close()

    def _attach(self, nbytes: int, descriptors: Sequence[int]) -> None:
        (descriptor,) = descriptors
        self._memory = SharedMemory.from_descriptor(descriptor, nbytes)
        self._arena = arena = map_arena(self._memory, self._layout)
        self._populating = asyncio.ensure_future(asyncio.to_thread(populate, arena))

    def _reschedule(self, number: int, scheduled_time: float) -> None:
        step = self._steps.get(number)
        if step is None:
            return  # it has ended in the meantime
        step.start_time = scheduled_time
        if step.is_searching:
            self._matchmaker.reschedule(dht_clock.from_steady(scheduled_time))

    # steps

    async def _run_step(self, command: RunStep) -> StepOutcome:
        step = self._steps[command.step] = Step(command)
        try:
            async with asyncio.timeout(_seconds_until(command.deadline)):
                await self._turn.acquire()  # first come, first served
        except TimeoutError:
            return self._finish(step, False, "found no group: until the deadline an earlier step still ran")
        else:
            try:
                return await self._take_turn(step)
            finally:
                self._turn.release()
        finally:
            del self._steps[command.step]

    async def _take_turn(self, step: Step) -> StepOutcome:
        # Before the search: the members of a group should not have to wait for this peer's user.
        try:
            async with asyncio.timeout(_seconds_until(step.command.deadline)):
                await self._arena_is_free.wait()
        except TimeoutError:
            return self._finish(step, False, _NOT_APPLIED)
        return await self._try_until_deadline(step)

    async def _try_until_deadline(self, step: Step) -> StepOutcome:
        command, found = step.command, False
        while True:
            try:
                group = await self._find_group(step)
                found = True
                await self._run_round(step, group)
            except MatchmakingException as e:
                # what ended the groups that were found says more than that no further one came
                reason = f"{step.report.failure}; then {e}" if found else str(e)
                if isinstance(e.story, SearchStory):
                    step.report = replace(step.report, search=asdict(e.story))
                return self._finish(step, found, reason)
            except AllreduceException as e:
                step.report = replace(step.report, failure=str(e))
                time_is_up = command.deadline is not None and steady_time() >= command.deadline
                if not command.allow_retries or time_is_up or isinstance(e, StepFailed):
                    return self._finish(step, found, str(e))
                await self._prepare_retry(step, e)
                continue
            gathered = tuple((member.peer_id, member.gather) for member in group.members)
            return replace(self._finish(step, found, None), gathered=gathered)

    async def _prepare_retry(self, step: Step, failure: AllreduceException) -> None:
        attempts, deadline = step.report.attempts, step.command.deadline
        logger.log(
            logging.INFO if attempts < WARN_AFTER_ATTEMPTS else logging.WARNING,
            "%s: step %d: attempt %d failed: %s",
            self._config.prefix,
            step.command.step,
            attempts,
            failure,
        )
        await asyncio.sleep(retry_pause(attempts, _seconds_until(deadline)))
        step.start_time = retry_start(step.start_time, steady_time(), deadline, self._config.matchmaking)

    def _finish(self, step: Step, found_group: bool, failure: str | None) -> StepOutcome:
        step.report = replace(step.report, failure=failure)
        # The user process warns of failures, or hands them out.
        logger.log(
            logging.INFO if failure is None else logging.DEBUG, "%s: %s", self._config.prefix, step.report
        )
        return StepOutcome(step.report, found_group)

    async def _find_group(self, step: Step) -> GroupInfo:
        if self._config.auxiliary and not self._host.reachability.is_full:
            raise MatchmakingException(
                "found no group: auxiliary=True, but no other peer can dial this one, so that it can't assist them; "
                "see the DHT's host_maddrs and announce_maddrs"
            )
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            while True:
                try:
                    return await self._search(step)
                except UserProcessAbsent:  # others find their groups without this peer
                    logger.info(
                        "%s: step %d: left the search for a group", self._config.prefix, step.command.step
                    )
                    await self._user_is_back(step)
        finally:
            step.spend(search=loop.time() - began)

    async def _search(self, step: Step) -> GroupInfo:
        """:raises UserProcessAbsent: the search was left for that, unless a group already stood"""
        user, deadline = self._context.user, step.command.deadline
        await user.unless_absent(self._reach(step, AveragingStage.LOOKING_FOR_GROUP))
        step.is_searching = True
        try:
            with user.when_absent(self._matchmaker.leave_search):
                return await self._matchmaker.find_group(
                    start_time=dht_clock.from_steady(step.start_time),
                    deadline=None if deadline is None else dht_clock.from_steady(deadline),
                    gather=step.command.gather,
                    weight=step.command.weight,
                )
        except MatchmakingException:
            if user.absence is None:
                raise
            raise UserProcessAbsent(user.absence) from None
        finally:
            step.is_searching = False

    async def _user_is_back(self, step: Step) -> None:
        """Wait for the user's process, and choose when a group that is not full begins now."""
        user, deadline = self._context.user, step.command.deadline
        try:
            async with asyncio.timeout(_seconds_until(deadline)):
                await user.present()
        except TimeoutError:
            raise MatchmakingException(f"found no group: until the deadline the {user.absence}") from None
        step.start_time = retry_start(step.start_time, steady_time(), deadline, self._config.matchmaking)

    async def _reach(self, step: Step, stage: AveragingStage) -> None:
        await self._context.call_user(ReachStage(step.command.step, stage))

    async def _notify_bound(self, step: Step) -> None:
        await self._context.call_user(BoundByWord(step.command.step))

    async def _run_round(self, step: Step, group: GroupInfo) -> None:
        """Run one round in ``group`` and, if it commits, have the average applied.

        A step that is cancelled before the user process knew that this peer was bound leaves the tensors as they are.
        Waits for nothing before the round can be withdrawn from: the step may have been cancelled in the moment when
        the group stood.

        :raises AllreduceException: it did not commit
        """
        arena, populating = self._arena, self._populating
        if arena is None or populating is None:
            raise InvalidStateError("no arena is attached")
        partition = self._divide(group)
        waited = 0.0
        own_fault = False
        weight = step.command.weight
        notices: list[asyncio.Future[None]] = []

        async def take_snapshot() -> None:
            nonlocal waited, own_fault, weight
            loop = asyncio.get_running_loop()
            began = loop.time()
            try:
                if not step.triggered.is_set():
                    await self._reach(step, AveragingStage.AWAITING_TRIGGER)
                    await step.triggered.wait()
            finally:  # the round may fail meanwhile
                waited = loop.time() - began
            await asyncio.shield(populating)
            try:
                weight = cast("float", await self._context.call_user(TakeSnapshot(step.command.step)))
            except Exception as e:  # of the user's tensors and their devices: may be anything
                own_fault = not isinstance(e, AllreduceException)
                raise

        async def run() -> RoundResult:
            try:
                return await current.run()
            finally:
                await asyncio.gather(*notices)

        async def take_snapshot_of_user() -> None:
            try:
                await self._context.user.unless_absent(take_snapshot())
            except UserProcessAbsent as e:  # the others go on without this member
                raise AllreduceException(f"withdrew from the round: the {e}") from None

        current = Round(
            self._host,
            self._config.prefix,
            group,
            partition,
            arena,
            take_snapshot=take_snapshot_of_user,
            weight=lambda: weight,
            timeouts=self._timeouts,
            on_bound=lambda: notices.append(asyncio.ensure_future(self._notify_bound(step))),
        )
        step.report = replace(
            step.report,
            attempts=step.report.attempts + 1,
            group_id=group.group_id.hex(),
            members=tuple(str(peer) for peer in group.peer_ids),
            modes=tuple(str(member.mode) for member in group.members),
        )
        self._rounds.begin(current)
        self._matchmaker.watch_members(partial(self._rounds.lose_member, group.group_id))
        try:
            result, cancelled = await _run_to_the_end(
                run(), lambda: current.withdraw("its user cancelled the step")
            )
        finally:
            self._rounds.end(current)
        self._record(step, current, result, waited)
        self._note_reach(result)
        duration = result.allreduce_seconds
        now = asyncio.get_running_loop().time()
        self._slow_peers.note(current.held_up(duration), duration, now, group, partition)
        self._matchmaker.keep_apart(current.unreached)
        if result.failure is not None and cancelled is None:
            raise (StepFailed if own_fault else AllreduceException)(result.failure)
        if result.failure is None:
            try:  # the others apply the average, whatever matchmaking makes of this group
                if result.applies and cancelled is None:
                    # Who cancels from now on comes too late, and gets the outcome.
                    await _run_to_the_end(self._apply(step), lambda: None)
            finally:
                self._matchmaker.round_committed(group)
        if cancelled is not None:
            raise cancelled

    def _record(self, step: Step, current: Round, result: RoundResult, waited: float) -> None:
        step.spend(
            trigger=waited, snapshot=result.snapshot_seconds - waited, allreduce=result.allreduce_seconds
        )
        step.report = replace(
            step.report,
            bytes_sent=result.bytes_sent,
            bytes_received=result.bytes_received,
            weight=sum(result.weights),
            weights=result.weights,
            parts=current.part_count,
            excluded=result.exclusions,
            spread_distance=None if result.spread is None else result.spread.distance,
            spread_relative=None if result.spread is None else result.spread.relative,
        )

    def _note_reach(self, result: RoundResult) -> None:
        if result.was_undialable:
            self._node.look_again(in_doubt=True)

    async def _apply(self, step: Step) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._arena_is_free.clear()  # before the user process is asked: AverageWritten may overtake its answer
        waits_for_user = False
        try:
            waits_for_user = not await self._context.call_user(ApplyAverage(step.command.step))
        except Exception as e:  # of the user's tensors and their devices: may be anything
            raise StepFailed(
                f"the group has averaged, but the average could not be written to this peer's tensors: {e}"
            ) from e
        finally:
            if not waits_for_user:
                self._arena_is_free.set()
            step.spend(apply=loop.time() - began)

    def _divide(self, group: GroupInfo) -> Partition:
        modes = [member.mode for member in group.members]
        owned = load_balance_peers(
            self._layout.data_nbytes,
            [member.bandwidth for member in group.members],
            can_own=[mode is not PeerMode.CLIENT for mode in modes],
            contributes=[mode is not PeerMode.AUXILIARY for mode in modes],
            min_size=self._min_span_nbytes,
        )
        return Partition.create(self._layout, owned, self._config.part_size_bytes)


async def _run_to_the_end(
    work: Coroutine[Any, Any, T], on_cancel: Callable[[], None]
) -> tuple[T, asyncio.CancelledError | None]:
    """Run what must not stop half-way. Being cancelled meanwhile calls ``on_cancel``, and is returned for later."""
    running = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as e:
            cancelled = e
            on_cancel()
    return running.result(), cancelled


def _seconds_until(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - steady_time()
