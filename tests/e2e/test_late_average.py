"""A background process that is stopped as its group decides: the step ends in doubt, and its average comes late."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm, wait_until

import shoal
from shoal.testing import plant

pytestmark = [pytest.mark.xdist_group("averaging"), pytest.mark.sweep]

LIMIT = 60  # seconds, against hanging only


def test_a_step_whose_process_stops_after_its_vote_gets_its_average_late(swarm: Swarm, tmp_path: Path):
    tensors = [torch.full((1000,), float(number)) for number in range(3)]
    others = [swarm.peer([tensor], 3, min_group_size=2) for tensor in tensors[1:]]
    dht = swarm.own_dht()
    stopped = swarm.peer([tensors[0]], 3, dht=dht, min_group_size=2)
    record = tmp_path / "fault.json"
    dht.run_coroutine(partial(plant, phase="announcing", action="stop", record=str(record)))
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in others]
    step = stopped.step(wait=False, timeout=10.0)
    try:
        assert isinstance(step.exception(LIMIT), shoal.InDoubt)
        assert record.exists()
        assert step.report is not None
        assert step.report.in_doubt
        assert all(len(one.result(LIMIT)) == 3 for one in steps)
        assert stopped.last_doubt is not None
        assert stopped.last_doubt.outcome is shoal.DoubtOutcome.OPEN
        assert not stopped.apply_late_average()
    finally:
        os.kill(dht.background.pid, signal.SIGCONT)
    wait_until(lambda: stopped.last_doubt.outcome is not shoal.DoubtOutcome.OPEN, LIMIT)
    assert stopped.last_doubt.outcome is shoal.DoubtOutcome.COMMITTED, stopped.last_doubt
    assert torch.equal(tensors[0], torch.zeros(1000))
    tensors[0] += 1  # an update of the trainer meanwhile is kept
    assert stopped.apply_late_average()
    assert torch.equal(tensors[0], torch.full((1000,), 2.0))
    assert torch.equal(tensors[1], torch.ones(1000))
    assert stopped.last_doubt.outcome is shoal.DoubtOutcome.WRITTEN
