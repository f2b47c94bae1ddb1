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
import itertools
import random
from collections.abc import Callable, Iterator
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

__all__ = ["Cores", "Value"]

Value: TypeAlias = frozenset[tuple[int, float]]
"""What stands for an average: the members in it, with their weights."""

DETECTION = 5.0
"""Seconds after which a connection that carries nothing is found dead, about."""
ASK_TIMEOUT = 5.0
REFUSED_FOR = 2.5
JOIN_TIMEOUT = 15.0
LIMIT = 600.0
"""Simulated seconds in which every round ends, whatever happens."""
PREFIX, GROUP = "test", b"g" * 16


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(eq=False)
class _Stream:
    """A stream between two members; each side sees its end by itself."""

    opener: int
    server: int
    kind: str
    span: SpanId | None = None
    term: int = 0
    due: dict[int, float] = field(default_factory=dict)
    """When the last message to each side arrives: they keep their order."""
    closed: set[int] = field(default_factory=set)
    """Sides that have ended it, or seen its end."""

    def other(self, member: int) -> int:
        return self.server if member == self.opener else self.opener


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
    streams: dict[int, _Stream] = field(default_factory=dict)
    arrived: dict[int, dict[int, float]] = field(default_factory=dict)
    """For each part: the weight of each member that delivered it."""
    cut: dict[int, int] = field(default_factory=dict)
    """Members of which only the first parts count."""


class _Member:
    """One core, and the state of its shell."""

    def __init__(self, roles: Roles, timeouts: RoundTimeouts, weight: float) -> None:
        self.core = AllReduce(roles, timeouts)
        self.weight = weight
        self.is_alive = True
        self.frozen_until = 0.0
        self.serving: dict[SpanId, _Serving] = {}
        self.taking: dict[SpanId, _Stream] = {}
        self.averages: dict[int, Value] = {}
        """Of each part that this member holds."""
        self.words: list[Event] = []
        """What this leader has announced in its term, for members that join later."""
        self.followers: dict[int, _Stream] = {}
        self.following: _Stream | None = None
        self.refused_since: dict[int, float] = {}
        self.has_begun = False
        """Whether it knows of the group: streams to it wait until then."""
        self.has_snapshot = False
        self.timer = NEVER
        self.inbox: list[Callable[[], None]] = []
        """What came while it was frozen."""
        self.bad_part: int | None = None
        """From which part on what it sends is not finite."""


class Cores:
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
        self.rng = rng
        self.size = size
        self.now = 0.0
        self.latency = latency
        contributes = [rng.random() >= auxiliaries for _ in range(size)]
        contributes[rng.randrange(size)] = True
        serves = [member == 0 or rng.random() >= clients for member in range(size)]
        owned = tuple(rng.choice(parts) if can else 0 for can in serves)
        weights = [rng.choice((0.0, 2.0)) if rng.random() < 0.2 else 1.0 for _ in range(size)]
        weights[contributes.index(True)] = 1.0
        self.serves = serves
        self.timeouts = timeouts or RoundTimeouts(None, 20.0, 40.0)
        self.members = [
            _Member(
                Roles(me, owned, tuple(contributes), (), tuple(serves), min_size), self.timeouts, weights[me]
            )
            for me in range(size)
        ]
        self.parts = sum(owned)
        self.streams: list[_Stream] = []
        """In the order in which they were opened, so that a seed replays exactly."""
        self.cuts: dict[tuple[int, int], int] = {}
        """Directions in which nothing arrives, and by how many cuts."""
        self._held: dict[tuple[int, int], list[tuple[_Stream, Any]]] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.log: list[str] = []
        for me in range(size):
            self.at(rng.random() * 0.1, lambda me=me: self._begin(me))  # type: ignore[misc]

    # time

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Have something happen at a time."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._count), what))

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now + seconds, what)

    def delay(self) -> float:
        return self.latency * (0.5 + self.rng.expovariate(2.0))

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

    def run_until(self, is_so: Callable[[], bool]) -> bool:
        """Go on until something is so; False: it never was."""
        while self._queue:
            if is_so():
                return True
            self.now, _, what = heapq.heappop(self._queue)
            what()
        return is_so()

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

    # faults

    def kill(self, member: int, *, machine: bool = False) -> None:
        """End a member's process; with ``machine``, in silence, as when a cable is pulled."""
        one = self.members[member]
        if not one.is_alive:
            return
        self.log.append(f"{self.now:.3f} kill {member}{' silently' if machine else ''}")
        one.is_alive = False
        one.inbox.clear()
        patience = self._patience() if machine else [self.delay() for _ in self.members]
        for stream in [s for s in self.streams if member in (s.opener, s.server)]:
            other = stream.other(member)
            stream.closed.add(member)
            self.later(patience[other], lambda s=stream, o=other: self._end(s, o, "killed"))  # type: ignore[misc]
        if machine:
            for other in range(self.size):
                self._cut(member, other, None)

    def freeze(self, member: int, seconds: float) -> None:
        """Stop a member's process for a while."""
        one = self.members[member]
        self.log.append(f"{self.now:.3f} freeze {member} for {seconds:.1f}")
        one.frozen_until = max(one.frozen_until, self.now + seconds)
        self.at(one.frozen_until, lambda: self._thaw(member))
        patience = self._patience()
        for stream in [s for s in self.streams if member in (s.opener, s.server)]:
            other = stream.other(member)
            self.later(patience[other], lambda s=stream, o=other: self._suspect(s, o))  # type: ignore[misc]

    def cut_off(self, a: int, b: int, seconds: float | None = None, *, one_way: bool = False) -> None:
        """Let nothing arrive between two members for a while; None: for good."""
        self.log.append(f"{self.now:.3f} cut {a}-{b} for {seconds} {'one way' if one_way else ''}")
        self._cut(a, b, seconds)
        if not one_way:
            self._cut(b, a, seconds)
        patience = self._patience()
        for stream in [s for s in self.streams if {a, b} == {s.opener, s.server}]:
            for end in (a, b):
                self.later(patience[end], lambda s=stream, e=end: self._suspect(s, e))  # type: ignore[misc]

    def reset(self, a: int, b: int) -> None:
        """End all streams between two members; they may open others at once."""
        self.log.append(f"{self.now:.3f} reset {a}-{b}")
        for stream in [s for s in self.streams if {a, b} == {s.opener, s.server}]:
            for end in (a, b):
                self.later(self.delay(), lambda s=stream, e=end: self._end(s, e, "reset"))  # type: ignore[misc]

    def withdraw(self, member: int) -> None:
        """The user of a member cancels its step."""
        self.log.append(f"{self.now:.3f} withdraw {member}")
        self._do(member, lambda: self._feed(member, Withdrawn("cancelled")))

    def _patience(self) -> list[float]:
        """For each member, when it finds a connection dead that falls silent now."""
        return [DETECTION * self.rng.uniform(0.8, 1.2) for _ in self.members]

    def _cut(self, source: int, target: int, seconds: float | None) -> None:
        key = (source, target)
        self.cuts[key] = self.cuts.get(key, 0) + 1
        if seconds is not None:
            self.later(seconds, lambda: self._heal(key))

    def _heal(self, key: tuple[int, int]) -> None:
        self.cuts[key] -= 1
        if not self.cuts[key]:
            del self.cuts[key]
            for stream, message in self._held.pop(key, []):
                self._arrive(stream, key[1], message)

    def _suspect(self, stream: _Stream, member: int) -> None:
        """The keep-alive of a side has heard nothing for too long, if the other side still says nothing."""
        other = stream.other(member)
        is_silent = (other, member) in self.cuts or (member, other) in self.cuts
        if is_silent or self.members[other].frozen_until > self.now:
            self._end(stream, member, "it is silent")
            # the other side learns it when it can be reached, or by its own keep-alive
            self.later(self.delay(), lambda: self._end_if_reached(stream, member, other))

    def _end_if_reached(self, stream: _Stream, source: int, member: int) -> None:
        if other_cut := (source, member) in self.cuts:
            self.later(1.0, lambda: self._end_if_reached(stream, source, member))
        if not other_cut:
            self._end(stream, member, "the connection was closed")

    def _thaw(self, member: int) -> None:
        one = self.members[member]
        if self.now >= one.frozen_until and one.is_alive:
            waiting, one.inbox = one.inbox, []
            for what in waiting:
                self._do(member, what)
            self._set_timer(member)

    # the shell of one member

    def _do(self, member: int, what: Callable[[], None]) -> None:
        """Have a member do something, as soon as it runs."""
        one = self.members[member]
        if not one.is_alive:
            return
        if one.frozen_until > self.now:
            one.inbox.append(what)
        elif not one.has_begun:
            self.later(0.01, lambda: self._do(member, what))
        else:
            what()

    def _begin(self, me: int) -> None:
        one = self.members[me]
        one.has_begun = True
        self._do(me, lambda: self._open(me, one.core.ledger.assignment.spans))
        if me != 0:
            self._do(me, lambda: self._follow(me, 0, 0))
        else:
            self.later(JOIN_TIMEOUT, lambda: self._do(0, lambda: self._expect(0, 0)))
        self.later(self.rng.random() * 0.2, lambda: self._do(me, lambda: self._take_snapshot(me)))

    def _take_snapshot(self, me: int) -> None:
        one = self.members[me]
        one.has_snapshot = True
        self._feed(me, SnapshotTaken(one.weight))
        for span, stream in list(one.taking.items()):
            self._contribute(me, span, stream)

    def fail_snapshot(self, me: int) -> None:
        """This member has nothing to contribute."""
        self._do(me, lambda: self._feed(me, SnapshotFailed("not finite")))

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

    def _set_timer(self, me: int) -> None:
        one = self.members[me]
        deadline = one.core.deadline
        if deadline < one.timer and deadline != NEVER:
            one.timer = deadline
            self.at(deadline, lambda: self._do(me, lambda: self._on_timer(me, deadline)))

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
                    self._send(stream, me, ("average", index, value))
            case ReturnReport(report):
                for stream in one.serving[report.span].streams.values():
                    self._send(stream, me, report)
            case DropSender(span, sender, reason):
                stream_ = one.serving[span].streams.get(sender) if span in one.serving else None
                if stream_ is not None:
                    self._send(stream_, me, ("excluded", reason))
                    stream_.closed.add(me)
            case StopContributing():
                for stream in one.taking.values():
                    self._close(stream, me)
                one.taking.clear()
            case VoidSpans(spans):
                self._void(me, spans)
            case OpenSpans(spans_):
                self._open(me, spans_)
            case TellLeader(report_):
                if one.following is not None:
                    self._send(one.following, me, report_)
            case FollowLeader(leader, term):
                self._follow(me, leader, term)
            case LeadMembers(term):
                self.later(JOIN_TIMEOUT, lambda: self._do(me, lambda: self._expect(me, term)))
            case StopLeading():
                for stream in one.followers.values():
                    self._close(stream, me)
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
            self._close(stream, me)

    # spans

    def _open(self, me: int, spans: tuple[Span, ...]) -> None:
        one = self.members[me]
        roles = one.core.roles
        for span in spans:
            if span.owner == me:
                one.serving[span.id] = _Serving(span)
            elif roles.contributes[me] and one.core.phase is Phase.EXCHANGING:
                stream = self._connect(me, span.owner, "exchange", span=span.id)
                one.taking[span.id] = stream

    def _void(self, me: int, spans: tuple[SpanId, ...]) -> None:
        one = self.members[me]
        for span in spans:
            stream = one.taking.pop(span, None)
            if stream is not None:
                self._close(stream, me)
            serving = one.serving.pop(span, None)
            if serving is not None:
                for sender in serving.streams.values():
                    self._send(sender, me, ("void",))
                    sender.closed.add(me)

    def _contribute(self, me: int, span: SpanId, stream: _Stream) -> None:
        """The owner is there, and the snapshot taken: send the weight and all parts."""
        one = self.members[me]
        if stream.term != 1 or me in stream.closed or not one.has_snapshot:
            return
        live = one.core.ledger.assignment.by_id.get(span)
        if live is None:
            return
        stream.term = 2
        self._send(stream, me, ("weight", one.weight))
        self._feed(me, ExchangeOpened(span))
        if one.weight:
            for index in range(live.count):
                self._send(stream, me, ("part", index))
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

    def _connect(
        self, me: int, other: int, kind: str, *, span: SpanId | None = None, term: int = 0
    ) -> _Stream:
        stream = _Stream(me, other, kind, span, term)
        self.streams.append(stream)
        can_reach = self.serves[other] or (self.serves[me] and other != me)
        if (me, other) in self.cuts or (other, me) in self.cuts:
            self.later(ASK_TIMEOUT, lambda: self._end(stream, me, "no answer"))
            stream.closed.add(other)
        elif not self.members[other].is_alive or not can_reach:
            self.later(self.delay(), lambda: self._end(stream, me, "refused"))
        else:
            self._send(stream, me, ("open",))
            if self.members[other].frozen_until > self.now:
                self.later(DETECTION, lambda: self._suspect(stream, me))
        return stream

    def _send(self, stream: _Stream, me: int, message: Any) -> None:
        if me in stream.closed:
            return
        target = stream.other(me)
        due = max(stream.due.get(target, 0.0) + 1e-9, self.now + self.delay())
        stream.due[target] = due
        self.at(due, lambda: self._arrive(stream, target, message))

    def _arrive(self, stream: _Stream, me: int, message: Any) -> None:
        key = (stream.other(me), me)
        if key in self.cuts:
            self._held.setdefault(key, []).append((stream, message))
        elif me not in stream.closed:
            self._do(me, lambda: self._hear(stream, me, message) if me not in stream.closed else None)

    def _close(self, stream: _Stream, me: int) -> None:
        """Tell the other side that the stream ends, after all that was sent."""
        if me not in stream.closed:
            self._send(stream, me, ("end",))
            stream.closed.add(me)

    def _end(self, stream: _Stream, me: int, reason: str) -> None:
        """One side sees the end of a stream."""
        self._do(me, lambda: self._see_end(stream, me, reason))

    def _see_end(self, stream: _Stream, me: int, reason: str) -> None:
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

    def _hear(self, stream: _Stream, me: int, message: Any) -> None:  # noqa: C901 - one case a message
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
                self._see_end(stream, me, "it ended the round")
            case Excluded():
                self._feed(me, ExclusionReceived(message, stream.term))
            case Repair():
                self._feed(me, RepairReceived(message, stream.term))
            case Outcome():
                self._feed(me, OutcomeReceived(message))
            case _ if isinstance(message, Report.__args__) and stream.kind == "commit":
                if stream.term == one.core.election.term:
                    self._feed(me, MemberReported(other, message))

    def _serve(self, me: int, other: int, stream: _Stream) -> None:
        one, span = self.members[me], stream.span
        assert span is not None
        if one.core.phase in OVER:
            self._close(stream, me)
        elif span not in one.serving:
            if span.epoch > one.core.ledger.assignment.epoch:
                self.later(0.05, lambda: self._do(me, lambda: self._serve(me, other, stream)))
            else:
                self._send(stream, me, ("void",))
        else:
            reason = one.core.ledger.collections[span].dropped.get(other)
            one.serving[span].streams[other] = stream
            if reason is not None:
                self._send(stream, me, ("excluded", reason))
                stream.closed.add(me)
                return
            self._send(stream, me, ("ready",))
            book = one.core.ledger.collections[span]
            for index in range(one.serving[span].span.count):
                if index < book._averaged:
                    value = one.averages[one.serving[span].span.first + index]
                    self._send(stream, me, ("average", index, value))
            if span in one.core.ledger.reports:
                self._send(stream, me, one.core.ledger.reports[span])

    # the leader

    def _follow(self, me: int, leader: int, term: int) -> None:
        one = self.members[me]
        one.following = self._connect(me, leader, "commit", term=term)

    def _join(self, me: int, other: int, stream: _Stream) -> None:
        one = self.members[me]
        election = one.core.election
        has_left = one.core.phase in OVER and one.core.outcome is None
        leads = election.lead in (Lead.LEADING, Lead.CANDIDATE) and stream.term == election.term
        if has_left or not leads:
            self._close(stream, me)
            return
        one.followers[other] = stream
        for word in one.words:
            self._send(stream, me, word)

    def _announce(self, me: int, word: Any) -> None:
        one = self.members[me]
        one.words.append(word)
        for stream in one.followers.values():
            self._send(stream, me, word)

    # questions

    def _ask(self, members: tuple[int, ...], asked: _Asked, delay: float) -> None:
        for member in members:
            self.later(delay, lambda m=member: self._do(asked.by, lambda: self._put(m, asked)))  # type: ignore[misc]

    def _put(self, member: int, asked: _Asked) -> None:
        """A question leaves its asker."""
        me, other = asked.by, self.members[member]
        if self.members[me].core.phase in DECIDED:
            return
        can_reach = self.serves[member] or self.serves[me]
        if self._is_cut(me, member) or other.frozen_until > self.now:
            self.later(ASK_TIMEOUT, lambda: self._do(me, lambda: self._miss(member, asked, refused=False)))
        elif not other.is_alive or not can_reach:
            refused = not other.is_alive
            self.later(self.delay(), lambda: self._do(me, lambda: self._miss(member, asked, refused=refused)))
        else:
            self.later(self.delay(), lambda: self._do(member, lambda: self._answer(member, asked)))

    def _is_cut(self, a: int, b: int) -> bool:
        return (a, b) in self.cuts or (b, a) in self.cuts

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
        if self._is_cut(me, member):
            self.later(ASK_TIMEOUT, lambda: self._do(me, lambda: self._miss(member, asked, refused=False)))
            return
        self.members[me].refused_since.pop(member, None)
        self._do(me, lambda: self._feed(me, event))

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
