"""Tensors that are handed over, on real processes."""

from __future__ import annotations

import os
import re
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm, step_all, wait_for_stage, wait_until

import shoal
from shoal import compression
from shoal.averaging import SharedBuffers
from shoal.averaging.commands import AveragingStage
from shoal.errors import AllreduceException, InvalidStateError, InvalidValueError
from shoal.testing import plant

pytestmark = pytest.mark.xdist_group("averaging")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "shared-buffers.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
SPECS = [((300, 7), torch.float32), ((), torch.float64), ((0, 3), torch.float32), (501, torch.float32)]


def test_buffers_average_with_copied_tensors_round_after_round(swarm: Swarm):
    """Some travel by another codec than their neighbours of the same dtype."""
    buffers = SharedBuffers(SPECS, debug=True)
    copied = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in buffers.tensors]
    codecs = compression.SizeAdaptiveCompression(
        threshold=1000, less=compression.NoCompression(), greater_equal=compression.Float16Compression()
    )
    averagers = [swarm.peer(tensors, 2, compression=codecs) for tensors in (buffers, copied)]
    addresses = [tensor.data_ptr() for tensor in buffers.tensors]
    for number in range(3):
        for tensors, value in ((buffers.tensors, 2.0), (copied, 4.0)):
            for tensor in tensors:
                tensor.fill_(value + number)
        assert all(step_all(averagers))
        for one, other in zip(buffers.tensors, copied, strict=True):
            assert torch.equal(one, torch.full_like(one, 3.0 + number))
            assert torch.equal(one, other)
    assert [tensor.data_ptr() for tensor in buffers.tensors] == addresses
    assert not buffers.in_use


@pytest.mark.sweep
def test_buffers_outlive_their_averager_and_serve_another_one(swarm: Swarm):
    buffers = SharedBuffers(SPECS[:1])
    first = swarm.peer(buffers, 2)
    with pytest.raises(InvalidStateError, match=f"the averager '{swarm.prefix}' has these"):
        swarm.peer(buffers, 2, prefix="other")
    with pytest.raises(InvalidValueError, match="detect_lost_updates must be False for SharedBuffers"):
        swarm.peer(buffers, 2, prefix="other", detect_lost_updates=True)
    first.shutdown()
    buffers.tensors[0].fill_(1)
    tensor = torch.full((300, 7), 3.0)
    averagers = [swarm.peer(given, 2, averaging_alpha=0.5) for given in (buffers, [tensor])]
    assert all(step_all(averagers))
    assert torch.equal(buffers.tensors[0], torch.full((300, 7), 1.5))
    assert torch.equal(tensor, torch.full((300, 7), 2.5))


def test_a_cancelled_round_lets_go_of_the_buffers(swarm: Swarm):
    buffers = SharedBuffers([(1000, torch.float32)])
    tensor = torch.zeros(1000)
    averagers = [swarm.peer(given, 2) for given in (buffers, [tensor])]
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True) for averager in averagers]
    wait_for_stage(steps, AveragingStage.AWAITING_TRIGGER)
    steps[0].allow_allreduce()
    wait_until(lambda: buffers.in_use)
    assert steps[0].cancel()  # its groupmate has not begun
    buffers.wait_until_free(STEP_TIMEOUT)
    buffers.tensors[0].fill_(1)
    steps[1].cancel()
    assert torch.equal(buffers.tensors[0], torch.ones(1000))


def test_a_write_while_a_round_runs_fails_the_step_and_names_the_tensor(swarm: Swarm):
    buffers = SharedBuffers([("head", (1000, torch.float32))], debug=True)
    averagers = [swarm.peer(given, 2) for given in (buffers, {"head": torch.zeros(1000)})]
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True) for averager in averagers]
    wait_for_stage(steps, AveragingStage.AWAITING_TRIGGER)
    steps[0].allow_allreduce()
    wait_until(lambda: buffers.in_use)
    with averagers[0].get_tensors() as tensors:  # waits for the digests, which are taken under this lock
        tensors[0].numpy()[3] = 7
    steps[1].allow_allreduce()
    with pytest.raises(
        AllreduceException, match=r"averaged_tensors\['head'\] was written between the trigger"
    ):
        steps[0].result(STEP_TIMEOUT)
    assert buffers.tensors[0].sum() == 7
    assert steps[1].result(STEP_TIMEOUT)


@pytest.mark.sweep
def test_a_process_that_stops_after_its_vote_keeps_the_buffers_until_it_goes_on(swarm: Swarm, tmp_path: Path):
    """The others have committed; the average comes too late to be written."""
    buffers = SharedBuffers([(1000, torch.float32)])
    others = [swarm.peer([torch.full((1000,), number)], 3, min_group_size=2) for number in (1.0, 2.0)]
    dht = swarm.own_dht()
    stopped = swarm.peer(buffers, 3, dht=dht, min_group_size=2)
    record = tmp_path / "fault.json"
    dht.run_coroutine(partial(plant, phase="announcing", action="stop", record=str(record)))
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in others]
    step = stopped.step(wait=False, timeout=10.0)
    try:
        assert isinstance(step.exception(2 * STEP_TIMEOUT), shoal.InDoubt)
        assert record.exists()
        assert all(len(one.result(STEP_TIMEOUT)) == 3 for one in steps)
        assert buffers.in_use
    finally:
        os.kill(dht.background.pid, signal.SIGCONT)
    buffers.wait_until_free(STEP_TIMEOUT)
    wait_until(lambda: stopped.last_doubt.outcome is not shoal.DoubtOutcome.OPEN, STEP_TIMEOUT)
    assert stopped.last_doubt is not None
    assert stopped.last_doubt.outcome is shoal.DoubtOutcome.DROPPED, stopped.last_doubt
    assert not stopped.apply_late_average()
    assert not buffers.tensors[0].any()


@pytest.mark.sweep
def test_a_process_that_is_killed_lets_go_of_the_buffers(swarm: Swarm):
    buffers = SharedBuffers([(1000, torch.float32)])
    dht = swarm.own_dht()
    averagers = [swarm.peer(buffers, 2, dht=dht), swarm.peer([torch.zeros(1000)], 2)]
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True) for averager in averagers]
    wait_for_stage(steps, AveragingStage.AWAITING_TRIGGER)
    steps[0].allow_allreduce()
    wait_until(lambda: buffers.in_use)
    os.kill(dht.background.pid, signal.SIGKILL)
    assert isinstance(steps[0].exception(STEP_TIMEOUT), shoal.PeerProcessDied)
    assert not buffers.in_use
    steps[1].cancel()
    averagers[0].shutdown()
    swarm.peer(buffers, 2, prefix="another")


def gradient(inputs: torch.Tensor) -> torch.Tensor:
    """Of the mean of a model with one output, by its weights."""
    return inputs.mean(dim=0, keepdim=True)


def with_frozen_parameters() -> torch.nn.Sequential:
    """A model whose first layer is frozen, and gives what it gets."""
    frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    torch.nn.init.eye_(frozen.weight)
    torch.nn.init.zeros_(frozen.bias)
    return torch.nn.Sequential(frozen, torch.nn.Linear(3, 1))


@pytest.mark.parametrize("program", [0, 1], ids=["gradients", "differences"])
def test_the_programs_of_the_page_keep_two_models_alike(program: int, swarm: Swarm):
    rounds = 2
    models = [with_frozen_parameters() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    start = models[0][1].weight.detach().clone()
    inputs = torch.randn(2, rounds, 4, 3)
    failures: list[BaseException] = []

    def run(peer: int) -> None:
        optimizer = torch.optim.SGD(models[peer].parameters(), lr=1.0)
        names: dict[str, Any] = {"shoal": shoal, "torch": torch, "model": models[peer], "dht": dhts[peer]}
        names |= {"optimizer": optimizer, "batches": inputs[peer], "outer_rounds": inputs[peer].unsqueeze(1)}
        try:
            exec(PROGRAMS[program].replace('prefix="run"', f"prefix={swarm.prefix!r}"), names)
        except BaseException as e:  # noqa: BLE001 - the test raises it
            failures.append(e)
        finally:
            if "averager" in names:
                names["averager"].shutdown()

    dhts = [swarm.dht(), swarm.dht()]
    threads = [threading.Thread(target=run, args=(peer,)) for peer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    moved = sum(gradient(inputs[:, number].flatten(0, 1)) for number in range(rounds))
    for model in models:
        torch.testing.assert_close(model[1].weight.detach(), start - moved)
