"""``shoal.Optimizer`` on real background processes: the scenarios of hivemind's own tests, and its faults."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from real_swarm import Swarm, wait_until
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shoal as hivemind
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.optim.record import read_record

pytestmark = pytest.mark.xdist_group("averaging")

PAGE = (Path(__file__).parents[2] / "docs" / "optimizer.md").read_text()
TARGET, EPOCHS = 32, 3


@pytest.fixture
def dht(swarm: Swarm) -> hivemind.DHT:
    return swarm.dht()


@pytest.fixture
def made() -> Iterator[list[hivemind.Optimizer]]:
    optimizers: list[hivemind.Optimizer] = []
    yield optimizers
    for optimizer in optimizers:
        optimizer.shutdown()


def make(
    made: list[hivemind.Optimizer], dht: hivemind.DHT, model: torch.nn.Module, run_id: str, **options: Any
) -> hivemind.Optimizer:
    settings: dict[str, Any] = {
        "target_batch_size": TARGET,
        "batch_size_per_step": 4,
        "optimizer": torch.optim.SGD,
        "matchmaking_time": 1.0,
        "averaging_timeout": 5.0,
        "averager_opts": {"request_timeout": 0.5},
        "tracker_opts": {"max_refresh_period": 1.0},
        **options,
    }
    if settings["optimizer"] is torch.optim.SGD:
        settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    made.append(hivemind.Optimizer(dht=dht, run_id=run_id, **settings))
    return made[-1]


def test_alone_the_mean_over_all_samples_is_the_update(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    """Batches of 1 and 3 samples weigh 1 to 3, and gradients with NaN count for nothing."""
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    opt = make(made, dht, model, swarm.prefix, target_batch_size=4)
    for value, size in ((float("nan"), 3), (8.0, 1), (4.0, 3)):
        model.weight.grad = torch.full((1, 1), value)
        opt.step(batch_size=size)
    assert opt.local_epoch == 1
    assert model.weight.item() == pytest.approx(before - 0.1 * 5.0)
    assert opt.report.gradients == "own"
    assert opt.report.to_dict()["samples"] == 4


def test_a_learning_rate_that_is_set_from_outside_counts(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    """Also for an offloaded optimizer, whose groups have the model's own parameters."""
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(
        made, dht, model, swarm.prefix, target_batch_size=4,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), params=model.parameters(),
    )  # fmt: skip
    assert opt.options.offload_optimizer
    assert opt.param_groups[0]["params"][0] is model.weight
    opt.param_groups[0]["lr"] = 0.5
    before = model.weight.item()
    model.weight.grad = torch.ones(1, 1)
    opt.step()
    assert model.weight.item() == pytest.approx(before - 0.5)


@pytest.mark.parametrize("local", [False, True])
def test_an_update_that_is_interrupted_counts_no_sample_twice(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm, local: bool
):
    """As by Ctrl+C while parameters are averaged: the epoch has ended, and its gradients are used up."""
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(made, dht, model, swarm.prefix, target_batch_size=8, use_local_updates=local)
    before = model.weight.item()

    def step(gradient: float) -> None:
        model.weight.grad = torch.full((1, 1), gradient)
        opt.step()

    def interrupted_after_the_update() -> None:
        if opt.local_epoch == 1:
            raise KeyboardInterrupt

    step(1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opt.state_averager, "_apply_round", interrupted_after_the_update)
        with pytest.raises(KeyboardInterrupt):
            step(3.0)
    assert opt.local_epoch == 1
    step(5.0)
    assert opt.local_progress.samples_accumulated == 4
    if not local:
        assert model.weight.item() == pytest.approx(before - 0.1 * 2.0)
        step(7.0)
        assert model.weight.item() == pytest.approx(before - 0.1 * 2.0 - 0.1 * 6.0)


def test_the_averaged_gradient_is_clipped_and_a_closure_gives_its_loss(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm
):
    """The norm is that of the mean over the epoch, not that of a batch."""
    model = torch.nn.Linear(2, 1, bias=False)
    opt = make(made, dht, model, swarm.prefix, target_batch_size=8, max_grad_norm=0.5)
    before = model.weight.detach().clone()

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = model(torch.tensor([[3.0, 4.0]])).sum()
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(2)]
    assert losses[0] == losses[1] == pytest.approx(float((before @ torch.tensor([3.0, 4.0])).item()))
    assert opt.local_epoch == 1
    assert torch.allclose(model.weight, before - 0.1 * torch.tensor([[0.3, 0.4]]), atol=1e-6)
    assert opt.report.loss == pytest.approx(losses[0])


def test_a_second_thread_in_a_step_is_an_error(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    """Two that end one epoch would update twice."""
    model = torch.nn.Linear(1, 1)
    opt = make(made, dht, model, swarm.prefix)

    def closure() -> float:
        with ThreadPoolExecutor(1) as pool, pytest.raises(InvalidStateError, match="one thread at a time"):
            pool.submit(opt.step).result()
        model(torch.ones(1, 1)).sum().backward()
        return 1.0

    assert opt.step(closure) == 1.0
    opt.step()
    assert opt.local_progress.samples_accumulated == 8


def test_those_that_watch_are_told_of_each_epoch(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm, tmp_path: Path
):
    """The loss of each batch counts by its samples; a record that cannot be written is said before anything starts."""
    model = torch.nn.Linear(1, 1, bias=False)
    told: list[Any] = []
    record = tmp_path / "run.jsonl"
    opt = make(made, dht, model, swarm.prefix, target_batch_size=4, record=record, on_epoch=told.append)
    for loss, size in ((2.0, 1), (torch.tensor(6.0), 3)):
        model.weight.grad = torch.ones(1, 1)
        assert opt.step(batch_size=size, loss=loss) is None
    assert [(report.epoch, report.loss) for report in told] == [(0, pytest.approx(5.0))]
    assert [entry["loss"] for entry in read_record(record)] == [pytest.approx(5.0)]
    with pytest.raises(InvalidValueError, match="loss must be None with a closure, which returns it"):
        opt.step(lambda: 1.0, loss=1.0)
    with pytest.raises(InvalidValueError, match="record must be a file that can be written"):
        make(made, dht, model, f"{swarm.prefix}2", record=tmp_path)


def test_a_model_that_was_cast_afterwards_is_an_error_that_names_the_parameter(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    """A batch without any gradient counts for nothing, and an end of the optimizer is none of its errors."""
    model = torch.nn.Linear(1, 1)
    opt = make(made, dht, model, swarm.prefix, target_batch_size=4)
    opt.step()
    assert opt.tracker.local_progress.samples_accumulated == 0
    assert "no parameter has a gradient" in caplog.text
    model.half()
    with pytest.raises(
        InvalidStateError, match=r"parameter\.0 was float32 \[1, 1\] .*, and is float16 \[1, 1\] now"
    ):
        opt.step()
    with pytest.raises(InvalidStateError, match="cast a model before its optimizer is made"):
        opt.load_state_from_peers()
    opt.shutdown()


def test_an_auxiliary_peer_takes_no_batches_and_changes_nothing(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm
):
    model = torch.nn.Linear(1, 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    opt = make(made, dht, model, swarm.prefix, auxiliary=True, batch_size_per_step=None)
    with pytest.raises(InvalidValueError, match="step\\(\\) must have no arguments"):
        opt.step(batch_size=4)
    opt.step()
    assert opt.tracker.local_progress.samples_accumulated == 0
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_what_is_loaded_into_an_offloaded_model_stays_until_the_next_update(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm
):
    """As the best model that a framework loads at the end, before this optimizer is shut down."""
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(made, dht, model, swarm.prefix, params=model.parameters(), optimizer=offloaded_sgd)
    with torch.no_grad():
        model.weight.fill_(7.0)
    opt.state_averager.step()
    opt.shutdown()
    assert model.weight.item() == 7.0


def test_a_saved_state_has_the_delayed_step(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    opt = make(
        made, dht, model, swarm.prefix, target_batch_size=4, params=model.parameters(), optimizer=offloaded_sgd,
        delay_optimizer_step=True,
    )  # fmt: skip
    model.weight.grad = torch.ones(1, 1)
    opt.step()
    assert opt.state_dict()["state"]["local_epoch"] == 1
    assert model.weight.item() == pytest.approx(before - 0.1)


def offloaded_sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


def test_state_dict_round_trips_and_stays_as_given(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(made, dht, model, swarm.prefix, target_batch_size=4)
    model.weight.grad = torch.ones(1, 1)
    opt.step()
    saved = opt.state_dict()
    opt.step()
    assert opt.local_epoch == 2
    opt.load_state_dict(saved)
    assert opt.local_epoch == 1
    assert saved["state"]["local_epoch"] == 1
    opt.shutdown()
    opt.shutdown()
    assert not opt.is_alive()
    with pytest.raises(InvalidStateError, match="shut down"):
        opt.step()


@pytest.mark.parametrize(
    ("after", "update"),
    [
        ("local", 2.0),
        pytest.param("skip", 0.0, marks=pytest.mark.sweep),
        pytest.param("delayed", 2.0, marks=pytest.mark.sweep),
    ],
)
def test_a_failed_round_never_updates_by_zeros(
    made: list[Any], swarm: Swarm, after: str, update: float, caplog: pytest.LogCaptureFixture
):
    """The other peer tells its progress, and never comes to a round."""
    dht, other = swarm.dht(), swarm.dht()
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    modes: dict[str, Any] = {"after_failed_round": after}
    if after == "delayed":
        modes = {
            "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
            "params": model.parameters(),
            "delay_grad_averaging": True,
        }
    modes |= {"target_batch_size": 8, "averaging_timeout": 0.5, "average_state_every": 2}
    opt = make(made, dht, model, swarm.prefix, **modes)
    options: dict[str, Any] = {"start": True, "min_refresh_period": 0.1}
    tracker = hivemind.optim.ProgressTracker(other, opt.tracker.prefix, 8, **options)
    tracker.report_local_progress(0, 1)
    try:
        wait_until(lambda: opt.tracker.global_progress.num_peers == 2)
        for value in (1.0, 3.0):
            model.weight.grad = torch.full((1, 1), value)
            opt.step()
        opt.state_averager.step(wait_for_delayed_updates=True)
    finally:
        tracker.shutdown()
    assert opt.local_epoch == 1
    assert model.weight.item() == pytest.approx(before - 0.1 * update)
    said = [r for r in caplog.records if "the gradients of epoch 0 were not averaged" in r.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"]


def test_a_local_update_that_raises_counts_for_nothing(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise ValueError("out of luck")
            return super().step(closure)

    model = torch.nn.Linear(1, 1, bias=False)
    inner = Failing(model.parameters(), lr=0.1)
    opt = make(made, dht, model, swarm.prefix, optimizer=inner, use_local_updates=True)
    inner.fails = True
    model.weight.grad = torch.ones(1, 1)
    with pytest.raises(ValueError, match="out of luck"):
        opt.step()
    assert opt.local_progress.samples_accumulated == 0
    inner.fails = False
    opt.step()
    assert opt.local_progress.samples_accumulated == 4


def test_a_late_peer_looks_for_those_that_average_in_the_background(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    """They are an epoch ahead as soon as their round begins, and would look for this peer in vain."""
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(
        made, dht, model, swarm.prefix, averaging_timeout=0.5, delay_grad_averaging=True,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), params=model.parameters(),
    )  # fmt: skip
    tracker = hivemind.optim.ProgressTracker(swarm.dht(), opt.tracker.prefix, TARGET, start=True)
    try:
        # A newcomer compares its epoch with that of the others once: before they move on.
        wait_until(opt.tracker.fetched_global_progress_this_epoch.is_set)
        model.weight.grad = torch.ones(1, 1)
        opt.step()
        tracker.report_local_progress(1, 1)
        wait_until(lambda: opt.tracker.global_epoch == 1)
        opt.step()
        opt.state_averager.finish_delayed()
    finally:
        tracker.shutdown()
    assert (opt.report.epoch, opt.report.gradients) == (0, "delayed")
    [said] = [r.getMessage() for r in caplog.records if "the gradients of epoch 0" in r.getMessage()]
    assert "no average within 0.5 s" in said or "found no group" in said


@pytest.mark.sweep
def test_the_last_partner_is_killed_and_nobody_waits_for_it(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    """Neither in the epoch that it was killed in, though its record stands for a minute, nor in the next one."""
    killed = swarm.own_dht()
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(made, dht, model, swarm.prefix, target_batch_size=8, averaging_timeout=60.0)
    tracker = hivemind.optim.ProgressTracker(killed, opt.tracker.prefix, 8, start=True)
    tracker.report_local_progress(0, 1)
    wait_until(lambda: opt.tracker.global_progress.num_peers == 2)
    model.weight.grad = torch.ones(1, 1)
    opt.step()
    searching = threading.Timer(1.0, lambda: os.kill(killed.background.pid, signal.SIGKILL))
    searching.start()
    opt.step()
    searching.join()
    assert (opt.report.epoch, opt.report.peers, opt.report.gradients) == (0, 2, "own")
    assert opt.report.failure == "no other peer is in this epoch any more"
    for _ in range(2):
        opt.step()
    assert (opt.report.epoch, opt.report.peers, opt.report.failure) == (1, 1, None)


def test_a_client_ends_epochs_and_a_load_without_donors_ends(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm
):
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(made, dht, model, swarm.prefix, target_batch_size=4, client_mode=True)
    assert opt.grad_averager.client_mode
    assert opt.state_averager.client_mode
    assert not opt.load_state_from_peers(timeout=5.0)
    model.weight.grad = torch.ones(1, 1)
    opt.step()
    assert opt.local_epoch == 1


def test_what_averager_opts_set_reaches_both_averagers(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    """A time that follows from another one may be set, too."""
    opts = {"bandwidth": 7.0, "next_chunk_timeout": 3.5}
    opt = make(made, dht, torch.nn.Linear(1, 1), swarm.prefix, averager_opts=opts)
    for averager in (opt.grad_averager, opt.state_averager):
        assert averager.bandwidth == 7.0
        assert averager.next_chunk_timeout == 3.5


def test_a_scheduler_and_a_scaler_of_torch_work_as_they_are(made: list[Any], dht: hivemind.DHT, swarm: Swarm):
    """The scaler leaves out a step with overflow: no sample counts."""
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(made, dht, model, swarm.prefix, target_batch_size=4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.item()
    for value in (float("inf"), 8.0):
        scaler.scale(value * model.weight.sum()).backward()  # the gradient is four times the value
        scaler.step(opt)
        opt.zero_grad()
        scaler.update(4.0)
    scheduler.step()
    assert opt.local_epoch == 1
    assert model.weight.item() == pytest.approx(before - 0.1 * 8.0)
    assert opt.opt.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("reuse", [False, True])
def test_gradients_that_a_scaler_has_scaled_are_unscaled_before_the_update(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm, reuse: bool
):
    """Also sums that stay scaled in ``param.grad`` until the epoch ends; what overflows counts for nothing."""
    model = torch.nn.Linear(1, 1, bias=False)
    opt = make(made, dht, model, swarm.prefix, target_batch_size=8, reuse_grad_buffers=reuse)
    scaler = hivemind.GradScaler("cpu", init_scale=4.0)
    before = model.weight.item()
    for value in (float("inf"), 2.0, 6.0):
        scaler.scale(value * model.weight.sum()).backward()
        scaler.step(opt)
        if not reuse:
            opt.zero_grad()
        scaler.update()
    assert opt.local_epoch == 1
    assert model.weight.item() == pytest.approx(before - 0.1 * 4.0)
    if reuse:
        with pytest.raises(
            InvalidTypeError, match=r"grad_scaler must be a shoal\.GradScaler with reuse_grad_buffers"
        ):
            opt.step(grad_scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("as_it_is", [False, True])
def test_torch_distributed_checkpoint_takes_epoch_optimizer_and_scheduler(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm, tmp_path: Path, as_it_is: bool
):
    """Both by its state and as an object with a state; names for parameters are refused with what to do."""

    def peer(number: int) -> tuple[torch.nn.Module, hivemind.Optimizer]:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        run_id = f"{swarm.prefix}{number}"
        return model, make(made, dht, model, run_id, optimizer=optimizer, scheduler=scheduler)

    def state(model: torch.nn.Module, opt: hivemind.Optimizer) -> dict[str, Any]:
        return (
            {"model": model, "opt": opt}
            if as_it_is
            else {"model": model.state_dict(), "opt": opt.state_dict()}
        )

    model, opt = peer(0)
    for _ in range(3):
        model(torch.ones(4, 2)).sum().backward()
        opt.step(batch_size=TARGET)
        opt.zero_grad()
    checkpoint.save(state(model, opt), checkpoint_id=tmp_path, no_dist=True)
    again, other = peer(1)
    loaded = state(again, other)
    checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    if not as_it_is:
        other.load_state_dict(loaded["opt"])
    assert other.local_epoch == opt.local_epoch == 3
    assert torch.equal(again.weight, model.weight)
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == pytest.approx(0.05)
    assert other.state_averager.scheduler.last_epoch == 3
    before, after = opt.opt.state[model.weight], other.opt.state[again.weight]
    assert all(torch.equal(before[name], after[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    with pytest.raises(InvalidStateError, match="must not be used with shoal"):
        get_optimizer_state_dict(model, opt)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"offload_optimizer": True}, "offload_optimizer must be False with an optimizer instance"),
        ({"use_local_updates": True, "reuse_grad_buffers": True}, "reuse_grad_buffers must be False"),
        ({"averager_opts": {"prefix": "other"}}, "averager_opts must not have 'prefix', which follows from run_id"),
        ({"auxiliary": True}, "batch_size_per_step must be None with auxiliary"),
        ({"after_failed_round": "retry"}, "after_failed_round must be"),
        ({"target_batch_size": 0}, "target_batch_size must be"),
        ({"averager_opts": {"timeout": 3}}, "averager_opts must have names of DecentralizedAverager's parameters"),
        ({"tracker_opts": {"period": 3}}, "tracker_opts must have names of ProgressTracker's parameters"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm, wrong: dict[str, Any], message: str
):
    with pytest.raises(InvalidValueError, match=message):
        make(made, dht, torch.nn.Linear(1, 1), swarm.prefix, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"average_opt_statistics": "exp_avg"}, "average_opt_statistics must be a sequence of names, got 'exp_avg'"),
        ({"extra_tensors": [3]}, "extra_tensors must be tensors, got 3"),
        ({"params": 5, "optimizer": torch.optim.Adam}, "params must be parameters or groups of them, got 5"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(
    made: list[Any], dht: hivemind.DHT, swarm: Swarm, wrong: dict[str, Any], message: str
):
    with pytest.raises(InvalidTypeError, match=message):
        make(made, dht, torch.nn.Linear(1, 1), swarm.prefix, **wrong)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "modes",
    [
        {},
        {"reuse_grad_buffers": True},
        {"delay_state_averaging": False},
        {"use_local_updates": True},
        {"use_local_updates": True, "delay_state_averaging": False},
        {"delay_optimizer_step": True},
        {"delay_optimizer_step": True, "delay_grad_averaging": True},
        {"after_failed_round": "wait"},
    ],
    ids=str,
)
def test_peers_end_three_epochs_together(made: list[Any], swarm: Swarm, modes: dict[str, Any]):
    dhts = [swarm.dht(), swarm.dht()]
    models = [torch.nn.Linear(4, 1) for _ in dhts]
    models[1].load_state_dict(models[0].state_dict())
    delayed = modes.get("delay_optimizer_step", False)
    opts = []
    told: list[list[hivemind.optim.EpochReport]] = [[], []]
    for dht, model, reports in zip(dhts, models, told, strict=True):
        factory = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "params": model.parameters()}
        options = {"on_epoch": reports.append, **(factory if delayed else {}), **modes}
        opts.append(make(made, dht, model, swarm.prefix, **options))
    together = threading.Barrier(2)

    def train(opt: hivemind.Optimizer, model: torch.nn.Module) -> None:
        together.wait(30)
        while opt.local_epoch < EPOCHS:
            model(torch.randn(4, 4)).pow(2).mean().backward()
            opt.step()
            if not opt.options.reuse_grad_buffers:
                opt.zero_grad()
            threading.Event().wait(0.2)
        opt.state_averager.step(wait_for_delayed_updates=True)

    threads = [threading.Thread(target=train, args=pair) for pair in zip(opts, models, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert [opt.local_epoch for opt in opts] == [EPOCHS, EPOCHS]
    assert [opt.tracker.global_epoch for opt in opts] == [EPOCHS, EPOCHS]
    for report, following in (pair for reports in told for pair in itertools.pairwise(reports)):
        is_told = "gradients" in following.late
        assert is_told == (report.gradients == "delayed"), "a delayed round ends before the next one begins"


@pytest.mark.sweep
def test_peers_that_missed_each_other_find_together_in_the_next_epoch(made: list[Any], swarm: Swarm):
    """One comes to a round of gradients when the other has given up, and averages parameters by itself."""
    dhts = [swarm.dht(), swarm.dht()]
    models = [torch.nn.Linear(1, 1) for _ in dhts]
    modes: dict[str, Any] = {"target_batch_size": 8, "averaging_timeout": 3.0, "matchmaking_time": 0.3}
    opts = [
        make(made, dht, model, swarm.prefix, delay_state_averaging=False, **modes)
        for dht, model in zip(dhts, models, strict=True)
    ]
    kinds: list[list[str]] = [[], []]
    gave_up = threading.Event()

    def step(index: int) -> None:
        models[index](torch.ones(4, 1)).sum().backward()
        opts[index].step()
        opts[index].zero_grad()

    def train(index: int) -> None:
        if index:
            gave_up.wait(30)
        while opts[index].local_epoch < EPOCHS:
            before = opts[index].local_epoch
            step(index)
            if opts[index].local_epoch > before:
                kinds[index].append(opts[index].report.gradients)

    for index in (0, 1):
        step(index)
    wait_until(lambda: all(opt.tracker.global_progress.samples_accumulated == 8 for opt in opts))
    average = opts[0].state_averager._average
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opts[0].state_averager, "_average", lambda *given: (gave_up.set(), average(*given)))
        threads = [threading.Thread(target=train, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert kinds == [["own", "averaged", "averaged"]] * 2


@pytest.mark.sweep
def test_the_program_of_the_page_runs(tmp_path: Path):
    [program] = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    script = tmp_path / "train.py"
    script.write_text(program)
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0, ended.stderr
    assert "epoch 19: 1 peers, 256 samples" in ended.stdout
