"""The leader's part of a round: who is ready, whom the round goes on without, and whether it commits. Pure.

The rules:

- A member that reported *ready* holds every average. It is never excluded afterwards, and its loss changes nothing.
- A member that is lost, gives up or cannot get an owner's averages before it was ready is excluded: the group goes on
  without it. If others may still need averages of its span, the round fails instead, for everybody. (This is the
  place for successors of owners: a span would be taken over in a new epoch.)
- When every span has been averaged, each member that is still not ready, and each owner that has not said so, is
  *awaited*: the group goes on without it if it does nothing for too long.
- The round commits when everybody who is not excluded is ready, and every owner that still serves has said which
  weights it used. Auxiliary members apply nothing and are not waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.averaging.allreduce.events import (
    AnnounceExclusion,
    AnnounceOutcome,
    Effect,
    ExchangeBegan,
    JoinTimedOut,
    MemberLost,
    MemberReported,
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
    Ready,
    Report,
    SenderExcluded,
    SpanAveraged,
    StandsAside,
    add_up,
    exclusion_text,
    reason_text,
)
from shoal.averaging.allreduce.part_clocks import PartClocks
from shoal.errors import ProtocolViolation
from shoal.sansio.core import TimePassed

PROGRESS_INTERVAL = 1.0
"""Seconds between two words of a member to the leader about averages that it has taken."""

CoordinatorEvent = ExchangeBegan | MemberReported | MemberLost | JoinTimedOut | Withdrawn | TimePassed


@dataclass
class Coordinator:
    """What the leader knows of the group. Its effects are announcements, which hold for the leader itself, too.

    ``timeout``: seconds after which the group goes on without a member that is awaited; None: never.
    """

    roles: Roles
    timeout: float | None = None
    outcome: Outcome | None = None
    _began: float | None = None
    _clocks: PartClocks = field(init=False)
    """Of the members that are awaited."""
    _ready: dict[int, float] = field(default_factory=dict)
    """Weights of the members that are ready."""
    _excluded: dict[int, Excluded] = field(default_factory=dict)
    _gone: set[int] = field(default_factory=set)
    """Members that serve nobody any more."""
    _spans: dict[int, SpanAveraged] = field(default_factory=dict)
    _stranded_by: set[int] = field(default_factory=set)
    """Owners whose averages an excluded member, which owns nothing, could not get: if such an owner turns out to be
    lost, it was not that member's fault, and the round fails.
    """
    _undialable: set[int] = field(default_factory=set)
    """Owners that members could not dial."""
    _received: dict[int, int] = field(default_factory=dict)
    """Averages that members said they have taken."""
    _told: dict[int, tuple[int, float]] = field(default_factory=dict)
    """The weight that each member told, and to whom first."""

    def __post_init__(self) -> None:
        limit = self.timeout
        self._clocks = PartClocks(None if limit is None else limit + PROGRESS_INTERVAL)

    @property
    def deadline(self) -> float:
        """When the patience with a member that is awaited ends."""
        return self._clocks.deadline

    def handle(self, event: CoordinatorEvent, now: float) -> list[Effect]:
        """Take in one event; return what is to be announced.

        :raises ProtocolViolation: no honest member would have reported that; nothing has changed
        """
        effects = self._take(event, 0.0 if self._began is None else now - self._began, now)
        awaited = self.awaited
        for member in self.roles.others:
            if member not in awaited:
                self._clocks.stop(member)
            elif not self._clocks.runs(member):
                self._clocks.start(member, now)
        return effects

    def _take(self, event: CoordinatorEvent, seconds: float, now: float) -> list[Effect]:
        match event:
            case MemberReported(member, report):
                if isinstance(report, AveragesReceived):
                    self._clocks.stop(member)
                return self._on_report(member, report, seconds)
            case MemberLost(member, reason):
                return self._lose(member, reason, seconds)
            case JoinTimedOut(member, reason):
                return self._lose(member, reason, seconds, "join")
            case Withdrawn(reason):
                return self.fail(f"the leader gave up: {reason}")
            case ExchangeBegan():
                self._began = now
            case TimePassed(late):
                self._clocks.shift(late)
                return self._on_time(seconds, now)
        return []

    def _on_time(self, seconds: float, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for member in self._clocks.expired(now):
            self._clocks.stop(member)
            reason = f"everything was averaged, but it said nothing for {self._clocks.timeout:g} s"
            effects += self._pass_over(member, reason, seconds)
        return effects

    def _on_report(self, member: int, report: Report, seconds: float) -> list[Effect]:
        if self.outcome is not None:
            return []
        match report:
            case Ready(weight):
                return self._on_ready(member, weight)
            case AveragesReceived(count):
                return self._on_progress(member, count)
            case SpanAveraged():
                return self._on_span(member, report)
            case GaveUp(reason):
                if member in self._ready:
                    raise ProtocolViolation(f"{self.roles.name(member)} gave up after it had reported ready")
                story = f"{self.roles.name(member)} gave up: {reason}"
                return self._on_gone(member, "exchange", seconds, reason, story)
            case StandsAside(phase, reason):
                if member in self._ready:
                    raise ProtocolViolation(
                        f"{self.roles.name(member)} stood aside after it had reported ready"
                    )
                return self._exclude(member, phase, seconds, reason)
            case SenderExcluded(sender, reason):
                return self._on_sender_excluded(member, sender, seconds, reason)
            case OwnerFailed():
                return self._on_owner_failed(member, report, seconds)

    def _lose(self, member: int, reason: str, seconds: float, phase: str = "exchange") -> list[Effect]:
        """The connection to a member ended, or it never joined."""
        if self.outcome is not None or member in self._gone:
            return []
        return self._on_gone(member, phase, seconds, reason, f"lost {self.roles.name(member)}: {reason}")

    @property
    def awaited(self) -> set[int]:
        """Members that hold up the decision though every span has been averaged: all owners said so, or the leader
        itself, which is ready, holds all averages. An excluded or auxiliary leader never does: then it counts that
        somebody else is ready, or that everybody has sent what the leader averages, so that whoever is alive says how
        it gets on. An owner that the leader lost is awaited in any case: it may have ended without a word.
        """
        if self.outcome is not None:
            return set()
        unready = {member for member in self._committers() if member not in self._ready}
        unreported = {
            owner for owner in self._owners() if owner not in self._spans and owner not in self._gone
        }
        leader = self.roles.leader
        takes_none = leader not in self._committers()
        is_under_way = takes_none and (bool(self._ready) or leader in self._spans)
        if unready and unreported and leader not in self._ready and not is_under_way:
            return self._stranded_by & (unready | unreported) if takes_none else set()
        return (unready | unreported) - {leader}

    def _pass_over(self, member: int, reason: str, seconds: float) -> list[Effect]:
        """An awaited member has done nothing for too long."""
        if self.outcome is not None:
            return []
        if member in self._committers() and member not in self._ready:
            return self._exclude(member, "exchange", seconds, reason)
        return self._lose(member, reason, seconds)

    def fail(self, reason: str) -> list[Effect]:
        """The leader fails the round for everybody."""
        if self.outcome is not None:
            return []
        undialable = tuple(sorted(self._undialable))
        return self._decide(Outcome(reason_text(reason), self._exclusions(), undialable=undialable))

    # reports

    def _on_ready(self, member: int, weight: float) -> list[Effect]:
        if member in self._ready or not self.roles.contributes[member]:
            raise ProtocolViolation(f"{self.roles.name(member)} reported ready, twice or without tensors")
        if member in self._excluded:
            return []  # its report and the notice of its exclusion crossed
        self._ready[member] = weight
        return self._hear_weight(member, member, weight) or self._settle()

    def _on_progress(self, member: int, count: int) -> list[Effect]:
        if member in self._ready or not self._received.get(member, 0) < count < sum(self.roles.parts_owned):
            raise ProtocolViolation(
                f"{self.roles.name(member)} took {count} averages, out of turn or too many"
            )
        self._received[member] = count
        return []

    def _on_span(self, owner: int, report: SpanAveraged) -> list[Effect]:
        if owner in self._spans or not self.roles.parts_owned[owner]:
            raise ProtocolViolation(
                f"{self.roles.name(owner)} reported a span twice, or one that it does not own"
            )
        self._spans[owner] = report
        for member, weight in enumerate(report.weights):
            if weight is not None and self.roles.contributes[member]:
                failed = self._hear_weight(owner, member, weight)
                if failed:
                    return failed
        return self._settle()

    def _hear_weight(self, witness: int, member: int, weight: float) -> list[Effect]:
        """All that heard a member's weight must have heard the same one."""
        first, told = self._told.setdefault(member, (witness, weight))
        if told == weight:
            return []
        name = self.roles.name
        return self.fail(
            f"{name(member)} contributed with different weights: {told:g} by the word of {name(first)}, "
            f"{weight:g} by that of {name(witness)}"
        )

    def _on_sender_excluded(self, owner: int, sender: int, seconds: float, reason: str) -> list[Effect]:
        if not self.roles.parts_owned[owner] or not self.roles.contributes[sender] or owner == sender:
            raise ProtocolViolation(f"{self.roles.name(owner)} excluded a member from which it gets nothing")
        if sender in self._ready:
            return []  # it has everything, so nothing is missing from it either
        return self._exclude(sender, "exchange", seconds, f"excluded by {self.roles.name(owner)}: {reason}")

    def _on_owner_failed(self, member: int, report: OwnerFailed, seconds: float) -> list[Effect]:
        roles, owner = self.roles, report.owner
        if member in self._ready or not roles.parts_owned[owner] or owner == member:
            raise ProtocolViolation(
                f"{roles.name(member)} misses averages that it has or that nobody owes it"
            )
        if member in self._excluded:
            return []
        if report.loss is Loss.UNDIALABLE:
            self._undialable.add(owner)
        story = f"{roles.name(member)} got no averages from {roles.name(owner)}: {report.reason}"
        if owner in self._gone or roles.parts_owned[member]:
            return self.fail(story)
        others = (one for one in self._committers() if one not in (member, owner))
        if report.loss is Loss.TIMED_OUT and (member == roles.leader or next(others, None) is None):
            return self.fail(story)  # who owns nothing is believed where nobody is left to know better
        self._stranded_by.add(owner)
        return self._exclude(
            member, "exchange", seconds, f"it got no averages from {roles.name(owner)}: {report.reason}"
        )

    # exclusion

    def _on_gone(self, member: int, phase: str, seconds: float, reason: str, story: str) -> list[Effect]:
        self._gone.add(member)
        if member in self._stranded_by:
            return self.fail(story)
        if member in self._ready:
            return self._settle()
        if self._is_needed(member):
            return self.fail(story)
        return self._exclude(member, phase, seconds, reason)

    def _is_needed(self, owner: int) -> bool:
        """Whether somebody may still wait for averages of this member's span."""
        return self.roles.parts_owned[owner] > 0 and any(
            member not in self._ready and member != owner for member in self._committers()
        )

    def _exclude(self, member: int, phase: str, seconds: float, reason: str) -> list[Effect]:
        if member in self._excluded:
            return self._settle()
        notice = Excluded(member, phase, max(0.0, seconds), exclusion_text(reason, self.roles.size))
        self._excluded[member] = notice
        return [AnnounceExclusion(notice), *self._settle()]

    # decision

    def _committers(self) -> list[int]:
        """Everybody who will apply the average if the round commits."""
        members = range(self.roles.size)
        return [one for one in members if self.roles.contributes[one] and one not in self._excluded]

    def _owners(self) -> list[int]:
        return [owner for owner, parts in enumerate(self.roles.parts_owned) if parts]

    def _settle(self) -> list[Effect]:
        committers = self._committers()
        if not committers:
            first = next(iter(self._excluded.values()))
            return self.fail(f"no member is left: {self.roles.name(first.member)}: {first.reason}")
        owners = self._owners()
        if any(member not in self._ready for member in committers):
            return []
        if any(owner not in self._spans and owner not in self._gone for owner in owners):
            return []
        spans = [self._spans.get(owner) for owner in owners]
        weights = [0.0] * self.roles.size
        for member in committers:
            weights[member] = self._ready[member]
        return self._decide(
            Outcome(
                None,
                self._exclusions(),
                tuple(weights),
                add_up(None if span is None else span.square_distance for span in spans),
                add_up(None if span is None else span.square_average for span in spans),
            )
        )

    def _decide(self, outcome: Outcome) -> list[Effect]:
        self.outcome = outcome
        return [AnnounceOutcome(outcome)]

    def _exclusions(self) -> tuple[Excluded, ...]:
        return tuple(self._excluded.values())
