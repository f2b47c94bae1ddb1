"""Averages while a trainer trains: what each way of writing them keeps, on real processes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm, wait_until

from shoal.averaging.commands import AveragingStage
from shoal.errors import InvalidStateError

pytestmark = pytest.mark.xdist_group("averaging")

ROUNDS = 4
UpdateLock = Callable[[Any], AbstractContextManager[object]]


def train(averager: Any, tensor: torch.Tensor, update_lock: UpdateLock, updates: list[int]) -> None:
    """Update a tensor without pause while rounds run; counts its updates."""
    control = averager.step(wait=False, timeout=STEP_TIMEOUT)
    rounds = 0
    while True:
        with update_lock(averager):
            tensor.add_(1)
        updates[0] += 1
        if control.done():
            control.result()
            rounds += 1
            if rounds == ROUNDS:
                return
            control = averager.step(wait=False, timeout=STEP_TIMEOUT)


@pytest.mark.parametrize(
    ("apply_when", "update_lock"),
    [("ready", lambda averager: averager.get_tensors()), ("called", lambda _: contextlib.nullcontext())],
    ids=["ready, under the lock", "called, without"],
)
def test_a_loop_without_pause_loses_no_update(swarm: Swarm, apply_when: str, update_lock: UpdateLock):
    """Averages of two move the tensors of both by the same amount: their sum is that of the updates, exactly."""
    tensors = [torch.zeros(300_000, dtype=torch.float64) for _ in range(2)]
    averagers = [swarm.peer([tensor], size=2, apply_when=apply_when) for tensor in tensors]
    updates = [[0], [0]]
    threads = [
        threading.Thread(target=train, args=(averager, tensor, update_lock, count))
        for averager, tensor, count in zip(averagers, tensors, updates, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if apply_when == "called":
        assert all(averager.apply_average() for averager in averagers)
    total = float(updates[0][0] + updates[1][0])
    assert torch.equal(tensors[0] + tensors[1], torch.full_like(tensors[0], total))
    assert all(averager.last_report.succeeded for averager in averagers)


def test_a_loop_outside_of_the_lock_is_noticed(swarm: Swarm, caplog: pytest.LogCaptureFixture):
    tensors = [torch.zeros(300_000) for _ in range(2)]
    averagers = [swarm.peer([tensor], size=2, detect_lost_updates=True) for tensor in tensors]

    def train_until_noticed() -> bool:
        for averager in averagers:
            averager.step(wait=False, when_busy="current", timeout=STEP_TIMEOUT)
        for _ in range(100):
            tensors[0].add_(1)
        return "was updated while it was" in caplog.text

    wait_until(train_until_noticed, 60)
    (line,) = [record.getMessage() for record in caplog.records if "was updated while" in record.getMessage()]
    assert line.startswith(f"{swarm.prefix}: averaged_tensors[0] was updated while it was")
    assert line.endswith(
        "Update inside `with averager.get_tensors():`, or make the averager with apply_when='called'"
    )


def make_models() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for _ in range(2)
    ]


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.linspace(0, 1, 8)).square().sum()


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("apply_when", ["ready", "called"])
def test_a_round_between_forward_and_backward(swarm: Swarm, apply_when: str):
    """Written when ready, an average changes the gradients, past autograd's check. Written when called, it can't."""
    models = make_models()
    averagers = [
        swarm.peer(list(model.parameters()), size=2, apply_when=apply_when, prefix=f"between {apply_when}")
        for model in models
    ]
    loss_of(models[0]).backward()
    expected = gradients_of(models[0])
    models[0].zero_grad()

    loss = loss_of(models[0])
    controls = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
    for control in controls:
        control.result(60)
    loss.backward()
    is_right = all(map(torch.equal, gradients_of(models[0]), expected))
    assert is_right == (apply_when == "called")

    if apply_when == "called":
        before = [parameter.detach().clone() for parameter in models[0].parameters()]
        assert all(averager.apply_average() for averager in averagers)
        assert not any(averager.apply_average() for averager in averagers)
        assert not all(map(torch.equal, before, models[0].parameters()))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_a_step_that_is_waited_for_returns_with_its_average_and_those_before(swarm: Swarm):
    tensors = [[torch.full((10,), value)] for value in (0.0, 4.0)]
    averagers = [
        swarm.peer(own, size=2, apply_when=when)
        for own, when in zip(tensors, ("called", "ready"), strict=True)
    ]
    others = [averagers[1].step(wait=False, timeout=STEP_TIMEOUT) for _ in range(3)]
    averagers[0].step(wait=False, timeout=STEP_TIMEOUT).result(60)
    assert tensors[0][0].tolist() == [0.0] * 10
    averagers[0].step(wait=False, timeout=STEP_TIMEOUT)  # writes the first average; its own has to wait
    assert tensors[0][0].tolist() == [2.0] * 10
    tensors[0][0] += 2
    assert averagers[0].step(timeout=STEP_TIMEOUT) is not None
    for other in others:
        other.result(60)
    # The second round has taken 2 or 4 of the first peer, the third one what was left: both have the average.
    assert tensors[0][0].tolist() == [3.0] * 10
    assert tensors[1][0].tolist() == [3.0] * 10
    assert not averagers[0].apply_average()


def test_queued_steps_begin_when_the_average_before_is_written(swarm: Swarm):
    tensors = [[torch.full((10,), value)] for value in (0.0, 4.0)]
    averagers = [
        swarm.peer(own, size=2, apply_when=when)
        for own, when in zip(tensors, ("called", "ready"), strict=True)
    ]
    first, second = (averagers[0].step(wait=False, timeout=STEP_TIMEOUT) for _ in range(2))
    others = [averagers[1].step(wait=False, timeout=STEP_TIMEOUT) for _ in range(2)]
    first.result(60)
    others[0].result(60)
    wait_until(lambda: others[1].stage is AveragingStage.LOOKING_FOR_GROUP)
    assert second.stage is AveragingStage.IDLE
    assert averagers[0].apply_average()
    second.result(60)
    others[1].result(60)
    assert averagers[0].apply_average()
    assert tensors[0][0].tolist() == tensors[1][0].tolist() == [2.0] * 10


def test_one_line_in_the_loop_keeps_averaging(swarm: Swarm):
    """step(wait=False, when_busy="current") applies what is there and begins a round where none is under way."""
    tensors = [[torch.full((10,), value)] for value in (0.0, 4.0)]
    averagers = [swarm.peer(own, size=2, apply_when="called") for own in tensors]
    wanted = {"wait": False, "when_busy": "current", "timeout": STEP_TIMEOUT}
    controls: list[set[Any]] = [set(), set()]

    def iterate() -> bool:
        for averager, seen in zip(averagers, controls, strict=True):
            seen.add(averager.step(**wanted))
        return all(own[0][0] == 2.0 for own in tensors)

    wait_until(iterate, 60)
    for averager in averagers:
        averager.shutdown()
    assert all(len(seen) < 5 for seen in controls)


def test_two_averagers_of_the_same_tensors(swarm: Swarm):
    """One for the neighbours and one for all, for instance: with one lock for both."""
    tensors = [[torch.full((10,), value)] for value in (0.0, 4.0)]
    dhts = [swarm.dht(), swarm.dht()]
    pairs = [
        [swarm.peer(own, size=2, dht=dht, prefix=f"{swarm.prefix} {name}") for name in ("near", "far")]
        for own, dht in zip(tensors, dhts, strict=True)
    ]
    for number in range(2):
        controls = [pair[number].step(wait=False, timeout=STEP_TIMEOUT) for pair in pairs]
        for control in controls:
            control.result(60)
        assert tensors[0][0].tolist() == tensors[1][0].tolist() == [2.0 + number] * 10
        tensors[0][0] += 2
    near, far = pairs[0]
    with near.get_tensors(), pytest.raises(InvalidStateError, match="inside get_tensors"):
        far.step(timeout=STEP_TIMEOUT)


def test_shutdown_with_an_average_that_waits_says_so(swarm: Swarm, caplog: pytest.LogCaptureFixture):
    tensors = [[torch.full((10,), value)] for value in (0.0, 4.0)]
    averagers = [swarm.peer(own, size=2, apply_when="called") for own in tensors]
    controls = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
    for control in controls:
        control.result(60)
        assert not control.cancel()
    assert averagers[0].apply_average()
    for averager in averagers:
        averager.shutdown()
    lines = [record.getMessage() for record in caplog.records if "shut down before" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"{swarm.prefix}: shut down before the average of step 0 was applied")
    assert tensors[0][0].tolist() == [2.0] * 10
    assert tensors[1][0].tolist() == [4.0] * 10
    with pytest.raises(InvalidStateError, match="shut down"):
        averagers[0].apply_average()
