"""What happened in a step of averaging, and why: made in the background process, read by people and programs in the
user process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from shoal.utils import figures

MEASURABLE = 0.01
"""Seconds; shorter phases say nothing of a rate."""
MEASURABLE_BYTES = 100_000
"""Nor do fewer bytes: they are on their way for as long as one is."""


@dataclass(frozen=True)
class Phases:
    """Seconds that a step spent in each phase, to a millisecond; 0 for those that it did not reach.

    ``search``: finding a group, tries that failed included; ``trigger``: waiting for ``allow_allreduce()``;
    ``snapshot``: copying the user's tensors; ``allreduce``: from the snapshot to the decision; ``apply``:
    writing the result (0 if it waits for ``apply_average()``).
    """

    search: float = 0.0
    trigger: float = 0.0
    snapshot: float = 0.0
    allreduce: float = 0.0
    apply: float = 0.0

    @property
    def total(self) -> float:
        return self.search + self.trigger + self.snapshot + self.allreduce + self.apply


@dataclass(frozen=True)
class Exclusion:
    """A member that a round went on without.

    :param member: its PeerID (base58)
    :param phase: "join": it never came; "snapshot": its tensors could not be copied; "exchange": while parts and
      averages were on their way
    :param seconds: into the leader's all-reduce
    :param reason: for people
    """

    member: str
    phase: str
    seconds: float
    reason: str

    def __str__(self) -> str:
        return f"{self.member} ({self.phase}, after {figures.duration(self.seconds)}: {self.reason})"


@dataclass(frozen=True)
class PartialContribution:
    """What is in the average of a member that the round went on without: parts that it had delivered before.

    :param member: its PeerID (base58)
    :param first_part: the first of a run of parts of the flat vector
    :param end_part: the part after the last one of the run
    """

    member: str
    first_part: int
    end_part: int


@dataclass(frozen=True)
class PathReport:
    """How payloads went to one member in the last attempt, as far as the system tells.

    :param member: its PeerID (base58)
    :param lanes: connections that carried them at the end
    :param reason: why so many, for people
    :param congestion_control: the algorithm of the connections; empty: not known
    :param rtt: the smallest round-trip time in seconds; None: not known
    :param rate: bytes a second that its machine took, in the last while that was measured
    :param loss: the part of the packets that were sent again; None: none were measured
    :param resent: bytes that were sent again on another connection, because the first one was slow
    """

    member: str
    lanes: int
    reason: str
    congestion_control: str
    rtt: float | None
    rate: float
    loss: float | None
    resent: int


@dataclass(frozen=True)
class Spread:
    """How far apart the members of a group were before its round; an estimate from a sample of elements, and the same
    at every member.

    :param distance: root of the mean square of (a member's value - the average), over elements and members
    :param relative: ``distance`` over the root mean square of the average; None if that is 0
    """

    distance: float
    relative: float | None


class DoubtOutcome(Enum):
    """What became of a step that had ended in doubt."""

    OPEN = "open"
    """Nothing is known yet: the members of its group are still asked."""
    COMMITTED = "committed"
    """The others have committed. The average waits for the next ``step()``, or for ``apply_late_average()``."""
    WRITTEN = "written"
    """The average was written late: this peer has it as the others have."""
    DROPPED = "dropped"
    """The others have committed, and this peer's tensors lack the average; ``reason`` says why."""
    FAILED = "failed"
    """The round has not committed for this peer; its tensors are rightly as they were."""
    UNKNOWN = "unknown"
    """Nobody could tell."""


@dataclass(frozen=True)
class DoubtReport:
    """What is known of a step that had ended in doubt.

    :param step: its number in this averager
    :param reason: for people; empty: there is nothing more to say
    """

    step: int
    outcome: DoubtOutcome
    reason: str = ""

    def __str__(self) -> str:
        return f"step {self.step}, which was in doubt: {self.outcome.value}" + (
            f" ({self.reason})" if self.reason else ""
        )


@dataclass(frozen=True)
class StepReport:
    """What happened in one step of averaging.

    :param step: number of the step in this averager, from 0
    :param group_id: hexadecimal id of the last group, empty if none was found
    :param members: PeerIDs (base58) of its members, the leader first
    :param modes: what each member does: "full", "client" or "auxiliary"
    :param failure: why the step failed; None: it succeeded
    :param attempts: groups that were tried, the last one included
    :param bytes_sent: tensor bytes sent, as encoded on the wire, in the last attempt
    :param bytes_received: likewise received
    :param parts: parts of the flat vector that were averaged
    :param weight: sum of the weights of the members that were averaged
    :param excluded: members that the round went on without
    :param weights: the weight of each member in the average, in the order of ``members``; 0 for auxiliary and
      excluded ones
    :param partial: parts of excluded members that are in the average all the same, with the weight that each of
      them declared
    :param repairs: how many times the parts of lost owners were given to others in the last attempt
    :param in_doubt: the step failed, and others may have committed its average
    :param doubt: what was learned, since the report before this one, of an earlier step that had ended in doubt; None:
      nothing
    :param spread_distance: how far apart the members were before; see :class:`Spread`. None: unknown
    :param spread_relative: likewise, relative to the average
    :param paths: how payloads went to each member
    :param search: what the search for a group saw, in plain dictionaries, lists and strings; None: nothing to tell
    """

    step: int
    group_id: str = ""
    members: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    failure: str | None = None
    attempts: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    parts: int = 0
    weight: float = 0.0
    excluded: tuple[Exclusion, ...] = ()
    weights: tuple[float, ...] = ()
    partial: tuple[PartialContribution, ...] = ()
    repairs: int = 0
    in_doubt: bool = False
    doubt: DoubtReport | None = None
    spread_distance: float | None = None
    spread_relative: float | None = None
    paths: tuple[PathReport, ...] = ()
    search: dict[str, Any] | None = None
    phases: Phases = field(default_factory=Phases)

    @property
    def succeeded(self) -> bool:
        return self.failure is None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        took = figures.duration(self.phases.total)
        if self.failure is not None:
            ended = "in doubt" if self.in_doubt else "failed"
            return f"step {self.step}: {ended} after {took}: {self.failure}{self._earlier}"
        text = (
            f"step {self.step}: {figures.count(len(self.members), 'peer')} in {took} (search "
            f"{figures.duration(self.phases.search)}, all-reduce {figures.duration(self._work)}), {self._moved}"
        )
        apart = self._apart
        if apart:
            text += f", peers differed by {apart}"
        if self.repairs:
            text += f", repaired {figures.count(self.repairs, 'time')}"
        if self.excluded:
            text += f", excluded: {', '.join(map(str, self.excluded))}"
        return text + self._earlier

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        from html import escape  # half a megabyte, which other programs never need

        rows = [("outcome", "averaged" if self.failure is None else f"failed: {self.failure}")]
        rows += [("group", figures.count(len(self.members), "peer"))] if self.members else []
        rows += [("attempts", f"{self.attempts:,}")] if self.attempts > 1 else []
        if self.failure is None:
            rows += [("moved", self._moved), ("peers differed by", self._apart or "not measured")]
        rows += [("excluded", str(one)) for one in self.excluded]
        rows += [("earlier", str(self.doubt))] if self.doubt else []
        phases = asdict(self.phases) | {"total": self.phases.total}
        rows += [(name, figures.duration(seconds)) for name, seconds in phases.items() if seconds]
        body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
        return f"<table><caption>step {self.step}</caption>{body}</table>"

    @property
    def _earlier(self) -> str:
        return f"; {self.doubt}" if self.doubt else ""

    @property
    def _work(self) -> float:
        return self.phases.snapshot + self.phases.allreduce + self.phases.apply

    @property
    def _moved(self) -> str:
        """How much was sent and received, and how fast, where that was not a matter of delays alone."""
        moved = self.bytes_sent + self.bytes_received
        is_measurable = self._work >= MEASURABLE and moved >= MEASURABLE_BYTES
        return figures.size(moved) + (f" at {figures.rate(moved / self._work)}" if is_measurable else "")

    @property
    def _apart(self) -> str:
        if self.spread_distance is None:
            return ""
        if self.spread_relative is None:
            return f"{figures.number(self.spread_distance)} (root mean square)"
        return f"{figures.number(100 * self.spread_relative)} % of the average (root mean square)"


RoundReport = StepReport
"""The former name. A step may try several rounds, and its report is about all of them."""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


@dataclass(frozen=True)
class StateReport:
    """A state that was loaded from another peer.

    :param donor: its PeerID (base58)
    :param nbytes: that came from it
    :param seconds: that ``load_state_from_peers()`` took
    :param age: seconds between the donor's copy and the end of the download, by the donor's word; more than
      ``seconds`` if the copy was made before the call, and shared with other peers
    """

    donor: str
    nbytes: int
    seconds: float
    age: float

    def __str__(self) -> str:
        shared = f", a copy of {self.age:.1f} s ago that others share" if self.age > self.seconds else ""
        return f"loaded the state of {self.donor}, {self.nbytes / 1e6:.1f} MB in {self.seconds:.1f} s{shared}"
