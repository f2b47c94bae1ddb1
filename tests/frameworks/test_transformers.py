"""A real Trainer of transformers with a small model, as a peer that is alone, or one of two."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import Trainer, TrainerCallback, TrainingArguments

from shoal.frameworks.transformers import ShoalCallback, SwarmScheduler
from shoal.optim.report import EpochReport

pytestmark = pytest.mark.xdist_group("transformers")

ROWS = 18
RATE = 0.1
names = itertools.count()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        found = self.linear(x)
        return (
            {"logits": found}
            if labels is None
            else {"loss": (found - labels).square().mean(), "logits": found}
        )


def rows() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": row.sum(0, keepdim=True)} for row in x]


def model() -> Model:
    torch.manual_seed(1)
    return Model()


def after(updates: int, optimizer: Any = None, clip: float | None = None) -> torch.Tensor:
    """The weights after so many updates by all rows."""
    plain = model()
    made = (optimizer or (lambda p: torch.optim.SGD(p, lr=RATE)))(plain.parameters())
    batch = {name: torch.stack([row[name] for row in rows()]) for name in ("x", "labels")}
    for _ in range(updates):
        made.zero_grad()
        plain(**batch)["loss"].backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        made.step()
    return plain.linear.weight.detach()


@pytest.fixture(scope="module")
def dht() -> Iterator[shoal.DHT]:
    with shoal.DHT(start=True) as made:
        yield made


class Maker:
    """Makes Trainers of one folder; each has a run of its own, unless a name is given."""

    def __init__(self, dht: shoal.DHT, folder: Path) -> None:
        self._dht, self._folder = dht, folder
        self.optimizers: list[shoal.Optimizer] = []

    def optimizer(self, net: Model, **options: Any) -> shoal.Optimizer:
        settings: dict[str, Any] = {
            "run_id": f"trainer_{next(names)}",
            "target_batch_size": ROWS,
            "optimizer": torch.optim.SGD(net.parameters(), lr=RATE) if "params" not in options else None,
            "matchmaking_time": 1.0,
            "averaging_timeout": 5.0,
            "load_state_timeout": 5.0,
            **options,
        }
        self.optimizers.append(shoal.Optimizer(dht=self._dht, **settings))
        return self.optimizers[-1]

    def trainer(
        self,
        opt: Any,
        net: Model,
        callback: ShoalCallback | None = None,
        scheduler: Any = None,
        callbacks: tuple[TrainerCallback, ...] = (),
        **arguments: Any,
    ) -> Trainer:
        settings: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "max_grad_norm": 0,
            "data_seed": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "dataloader_pin_memory": False,
            **arguments,
        }
        if scheduler is None and isinstance(opt, shoal.Optimizer):
            scheduler = SwarmScheduler(opt)
        return Trainer(
            net,
            TrainingArguments(str(self._folder), **settings),
            train_dataset=rows(),
            eval_dataset=rows(),
            callbacks=[callback or ShoalCallback(), *callbacks],
            optimizers=(opt, scheduler),
        )


@pytest.fixture
def make(dht: shoal.DHT, tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(dht, tmp_path)
    yield maker
    for optimizer in maker.optimizers:
        optimizer.shutdown()


# ---- training


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_sample_has_the_same_weight(make: Maker, accumulation: int):
    """Four full batches and one of two rows are one epoch; an evaluation between two steps counts for nothing."""
    net = model()
    heard: list[EpochReport] = []
    opt = make.optimizer(net, on_epoch=heard.append)
    trainer = make.trainer(
        opt, net,
        gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    assert torch.allclose(net.linear.weight, after(3), atol=1e-6)
    assert [report.samples for report in heard] == [ROWS] * 3
    assert opt.batch_size_per_step is None, "as it was given"
    assert not opt.is_alive()


def test_the_trainers_logs_have_the_figures_of_the_swarm(make: Maker):
    """Callbacks that are told after this one get them, and trainer_state.json; the learning rate follows epochs."""
    net = model()
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            seen.append(dict(logs))

    opt = make.optimizer(
        net, params=net.parameters(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, lambda epoch: 0.5**epoch),
    )  # fmt: skip
    trainer = make.trainer(opt, net, callbacks=(Reporter(),))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["shoal/epoch"] for entry in logged] == [0] * 4 + [1] * 5 + [2] * 5 + [3]
    assert [entry["learning_rate"] for entry in logged] == [0.5 ** entry["shoal/epoch"] for entry in logged]
    assert {name: logged[-1][f"shoal/{name}"] for name in ("peers", "own", "averaged", "failed", "samples")} == {
        "peers": 1, "own": 3, "averaged": 0, "failed": 0, "samples": ROWS,
    }  # fmt: skip
    assert logged[-1]["shoal/seconds/epoch"] > 0
    assert [entry["shoal/epoch"] for entry in seen if "loss" in entry] == [
        entry["shoal/epoch"] for entry in logged
    ]


def test_the_swarm_ends_training_and_clips_its_mean(make: Maker):
    net = model()
    opt = make.optimizer(net, max_grad_norm=0.5)
    trainer = make.trainer(opt, net, ShoalCallback(stop_at_epoch=2, shutdown=False), num_train_epochs=100)
    trainer.train()
    assert opt.local_epoch == 2
    assert torch.allclose(net.linear.weight, after(2, clip=0.5), atol=1e-6)
    assert opt.is_alive()
    trainer.train()  # it has reached its epoch: one step, of which nothing comes
    assert opt.local_epoch == 2


def test_bfloat16_trains_the_same_model(make: Maker):
    net = model()
    make.trainer(make.optimizer(net), net, bf16=True).train()
    assert torch.allclose(net.linear.weight, after(3), atol=0.02)
    assert not torch.allclose(net.linear.weight, after(0), atol=0.02)


# ---- checkpoints


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


@pytest.mark.parametrize("offload", [True, False])
def test_a_checkpoint_goes_on_at_its_epoch(make: Maker, offload: bool):
    def begin(net: Model) -> Trainer:
        parts = (
            {"params": net.parameters(), "optimizer": adam}
            if offload
            else {"optimizer": adam(net.parameters())}
        )
        opt = make.optimizer(net, **parts)
        return make.trainer(opt, net, save_strategy="epoch", num_train_epochs=2)

    begin(model()).train()
    net = model()
    resumed = begin(net)
    resumed.args.num_train_epochs = 4
    resumed.train(resume_from_checkpoint=True)
    assert make.optimizers[1].local_epoch == 4
    assert torch.allclose(net.linear.weight, after(4, adam), atol=1e-6)


def test_a_checkpoint_without_an_optimizer_is_said_to_be_one(make: Maker, caplog: pytest.LogCaptureFixture):
    trained = model()
    make.trainer(make.optimizer(trained), trained, save_strategy="epoch", save_only_model=True).train()
    net = model()
    opt = make.optimizer(net)
    make.trainer(opt, net, num_train_epochs=4).train(resume_from_checkpoint=True)
    assert "the checkpoint has parameters and no epoch" in caplog.text
    assert opt.local_epoch == 1
    assert torch.allclose(net.linear.weight, after(4), atol=1e-6)


@pytest.mark.sweep
def test_the_best_model_stays_in_place_when_the_peer_leaves(make: Maker):
    """The offloaded copies have the last model: nothing writes them over the best one."""
    net = model()
    opt = make.optimizer(net, params=net.parameters(), optimizer=lambda p: torch.optim.SGD(p, lr=1.5))
    make.trainer(
        opt, net, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss",
    ).train()  # fmt: skip
    losses = [model_loss(after(n, lambda p: torch.optim.SGD(p, lr=1.5))) for n in range(1, 4)]
    assert losses.index(min(losses)) == 0, "it diverges: the first is the best"
    assert torch.allclose(net.linear.weight, after(1, lambda p: torch.optim.SGD(p, lr=1.5)), atol=1e-5)


def model_loss(weight: torch.Tensor) -> float:
    return float((weight - 1).square().sum())


# ---- NaN


class Poison(TrainerCallback):
    """Spoils the parameters once, before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            given["model"].linear.weight.data.fill_(float("nan"))


def test_a_diverged_model_goes_back_to_its_backup(make: Maker):
    net = model()
    opt = make.optimizer(net)
    trainer = make.trainer(
        opt, net, ShoalCallback(backup_every=1, stop_at_epoch=3), callbacks=(Poison(5),), num_train_epochs=10
    )
    trainer.train()
    assert opt.local_epoch == 3
    assert torch.isfinite(net.linear.weight).all()


def test_a_diverged_model_without_a_backup_ends_training(make: Maker):
    net = model()
    trainer = make.trainer(make.optimizer(net), net, callbacks=(Poison(5),))
    with pytest.raises(InvalidStateError, match=r"no peer has better ones.*backup_every"):
        trainer.train()


@pytest.mark.sweep
def test_a_diverged_model_takes_that_of_a_peer(make: Maker, dht: shoal.DHT):
    net, other = model(), model()
    opt = make.optimizer(net)
    with shoal.DHT(initial_peers=dht.get_visible_maddrs(), start=True) as second:
        donor = shoal.Optimizer(
            dht=second, run_id=opt.run_id, target_batch_size=ROWS,
            optimizer=torch.optim.SGD(other.parameters(), lr=RATE), batch_size_per_step=1,
        )  # fmt: skip
        try:
            trainer = make.trainer(
                opt, net, ShoalCallback(load_state=False), callbacks=(Poison(0),), max_steps=1
            )
            trainer.train()
        finally:
            donor.shutdown()
    assert torch.equal(net.linear.weight, other.linear.weight)


# ---- wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse_grad_buffers": True}, "reuse_grad_buffers must be False with a Trainer"),
        ({"auxiliary": True}, "auxiliary must be False with a Trainer"),
        ({"batch_size_per_step": 4}, r"batch_size_per_step must be 8 .* or be left out, got 4"),
    ],
)
def test_modes_that_a_trainer_would_spoil_are_named(make: Maker, options: dict[str, Any], message: str):
    net = model()
    opt = make.optimizer(net, **options)
    with pytest.raises(InvalidValueError, match=message):
        make.trainer(opt, net, gradient_accumulation_steps=2)


def test_another_optimizer_or_schedule_is_named(make: Maker):
    net = model()
    with pytest.raises(InvalidTypeError, match=r"must be a shoal\.Optimizer, got SGD: give Trainer"):
        make.trainer(torch.optim.SGD(net.parameters(), lr=RATE), net)
    with pytest.raises(InvalidTypeError, match=r"must be a shoal\.Optimizer, got AdamW"):
        make.trainer(None, net).train()
    inner = torch.optim.SGD(net.parameters(), lr=RATE)
    opt = make.optimizer(net, optimizer=inner, scheduler=torch.optim.lr_scheduler.ConstantLR(inner))
    with pytest.raises(InvalidValueError, match="the Trainer's scheduler must be a SwarmScheduler"):
        make.trainer(opt, net, scheduler=torch.optim.lr_scheduler.ConstantLR(opt))
    with pytest.raises(InvalidTypeError, match=r"optimizer must be a shoal\.Optimizer, got SGD"):
        SwarmScheduler(inner)  # type: ignore[arg-type]


def test_what_is_seldom_meant_is_said(make: Maker, caplog: pytest.LogCaptureFixture):
    net = model()
    opt = make.optimizer(net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    make.trainer(opt, net, scheduler=scheduler, max_grad_norm=1.0, data_seed=None, max_steps=1).train()
    for words in ("follows this peer's own steps", "to max_grad_norm=1. To clip", "data_seed is not set"):
        assert words in caplog.text
    caplog.clear()
    net = model()
    make.trainer(make.optimizer(net), net, max_steps=1).train()
    assert [record.getMessage() for record in caplog.records if "frameworks" in record.name] == []


def test_arguments_of_the_callback_are_checked():
    with pytest.raises(InvalidValueError, match="stop_at_epoch must be"):
        ShoalCallback(stop_at_epoch=0)
    assert copy.copy(ShoalCallback(backup_every=2)).backup_every == 2
