"""The streams of one round that carry reports, the leader's word and votes."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict

from shoal.averaging.allreduce.assignment import Repair
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.effects import Reply
from shoal.averaging.allreduce.events import (
    AcceptanceAsked,
    Event,
    ExclusionReceived,
    JoinTimedOut,
    Lead,
    MemberAnswered,
    MemberLost,
    MemberReported,
    OutcomeReceived,
    PromiseAsked,
    RepairReceived,
    VoteHandedOn,
)
from shoal.averaging.allreduce.message_checks import (
    MAX_NUMBER,
    check_answer,
    check_excluded,
    check_outcome,
    check_repair,
    check_report,
)
from shoal.averaging.allreduce.messages import (
    COMMIT,
    VOTE,
    Answer,
    AskOutcome,
    Excluded,
    FromLeader,
    JoinRound,
    Knows,
    Outcome,
    Prepare,
    Propose,
    Question,
    Report,
)
from shoal.averaging.allreduce.participants import RoundCore
from shoal.averaging.codes import AveragingCode
from shoal.errors import DialOutcome, PeerUnreachable, ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.rpc import EndOfStream, Stream

logger = logging.getLogger(__name__)

ASK_TIMEOUT = 5.0
REFUSED_FOR = 2.5
"""Seconds for which a member's machine answers that nobody listens, before it is taken for dead."""


class Commitment:
    """Reports, words and votes of one member, on their way."""

    def __init__(self, shared: RoundCore) -> None:
        self._shared = shared
        self._roles = shared.core.roles
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        self._word: dict[int, asyncio.Queue[FromLeader]] = defaultdict(asyncio.Queue)
        """For each member, what the leader of this term has to say to it, from the beginning."""
        self._joined: set[int] = set()
        """Members that have joined this leader, whether or not they are still there."""
        self._streams: dict[int, Stream] = {}
        """Of those that are there."""
        self._refused_since: dict[int, float] = {}

    @property
    def leads(self) -> bool:
        return self._shared.core.election.lead is Lead.LEADING

    def report(self, report: Report) -> None:
        """Send the leader a report."""
        self._reports.put_nowait(report)

    def close(self) -> None:
        """There is nothing more to report."""
        self._reports.put_nowait(None)

    def announce(self, message: FromLeader) -> None:
        """As the leader: tell every other member, also those that join later."""
        for member in self._roles.others:
            self._word[member].put_nowait(message)

    def stop_leading(self, heir: int | None = None) -> None:
        """Have the members that follow this one look for another leader. ``heir`` gets the casting vote."""
        for member, stream in self._streams.items():
            code = AveragingCode.CASTING_VOTE if member == heir else AveragingCode.NOT_LEADING
            stream.reset(code, "it does not lead any more")
        self._streams.clear()
        self._joined.clear()
        self._word.clear()

    # as a member

    def follow_anew(self) -> None:
        """Reports from now on are for another leader."""
        self._reports = asyncio.Queue()

    async def follow_leader(self, leader: int, term: int) -> None:
        """Report to the leader of ``term``, and learn its word."""
        shared, reports = self._shared, self._reports
        try:
            async with shared.host.open_stream(shared.peers[leader], COMMIT) as stream:
                await stream.send(JoinRound(shared.prefix, shared.group_id, term))
                reporting = asyncio.ensure_future(self._send_reports(stream, reports))
                try:
                    await self._hear_leader(stream, leader, term)
                finally:
                    reporting.cancel()
                    await asyncio.wait({reporting})
        except (ShoalError, EOFError) as e:
            shared.note_failure(leader, e)
            if isinstance(e, RemoteError) and e.code == AveragingCode.CASTING_VOTE and term == 0:
                shared.feed(VoteHandedOn())
            if term == shared.core.election.term:
                shared.feed(MemberLost(leader, str(e)))

    async def _send_reports(self, stream: Stream, reports: asyncio.Queue[Report | None]) -> None:
        try:
            while (report := await reports.get()) is not None:
                await stream.send(report)
            await stream.finish()
        except ShoalError as e:
            logger.debug("a report did not reach the leader, whose stream says why: %s", e)

    async def _hear_leader(self, stream: Stream, leader: int, term: int) -> None:
        size = self._roles.size
        while True:
            message = await stream.receive()
            event: Event
            if isinstance(message, Outcome):
                event = OutcomeReceived(check_outcome(message, size))
            elif isinstance(message, Excluded):
                event = ExclusionReceived(check_excluded(message, size), term)
            elif isinstance(message, Repair):
                check_repair(message, size)
                event = RepairReceived(message, term)
            else:
                raise ProtocolViolation(f"{stream.remote} sent a payload instead of its word")
            self._shared.feed_from(event, lambda reason: MemberLost(leader, reason))
            if isinstance(message, Outcome):
                return

    # as the leader

    async def expect_members(self, timeout: float) -> None:
        """A member that does not join has left before it learned of the group, and nobody else may notice: members
        that own nothing are not dialed.
        """
        await asyncio.sleep(timeout)
        for member in self._roles.others:
            if member not in self._joined and self.leads:
                self._shared.feed(JoinTimedOut(member, f"it did not join the round within {timeout:g} s"))

    async def serve(self, stream: Stream, first: object) -> None:
        """Take a member's reports, and give it the leader's word."""
        shared, member = self._shared, self._shared.member(stream)
        election = shared.core.election
        if not isinstance(first, JoinRound):
            raise ProtocolViolation(f"{stream.remote} reports before it has joined the round")
        leads = election.lead in (Lead.LEADING, Lead.CANDIDATE) and first.term == election.term
        if not leads or (shared.is_over and shared.core.outcome is None):
            raise RemoteError(AveragingCode.NOT_LEADING, "it does not lead in this term")
        if member in self._joined:
            raise ProtocolViolation(f"{stream.remote} joined the round twice")
        self._joined.add(member)
        self._streams[member] = stream
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
            if self._streams.get(member) is stream:  # else it follows this leader in a later term already
                del self._streams[member]
            reading.cancel()
            telling.cancel()
            await asyncio.wait({reading, telling})
            if first.term == election.term:
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

    # votes

    async def ask_for_outcome(self, member: int, delay: float, burials: int) -> None:
        """Ask a member what it knows of the decision."""
        shared = self._shared
        await self._ask(member, AskOutcome(shared.prefix, shared.group_id), None, delay, burials)

    async def ask_for_promise(self, member: int, term: int, delay: float, burials: int, floor: int) -> None:
        """Ask a member for its promise to follow this one."""
        shared = self._shared
        await self._ask(member, Prepare(shared.prefix, shared.group_id, term, floor), term, delay, burials)

    async def ask_for_acceptance(self, member: int, term: int, outcome: Outcome, delay: float) -> None:
        """Propose an outcome to a member."""
        shared = self._shared
        await self._ask(member, Propose(shared.prefix, shared.group_id, term, outcome), term, delay)

    async def _ask(
        self, member: int, question: Question, term: int | None, delay: float, burials: int = 0
    ) -> None:
        await asyncio.sleep(delay)
        shared, answer, is_dead = self._shared, None, False
        try:
            async with shared.host.open_stream(shared.peers[member], VOTE, timeout=ASK_TIMEOUT) as stream:
                await stream.send(question)
                answer = read_answer(await stream.receive(), self._roles.size)
        except (ShoalError, EOFError) as e:
            logger.debug("%s does not answer: %s", self._roles.name(member), e)
            is_dead = self._is_dead(member, e)
        else:
            self._refused_since.pop(member, None)
        shared.feed(MemberAnswered(member, term, answer, is_dead, burials))

    def _is_dead(self, member: int, error: Exception) -> bool:
        """Whether nobody has listened at a member's address for so long that its process seems to have ended.

        That an address is not known says nothing: a client cannot be dialed.
        """
        if not (isinstance(error, PeerUnreachable) and error.is_refused and _has_refused(error)):
            self._refused_since.pop(member, None)
            return False
        now = asyncio.get_running_loop().time()
        return now - self._refused_since.setdefault(member, now) >= REFUSED_FOR


def answer_question(votes: AllReduce | Outcome, question: Question, member: int, now: float) -> Answer:
    """What a member answers whose own round has ended: the decision, or, as long as it knows none, it votes on."""
    event = to_event(question, member)
    if isinstance(votes, Outcome):
        return Knows(votes)
    if event is None:
        return votes.answer()
    (answer,) = (effect.answer for effect in votes.handle(event, now) if isinstance(effect, Reply))
    return answer


def to_event(question: Question, member: int) -> PromiseAsked | AcceptanceAsked | None:
    """What a question is to the core; None: it changes nothing there.

    :raises ProtocolViolation: the question is not well-formed
    """
    match question:
        case Prepare(_, _, term, floor):
            _check_term(term)
            if not 0 <= floor <= term:
                raise ProtocolViolation(f"the floor {floor} of the term {term}")
            return PromiseAsked(member, term, floor)
        case Propose(_, _, term, outcome):
            _check_term(term)
            return AcceptanceAsked(member, term, outcome)
        case AskOutcome():
            return None


def _has_refused(error: PeerUnreachable) -> bool:
    """Whether a machine answered that nobody listens. Where no address can be dialed at all, nothing is known."""
    return any(dial.outcome is DialOutcome.REFUSED for dial in error.dials)


def _check_term(term: int) -> None:
    if not 0 <= term < MAX_NUMBER:
        raise ProtocolViolation(f"the term {term}")


def read_answer(answer: object, size: int) -> Answer:
    """The answer of a member.

    :raises ProtocolViolation: it is not well-formed
    """
    if not isinstance(answer, Answer.__args__):
        raise ProtocolViolation("a payload instead of an answer")
    return check_answer(answer, size)
