"""What has to be done in a round of all-reduce: the words that :mod:`.core` says. Pure.

Effects are in the imperative; what happened is in :mod:`.events`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.averaging.allreduce.assignment import Repair, Span, SpanId
from shoal.averaging.allreduce.messages import Answer, Excluded, Outcome, Report, SpanAveraged


@dataclass(frozen=True)
class AveragePart:
    """Everybody who is waited for has delivered the ``index``-th part of an own span: average what there is."""

    span: SpanId
    index: int


@dataclass(frozen=True)
class ReturnAverage:
    """Send the average of the ``index``-th part of an own span to every other member."""

    span: SpanId
    index: int


@dataclass(frozen=True)
class ReturnReport:
    """After the last average of an own span: send every other member what is to be said of it."""

    report: SpanAveraged


@dataclass(frozen=True)
class DropSender:
    """Take nothing more from ``sender`` for a span, and tell it why."""

    span: SpanId
    sender: int
    reason: str
    is_silent: bool = field(default=False, compare=False)
    """This member has waited for its first part in vain."""


@dataclass(frozen=True)
class StopContributing:
    """Send no more parts, and take no more averages: this member will not commit."""


@dataclass(frozen=True)
class VoidSpans:
    """These spans count no more: end their streams, and write nothing of them to the arena from now on."""

    spans: tuple[SpanId, ...]


@dataclass(frozen=True)
class OpenSpans:
    """Serve those of these spans that are the own ones, and contribute to the others."""

    spans: tuple[Span, ...]


@dataclass(frozen=True)
class TellLeader:
    """Send the leader this report."""

    report: Report


@dataclass(frozen=True)
class FollowLeader:
    """Join the leader of ``term``: report to it, and hear its word."""

    leader: int
    term: int


@dataclass(frozen=True)
class LeadMembers:
    """This member leads, in ``term``: take the reports of the others from now on."""

    term: int


@dataclass(frozen=True)
class StopLeading:
    """This member does not lead, or want to, any more: end the streams of those that followed.

    ``heir``: the member to which this founder hands on its casting vote.
    """

    heir: int | None = None


@dataclass(frozen=True)
class AnnounceExclusion:
    """The leader's word, for every other member."""

    excluded: Excluded


@dataclass(frozen=True)
class AnnounceRepair:
    """The leader's order, for every other member."""

    order: Repair


@dataclass(frozen=True)
class AnnounceOutcome:
    """The decision, for every other member: a quorum has accepted it."""

    outcome: Outcome


@dataclass(frozen=True)
class AskForOutcome:
    """Ask these members what they know of the decision, ``delay`` seconds from now.

    ``burials``: how many members had been found dead by then; it comes back with the answer.
    """

    members: tuple[int, ...]
    delay: float = 0.0
    burials: int = 0


@dataclass(frozen=True)
class AskForPromise:
    """Ask these members for their promise to follow this one, in ``term``, ``delay`` seconds from now.

    ``burials``: as in :class:`AskForOutcome`. ``floor``: what they have to keep in mind, see :class:`.Voter`.
    """

    members: tuple[int, ...]
    term: int
    delay: float = 0.0
    burials: int = 0
    floor: int = 0


@dataclass(frozen=True)
class AskForAcceptance:
    """Propose ``outcome`` to these members, in ``term``, ``delay`` seconds from now."""

    members: tuple[int, ...]
    term: int
    outcome: Outcome
    delay: float = 0.0


@dataclass(frozen=True)
class Reply:
    """The answer to the question of the same turn."""

    answer: Answer


@dataclass(frozen=True)
class Finish:
    """The round is over for this member; ``reason`` None: committed."""

    reason: str | None = None


Effect = (
    AveragePart
    | ReturnAverage
    | ReturnReport
    | DropSender
    | StopContributing
    | VoidSpans
    | OpenSpans
    | TellLeader
    | FollowLeader
    | LeadMembers
    | StopLeading
    | AnnounceExclusion
    | AnnounceRepair
    | AnnounceOutcome
    | AskForOutcome
    | AskForPromise
    | AskForAcceptance
    | Reply
    | Finish
)
