"""The leader's part of a round: who is ready, whom the round goes on without, which spans others take over. Pure.

The rules:

- A member that reported *ready* holds every average. It is never excluded afterwards, and its loss changes nothing.
- A member that is lost, gives up or stands aside before it was ready is excluded: the group goes on without it.
- A span whose averages somebody still needs and whose owner is lost, or too slow, is *repaired*: it is void, and its
  parts are cut among the members that are left, in a new epoch. Members that were ready exchange again.
- When two members cannot reach each other, neither is at fault. After a short wait, by which the death of one of them
  would be known, the spans of both go to others, so that they need not talk. A member that several others cannot reach
  is at fault itself, and is excluded.
- When every span has been averaged, each member that is still not ready, and each owner that has not said so, is
  *awaited*: the group goes on without it if it does nothing for too long.
- When everybody who is not excluded is ready, and it is known of every span what was averaged, the leader *proposes* to
  commit. It proposes to fail if fewer than ``min_size`` members are left, or nobody can take over a span. The round is
  decided when a quorum of the group, as it was formed, has accepted that (:mod:`.voter`).
- Auxiliary members apply nothing and are not waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.averaging.allreduce.assignment import Assignment, Epoch, Repair, Span, SpanId
from shoal.averaging.allreduce.effects import (
    AnnounceExclusion,
    AnnounceOutcome,
    AnnounceRepair,
    AskForAcceptance,
    Effect,
)
from shoal.averaging.allreduce.events import (
    ExchangeBegan,
    JoinTimedOut,
    MemberLost,
    MemberReported,
    Phase,
    Roles,
    Withdrawn,
)
from shoal.averaging.allreduce.messages import (
    AveragesReceived,
    Excluded,
    GaveUp,
    Loss,
    Outcome,
    OwnerFailed,
    Promised,
    Ready,
    Report,
    SenderExcluded,
    SpanAveraged,
    StandsAside,
    exclusion_text,
    reason_text,
)
from shoal.averaging.allreduce.pairs import Pairs
from shoal.averaging.allreduce.part_clocks import PartClocks
from shoal.averaging.allreduce.summary import Weights, sum_up
from shoal.averaging.allreduce.voter import is_quorum
from shoal.errors import ProtocolViolation
from shoal.sansio.core import NEVER, TimePassed

PROGRESS_INTERVAL = 1.0
"""Seconds between two words of a member to the leader about averages that it has taken."""
MAX_REPAIRS = 3
"""Repairs for each member of the group: more are somebody's mistake, or malice."""

CoordinatorEvent = ExchangeBegan | MemberReported | MemberLost | JoinTimedOut | Withdrawn | TimePassed


@dataclass
class Coordinator:
    """What the leader of one term knows of the group. Its announcements hold for the leader itself, too.

    :param timeout: seconds after which the group goes on without a member that is awaited; None: never
    :param standings: what each member of its quorum said when it promised to follow; None: the founding leader, which
      nobody had to promise anything
    """

    roles: Roles
    assignment: Assignment
    timeout: float | None = None
    term: int = 0
    proposed: Outcome | None = None
    """What this leader wants decided; nothing changes any more once there is such a proposal."""
    outcome: Outcome | None = None
    """The decision."""
    _began: float | None = None
    _clocks: PartClocks[int] = field(init=False)
    """Of the members that are awaited."""
    _pairs: Pairs = field(default_factory=Pairs)
    _ready: dict[int, float] = field(default_factory=dict)
    """Weights of the members that are ready."""
    _excluded: dict[int, Excluded] = field(default_factory=dict)
    _gone: set[int] = field(default_factory=set)
    """Members that serve nobody any more."""
    _slow: dict[int, str] = field(default_factory=dict)
    """Owners that returned nothing for too long, and what was said of the first such span: they get no more."""
    _reports: dict[SpanId, SpanAveraged] = field(default_factory=dict)
    _undialable: set[int] = field(default_factory=set)
    """Owners that members could not dial."""
    _received: dict[int, int] = field(default_factory=dict)
    """Averages that members said they have taken."""
    _weights: Weights = field(default_factory=Weights)
    _accepted_by: set[int] = field(default_factory=set)
    _caster: int = 0
    """The member that has the casting vote, as far as this leader heard."""

    def __post_init__(self) -> None:
        limit = self.timeout
        self._clocks = PartClocks(None if limit is None else limit + PROGRESS_INTERVAL)

    @property
    def deadline(self) -> float:
        """When the patience with a member that is awaited ends, or two members are found unable to talk."""
        return NEVER if self.proposed is not None else min(self._clocks.deadline, self._pairs.deadline)

    @property
    def is_bound(self) -> bool:
        """Whether the round may commit by what this leader has proposed."""
        return self.proposed is not None and self.proposed.reason is None

    def take_over(
        self, standings: Mapping[int, Promised], adopted: Outcome | None, now: float
    ) -> list[Effect]:
        """Begin to lead, after the leader of a lower term was lost.

        :param standings: of all members that have promised to follow, this one among them
        :param adopted: a decision that may have been made before; then it is proposed, and nothing else
        """
        self._began = now
        if adopted is not None:
            return self._propose(adopted)
        effects: list[Effect] = []
        for member, standing in standings.items():
            for report in standing.spans:
                if report.span in self.assignment.by_id:
                    self._reports[report.span] = report
            if standing.phase in (Phase.FAILED.name, Phase.IN_DOUBT.name):
                self._gone.add(member)
            if standing.failure is not None:
                effects += self._exclude(member, "exchange", 0.0, standing.failure)
            elif (
                standing.phase == Phase.READY.name
                and standing.weight is not None
                and standing.orders == self.assignment.orders
            ):
                self._ready[member] = standing.weight
        for member in range(self.roles.size):
            if member not in standings:
                self._gone.add(member)
                effects += self._exclude(
                    member, "exchange", 0.0, "lost together with the leader, or before it"
                )
        # What a member has dropped by an order that this leader does not know is averaged again.
        void = {span for standing in standings.values() for order in standing.orders for span in order.void}
        effects += self._settle(now, void & self.assignment.by_id.keys())
        self._watch_awaited(now)
        return effects

    def handle(self, event: CoordinatorEvent, now: float) -> list[Effect]:
        """Take in one event; return what is to be announced.

        :raises ProtocolViolation: no honest member would have reported that; nothing has changed
        """
        effects = self._take(event, 0.0 if self._began is None else now - self._began, now)
        self._watch_awaited(now)
        return effects

    def _watch_awaited(self, now: float) -> None:
        awaited = self.awaited
        for member in self.roles.others:
            if member not in awaited:
                self._clocks.stop(member)
            elif not self._clocks.runs(member):
                self._clocks.start(member, now)

    def learn(self, report: SpanAveraged, now: float) -> list[Effect]:
        """The leader itself holds the averages of a span, and knows from its owner what they are made of."""
        if report.span in self.assignment.by_id:
            self._reports.setdefault(report.span, report)
        effects = self._settle(now)
        self._watch_awaited(now)
        return effects

    def accept(self, member: int, *, casts: bool = False) -> list[Effect]:
        """A member, possibly this one, accepts what was proposed. ``casts``: it has the founder's casting vote."""
        if self.proposed is None or self.outcome is not None:
            return []
        self._accepted_by.add(member)
        if casts:
            self._caster = member
        if not is_quorum(self._accepted_by, self.roles.size, self._caster):
            return []
        self.outcome = self.proposed
        return [AnnounceOutcome(self.outcome)]

    def _take(self, event: CoordinatorEvent, seconds: float, now: float) -> list[Effect]:
        if self.proposed is not None:
            return []
        match event:
            case MemberReported(member, report):
                effects = self._on_report(member, report, seconds, now)
                if isinstance(report, AveragesReceived):
                    self._clocks.stop(member)  # it starts again below
                return effects
            case MemberLost(member, reason):
                return self._on_gone(member, "exchange", seconds, reason, now)
            case JoinTimedOut(member, reason):
                return self._on_gone(member, "join", seconds, reason, now)
            case Withdrawn(reason):
                return self.fail(f"the leader gave up: {reason}")
            case ExchangeBegan():
                if self._began is None:
                    self._began = now
            case TimePassed(late):
                self._clocks.shift(late)
                self._pairs.shift(late)
                return self._on_time(seconds, now)
        return []

    def _on_time(self, seconds: float, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for member in self._clocks.expired(now):
            self._clocks.stop(member)
            reason = f"everything was averaged, but it said nothing for {self._clocks.timeout:g} s"
            if member in self._committers() and member not in self._ready:
                effects += self._exclude(member, "exchange", seconds, reason)
            else:
                self._gone.add(member)
        slow = set(self._slow)
        effects += self._separate(seconds, now)
        void = [span.id for span in self.assignment.spans if span.owner in self._slow.keys() - slow]
        return [*effects, *self._settle(now, void)]

    def fail(self, reason: str) -> list[Effect]:
        """The leader wants the round to fail for everybody."""
        if self.proposed is not None:
            return []
        undialable = tuple(sorted(self._undialable))
        return self._propose(Outcome(reason_text(reason), self._exclusions(), undialable=undialable))

    @property
    def heir(self) -> int | None:
        """The member to which the founder of an even group hands on its casting vote: the first that may lead and seems
        to live.
        """
        if self.term or self.roles.size % 2:
            return None
        out = self._gone | self._excluded.keys() | {self.roles.me}
        return next(
            (one for one in range(self.roles.size) if self.roles.serves(one) and one not in out), None
        )

    @property
    def awaited(self) -> set[int]:
        """Members that hold up the decision though every span has been averaged: all owners said so, or the leader
        itself, which is ready, holds all averages. An excluded or auxiliary leader never does: then it counts that
        somebody else is ready, or that everybody has sent what the leader averages, so that each living member says how
        it gets on.
        """
        if self.proposed is not None:
            return set()
        unready = {member for member in self._committers() if member not in self._ready}
        unreported = {span.owner for span in self._unreported()} - self._gone
        leader = self.roles.me
        takes_none = leader not in self._committers()
        own = self.assignment.owned_by(leader)
        is_under_way = takes_none and (
            bool(self._ready) or (bool(own) and all(span.id in self._reports for span in own))
        )
        if unready and unreported and leader not in self._ready and not is_under_way:
            return set()
        return (unready | unreported) - {leader}

    # reports

    def _on_report(self, member: int, report: Report, seconds: float, now: float) -> list[Effect]:
        name = self.roles.name
        match report:
            case Ready(weight, epoch):
                return self._on_ready(member, weight, epoch, now)
            case AveragesReceived(count):
                return self._on_progress(member, count)
            case SpanAveraged():
                return self._on_span(member, report, now)
            case GaveUp(reason):
                if member in self._ready:
                    raise ProtocolViolation(f"{name(member)} gave up after it had reported ready")
                return self._on_gone(member, "exchange", seconds, reason, now)
            case StandsAside(phase, reason):
                if member in self._ready:
                    raise ProtocolViolation(f"{name(member)} stood aside after it had reported ready")
                return [*self._exclude(member, phase, seconds, reason), *self._settle(now)]
            case SenderExcluded():
                return self._on_sender_excluded(member, report, seconds, now)
            case OwnerFailed():
                return self._on_owner_failed(member, report, seconds, now)

    def _on_ready(self, member: int, weight: float, epoch: Epoch, now: float) -> list[Effect]:
        if self.term and member in self._ready:
            return []  # it has said so with its promise
        if member in self._ready or not self.roles.contributes[member]:
            raise ProtocolViolation(f"{self.roles.name(member)} reported ready, twice or without tensors")
        if member in self._excluded or epoch != self.assignment.epoch:
            return []  # its report and the leader's word crossed
        self._ready[member] = weight
        return self._hear_weight(member, member, weight) or self._settle(now)

    def _on_progress(self, member: int, count: int) -> list[Effect]:
        # Of all repairs that there can be: it may have followed a leader that ordered others than this one knows.
        parts = sum(self.roles.parts_owned) * (MAX_REPAIRS * self.roles.size + 1)
        if not self._received.get(member, 0) < count <= parts:
            raise ProtocolViolation(
                f"{self.roles.name(member)} took {count} averages, out of turn or too many"
            )
        self._received[member] = count
        return []

    def _on_span(self, owner: int, report: SpanAveraged, now: float) -> list[Effect]:
        span = self.assignment.by_id.get(report.span)
        if span is None:
            return []  # it was declared void meanwhile
        if span.owner != owner:
            raise ProtocolViolation(f"{self.roles.name(owner)} reported {report.span}, which it does not own")
        self._reports[report.span] = report
        for member, weight in enumerate(report.weights):
            if weight is not None and self.roles.contributes[member]:
                failed = self._hear_weight(owner, member, weight)
                if failed:
                    return failed
        return self._settle(now)

    def _hear_weight(self, witness: int, member: int, weight: float) -> list[Effect]:
        """All that heard a member's weight must have heard the same one."""
        problem = self._weights.hear(witness, member, weight, self.roles)
        return [] if problem is None else self.fail(problem)

    def _on_sender_excluded(
        self, owner: int, report: SenderExcluded, seconds: float, now: float
    ) -> list[Effect]:
        sender, span = report.sender, self.assignment.by_id.get(report.span)
        if span is None:
            return []
        if span.owner != owner or not self.roles.contributes[sender] or owner == sender:
            raise ProtocolViolation(f"{self.roles.name(owner)} excluded a member from which it gets nothing")
        if sender in self._ready or sender in self._excluded:
            return []  # a ready one has everything, so nothing is missing from it either
        reason = f"excluded by {self.roles.name(owner)}: {report.reason}"
        if report.loss in (Loss.BROKEN, Loss.UNDIALABLE):
            return self._on_broken(owner, sender, reason, now)
        return [*self._exclude(sender, "exchange", seconds, reason), *self._settle(now)]

    def _on_owner_failed(self, member: int, report: OwnerFailed, seconds: float, now: float) -> list[Effect]:
        roles, span = self.roles, self.assignment.by_id.get(report.span)
        if span is None:
            return []
        if span.owner == member or (member in self._ready and not self.term):
            raise ProtocolViolation(
                f"{roles.name(member)} misses averages that it has or that nobody owes it"
            )
        if member in self._excluded or member in self._ready:
            # Ready in a later term: it complained to the former leader, and its promise overtook the complaint.
            return []
        story = f"it got no averages from {roles.name(span.owner)}: {report.reason}"
        if report.loss is Loss.UNDIALABLE:
            self._undialable.add(span.owner)
        return self._on_broken(member, span.owner, story, now, is_slow=report.loss is Loss.TIMED_OUT)

    # members that are lost, and pairs that cannot talk

    def _on_gone(self, member: int, phase: str, seconds: float, reason: str, now: float) -> list[Effect]:
        if member in self._gone:
            return []
        self._gone.add(member)
        excluded = [] if member in self._ready else self._exclude(member, phase, seconds, reason)
        return [*excluded, *self._settle(now)]

    def _on_broken(
        self, member: int, other: int, reason: str, now: float, *, is_slow: bool = False
    ) -> list[Effect]:
        """``member`` says that it cannot talk with ``other``: one of them may be about to be lost."""
        self._pairs.complain(member, other, reason, now, is_slow=is_slow)
        return self._settle(now)

    def _separate(self, seconds: float, now: float) -> list[Effect]:
        """Judge the pairs of which it has been known for long enough that they cannot talk."""
        out = self._gone | self._excluded.keys()
        effects: list[Effect] = []
        for fault in self._pairs.judge(now, out, self.roles):
            if fault.is_slow:
                self._slow[fault.member] = fault.reason
            else:
                effects += self._exclude(fault.member, "exchange", seconds, fault.reason)
        return effects

    def _exclude(self, member: int, phase: str, seconds: float, reason: str) -> list[Effect]:
        if member in self._excluded:
            return []
        notice = Excluded(member, phase, max(0.0, seconds), exclusion_text(reason, self.roles.size))
        self._excluded[member] = notice
        return [AnnounceExclusion(notice)]

    # repair

    def _settle(self, now: float, void: Iterable[SpanId] = ()) -> list[Effect]:
        """Repair what has to be, or propose how the round ends, if either is due."""
        if self.proposed is not None:
            return []
        left = self._committers()
        if not left:
            first = next(iter(self._excluded.values()))
            return self.fail(f"no member is left: {self.roles.name(first.member)}: {first.reason}")
        helpers = [one for one in range(self.roles.size) if not self.roles.contributes[one]]
        if len(left) + len([one for one in helpers if one not in self._gone]) < self.roles.min_size:
            lost = "; ".join(f"{self.roles.name(one.member)}: {one.reason}" for one in self._exclusions())
            return self.fail(f"fewer than min_group_size={self.roles.min_size} members are left: {lost}")
        broken = self._broken_spans() | set(void)
        if broken:
            return self._repair(broken, now)
        if any(member not in self._ready for member in left) or self._unreported():
            return []
        ready = {member: self._ready[member] for member in left}
        return self._propose(
            sum_up(self.assignment, self._reports, ready, self._exclusions(), self.roles.size)
        )

    def _broken_spans(self) -> set[SpanId]:
        """Spans that somebody still needs, and that will not come as they are assigned."""
        if all(member in self._ready for member in self._committers()) and not self._unreported():
            return set()
        out = self._excluded.keys() | self._gone
        unready = [member for member in self._committers() if member not in self._ready]
        return {
            span.id
            for span in self.assignment.spans
            if span.owner in self._gone or self._pairs.separates(span.owner, unready, out)
        }

    def _unreported(self) -> list[Span]:
        return [span for span in self.assignment.spans if span.id not in self._reports]

    def _repair(self, broken: set[SpanId], now: float) -> list[Effect]:
        out = self._excluded.keys() | self._gone
        able = [
            member
            for member in range(self.roles.size)
            if self.roles.serves(member) and member not in out and member not in self._slow
        ]
        owners = [member for member in able if not self._pairs.has(member, out)]
        lost = ", ".join(sorted({self._owner_story(span) for span in broken}))
        if not owners and able:  # each of them cannot talk with some other one: the last one has to go
            last = max(member for member in range(self.roles.size) if self._pairs.has(member, out))
            effects = self._exclude(
                last, "exchange", 0.0, "it cannot talk with another member, nor can the rest"
            )
            return [*effects, *self._settle(now)]
        if not owners:
            return self.fail(f"nobody can take over the parts of {lost}")
        if len(self.assignment.orders) >= MAX_REPAIRS * self.roles.size:
            return self.fail(f"too many repairs; the last one was of the parts of {lost}")
        epoch = Epoch(self.term, self.assignment.epoch.number + 1 if self._same_term() else 1)
        void = sorted(broken, key=lambda span: self.assignment.by_id[span].first)
        order = Repair(epoch, tuple(void), tuple(owners), self.assignment.epoch)
        self.assignment = self.assignment.after(order)
        self._ready.clear()
        effects = [  # they were ready before, and will not be again
            effect
            for member in sorted(self._gone - self._excluded.keys())
            if self.roles.contributes[member]
            for effect in self._exclude(member, "exchange", 0.0, "lost before the parts were averaged again")
        ]
        for span in broken:
            self._reports.pop(span, None)
        return [*effects, AnnounceRepair(order)]

    def _same_term(self) -> bool:
        return self.assignment.epoch.term == self.term

    def _owner_story(self, span: SpanId) -> str:
        owner = self.assignment.by_id[span].owner
        name, excluded = self.roles.name(owner), self._excluded.get(owner)
        if excluded is not None:
            return f"{name} ({excluded.reason})"
        return f"{name} ({self._slow[owner]})" if owner in self._slow else name

    # decision

    def _committers(self) -> list[int]:
        """Everybody who will apply the average if the round commits."""
        members = range(self.roles.size)
        return [one for one in members if self.roles.contributes[one] and one not in self._excluded]

    def _propose(self, outcome: Outcome) -> list[Effect]:
        self.proposed = outcome
        return [AskForAcceptance(self.roles.others, self.term, outcome)]

    def _exclusions(self) -> tuple[Excluded, ...]:
        return tuple(self._excluded.values())
