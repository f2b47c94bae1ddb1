"""Whole groups of the pure core of a round on a network of messages, made from a seed: no sockets, no event loop.

:class:`Cores` does what the shells do, in simulated time. Members are killed, frozen and cut off at any moment, links
lose what is on its way, and streams end at each side by itself. Values are symbols: an average is the set of members
that are in it, with their weights. So :meth:`Cores.check` can compare every part with what the outcome says::

    group = Cores(random.Random(7), size=5)
    group.at(0.2, lambda: group.kill(2))
    group.run()
    group.check()
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from shoal.averaging.allreduce.assignment import Repair, Span, SpanId
from shoal.averaging.allreduce.commit import answer_question, to_event
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.effects import (
    AnnounceExclusion,
    AnnounceOutcome,
    AnnounceRepair,
    AskForAcceptance,
    AskForOutcome,
    AskForPromise,
    AveragePart,
    DropSender,
    Effect,
    Finish,
    FollowLeader,
    LeadMembers,
    OpenSpans,
    Reply,
    ReturnAverage,
    ReturnReport,
    StopContributing,
    StopLeading,
    TellLeader,
    VoidSpans,
)
from shoal.averaging.allreduce.events import (
    DECIDED,
    OVER,
    AverageReceived,
    Event,
    ExchangeOpened,
    ExcludedByOwner,
    ExclusionReceived,
    JoinTimedOut,
    Lead,
    MemberAnswered,
    MemberLost,
    MemberReported,
    OutcomeReceived,
    OwnerLost,
    PartAveraged,
    PartDelivered,
    PartSent,
    Phase,
    RepairReceived,
    Roles,
    RoundTimeouts,
    SenderLost,
    SnapshotFailed,
    SnapshotTaken,
    SpanReceived,
    WeightDeclared,
    Withdrawn,
)
from shoal.averaging.allreduce.messages import (
    AskOutcome,
    Excluded,
    Loss,
    Outcome,
    Prepare,
    Propose,
    Question,
    Report,
    SpanAveraged,
)
from shoal.sansio.core import NEVER, TimePassed
from shoal.testing.links import ASK_TIMEOUT, Links, Node, SimulatedStream

__all__ = ["Cores", "Value"]

Value: TypeAlias = frozenset[tuple[int, float]]
"""What stands for an average: the members in it, with their weights."""

REFUSED_FOR = 2.5
JOIN_TIMEOUT = 15.0
LIMIT = 600.0
"""Simulated seconds in which every round ends, whatever happens."""
PREFIX, GROUP = "test", b"g" * 16


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class _Asked:
    """A question of one member to others."""

    by: int
    question: Question
    term: int | None
    burials: int = 0


@dataclass(eq=False)
class _Serving:
    """An own span at its owner."""

    span: Span
    streams: dict[int, SimulatedStream] = field(default_factory=dict)
    arrived: dict[int, dict[int, float]] = field(default_factory=dict)
    """For each part: the weight of each member that delivered it."""
    cut: dict[int, int] = field(default_factory=dict)
    """Members of which only the first parts count."""


class _Member(Node):
    """One core, and the state of its shell."""

    def __init__(self, roles: Roles, timeouts: RoundTimeouts, weight: float) -> None:
        super().__init__()
        self.core = AllReduce(roles, timeouts)
        self.weight = weight
        self.serving: dict[SpanId, _Serving] = {}
        self.taking: dict[SpanId, SimulatedStream] = {}
        self.averages: dict[int, Value] = {}
        """Of each part that this member holds."""
        self.words: list[Event] = []
        """What this leader has announced in its term, for members that join later."""
        self.followers: dict[int, SimulatedStream] = {}
        self.following: SimulatedStream | None = None
        self.refused_since: dict[int, float] = {}
        self.has_snapshot = False
        self.timer = NEVER
        self.bad_part: int | None = None
        """From which part on what it sends is not finite."""


class Cores(Links[_Member]):
    """A group in simulated time.

    :param rng: decides sizes, roles, weights and delays
    :param latency: seconds that a message takes, about
    """

    def __init__(
        self,
        rng: random.Random,
        size: int,
        *,
        auxiliaries: float = 0.1,
        clients: float = 0.2,
        parts: tuple[int, ...] = (0, 1, 3, 5),
        latency: float = 0.02,
        timeouts: RoundTimeouts | None = None,
        min_size: int = 1,
    ) -> None:
        contributes = [rng.random() >= auxiliaries for _ in range(size)]
        contributes[rng.randrange(size)] = True
        serves = [member == 0 or rng.random() >= clients for member in range(size)]
        owned = tuple(rng.choice(parts) if can else 0 for can in serves)
        weights = [rng.choice((0.0, 2.0)) if rng.random() < 0.2 else 1.0 for _ in range(size)]
        weights[contributes.index(True)] = 1.0
        self.timeouts = timeouts or RoundTimeouts(None, 20.0, 40.0)
        self.parts = sum(owned)
        roles = [Roles(me, owned, tuple(contributes), (), tuple(serves), min_size) for me in range(size)]
        members = [_Member(roles[me], self.timeouts, weights[me]) for me in range(size)]
        super().__init__(rng, members, serves, latency)
        for me in range(size):
            self.at(rng.random() * 0.1, lambda me=me: self._begin(me))  # type: ignore[misc]

    # how it goes

    def run(self, until: float = LIMIT) -> None:
        """Go on until nothing is left to happen, or everybody's round is over.

        :raises Violation: some round has not ended by then
        """
        while self._queue and self._queue[0][0] <= until:
            self.now, _, what = heapq.heappop(self._queue)
            what()
            if all(one.core.phase in OVER for one in self.living()):
                return
        waiting = [me for me, one in self._living() if one.core.phase not in OVER]
        if waiting and until >= LIMIT:
            raise Violation(f"the round never ends for {waiting}: {self.describe()}")

    def living(self) -> list[_Member]:
        return [one for one in self.members if one.is_alive]

    def _living(self) -> Iterator[tuple[int, _Member]]:
        return ((me, one) for me, one in enumerate(self.members) if one.is_alive)

    def describe(self) -> str:
        """Where everybody stands."""
        return "; ".join(
            f"{me}: {one.core.phase.name if one.is_alive else 'dead'} {one.core.election.lead.name} "
            f"{one.core.failure or ''}"
            for me, one in enumerate(self.members)
        )

    # what users do

    def withdraw(self, member: int) -> None:
        """The user of a member cancels its step."""
        self.log.append(f"{self.now:.3f} withdraw {member}")
        self.do(member, lambda: self._feed(member, Withdrawn("cancelled")))

    # the shell of one member

    def snapshot_after(self, member: int) -> float:
        """Seconds after which a member's user has its tensors ready."""
        return self.rng.random() * 0.2

    def _begin(self, me: int) -> None:
        one = self.members[me]
        one.has_begun = True
        self.do(me, lambda: self._open(me, one.core.ledger.assignment.spans))
        if me != 0:
            self.do(me, lambda: self._follow(me, 0, 0))
        else:
            self.later(JOIN_TIMEOUT, lambda: self.do(0, lambda: self._expect(0, 0)))
        self.later(self.snapshot_after(me), lambda: self.do(me, lambda: self._take_snapshot(me)))

    def _take_snapshot(self, me: int) -> None:
        one = self.members[me]
        one.has_snapshot = True
        self._feed(me, SnapshotTaken(one.weight))
        for span, stream in list(one.taking.items()):
            self._contribute(me, span, stream)

    def fail_snapshot(self, me: int) -> None:
        """This member has nothing to contribute."""
        self.do(me, lambda: self._feed(me, SnapshotFailed("not finite")))

    def _expect(self, me: int, term: int) -> None:
        one = self.members[me]
        for member in one.core.roles.others:
            if member not in one.followers and one.core.election.term == term:
                self._feed(me, JoinTimedOut(member, "it did not join"))

    def _feed(self, me: int, event: Event | TimePassed) -> None:
        one = self.members[me]
        pending: list[Event | TimePassed] = [event]
        while pending and one.is_alive:
            for effect in one.core.handle(pending.pop(0), self.now):
                pending.extend(self._carry_out(me, effect))
        self._set_timer(me)

    def wake(self, me: int) -> None:
        """See :class:`.links.Links`."""
        self._set_timer(me)

    def _set_timer(self, me: int) -> None:
        one = self.members[me]
        deadline = one.core.deadline
        if deadline < one.timer and deadline != NEVER:
            one.timer = deadline
            self.at(deadline, lambda: self.do(me, lambda: self._on_timer(me, deadline)))

    def _on_timer(self, me: int, due: float) -> None:
        one = self.members[me]
        if one.timer == due:
            one.timer = NEVER
        if one.core.deadline <= self.now:
            late = self.now - due
            self._feed(me, TimePassed(late if late > 0.1 else 0.0))
        self._set_timer(me)

    def _carry_out(self, me: int, effect: Effect) -> list[Event]:  # noqa: C901 - one case an effect
        one = self.members[me]
        match effect:
            case AveragePart(span, index):
                return self._average(me, span, index)
            case ReturnAverage(span, index):
                serving = one.serving[span]
                value = one.averages[serving.span.first + index]
                for stream in serving.streams.values():
                    self.send(stream, me, ("average", index, value))
            case ReturnReport(report):
                for stream in one.serving[report.span].streams.values():
                    self.send(stream, me, report)
            case DropSender(span, sender, reason):
                stream_ = one.serving[span].streams.get(sender) if span in one.serving else None
                if stream_ is not None:
                    self.send(stream_, me, ("excluded", reason))
                    stream_.closed.add(me)
            case StopContributing():
                for stream in one.taking.values():
                    self.close(stream, me)
                one.taking.clear()
            case VoidSpans(spans):
                self._void(me, spans)
            case OpenSpans(spans_):
                self._open(me, spans_)
            case TellLeader(report_):
                if one.following is not None:
                    self.send(one.following, me, report_)
            case FollowLeader(leader, term):
                self._follow(me, leader, term)
            case LeadMembers(term):
                self.later(JOIN_TIMEOUT, lambda: self.do(me, lambda: self._expect(me, term)))
            case StopLeading():
                for stream in one.followers.values():
                    self.close(stream, me)
                one.followers, one.words = {}, []
            case AnnounceExclusion(excluded):
                self._announce(me, excluded)
            case AnnounceRepair(order):
                self._announce(me, order)
            case AnnounceOutcome(outcome):
                self._announce(me, outcome)
            case AskForOutcome(members, delay, burials):
                self._ask(members, _Asked(me, AskOutcome(PREFIX, GROUP), None, burials), delay)
            case AskForPromise(members, term, delay, burials):
                self._ask(members, _Asked(me, Prepare(PREFIX, GROUP, term), term, burials), delay)
            case AskForAcceptance(members, term, outcome, delay):
                self._ask(members, _Asked(me, Propose(PREFIX, GROUP, term, outcome), term), delay)
            case Reply():
                raise Violation("an answer that nobody asked for")
            case Finish():
                self._leave(me)
        return []

    def _leave(self, me: int) -> None:
        """The round is over for a member: its streams end, it still answers questions."""
        one = self.members[me]
        for stream in [s for s in self.streams if me in (s.opener, s.server)]:
            if stream.kind == "commit" and stream.server == me and one.core.outcome is not None:
                continue  # its word is told to the end
            self.close(stream, me)

    # spans

    def _open(self, me: int, spans: tuple[Span, ...]) -> None:
        one = self.members[me]
        roles = one.core.roles
        for span in spans:
            if span.owner == me:
                one.serving[span.id] = _Serving(span)
            elif roles.contributes[me] and one.core.phase is Phase.EXCHANGING:
                stream = self.connect(me, span.owner, "exchange", span=span.id)
                one.taking[span.id] = stream

    def _void(self, me: int, spans: tuple[SpanId, ...]) -> None:
        one = self.members[me]
        for span in spans:
            stream = one.taking.pop(span, None)
            if stream is not None:
                self.close(stream, me)
            serving = one.serving.pop(span, None)
            if serving is not None:
                for sender in serving.streams.values():
                    self.send(sender, me, ("void",))
                    sender.closed.add(me)

    def _contribute(self, me: int, span: SpanId, stream: SimulatedStream) -> None:
        """The owner is there, and the snapshot taken: send the weight and all parts."""
        one = self.members[me]
        if stream.term != 1 or me in stream.closed or not one.has_snapshot:
            return
        live = one.core.ledger.assignment.by_id.get(span)
        if live is None:
            return
        stream.term = 2
        self.send(stream, me, ("weight", one.weight))
        self._feed(me, ExchangeOpened(span))
        if one.weight:
            for index in range(live.count):
                self.send(stream, me, ("part", index))
                self._feed(me, PartSent(span, index))

    def _average(self, me: int, span: SpanId, index: int) -> list[Event]:
        one = self.members[me]
        serving = one.serving[span]
        arrived = serving.arrived.get(index, {})
        part = serving.span.first + index
        bad = [m for m in arrived if self._is_bad(m, part)]
        value = {(m, w) for m, w in arrived.items() if m not in bad and index < serving.cut.get(m, index + 1)}
        if one.core.ledger.weight:
            value.add((me, one.core.ledger.weight))
        if not any(weight for _, weight in value):
            return [Withdrawn("nobody contributes")]
        one.averages[part] = frozenset(value)
        lost: list[Event] = [SenderLost(span, m, "NaN", Loss.INVALID, index) for m in bad]
        for member in bad:
            serving.cut[member] = index
        return [*lost, PartAveraged(span, index, 1.0, 1.0)]

    def _is_bad(self, member: int, part: int) -> bool:
        first = self.members[member].bad_part
        return first is not None and part >= first

    # streams

    def see_end(self, stream: SimulatedStream, me: int, reason: str) -> None:
        if me in stream.closed:
            return
        stream.closed.add(me)
        one = self.members[me]
        other = stream.other(me)
        if stream.kind == "commit":
            if stream.server == me:
                if stream.term == one.core.election.term:
                    self._feed(me, MemberLost(other, reason))
            elif stream is one.following:
                self._feed(me, MemberLost(other, reason))
        elif stream.span is not None and stream.opener == me:
            self._feed(me, OwnerLost(stream.span, reason))
        elif stream.span is not None:
            self._feed(me, SenderLost(stream.span, other, reason))

    def hear(self, stream: SimulatedStream, me: int, message: Any) -> None:  # noqa: C901 - one case a message
        one, other = self.members[me], stream.other(me)
        span = stream.span
        match message:
            case ("open",) if stream.kind == "commit":
                self._join(me, other, stream)
            case ("open",):
                self._serve(me, other, stream)
            case ("ready",):
                stream.term = 1
                assert span is not None
                self._contribute(me, span, stream)
            case ("weight", weight) if span in one.serving:
                self._feed(me, WeightDeclared(span, other, weight))
            case ("part", index) if span in one.serving:
                weight = one.core.ledger.collections[span].weights[other]
                one.serving[span].arrived.setdefault(index, {})[other] = weight or 0.0
                self._feed(me, PartDelivered(span, other, index))
            case ("average", index, value) if span in one.taking:
                live = one.core.ledger.assignment.by_id[span]
                one.averages[live.first + index] = value
                self._feed(me, AverageReceived(span, index))
            case SpanAveraged() if span in one.taking:
                self._feed(me, SpanReceived(message))
            case ("excluded", reason):
                stream.closed.add(me)
                assert span is not None
                self._feed(me, ExcludedByOwner(span, reason))
            case ("void",):
                stream.closed.add(me)
            case ("end",):
                self.see_end(stream, me, "it ended the round")
            case Excluded():
                self._feed(me, ExclusionReceived(message, stream.term))
            case Repair():
                self._feed(me, RepairReceived(message, stream.term))
            case Outcome():
                self._feed(me, OutcomeReceived(message))
            case _ if isinstance(message, Report.__args__) and stream.kind == "commit":
                if stream.term == one.core.election.term:
                    self._feed(me, MemberReported(other, message))

    def _serve(self, me: int, other: int, stream: SimulatedStream) -> None:
        one, span = self.members[me], stream.span
        assert span is not None
        if one.core.phase in OVER:
            self.close(stream, me)
        elif span not in one.serving:
            if span.epoch > one.core.ledger.assignment.epoch:
                self.later(0.05, lambda: self.do(me, lambda: self._serve(me, other, stream)))
            else:
                self.send(stream, me, ("void",))
        else:
            reason = one.core.ledger.collections[span].dropped.get(other)
            one.serving[span].streams[other] = stream
            if reason is not None:
                self.send(stream, me, ("excluded", reason))
                stream.closed.add(me)
                return
            self.send(stream, me, ("ready",))
            book = one.core.ledger.collections[span]
            for index in range(one.serving[span].span.count):
                if index < book._averaged:
                    value = one.averages[one.serving[span].span.first + index]
                    self.send(stream, me, ("average", index, value))
            if span in one.core.ledger.reports:
                self.send(stream, me, one.core.ledger.reports[span])

    # the leader

    def _follow(self, me: int, leader: int, term: int) -> None:
        one = self.members[me]
        one.following = self.connect(me, leader, "commit", term=term)

    def _join(self, me: int, other: int, stream: SimulatedStream) -> None:
        one = self.members[me]
        election = one.core.election
        has_left = one.core.phase in OVER and one.core.outcome is None
        leads = election.lead in (Lead.LEADING, Lead.CANDIDATE) and stream.term == election.term
        if has_left or not leads:
            self.close(stream, me)
            return
        one.followers[other] = stream
        for word in one.words:
            self.send(stream, me, word)

    def _announce(self, me: int, word: Any) -> None:
        one = self.members[me]
        one.words.append(word)
        for stream in one.followers.values():
            self.send(stream, me, word)

    # questions

    def _ask(self, members: tuple[int, ...], asked: _Asked, delay: float) -> None:
        for member in members:
            self.later(delay, lambda m=member: self.do(asked.by, lambda: self._put(m, asked)))  # type: ignore[misc]

    def _put(self, member: int, asked: _Asked) -> None:
        """A question leaves its asker."""
        me, other = asked.by, self.members[member]
        if self.members[me].core.phase in DECIDED:
            return
        can_reach = self.serves[member] or self.serves[me]
        if self.is_cut(me, member) or other.frozen_until > self.now:
            self.later(ASK_TIMEOUT, lambda: self.do(me, lambda: self._miss(member, asked, refused=False)))
        elif not other.is_alive or not can_reach:
            refused = not other.is_alive
            self.later(self.delay(), lambda: self.do(me, lambda: self._miss(member, asked, refused=refused)))
        else:
            self.later(self.delay(), lambda: self.do(member, lambda: self._answer(member, asked)))

    def _miss(self, member: int, asked: _Asked, *, refused: bool) -> None:
        """A question has found nobody, or its answer was lost."""
        one, is_dead = self.members[asked.by], False
        if refused and self.serves[member]:
            is_dead = self.now - one.refused_since.setdefault(member, self.now) >= REFUSED_FOR
        else:
            one.refused_since.pop(member, None)
        self._feed(asked.by, MemberAnswered(member, asked.term, None, is_dead, asked.burials))

    def _answer(self, member: int, asked: _Asked) -> None:
        core, me = self.members[member].core, asked.by
        answer: Any
        if isinstance(asked.question, AskOutcome):
            answer = core.answer()
        elif core.phase in OVER:
            answer = answer_question(core, asked.question, me, self.now)
        else:
            answer = self._vote(member, asked.question, me)
        event = MemberAnswered(member, asked.term, answer, burials=asked.burials)
        self.later(self.delay(), lambda: self._hear_answer(asked, event))

    def _hear_answer(self, asked: _Asked, event: MemberAnswered) -> None:
        """An answer arrives, unless the link was cut while it was on its way."""
        me, member = asked.by, event.member
        if self.is_cut(me, member):
            self.later(ASK_TIMEOUT, lambda: self.do(me, lambda: self._miss(member, asked, refused=False)))
            return
        self.members[me].refused_since.pop(member, None)
        self.do(me, lambda: self._feed(me, event))

    def _vote(self, member: int, question: Question, asker: int) -> Any:
        event = to_event(question, asker)
        assert event is not None
        answer = None
        pending: list[Event] = []
        for effect in self.members[member].core.handle(event, self.now):
            if isinstance(effect, Reply):
                answer = effect.answer
            else:
                pending += self._carry_out(member, effect)
        for event_ in pending:
            self._feed(member, event_)
        self._set_timer(member)
        return answer

    # what must hold

    @property
    def committed(self) -> list[int]:
        return [me for me, one in enumerate(self.members) if one.core.phase is Phase.COMMITTED]

    def check(self) -> str:
        """Compare how everybody ended; return in a word how the round did.

        :raises Violation: with what happened, and where everybody stands
        """
        outcomes = {one.core.outcome for one in self.members if one.core.outcome is not None}
        if len(outcomes) > 1:
            raise Violation(f"two decisions: {outcomes}; {self.log}")
        committed = self.committed
        for me, one in self._living():
            if one.core.phase not in OVER:
                raise Violation(f"{me} has not ended: {self.describe()}; {self.log}")
        if not committed:
            return "in doubt" if self._some(Phase.IN_DOUBT) else "failed"
        (outcome,) = outcomes
        if outcome.reason is not None:
            raise Violation(f"some committed a round that failed: {self.describe()}; {self.log}")
        self._check_averages(outcome, committed)
        excluded = {one.member for one in outcome.excluded}
        for me, one in self._living():
            is_excluded = me in excluded
            if is_excluded and one.core.phase is Phase.COMMITTED and one.core.roles.contributes[me]:
                raise Violation(f"{me} committed, though it was excluded: {self.describe()}; {self.log}")
        if self._some(Phase.IN_DOUBT):
            return "committed with doubts"
        if any(one.core.ledger.assignment.orders for one in self.members):
            return "repaired"
        return "committed without some" if excluded else "committed"

    def _some(self, phase: Phase) -> bool:
        return any(one.core.phase is phase for _, one in self._living())

    def _check_averages(self, outcome: Outcome, committed: list[int]) -> None:
        """Every member that committed holds, of each part, the average that the outcome says."""
        roles = self.members[0].core.roles
        expected = [
            {(member, weight) for member, weight in enumerate(outcome.weights) if weight}
            for _ in range(self.parts)
        ]
        for member, first, stop in outcome.partial:
            for part in range(first, stop):
                expected[part].add((member, self.members[member].weight))
        for me in committed:
            one = self.members[me]
            if not roles.contributes[me]:
                continue
            for part in range(self.parts):
                value = {pair for pair in one.averages.get(part, frozenset()) if pair[1]}
                if value != expected[part]:
                    raise Violation(
                        f"part {part} at {me} is {sorted(value)}, and should be {sorted(expected[part])}: "
                        f"{self.describe()}; {self.log}"
                    )
