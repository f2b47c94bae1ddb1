"""Rounds whose members stall, die or only help, through real background processes and sockets."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm, wait_for_stage

from shoal.averaging.commands import AveragingStage
from shoal.averaging.report import Exclusion
from shoal.errors import AllreduceException

pytestmark = pytest.mark.xdist_group("averaging")


def exclusions(controls: list[Any]) -> list[Exclusion]:
    """The one member that each of these rounds went on without."""
    return [control.report.excluded[0] for control in controls]


def test_a_sender_whose_trigger_never_comes_is_excluded_and_the_others_average(swarm: Swarm):
    tensors = [[torch.full((1000,), float(value))] for value in (1, 2, 60)]
    options: dict[str, Any] = {
        "size": 3,
        "sender_timeout": 1.0,
        "min_group_size": 2,
        "min_matchmaking_time": 3.0,
    }
    averagers = [swarm.peer(own, **options) for own in tensors[:2]]
    averagers.append(swarm.peer(tensors[2], client_mode=True, **options))
    controls = [
        averager.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True, allow_retries=False)
        for averager in averagers
    ]
    wait_for_stage(controls, AveragingStage.AWAITING_TRIGGER)
    for control in controls[:2]:
        control.allow_allreduce()
    for control, own in zip(controls[:2], tensors, strict=False):
        control.result(STEP_TIMEOUT)
        assert torch.equal(own[0], torch.full((1000,), 1.5))
        assert control.report.weight == 2.0
    with pytest.raises(AllreduceException, match="sender_timeout=1 s"):
        controls[2].result(STEP_TIMEOUT)
    assert torch.equal(tensors[2][0], torch.full((1000,), 60.0))
    for exclusion in exclusions(controls[:2]):
        assert exclusion.member == str(averagers[2].peer_id)
        assert "sender_timeout=1 s" in exclusion.reason
    assert str(averagers[2].peer_id) in str(controls[0].report)


@pytest.mark.sweep
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_dies_or_hangs_does_not_fail_the_round(swarm: Swarm, blow: signal.Signals):
    tensors = [[torch.full((1000,), float(value))] for value in (1, 2, 60)]
    options: dict[str, Any] = {
        "size": 3,
        "sender_timeout": 2.0,
        "min_group_size": 2,
        "min_matchmaking_time": 3.0,
    }
    averagers = [swarm.peer(own, **options) for own in tensors[:2]]
    dht = swarm.own_dht()
    averagers.append(swarm.peer(tensors[2], dht=dht, client_mode=True, **options))
    controls = [
        averager.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True, allow_retries=False)
        for averager in averagers
    ]
    wait_for_stage(controls, AveragingStage.AWAITING_TRIGGER)
    victim = str(dht.peer_id)
    os.kill(dht.background.pid, blow)
    try:
        for control in controls[:2]:
            control.allow_allreduce()
        for control, own in zip(controls[:2], tensors, strict=False):
            control.result(STEP_TIMEOUT)
            assert torch.equal(own[0], torch.full((1000,), 1.5))
        assert {one.member for one in exclusions(controls[:2])} == {victim}
    finally:
        if blow is signal.SIGSTOP:
            os.kill(dht.background.pid, signal.SIGCONT)


def test_an_auxiliary_peer_helps_and_keeps_its_tensors(swarm: Swarm):
    tensors = [[torch.full((1000,), float(value))] for value in (1, 2, 60)]
    averagers = [swarm.peer(own, size=3) for own in tensors[:2]]
    averagers.append(swarm.peer(tensors[2], size=3, auxiliary=True))
    controls = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
    for control in controls:
        assert len(control.result(STEP_TIMEOUT)) == 3
    assert all(torch.equal(own[0], torch.full((1000,), 1.5)) for own in tensors[:2])
    assert torch.equal(tensors[2][0], torch.full((1000,), 60.0))
    assert controls[2].report.bytes_received > 0
    assert sorted(controls[2].report.weights) == [0.0, 1.0, 1.0]


def test_a_peer_with_weight_0_gets_the_average(swarm: Swarm):
    tensors = [[torch.full((1000,), float(value))] for value in (1, 2, 60)]
    averagers = [swarm.peer(own, size=3) for own in tensors]
    controls = [
        averager.step(wait=False, timeout=STEP_TIMEOUT, weight=weight)
        for averager, weight in zip(averagers, (1, 3, 0), strict=True)
    ]
    for control, own in zip(controls, tensors, strict=True):
        control.result(STEP_TIMEOUT)
        assert torch.equal(own[0], torch.full((1000,), 1.75))
        assert control.report.weight == 4.0


def test_the_report_tells_how_far_apart_the_peers_were(swarm: Swarm):
    tensors = [[torch.full((1000,), float(value))] for value in (1, 3)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    controls = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
    for control in controls:
        control.result(STEP_TIMEOUT)
        assert control.report.spread_distance == pytest.approx(1.0)
        assert control.report.spread_relative == pytest.approx(0.5)
        assert "peers differed by 50 % of the average" in str(control.report)
