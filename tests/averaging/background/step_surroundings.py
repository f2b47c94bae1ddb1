"""What an attempt of a step works with, on a simulated network, and a user's process that a test makes up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

from shoal.averaging.allreduce.round import RoundTimeouts
from shoal.averaging.background.arena import SharedArena
from shoal.averaging.background.attempt import Attempt
from shoal.averaging.background.division import Division
from shoal.averaging.background.doubts import Doubts
from shoal.averaging.background.resources import Resources
from shoal.averaging.background.slow_peers import SlowPeers
from shoal.averaging.background.step import Step
from shoal.averaging.commands import RunStep
from shoal.averaging.matchmaking_config import matchmaking_config
from shoal.testing.rounds import PART_BYTES, PREFIX, SimulatedGroup

NO_LIMITS = RoundTimeouts()


def make_step(
    number: int = 0,
    *,
    deadline: float | None = None,
    allow_retries: bool = False,
    needs_trigger: bool = False,
) -> RunStep:
    return RunStep(number, 1.0, b"", 0.0, deadline, allow_retries, needs_trigger)


def make_resources(
    user: Any,
    *,
    group: SimulatedGroup | None = None,
    member: int = 0,
    matchmaker: Any = None,
    timeouts: RoundTimeouts = NO_LIMITS,
) -> Resources:
    """Those of a member of ``group``; without one, no round can be run with them."""
    arena: Any = SharedArena(Mock())
    if group is not None:
        arena._areas = group.arenas[member]
    return Resources(
        context=user,
        config=cast(
            "Any",
            SimpleNamespace(
                prefix=PREFIX, auxiliary=False, matchmaking=matchmaking_config(None, 2, 5.0, 3.0)
            ),
        ),
        node=cast("Any", Mock() if group is None else SimpleNamespace(host=group.hosts[member])),
        matchmaker=Mock() if matchmaker is None else matchmaker,
        rounds=cast("Any", None if group is None else group.rounds[member]),
        timeouts=timeouts,
        division=cast("Any", None)
        if group is None
        else Division(group.layout, part_size_bytes=PART_BYTES, min_vector_size=0),
        arena=arena,
        slow_peers=SlowPeers(PREFIX),
        doubts=Doubts(user, Mock() if group is None else group.hosts[member], PREFIX),
    )


async def run_attempt(resources: Resources, group: SimulatedGroup, step: Step) -> None:
    await Attempt(resources, step, group.group).run()
