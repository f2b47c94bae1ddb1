"""The streams of one round that carry reports and decisions: between each member and the leader, and from orphans to
everybody.
"""

from __future__ import annotations

import asyncio
import logging

from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import (
    DECIDED,
    Event,
    ExclusionReceived,
    JoinTimedOut,
    MemberLost,
    MemberReported,
    OutcomeAnswered,
    OutcomeReceived,
    Phase,
)
from shoal.averaging.allreduce.messages import (
    COMMIT,
    OUTCOME,
    AskOutcome,
    Excluded,
    FromLeader,
    JoinRound,
    Outcome,
    OutcomeAnswer,
    Report,
    check_excluded,
    check_outcome,
    check_report,
)
from shoal.averaging.allreduce.participants import RoundCore
from shoal.errors import (
    ConnectionLost,
    DeadlineExceeded,
    PeerUnreachable,
    ProtocolViolation,
    RemoteError,
    ShoalError,
)
from shoal.p2p.rpc import EndOfStream, Stream

logger = logging.getLogger(__name__)

ASK_TIMEOUT = 5.0
ASK_AGAIN_AFTER = 0.25
UNREACHABLE_FOR = 20.0
"""Seconds for which an orphan cannot reach a member before it takes that member for dead: a network may be away for a
moment, and take every connection with it.
"""
REFUSED_FOR = 2.5
"""Likewise while the member's machine answers that nobody listens, or no address to dial is known."""

Answer = tuple[Phase | None, Outcome | None]


class Commitment:
    """Reports and decisions of one member, on their way."""

    def __init__(self, shared: RoundCore) -> None:
        self._shared = shared
        self._roles = shared.core.roles
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        self._word: dict[int, asyncio.Queue[FromLeader]] = {
            member: asyncio.Queue() for member in self._roles.others if self.leads
        }
        self._joined: set[int] = {self._roles.leader}

    @property
    def leads(self) -> bool:
        return self._roles.me == self._roles.leader

    def report(self, report: Report) -> None:
        """Send the leader a report."""
        self._reports.put_nowait(report)

    def close(self) -> None:
        """There is nothing more to report."""
        self._reports.put_nowait(None)

    def announce(self, message: FromLeader) -> None:
        """As the leader: tell every other member, also those that join later."""
        for queue in self._word.values():
            queue.put_nowait(message)

    # as a member

    async def follow_leader(self) -> None:
        """Report to the leader, and learn its word."""
        shared, leader = self._shared, self._roles.leader
        try:
            async with shared.host.open_stream(shared.peers[leader], COMMIT) as stream:
                await stream.send(JoinRound(shared.prefix, shared.group_id))
                reporting = asyncio.ensure_future(self._send_reports(stream))
                try:
                    await self._hear_leader(stream)
                finally:
                    reporting.cancel()
                    await asyncio.wait({reporting})
        except (ShoalError, EOFError) as e:
            shared.note_failure(leader, e)
            shared.feed(MemberLost(leader, str(e)))

    async def _send_reports(self, stream: Stream) -> None:
        try:
            while (report := await self._reports.get()) is not None:
                await stream.send(report)
            await stream.finish()
        except ShoalError as e:
            logger.debug("a report did not reach the leader, whose stream says why: %s", e)

    async def _hear_leader(self, stream: Stream) -> None:
        leader = self._roles.leader
        while True:
            message = await stream.receive()
            event: Event
            if isinstance(message, Outcome):
                event = OutcomeReceived(check_outcome(message, self._roles.size))
            elif isinstance(message, Excluded):
                event = ExclusionReceived(check_excluded(message, self._roles.size))
            else:
                raise ProtocolViolation(f"{stream.remote} sent a payload instead of its word")
            self._shared.feed_from(event, lambda reason: MemberLost(leader, reason))
            if isinstance(message, Outcome):
                return

    # as the leader

    async def expect_members(self, timeout: float) -> None:
        """Who does not join has left before it learned of the group, and nobody else may notice: members that own
        nothing are not dialed.
        """
        await asyncio.sleep(timeout)
        for member in self._roles.others:
            if member not in self._joined:
                self._shared.feed(JoinTimedOut(member, f"it did not join the round within {timeout:g} s"))

    async def serve(self, stream: Stream, first: object) -> None:
        """Take a member's reports, and give it the leader's word."""
        shared, member = self._shared, self._shared.member(stream)
        if not self.leads or not isinstance(first, JoinRound):
            raise ProtocolViolation(f"{stream.remote} reports to a member that does not lead")
        if member in self._joined:
            raise ProtocolViolation(f"{stream.remote} joined the round twice")
        self._joined.add(member)
        reading = asyncio.ensure_future(self._take_reports(stream, member))
        telling = asyncio.ensure_future(self._give_word(stream, self._word[member]))
        reason = "it ended the round"
        try:
            done, _ = await asyncio.wait({reading, telling}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except EndOfStream:
            pass  # it has nothing to say any more
        except ShoalError as e:
            reason = str(e)
            shared.note_failure(member, e)
            raise
        finally:
            reading.cancel()
            telling.cancel()
            await asyncio.wait({reading, telling})
            shared.feed(MemberLost(member, reason))

    async def _take_reports(self, stream: Stream, member: int) -> None:
        while True:
            message = await stream.receive()
            if not isinstance(message, Report.__args__):
                raise ProtocolViolation(f"{stream.remote} sent no report")
            report = check_report(message, self._roles.size)
            self._shared.feed_from(MemberReported(member, report), lambda reason: MemberLost(member, reason))

    async def _give_word(self, stream: Stream, queue: asyncio.Queue[FromLeader]) -> None:
        while True:
            message = await queue.get()
            await stream.send(message)
            if isinstance(message, Outcome):
                return

    # as an orphan

    async def ask_for_outcome(self, member: int) -> None:
        """Ask one member what it knows of the leader's decision, until it answers or counts as dead."""
        phase, outcome = None, None
        try:
            phase, outcome = await self._ask_until_dead(member)
        except (ShoalError, EOFError) as e:
            logger.debug("%s does not say how the round ended: %s", self._roles.name(member), e)
        if outcome is None and phase is not None and phase not in DECIDED:
            await asyncio.sleep(ASK_AGAIN_AFTER)
        self._shared.feed(OutcomeAnswered(member, phase, outcome))

    async def _ask_until_dead(self, member: int) -> Answer:
        loop = asyncio.get_running_loop()
        began = refused_since = loop.time()
        while True:
            try:
                return await self._ask(member)
            except (PeerUnreachable, ConnectionLost, DeadlineExceeded, RemoteError) as e:
                if isinstance(e, RemoteError) and e.code != "busy":
                    raise
                now = loop.time()
                if not (isinstance(e, PeerUnreachable) and e.is_refused):
                    refused_since = now
                if now - began >= UNREACHABLE_FOR or now - refused_since >= REFUSED_FOR:
                    raise
            await asyncio.sleep(ASK_AGAIN_AFTER)

    async def _ask(self, member: int) -> Answer:
        shared = self._shared
        async with shared.host.open_stream(shared.peers[member], OUTCOME, timeout=ASK_TIMEOUT) as stream:
            await stream.send(AskOutcome(shared.prefix, shared.group_id))
            return read_answer(await stream.receive(), self._roles.size)


def answer_outcome(core: AllReduce) -> OutcomeAnswer:
    """What a member answers to an orphan: only the leader's decision is one, not what became of the member itself."""
    return OutcomeAnswer(core.phase.name, core.outcome)


def read_answer(answer: object, size: int) -> Answer:
    """The answer of a member; a phase that this version does not know counts as no answer.

    :raises ProtocolViolation: it is not well-formed
    """
    if not isinstance(answer, OutcomeAnswer):
        raise ProtocolViolation("a payload instead of an answer")
    outcome = None if answer.outcome is None else check_outcome(answer.outcome, size)
    return (None if answer.phase is None else Phase.__members__.get(answer.phase)), outcome
