"""How a round ended for one member, as the rest of the background process learns it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import Phase
from shoal.averaging.allreduce.messages import Outcome
from shoal.averaging.report import Exclusion, Spread


@dataclass(frozen=True)
class RoundResult:
    """How a round ended for this member.

    :param failure: None: committed, and the arena holds the average; else why not
    :param applies: whether this member's tensors take the average; False for an auxiliary one
    :param exclusions: members that the round went on without, as far as this member knows: the leader's list if
      its decision is known
    :param weights: of each member, as averaged; 0 for auxiliary and excluded ones (what these had delivered before is
      in the average all the same); empty if the round failed
    :param was_undialable: the round failed, and a member could not dial this one
    :param in_doubt: this member was ready, and cannot learn whether the others committed; ``failure`` says why
    :param partial: what is in the average of excluded members: of each one runs of parts, as (member, first part, the
      part after the last)
    :param repairs: how many times spans of lost owners were assigned anew
    :param spread: how far apart the members were before; None: unknown
    """

    failure: str | None
    applies: bool
    bytes_sent: int
    bytes_received: int
    snapshot_seconds: float
    allreduce_seconds: float
    exclusions: tuple[Exclusion, ...] = ()
    weights: tuple[float, ...] = ()
    spread: Spread | None = None
    was_undialable: bool = False
    in_doubt: bool = False
    partial: tuple[tuple[int, int, int], ...] = ()
    repairs: int = 0


def result_of(
    core: AllReduce,
    elements: int,
    *,
    bytes_sent: int,
    bytes_received: int,
    snapshot_seconds: float,
    allreduce_seconds: float,
) -> RoundResult:
    """The result of a round that has ended here. ``elements``: of the flat vector that was averaged."""
    roles, outcome = core.roles, core.outcome
    known = () if outcome is None else outcome.excluded
    return RoundResult(
        failure=core.failure,
        applies=roles.contributes[roles.me],
        bytes_sent=bytes_sent,
        bytes_received=bytes_received,
        snapshot_seconds=snapshot_seconds,
        allreduce_seconds=allreduce_seconds,
        exclusions=tuple(
            Exclusion(roles.name(one.member), one.phase, one.seconds, one.reason) for one in known
        ),
        weights=() if outcome is None else outcome.weights,
        spread=None if outcome is None else _spread(outcome, elements),
        was_undialable=outcome is not None and roles.me in outcome.undialable,
        in_doubt=core.phase is Phase.IN_DOUBT,
        partial=() if outcome is None else outcome.partial,
        repairs=len(core.ledger.assignment.orders),
    )


def _spread(outcome: Outcome, elements: int) -> Spread | None:
    if outcome.square_distance is None or outcome.square_average is None or not elements:
        return None
    distance = math.sqrt(outcome.square_distance / elements)
    average = math.sqrt(outcome.square_average / elements)
    relative = distance / average if average else math.inf
    return Spread(distance, relative if math.isfinite(relative) else None)
