"""One attempt of a step: a round in one group and, if it commits, the average written by the user process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

from shoal.averaging.allreduce.deadlines import load
from shoal.averaging.allreduce.round import Round, RoundResult, RoundTimeouts
from shoal.averaging.background.resources import Resources
from shoal.averaging.background.step import Step, StepFailed
from shoal.averaging.commands import ApplyAverage, AveragingStage, BoundByWord, ReachStage, TakeSnapshot
from shoal.averaging.group import GroupInfo
from shoal.averaging.report import PartialContribution, PathReport
from shoal.errors import AllreduceException, InDoubt, ShoalError
from shoal.p2p.identity import PeerID
from shoal.runtime.presence import UserProcessAbsent

T = TypeVar("T")

SNAPSHOT_TIMEOUT = 600.0
"""Seconds from the beginning of a round within which the user has triggered it, and the tensors are copied."""


class Attempt:
    """Takes a step through one round; used once.

    :raises InvalidStateError: no arena is attached
    """

    def __init__(self, resources: Resources, step: Step, group: GroupInfo) -> None:
        self._resources = resources
        self._context = resources.context
        self._step = step
        self._group = group
        self._weight = step.command.weight
        self._waited = 0.0
        """Seconds until the user had triggered the round."""
        self._is_own_fault = False
        self._notices: list[asyncio.Future[object]] = []
        """What tells the user process that this peer is bound."""
        self._partition = resources.division.among(group)
        self._load = load(max((part.nbytes for part in self._partition.parts), default=0), len(group))
        self._round = Round(
            resources.host,
            resources.prefix,
            group,
            self._partition,
            resources.arena.areas,
            take_snapshot=self._snapshot_unless_absent,
            weight=lambda: self._weight,
            timeouts=self._timeouts(),
            min_size=resources.config.matchmaking.min_group_size,
            on_bound=self._on_bound,
        )

    def _timeouts(self) -> RoundTimeouts:
        deadlines = self._resources.deadlines
        if deadlines is None:
            return self._resources.timeouts
        return deadlines.timeouts(self._load)

    async def run(self) -> None:
        """Back when the average is written, or waits for the user's call.

        A step that is cancelled before the user process knew that this peer was bound leaves the tensors as they are.
        Waits for nothing before the round can be withdrawn from: the step may have been cancelled in the moment when
        the group stood.

        :raises AllreduceException: the round did not commit
        :raises InDoubt: this peer cannot know whether it did
        :raises StepFailed: because of this peer's own tensors, or these could not be written
        """
        self._note_group()
        rounds, matchmaker = self._resources.rounds, self._resources.matchmaker
        rounds.begin(self._round)
        matchmaker.watch_members(partial(rounds.lose_member, self._group.group_id))
        try:
            result, cancelled = await run_to_the_end(self._round.run(), self._give_up)
        finally:
            rounds.end(self._round)
        unreached = self._round.unreached
        note = partial(self._note, result, unreached, was_cancelled=cancelled is not None)
        if result.failure is not None:
            note()
            late = await self._settle_notices()
            self._raise_failure(result, cancelled or late)
        try:  # the others apply the average, whatever matchmaking makes of this group
            if result.applies and cancelled is None:
                # A cancellation from now on comes too late, and gets the outcome.
                await run_to_the_end(self._apply(meanwhile=note), lambda: None)
            else:
                note()
            await self._settle_notices()
        finally:
            matchmaker.round_committed(self._group, {*self._excluded(result), *unreached})
        if cancelled is not None:
            raise cancelled

    def _raise_failure(self, result: RoundResult, cancelled: asyncio.CancelledError | None) -> NoReturn:
        if cancelled is not None:
            raise cancelled
        if result.in_doubt:
            raise InDoubt(result.failure)
        raise (StepFailed if self._is_own_fault else AllreduceException)(result.failure)

    def _give_up(self) -> None:
        if self._context.is_closing:
            self._round.leave("its averager is shut down")
        else:
            self._round.withdraw("its user cancelled the step")

    async def _settle_notices(self) -> asyncio.CancelledError | None:
        """Wait until the user process has taken what it was told; it has, where it has answered anything since.

        :returns: that the step was cancelled meanwhile
        """
        return (await run_to_the_end(_all(self._notices), lambda: None))[1]

    def _on_bound(self) -> None:
        self._notices.append(asyncio.ensure_future(self._context.call_user(BoundByWord(self._step.number))))

    async def _snapshot_unless_absent(self) -> None:
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT):
                await self._context.user.unless_absent(self._snapshot())
        except UserProcessAbsent as e:  # the others go on without this member
            raise AllreduceException(f"withdrew from the round: the {e}") from None
        except TimeoutError as e:
            if isinstance(e, ShoalError):
                raise
            self._is_own_fault = True  # the next group would wait for it as long
            missing = (
                "the tensors were not copied" if self._step.triggered.is_set() else "nobody triggered it"
            )
            raise AllreduceException(
                f"withdrew from the round: {missing} within {SNAPSHOT_TIMEOUT:g} s"
            ) from None

    async def _snapshot(self) -> None:
        await self._wait_for_trigger()
        await self._resources.arena.populated()
        try:
            self._weight = cast("float", await self._context.call_user(TakeSnapshot(self._step.number)))
        except Exception as e:  # of the user's tensors and their devices: may be anything
            self._is_own_fault = not isinstance(e, AllreduceException)
            raise

    async def _wait_for_trigger(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            if not self._step.triggered.is_set():
                await self._context.call_user(ReachStage(self._step.number, AveragingStage.AWAITING_TRIGGER))
                await self._step.triggered.wait()
        finally:  # the round may fail meanwhile
            self._waited = loop.time() - began

    async def _apply(self, meanwhile: Callable[[], None]) -> None:
        """Have the user process write the average; ``meanwhile`` is called when it was asked to."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        arena_is_free = self._resources.arena.is_free
        arena_is_free.clear()  # before the user process is asked: AverageWritten may overtake its answer
        waits_for_user = False
        asking = asyncio.ensure_future(self._context.call_user(ApplyAverage(self._step.number)))
        await asyncio.sleep(0)  # it leaves
        meanwhile()
        try:
            waits_for_user = not await asking
        except Exception as e:  # of the user's tensors and their devices: may be anything
            raise StepFailed(
                f"the group has averaged, but the average could not be written to this peer's tensors: {e}"
            ) from e
        finally:
            if not waits_for_user:
                arena_is_free.set()
            self._step.spend(apply=loop.time() - began)

    def _note(self, result: RoundResult, unreached: list[PeerID], *, was_cancelled: bool) -> None:
        """Remember what the round has shown."""
        self._note_result(result)
        self._learn(result, unreached)
        self._note_doubt(result, was_cancelled=was_cancelled)

    def _note_doubt(self, result: RoundResult, *, was_cancelled: bool) -> None:
        """Learn later how the round ended, or tell the user process, which may have given the step up in doubt itself:
        it does so when a step is bound and its time is up.
        """
        if result.in_doubt:
            self._resources.doubts.look_into(self._step.number, self._round)
        elif was_cancelled and self._notices and result.applies:
            self._resources.doubts.tell(self._step.number, result.failure)

    def _learn(self, result: RoundResult, unreached: list[PeerID]) -> None:
        """Remember how long others take, which are slow, and which could not reach this peer, or not be reached."""
        duration, now = result.allreduce_seconds, asyncio.get_running_loop().time()
        if self._resources.deadlines is not None:
            self._resources.deadlines.learn(self._round.waits, self._load)
        held_up = self._round.held_up(duration)
        self._resources.slow_peers.note(held_up, duration, now, self._group, self._partition)
        self._resources.matchmaker.keep_apart(unreached)
        self._resources.matchmaker.hear_of_exclusions(self._group.leader, self._excluded(result))
        if result.was_undialable:
            self._resources.node.look_again(in_doubt=True)

    def _excluded(self, result: RoundResult) -> list[PeerID]:
        names = {exclusion.member for exclusion in result.exclusions}
        return [peer for peer in self._group.peer_ids if str(peer) in names]

    def _note_group(self) -> None:
        group = self._group
        self._step.note(
            attempts=self._step.report.attempts + 1,
            group_id=group.group_id.hex(),
            members=tuple(str(peer) for peer in group.peer_ids),
            modes=tuple(str(member.mode) for member in group.members),
        )

    def _note_result(self, result: RoundResult) -> None:
        self._step.spend(
            trigger=self._waited,
            snapshot=result.snapshot_seconds - self._waited,
            allreduce=result.allreduce_seconds,
        )
        spread = result.spread
        self._step.note(
            bytes_sent=result.bytes_sent,
            bytes_received=result.bytes_received,
            weight=sum(result.weights),
            weights=result.weights,
            parts=self._round.part_count,
            excluded=result.exclusions,
            partial=tuple(
                PartialContribution(str(self._group.peer_ids[member]), first, end)
                for member, first, end in result.partial
            ),
            repairs=result.repairs,
            in_doubt=result.in_doubt,
            spread_distance=None if spread is None else spread.distance,
            spread_relative=None if spread is None else spread.relative,
            paths=tuple(self._paths()),
        )

    def _paths(self) -> Iterator[PathReport]:
        for peer in self._group.peer_ids:
            lanes = None if peer == self._resources.host.peer_id else self._resources.host.lane_report(peer)
            if lanes is not None:
                yield PathReport(
                    str(peer),
                    lanes.lanes,
                    lanes.reason,
                    lanes.congestion_control,
                    lanes.rtt,
                    lanes.rate,
                    lanes.retransmitted / lanes.segments_sent if lanes.segments_sent else None,
                    lanes.resent,
                )


async def _all(futures: Iterable[asyncio.Future[object]]) -> None:
    await asyncio.gather(*futures)


async def run_to_the_end(
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
