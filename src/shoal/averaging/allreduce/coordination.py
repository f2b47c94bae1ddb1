"""The leader's part of a round: what it hears of its group, what it announces, and what it proposes. Pure.

The rules:

- A member that reported *ready* holds every average. It is never excluded afterwards, and its loss changes nothing.
- A member that is lost, gives up or stands aside before it was ready is excluded: the group goes on without it.
- So is one of which others complain for good reason (:mod:`.complaints`).
- A span whose averages somebody still needs and whose owner is lost, or too slow, is repaired in a new epoch
  (:mod:`.repair`). Members that were ready exchange again.
- When two members cannot reach each other, neither is at fault (:mod:`.pairs`). After a short wait, by which the death
  of one of them would be known, the spans of both go to others, so that they need not talk.
- When every span has been averaged, each member that is still not ready, and each owner that has not said so, is
  awaited (:mod:`.awaited`): the group goes on without it if it does nothing for too long.
- When everybody who is not excluded is ready, and it is known of every span what was averaged, the leader *proposes* to
  commit. It proposes to fail if fewer than ``min_size`` members are left, or nobody can take over a span. The round is
  decided when a quorum of the group, as it was formed, has accepted that (:mod:`.voter`).
- Auxiliary members apply nothing and are not waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal.averaging.allreduce.assignment import Assignment, Epoch, Repair, SpanId
from shoal.averaging.allreduce.awaited import Awaited
from shoal.averaging.allreduce.complaints import Complaints
from shoal.averaging.allreduce.effects import (
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
    GaveUp,
    Outcome,
    OwnerFailed,
    Promised,
    Ready,
    Report,
    SenderExcluded,
    SpanAveraged,
    StandsAside,
    reason_text,
)
from shoal.averaging.allreduce.pairs import Culprit
from shoal.averaging.allreduce.repair import Irreparable, Spans
from shoal.averaging.allreduce.roll import Roll
from shoal.averaging.allreduce.summary import Weights, sum_up
from shoal.averaging.allreduce.voter import is_quorum
from shoal.errors import ProtocolViolation
from shoal.sansio.core import NEVER, TimePassed

CoordinatorEvent = ExchangeBegan | MemberReported | MemberLost | JoinTimedOut | Withdrawn | TimePassed


class Coordinator:
    """What the leader of one term knows and wants of the group. Its announcements hold for the leader itself, too.

    :param timeout: seconds after which the group goes on without a member that is awaited; None: never
    """

    def __init__(
        self, roles: Roles, assignment: Assignment, timeout: float | None = None, term: int = 0
    ) -> None:
        self.roles = roles
        self.term = term
        self.proposed: Outcome | None = None
        """What this leader wants decided; nothing changes any more once there is such a proposal."""
        self.outcome: Outcome | None = None
        """The decision."""
        self._roll = Roll(roles)
        self._spans = Spans(assignment, term)
        self._complaints = Complaints(self._roll, self._spans, term)
        self._awaited = Awaited(self._roll, self._spans, timeout)
        self._began: float | None = None
        self._weights = Weights()
        """What members told of theirs."""
        self._accepted_by: set[int] = set()
        self._caster = 0
        """The member that has the casting vote, as far as this leader heard."""

    @property
    def assignment(self) -> Assignment:
        """The spans that count."""
        return self._spans.assignment

    @property
    def deadline(self) -> float:
        """When the patience with a member that is awaited ends, or two members are found unable to talk."""
        return NEVER if self.proposed is not None else min(self._awaited.deadline, self._complaints.deadline)

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
                self._spans.note(report)
            if standing.phase in (Phase.FAILED.name, Phase.IN_DOUBT.name):
                self._roll.gone.add(member)
            if standing.failure is not None:
                effects += self._roll.exclude(member, "exchange", 0.0, standing.failure)
            elif (
                standing.phase == Phase.READY.name
                and standing.weight is not None
                and standing.orders == self.assignment.orders
            ):
                self._roll.ready[member] = standing.weight
        for member in range(self.roles.size):
            if member not in standings:
                self._roll.gone.add(member)
                effects += self._roll.exclude(
                    member, "exchange", 0.0, "lost together with the leader, or before it"
                )
        # What a member has dropped by an order that this leader does not know is averaged again.
        void = {span for standing in standings.values() for order in standing.orders for span in order.void}
        effects += self._settle(void & self.assignment.by_id.keys())
        self._watch(now)
        return effects

    def handle(self, event: CoordinatorEvent, now: float) -> list[Effect]:
        """Take in one event; return what is to be announced.

        :raises ProtocolViolation: no honest member would have reported that; nothing has changed
        """
        effects = self._take(event, 0.0 if self._began is None else now - self._began, now)
        self._watch(now)
        return effects

    def _watch(self, now: float) -> None:
        if self.proposed is None:
            self._awaited.watch(now)
        else:
            self._awaited.stop()

    def learn(self, report: SpanAveraged, now: float) -> list[Effect]:
        """The leader itself holds the averages of a span, and knows from its owner what they are made of."""
        if report.span not in self._spans.reports:
            self._spans.note(report)
        effects = self._settle()
        self._watch(now)
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
                return self._on_report(member, report, seconds, now)
            case MemberLost(member, reason):
                return self._on_gone(member, "exchange", seconds, reason)
            case JoinTimedOut(member, reason):
                return self._on_gone(member, "join", seconds, reason)
            case Withdrawn(reason):
                return self.fail(f"the leader gave up: {reason}")
            case ExchangeBegan():
                if self._began is None:
                    self._began = now
            case TimePassed(late):
                self._awaited.shift(late)
                self._complaints.shift(late)
                return self._on_time(seconds, now)
        return []

    def _on_time(self, seconds: float, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for member, reason in self._awaited.expire(now):
            if member in self._roll.unready:
                effects += self._roll.exclude(member, "exchange", seconds, reason)
            else:
                self._roll.gone.add(member)
        ruling = self._complaints.judge(seconds, now)
        return [*effects, *ruling.exclusions, *self._settle(ruling.void)]

    def fail(self, reason: str) -> list[Effect]:
        """The leader wants the round to fail for everybody."""
        if self.proposed is not None:
            return []
        undialable = self._complaints.undialable
        return self._propose(Outcome(reason_text(reason), self._roll.exclusions, undialable=undialable))

    @property
    def heir(self) -> int | None:
        """The member to which the founder of an even group hands on its casting vote: the first that may lead and seems
        to live.
        """
        return None if self.term or self.roles.size % 2 else self._roll.heir

    # reports

    def _on_report(self, member: int, report: Report, seconds: float, now: float) -> list[Effect]:
        name = self.roles.name
        match report:
            case Ready(weight, epoch):
                return self._on_ready(member, weight, epoch)
            case AveragesReceived(count):
                self._awaited.note_progress(member, count)
                return []
            case SpanAveraged():
                return self._on_span(member, report)
            case GaveUp(reason):
                if member in self._roll.ready:
                    raise ProtocolViolation(f"{name(member)} gave up after it had reported ready")
                return self._on_gone(member, "exchange", seconds, reason)
            case StandsAside(phase, reason):
                if member in self._roll.ready:
                    raise ProtocolViolation(f"{name(member)} stood aside after it had reported ready")
                return [*self._roll.exclude(member, phase, seconds, reason), *self._settle()]
            case SenderExcluded():
                ruling = self._complaints.hear_owner(member, report, seconds, now)
                return [*ruling.exclusions, *self._settle(ruling.void)]
            case OwnerFailed():
                self._complaints.hear_member(member, report, now)
                return self._settle()

    def _on_ready(self, member: int, weight: float, epoch: Epoch) -> list[Effect]:
        if self.term and member in self._roll.ready:
            return []  # it has said so with its promise
        if member in self._roll.ready or not self.roles.contributes[member]:
            raise ProtocolViolation(f"{self.roles.name(member)} reported ready, twice or without tensors")
        if member in self._roll.excluded or epoch != self.assignment.epoch:
            return []  # its report and the leader's word crossed
        self._roll.ready[member] = weight
        return self._hear_weight(member, member, weight) or self._settle()

    def _on_span(self, owner: int, report: SpanAveraged) -> list[Effect]:
        span = self.assignment.by_id.get(report.span)
        if span is None:
            return []  # it was declared void meanwhile
        if span.owner != owner:
            raise ProtocolViolation(f"{self.roles.name(owner)} reported {report.span}, which it does not own")
        self._spans.note(report)
        for member, weight in enumerate(report.weights):
            if weight is not None and self.roles.contributes[member]:
                failed = self._hear_weight(owner, member, weight)
                if failed:
                    return failed
        return self._settle()

    def _hear_weight(self, witness: int, member: int, weight: float) -> list[Effect]:
        """All that heard a member's weight must have heard the same one."""
        problem = self._weights.hear(witness, member, weight, self.roles)
        return [] if problem is None else self.fail(problem)

    def _on_gone(self, member: int, phase: str, seconds: float, reason: str) -> list[Effect]:
        if member in self._roll.gone:
            return []
        self._roll.gone.add(member)
        excluded = [] if member in self._roll.ready else self._roll.exclude(member, phase, seconds, reason)
        return [*excluded, *self._settle()]

    # repair, or the decision

    def _settle(self, void: Iterable[SpanId] = ()) -> list[Effect]:
        """Repair what has to be, or propose how the round ends, if either is due. ``void``: spans that are broken,
        whatever is known of their owners.
        """
        if self.proposed is not None:
            return []
        shortage = self._roll.shortage
        if shortage is not None:
            return self.fail(shortage)
        void = set(void)
        broken = self._spans.broken(self._roll) | void
        if broken:
            return self._repair(broken, void)
        if self._roll.unready or self._spans.unreported:
            return []
        ready = {member: self._roll.ready[member] for member in self._roll.committers}
        return self._propose(
            sum_up(self.assignment, self._spans.reports, ready, self._roll.exclusions, self.roles.size)
        )

    def _repair(self, broken: set[SpanId], void: set[SpanId]) -> list[Effect]:
        match self._spans.plan(broken, self._roll):
            case Repair() as order:
                self._spans.carry_out(order)
                return [*self._roll.begin_anew(), AnnounceRepair(order)]
            case Culprit(member, reason):
                # Without that member, other spans may be sound again, but for those that are void anyway.
                return [*self._roll.exclude(member, "exchange", 0.0, reason), *self._settle(void)]
            case Irreparable(reason):
                return self.fail(reason)

    def _propose(self, outcome: Outcome) -> list[Effect]:
        self.proposed = outcome
        return [AskForAcceptance(self.roles.others, self.term, outcome)]
