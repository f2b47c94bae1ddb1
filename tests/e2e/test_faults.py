"""A background process dies or stops at a named phase of a round; the others end alike, with the right average."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from real_swarm import Swarm, is_running, wait_until

import shoal
from shoal.errors import InvalidValueError
from shoal.testing.faults import plant

pytestmark = pytest.mark.xdist_group("averaging")

LIMIT = 60.0  # seconds, against hanging only


@pytest.mark.parametrize(
    ("phase", "after"),
    [
        ("ready", True),
        *(
            pytest.param(phase, False, marks=pytest.mark.sweep)
            for phase in ("forming", "scattering", "applying")
        ),
    ],
)
def test_a_peer_that_is_killed_at_a_phase_is_left_behind(swarm: Swarm, phase: str, after: bool):
    """The others average without it: in the same round, if it was ready, and in the next one otherwise."""
    tensors = [[torch.full((5000,), float(value))] for value in (1.0, 3.0, 8.0)]
    options: dict[str, Any] = {
        "size": 3,
        "min_group_size": 2,
        "sender_timeout": 3.0,
        "min_matchmaking_time": 3.0,
    }
    averagers = [swarm.peer(own, **options) for own in tensors[:2]]
    victim = swarm.own_dht()
    averagers.append(swarm.peer(tensors[2], dht=victim, client_mode=True, **options))
    victim.run_coroutine(partial(plant, phase=phase, action="kill", after=after))
    controls = [averager.step(wait=False, timeout=LIMIT) for averager in averagers]
    for control in controls[:2]:
        control.result(LIMIT)
    wait_until(lambda: not is_running(victim.background.pid), LIMIT)
    with pytest.raises(shoal.PeerProcessDied):
        controls[2].result(LIMIT)
    (first,), (second,) = tensors[:2]
    assert torch.equal(first, second)
    # What it had sent before counts, part by part.
    assert set(first.tolist()) <= {2.0, 4.0}
    assert set(first.tolist()) == {4.0} or phase not in ("ready", "applying")


@pytest.mark.sweep
def test_a_leader_that_stops_before_it_tells_its_decision_takes_nobody_along(swarm: Swarm):
    """Nobody knows the decision: the others ask each other, and average without the leader after that."""
    tensors = [[torch.full((5000,), float(value))] for value in (1.0, 3.0, 8.0)]
    options: dict[str, Any] = {
        "size": 3,
        "min_group_size": 2,
        "sender_timeout": 2.0,
        "min_matchmaking_time": 3.0,
    }
    averagers = [
        swarm.peer(own, client_mode=number == 1, **options) for number, own in enumerate(tensors[1:])
    ]
    leader = swarm.own_dht()
    averagers.insert(0, swarm.peer(tensors[0], dht=leader, **options))
    leader.run_coroutine(partial(plant, phase="deciding", action="stop"))
    pid = leader.background.pid
    try:
        first = averagers[0].step(wait=False, timeout=LIMIT)
        others = [averager.step(wait=False, timeout=LIMIT) for averager in averagers[1:]]
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, LIMIT)
        for control in others:
            control.result(LIMIT)
        assert torch.equal(tensors[1][0], tensors[2][0])
    finally:
        os.kill(pid, signal.SIGCONT)
    first.exception(LIMIT)


def test_what_cannot_be_planted_is_said(swarm: Swarm):
    dht = swarm.dht()
    with pytest.raises(InvalidValueError, match="phase must be one of searching, "):
        dht.run_coroutine(partial(plant, phase="lunch", action="kill"))
    with pytest.raises(InvalidValueError, match=r"action must be 'kill' or .* or 'close', got 'hug'"):
        dht.run_coroutine(partial(plant, phase="ready", action="hug"))  # type: ignore[arg-type]
