"""Parameters, statistics and state between peers: what :class:`shoal.optim.TrainingStateAverager` promises."""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import Any

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm
from torch.optim import lr_scheduler as schedulers

from shoal.errors import InvalidValueError
from shoal.optim import GradScaler, TrainingStateAverager

pytestmark = pytest.mark.xdist_group("averaging")


def state_averager(swarm: Swarm, size: int = 2, **options: Any) -> TrainingStateAverager:
    return swarm.start(TrainingStateAverager, size=size, **options)


def model(value: float) -> torch.nn.Linear:
    made = torch.nn.Linear(3, 1)
    with torch.no_grad():
        for param in made.parameters():
            param.fill_(value)
    return made


def set_grads(module: torch.nn.Module, value: float) -> None:
    for param in module.parameters():
        param.grad = torch.full_like(param, value)


def on_all(calls: list[Any]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "offload": {"offload_optimizer": True},
    "delta rule": {"delta_rule_averaging": True},
    "synchronised": {"sync_epoch_when_averaging": True},
    "offload, synchronised": {"offload_optimizer": True, "sync_epoch_when_averaging": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_parameters_named_statistics_and_extras_are_averaged_and_nothing_else(swarm: Swarm, mode: str):
    models = [model(1.0), model(3.0)]
    extras = [[torch.tensor([float(i)]), torch.tensor([5 + 2 * i])] for i in range(2)]
    averagers = [
        state_averager(
            swarm,
            optimizer=partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.5)),
            params=module.parameters(),
            average_opt_statistics=("exp_avg_sq",),
            extra_tensors=extra,
            **MODES[mode],
        )
        for module, extra in zip(models, extras, strict=True)
    ]
    averagers[0].step(increment_epoch=True)
    for averager, module, grad in zip(averagers, models, (1.0, 3.0), strict=True):
        set_grads(module, grad)
        averager.step(increment_epoch=True, optimizer_step=True, zero_grad=False)
    on_all(
        [partial(a.step, averaging_round=True, averaging_opts={"timeout": STEP_TIMEOUT}) for a in averagers]
    )
    for index, (averager, module, extra) in enumerate(zip(averagers, models, extras, strict=True)):
        torch.testing.assert_close(module.weight.detach(), torch.full((1, 3), 1.9))
        state = averager.optimizer.state[averager.holder.parameters[0]]
        torch.testing.assert_close(state["exp_avg_sq"], torch.full((1, 3), 2.5))
        torch.testing.assert_close(state["exp_avg"], torch.full((1, 3), (0.5, 1.5)[index]))
        assert extra[0].item() == 0.5
        assert extra[1].item() == 7  # the larger count
        assert averager.local_epoch == (2, 2 if "synchronised" in mode else 1)[index]


def test_steps_beside_a_delayed_round_are_kept(swarm: Swarm):
    models = [model(1.0), model(3.0)]
    averagers = [
        state_averager(
            swarm, optimizer=torch.optim.SGD(module.parameters(), lr=0.5), delta_rule_averaging=True, size=2
        )
        for module in models
    ]
    for averager in averagers:
        averager.step(averaging_round=True, delay_averaging=True, averaging_opts={"timeout": STEP_TIMEOUT})
    set_grads(models[0], 1.0)
    averagers[0].step(optimizer_step=True)
    for averager in averagers:
        averager.step(wait_for_delayed_updates=True)
        assert not averager.averaging_in_progress
    total = models[0].weight + models[1].weight  # the update may have come before the round or after it
    torch.testing.assert_close(total.detach(), torch.full((1, 3), 3.5))
    assert abs(models[0].weight[0, 0] - models[1].weight[0, 0]) < 1


def test_a_round_that_finds_nobody_ends_in_time_and_changes_nothing(swarm: Swarm):
    module = model(1.0)
    averager = state_averager(swarm, optimizer=torch.optim.SGD(module.parameters(), lr=0.5))
    averager.step(increment_epoch=True, averaging_round=True, averaging_opts={"timeout": 0.3})
    assert averager.load_state_from_peers(timeout=2) is None
    assert averager.local_epoch == 1
    assert torch.equal(module.weight, torch.ones(1, 3))


def test_a_late_average_reaches_the_model_by_the_callers_hand(swarm: Swarm, monkeypatch: pytest.MonkeyPatch):
    module = model(1.0)
    averager = state_averager(
        swarm,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        params=module.parameters(),
        offload_optimizer=True,
    )
    writers = []

    def write_late() -> bool:
        writers.append(threading.current_thread())
        averager.holder.parameters[0].data.fill_(7.0)
        return True

    monkeypatch.setattr(averager, "apply_late_average", write_late)
    averager.step()
    assert set(writers) == {threading.current_thread()}
    assert torch.equal(module.weight, torch.full((1, 3), 7.0))


@pytest.mark.parametrize(
    ("offload", "scheduler", "rate"),
    [
        (False, lambda o: schedulers.LambdaLR(o, lambda t: 1.0 / max(1, t)), 0.1 / 1337),
        (True, lambda o: schedulers.LambdaLR(o, lambda t: 1.0 / max(1, t)), 0.1 / 1337),
        (False, lambda o: schedulers.StepLR(o, 1000, 0.5), 0.1 / 2),
        (True, lambda o: schedulers.ChainedScheduler([schedulers.StepLR(o, 1000, 0.5)]), 0.1 / 2),
    ],
)
def test_a_joiner_has_the_epoch_weights_and_rate_of_its_donor(
    swarm: Swarm, offload: bool, scheduler: Any, rate: float
):
    """Also where the scheduler computes a rate from the last one, and where it has no count."""

    def peer(value: float) -> tuple[torch.nn.Linear, TrainingStateAverager]:
        module = model(value)
        return module, state_averager(
            swarm,
            optimizer=partial(torch.optim.Adam, lr=0.1),
            params=module.parameters(),
            scheduler=scheduler,
            offload_optimizer=offload,
            extra_tensors=[torch.tensor([int(value)])],
        )

    (_, donor), (module, joiner) = peer(42.0), peer(0.0)
    donor.local_epoch = 1337
    donor.step()
    donor.state_sharing_priority = 1337
    groups = joiner.param_groups
    group = groups[0]
    assert joiner.load_state_from_peers(timeout=30) is not None
    assert joiner.local_epoch == 1337
    assert torch.equal(module.weight, torch.full((1, 3), 42.0))
    assert joiner.extra_tensors[0].item() == 42
    assert joiner.param_groups is groups
    assert joiner.param_groups[0] is group  # schedulers from outside refer to it
    assert group["lr"] == pytest.approx(rate)
    donor.local_epoch = 1000
    assert joiner.load_state_from_peers(timeout=30) is None
    assert joiner.local_epoch == 1337


def test_a_rate_that_the_user_sets_counts_in_the_next_step_also_offloaded(swarm: Swarm):
    module = model(1.0)
    averager = state_averager(
        swarm,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        params=module.parameters(),
        offload_optimizer=True,
        start=False,
    )
    assert averager.param_groups[0]["params"][0] is module.weight
    averager.param_groups[0]["lr"] = 0.5
    set_grads(module, 1.0)
    averager.step(optimizer_step=True, zero_grad=True)
    assert torch.equal(module.weight, torch.full((1, 3), 0.5))
    set_grads(module, 1.0)
    averager.step(optimizer_step=True, delay_optimizer_step=True)
    averager.step(wait_for_delayed_updates=True)
    assert torch.equal(module.weight, torch.zeros(1, 3))


def test_what_a_delayed_step_raises_is_raised_by_the_next_call(swarm: Swarm):
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no memory")

    module = model(1.0)
    averager = state_averager(
        swarm,
        optimizer=partial(Broken, lr=0.1),
        params=module.parameters(),
        offload_optimizer=True,
        initialize_optimizer=False,
        start=False,
    )
    averager.step(optimizer_step=True, delay_optimizer_step=True)
    with pytest.raises(RuntimeError, match="no memory"):
        averager.step(wait_for_delayed_updates=True)
    averager.step()


def test_a_trigger_that_raises_drops_the_step_and_keeps_the_epoch(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    module = model(1.0)
    averager = state_averager(swarm, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), start=False)
    set_grads(module, 1.0)

    def no_gradients() -> None:
        raise TimeoutError("no gradients in 3 s")

    averager.step(increment_epoch=True, optimizer_step=True, wait_for_trigger=no_gradients)
    assert averager.local_epoch == 1
    assert torch.equal(module.weight, torch.ones(1, 3))
    assert "no step and no round in this epoch: no gradients in 3 s" in caplog.text


def test_scalers_of_shoal_and_of_torch_step_the_optimizer(swarm: Swarm):
    module = model(1.0)
    averager = state_averager(swarm, optimizer=torch.optim.SGD(module.parameters(), lr=0.5), start=False)
    for scaler in (GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu", init_scale=8.0)):
        averager.optimizer.zero_grad()
        scaler.scale(sum(param.sum() for param in module.parameters())).backward()  # type: ignore[union-attr]
        with scaler.running_global_step() if isinstance(scaler, GradScaler) else contextlib.nullcontext():
            scaler.unscale_(averager.optimizer)
        averager.step(optimizer_step=True, grad_scaler=scaler)
    assert torch.equal(module.weight, torch.zeros(1, 3))


def test_frozen_parameters_are_neither_averaged_nor_sent(swarm: Swarm):
    module = model(1.0)
    module.weight.requires_grad_(False)
    averager = state_averager(swarm, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), start=False)
    assert averager.total_size == 1
    _, tensors = averager.get_current_state()
    assert [tuple(t.shape) for t in tensors] == [(1,)]


def test_wrong_arguments_are_named(swarm: Swarm):
    module = model(1.0)
    make = partial(TrainingStateAverager, dht=swarm.dht(), prefix="x", start=False)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    for match, options in [
        (
            "optimizer must be a callable with offload_optimizer",
            {"optimizer": sgd, "offload_optimizer": True},
        ),
        ("params must be given", {"optimizer": torch.optim.SGD}),
        ("params must have each parameter once", {"optimizer": torch.optim.SGD, "params": [module.bias] * 2}),
        ("average_opt_statistics must name", {"optimizer": sgd, "average_opt_statistics": ["exp_avg"]}),
        ("parameter_names must have one name for each of 2", {"optimizer": sgd, "parameter_names": ["a"]}),
        ("custom_gradients must be False", {"optimizer": sgd, "custom_gradients": True}),
    ]:
        with pytest.raises(InvalidValueError, match=match):
            make(**options)
    averager = state_averager(swarm, optimizer=sgd, start=False)
    with pytest.raises(InvalidValueError, match="delay_optimizer_step must be False"):
        averager.step(optimizer_step=True, delay_optimizer_step=True)
    with pytest.raises(InvalidValueError, match="must be None without averaging_round"):
        averager.step(averaging_opts={"timeout": 1})
