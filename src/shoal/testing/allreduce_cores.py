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
from typing import Any

from shoal.averaging.allreduce.assignment import Repair, Span, SpanId
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
    OVER,
    AverageReceived,
    Event,
    ExchangeOpened,
    ExcludedByOwner,
    ExclusionReceived,
    JoinTimedOut,
    Lead,
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
    VoteHandedOn,
    WeightDeclared,
    Withdrawn,
)
from shoal.averaging.allreduce.messages import (
    Excluded,
    Loss,
    Outcome,
    Report,
    SpanAveraged,
)
from shoal.sansio.core import NEVER, TimePassed
from shoal.testing.allreduce_members import Member, Serving, Value, Violation
from shoal.testing.allreduce_votes import Votes
from shoal.testing.links import SimulatedStream

__all__ = ["Cores", "Value", "Violation"]

JOIN_TIMEOUT = 15.0
LIMIT = 600.0
"""Simulated seconds in which every round ends, whatever happens."""


class Cores(Votes):
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
        self._late: dict[int, float] = {}
        """Seconds by which members learn of their group later than the others."""
        roles = [Roles(me, owned, tuple(contributes), (), tuple(serves), min_size) for me in range(size)]
        members = [Member(roles[me], self.timeouts, weights[me]) for me in range(size)]
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

    def living(self) -> list[Member]:
        return [one for one in self.members if one.is_alive]

    def _living(self) -> Iterator[tuple[int, Member]]:
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
        self.do(member, lambda: self.feed(member, Withdrawn("cancelled")))

    def quit(self, member: int) -> None:
        """A member's process is told to end: it withdraws from its round, and says goodbye a moment later."""
        self.log.append(f"{self.now:.3f} {member} quits")
        self.do(member, lambda: self.feed(member, Withdrawn("it leaves", leaves=True)))
        self.later(0.1, lambda: self.do(member, lambda: self.leave(member)))

    def restart(self, member: int) -> None:
        """A member's process dies. One with its identity runs at once, and knows nothing of the round."""
        self.kill(member)
        self.members[member].is_back = True

    def forget(self, member: int) -> None:
        """A member does not remember the round any more, once that has ended there."""
        self.log.append(f"{self.now:.3f} {member} forgets")
        self.members[member].has_forgotten = True

    def come_late(self, member: int, seconds: float) -> None:
        """Before the round: let a member learn of its group so much later."""
        self.log.append(f"{member} comes late by {seconds:.1f}")
        self._late[member] = seconds

    # the shell of one member

    def snapshot_after(self, member: int) -> float:
        """Seconds after which a member's user has its tensors ready."""
        return self.rng.random() * 0.2

    def _begin(self, me: int) -> None:
        one = self.members[me]
        if (late := self._late.pop(me, 0.0)) > 0.0:
            self.later(late, lambda: self._begin(me))
            return
        one.has_begun = True
        early, one.inbox = one.inbox, []
        self.do(me, lambda: self._open(me, one.core.ledger.assignment.spans))
        if me != 0:
            self.do(me, lambda: self._follow(me, 0, 0))
        else:
            self.later(JOIN_TIMEOUT, lambda: self.do(0, lambda: self._expect(0, 0)))
        for what in early:
            self.do(me, what)
        self.later(self.snapshot_after(me), lambda: self.do(me, lambda: self._take_snapshot(me)))

    def _take_snapshot(self, me: int) -> None:
        one = self.members[me]
        one.has_snapshot = True
        self.feed(me, SnapshotTaken(one.weight))
        for span, stream in list(one.taking.items()):
            self._contribute(me, span, stream)

    def fail_snapshot(self, me: int) -> None:
        """This member has nothing to contribute."""
        self.do(me, lambda: self.feed(me, SnapshotFailed("not finite")))

    def _expect(self, me: int, term: int) -> None:
        one = self.members[me]
        for member in one.core.roles.others:
            if member not in one.followers and one.core.election.term == term:
                self.feed(me, JoinTimedOut(member, "it did not join"))

    def feed(self, me: int, event: Event | TimePassed) -> None:
        one = self.members[me]
        pending: list[Event | TimePassed] = [event]
        while pending and one.is_alive:
            for effect in one.core.handle(pending.pop(0), self.now):
                pending.extend(self.carry_out(me, effect))
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
            self.feed(me, TimePassed(late if late > 0.1 else 0.0))
        self._set_timer(me)

    def carry_out(self, me: int, effect: Effect) -> list[Event]:  # noqa: C901 - one case an effect
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
            case StopLeading(heir):
                for member, stream in one.followers.items():
                    if member == heir:
                        self.send(stream, me, ("casting vote",))
                    self.close(stream, me)
                one.followers, one.words = {}, []
            case AnnounceExclusion(excluded):
                self._announce(me, excluded)
            case AnnounceRepair(order):
                self._announce(me, order)
            case AnnounceOutcome(outcome):
                self._announce(me, outcome)
            case AskForOutcome() | AskForPromise() | AskForAcceptance():
                self.ask(me, effect)
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
                one.serving[span.id] = Serving(span)
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
        self.feed(me, ExchangeOpened(span))
        if one.weight:
            for index in range(live.count):
                self.send(stream, me, ("part", index))
                self.feed(me, PartSent(span, index))

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
                    self.feed(me, MemberLost(other, reason))
            elif stream is one.following:
                self.feed(me, MemberLost(other, reason))
        elif stream.span is not None and stream.opener == me:
            self.feed(me, OwnerLost(stream.span, reason))
        elif stream.span is not None:
            self.feed(me, SenderLost(stream.span, other, reason))

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
                self.feed(me, WeightDeclared(span, other, weight))
            case ("part", index) if span in one.serving:
                weight = one.core.ledger.collections[span].weights[other]
                one.serving[span].arrived.setdefault(index, {})[other] = weight or 0.0
                self.feed(me, PartDelivered(span, other, index))
            case ("average", index, value) if span in one.taking:
                live = one.core.ledger.assignment.by_id[span]
                one.averages[live.first + index] = value
                self.feed(me, AverageReceived(span, index))
            case SpanAveraged() if span in one.taking:
                self.feed(me, SpanReceived(message))
            case ("excluded", reason):
                stream.closed.add(me)
                assert span is not None
                self.feed(me, ExcludedByOwner(span, reason))
            case ("void",):
                stream.closed.add(me)
            case ("end",):
                self.see_end(stream, me, "it ended the round")
            case ("casting vote",):
                if stream is one.following and stream.term == 0:
                    self.feed(me, VoteHandedOn())
            case Excluded():
                self.feed(me, ExclusionReceived(message, stream.term))
            case Repair():
                self.feed(me, RepairReceived(message, stream.term))
            case Outcome():
                self.feed(me, OutcomeReceived(message))
            case _ if isinstance(message, Report.__args__) and stream.kind == "commit":
                if stream.term == one.core.election.term:
                    self.feed(me, MemberReported(other, message))

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
        self._check_holders()
        for decided in outcomes:
            self._check_kept(decided)
        if not committed:
            return "in doubt" if self._some(Phase.IN_DOUBT) else "failed"
        (outcome,) = outcomes
        if outcome.reason is not None:
            raise Violation(f"some committed a round that failed: {self.describe()}; {self.log}")
        self._check_averages(outcome, committed)
        excluded = {one.member for one in outcome.excluded}
        self._check_counted(outcome, excluded)
        for me, one in self._living():
            is_excluded = me in excluded
            if is_excluded and one.core.phase is Phase.COMMITTED and one.core.roles.contributes[me]:
                raise Violation(f"{me} committed, though it was excluded: {self.describe()}; {self.log}")
        if self._some(Phase.IN_DOUBT):
            return "committed with doubts"
        if any(one.core.ledger.assignment.orders for one in self.members):
            return "repaired"
        return "committed without some" if excluded else "committed"

    def _check_holders(self) -> None:
        """One member has the casting vote at most, and a founder that handed it on never used its own."""
        voters = [one.core.election.voter for one in self.members]
        holders = [me for me, voter in enumerate(voters) if voter.casts]
        has_voted = voters[0].accepted is not None or voters[0].promised > 0
        if len(holders) > 1 or (voters[0].is_closed and has_voted) or (holders and not voters[0].is_closed):
            raise Violation(f"{holders} have the casting vote: {self.describe()}; {self.log}")

    def _check_counted(self, outcome: Outcome, excluded: set[int]) -> None:
        """No member that lives fails plainly in a round that others, dead ones too, have committed counting it in."""
        for me, one in self._living():
            counts = one.core.roles.contributes[me] and me not in excluded
            if counts and one.core.phase is Phase.FAILED:
                raise Violation(f"{me} failed, though it counts: {self.describe()}; {self.log}")

    def _check_kept(self, outcome: Outcome) -> None:
        """Nobody who promised to follow the leader that decided, and counts, has averaged anew what was committed."""
        for one in self.members:
            leader, epoch = one.core.decision.coordinator, outcome.epoch
            if leader is not None and leader.outcome is not None and outcome.reason is None:
                counted = filter(outcome.counts, one.core.election.promises)
                voters = [self.members[member].core.ledger for member in counted]
                if any(voter.assignment.epoch > epoch for voter in voters):
                    raise Violation(f"a voter has dropped what it decided: {self.describe()}; {self.log}")

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
