"""What the leader says of a round that may commit: whose tensors are in the average, and with which weight. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from shoal.averaging.allreduce.assignment import Assignment, Span, SpanId
from shoal.averaging.allreduce.events import Roles
from shoal.averaging.allreduce.messages import Excluded, Outcome, SpanAveraged, add_up


@dataclass
class Weights:
    """What each member told of its weight, by the word of those that heard it."""

    _told: dict[int, tuple[int, float]] = field(default_factory=dict)
    """The weight that each member told, and the member that heard it first."""

    def hear(self, witness: int, member: int, weight: float, roles: Roles) -> str | None:
        """``witness`` says what ``member`` told it; what is wrong, if another one heard something else."""
        first, told = self._told.setdefault(member, (witness, weight))
        if told == weight:
            return None
        name = roles.name
        return (
            f"{name(member)} contributed with different weights: {told:g} by the word of {name(first)}, "
            f"{weight:g} by that of {name(witness)}"
        )


def sum_up(
    assignment: Assignment,
    reports: Mapping[SpanId, SpanAveraged],
    ready: Mapping[int, float],
    excluded: tuple[Excluded, ...],
    size: int,
) -> Outcome:
    """The outcome of a round that commits.

    :param reports: what the owners said of all spans of the assignment
    :param ready: the weight of each member that will apply the average
    :param size: members of the group
    """
    said = [(span, reports[span.id]) for span in assignment.spans]
    out = {one.member for one in excluded}
    partial = [
        (member, span.first, span.first + parts)
        for span, report in said
        for member, parts in _delivered_by(out, report, span)
    ]
    return Outcome(
        None,
        excluded,
        tuple(ready.get(member, 0.0) for member in range(size)),
        add_up(report.square_distance for _, report in said),
        add_up(report.square_average for _, report in said),
        epoch=assignment.epoch,
        partial=tuple(sorted(partial)),
    )


def _delivered_by(members: Collection[int], report: SpanAveraged, span: Span) -> Iterable[tuple[int, int]]:
    """Of each of these members: how many parts of a span are in the average."""
    parts = dict(report.partial)
    return (
        (member, parts.get(member, span.count))
        for member in members
        if report.weights[member] and parts.get(member, span.count)
    )
