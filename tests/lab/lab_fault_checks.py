"""What must hold after a fault: judged from what the members said, and from nothing else. Pure.

Each member averages one value with a weight of its own. So the average of a part tells what is in it, and what must be
in it follows from the report: members and their weights, and which parts of excluded members count.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-6
"""Relative; float32 rounds by a tenth of that, and members' shares differ by a thousand times as much."""


@dataclass(frozen=True)
class Ending:
    """How a step ended for one member of the swarm.

    :param peer: its PeerID
    :param value: what it averaged
    :param weight: with which weight
    :param before: digest of its tensors before the step
    :param said: what its program said in the end; None: nothing
    :param is_dead: one of its processes was killed, so that it may say nothing, or that
    """

    peer: str
    value: float
    weight: float
    before: str
    said: Mapping[str, Any] | None
    is_dead: bool = False

    @property
    def report(self) -> Mapping[str, Any] | None:
        return None if self.said is None else self.said["report"]

    @property
    def committed(self) -> bool:
        return self.said is not None and self.said["error"] is None

    @property
    def group(self) -> str:
        """The group that it is in, or was in last; empty: none."""
        return "" if self.report is None else str(self.report["group_id"])

    def was_apart_from(self, peer: str) -> bool:
        """Whether it has found no group at all, or averaged at once in one without that peer."""
        if self.report is None:
            return False
        if self.committed:
            return self.report["attempts"] == 1 and peer not in self.report["members"]
        return not self.group

    @property
    def is_in_doubt(self) -> bool:
        return self.said is not None and self.said["kind"] == "InDoubt"


def find_splits(endings: Sequence[Ending]) -> list[str]:
    """Where members of one group ended differently, though one's report counts on the other.

    :param endings: of all steps of all members, in any order; a member may have stepped several times
    """
    by_peer: dict[str, list[Ending]] = defaultdict(list)
    committed: dict[str, list[Ending]] = defaultdict(list)
    for ending in endings:
        by_peer[ending.peer].append(ending)
        if ending.committed:
            committed[ending.group].append(ending)
    found: list[str] = []
    for group, members in committed.items():
        if len({one.said["digest"] for one in members}) > 1:
            found.append(f"group {group[:6]}: members that committed hold different tensors")
        if len({_told(one.report) for one in members}) > 1:
            found.append(f"group {group[:6]}: members that committed report different averages")
        for peer in _counted_members(members[0].report) & by_peer.keys():
            if not any(_agrees(one, group) for one in by_peer[peer]):
                one = by_peer[peer][0]
                found.append(f"group {group[:6]} committed, and its {_name(one)} {_how(one)}")
    return found


def _agrees(ending: Ending, group: str) -> bool:
    """Whether a member that a committed group counts on may have ended so."""
    return ending.is_dead or ending.is_in_doubt or (ending.committed and ending.group == group)


def find_wrong_tensors(endings: Sequence[Ending]) -> list[str]:
    """Members whose tensors are not what their report says, or are not as they were though they did not commit."""
    by_peer = {ending.peer: ending for ending in endings}
    averages = {one.said["digest"] for one in endings if one.committed}
    found: list[str] = []
    for ending in endings:
        if ending.said is None:
            continue
        if not ending.committed:
            allowed = {ending.before} | (averages if ending.is_dead else set())
            if ending.said["digest"] not in allowed:
                found.append(f"{_name(ending)} did not commit, and its tensors have changed")
            continue
        expected = expected_values(ending.report, by_peer)
        if not _are_close(expected, ending.said["values"]):
            found.append(f"{_name(ending)} holds {ending.said['values']}, its report says {expected}")
    return found


def expected_values(report: Mapping[str, Any], by_peer: Mapping[str, Ending]) -> list[float]:
    """The average that a report describes, in float64: one value for each run of parts with the same contributors."""
    members, weights = report["members"], report["weights"]
    whole = [(by_peer[peer], weight) for peer, weight in zip(members, weights, strict=True) if weight]
    averages: list[float] = []
    for part in range(report["parts"]):
        inside = [
            (by_peer[run["member"]], by_peer[run["member"]].weight)
            for run in report["partial"]
            if run["first_part"] <= part < run["end_part"]
        ]
        shares = [*whole, *inside]
        total = math.fsum(weight for _, weight in shares)
        averages.append(math.fsum(weight * one.value for one, weight in shares) / total)
    return [value for value, _ in itertools.groupby(averages)]


def find_late(endings: Sequence[Ending], deadline: float) -> list[str]:
    """Members that said nothing by their deadline."""
    found: list[str] = []
    for ending in endings:
        if ending.said is None:
            found.append(f"{_name(ending)} waits beyond its deadline")
        elif ending.said["time"] > deadline:
            found.append(f"{_name(ending)} ended {ending.said['time'] - deadline:.1f} s after its deadline")
    return found


def _told(report: Mapping[str, Any]) -> tuple[Any, ...]:
    partial = tuple(sorted(tuple(sorted(run.items())) for run in report["partial"]))
    excluded = tuple(sorted(one["member"] for one in report["excluded"]))
    return tuple(report["members"]), tuple(report["weights"]), excluded, partial


def _counted_members(report: Mapping[str, Any]) -> set[str]:
    return {peer for peer, weight in zip(report["members"], report["weights"], strict=True) if weight}


def _are_close(expected: Sequence[float], found: Sequence[float]) -> bool:
    return len(expected) == len(found) and all(
        math.isclose(one, other, rel_tol=TOLERANCE) for one, other in zip(expected, found, strict=True)
    )


def _name(ending: Ending) -> str:
    return f"member {ending.value:g}"


def _how(ending: Ending) -> str:
    if ending.said is None:
        return "said nothing"
    if ending.committed:
        return f"committed another group, {ending.report['group_id'][:6]}"
    return f"failed: {ending.said['kind']}: {ending.said['error']}"
