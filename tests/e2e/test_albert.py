"""The shape of hivemind's ALBERT example, by its names: trainers that offload and delay everything, and a monitor."""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import pytest
import torch
from real_swarm import Swarm, wait_until

import shoal as hivemind
from shoal.optim import TrainingStateAverager

pytestmark = [pytest.mark.xdist_group("averaging"), pytest.mark.sweep]

EPOCHS = 4
TARGET = 96
BATCH = 4
WARMUP = 3


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weights decay, biases and norms do not."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if not is_plain(name)], "weight_decay": 0.01},
        {"params": [p for name, p in named if is_plain(name)], "weight_decay": 0.0},
    ]


def is_plain(name: str) -> bool:
    return name.endswith("bias") or name.startswith("1.")


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, (epoch + 1) / WARMUP))


class Trainer:
    """What run_trainer.py and its callback do."""

    def __init__(self, dht: hivemind.DHT, run_id: str, *, client_mode: bool) -> None:
        self.model = make_model()
        self.optimizer = hivemind.Optimizer(
            dht=dht,
            run_id=run_id,
            target_batch_size=TARGET,
            batch_size_per_step=BATCH,
            optimizer=partial(torch.optim.AdamW, lr=0.02),
            params=groups_of(self.model),
            scheduler=warm_up,
            matchmaking_time=2.0,
            averaging_timeout=20.0,
            offload_optimizer=True,
            delay_optimizer_step=True,
            delay_grad_averaging=True,
            client_mode=client_mode,
            grad_compression=hivemind.Float16Compression(),
            state_averaging_compression=hivemind.Float16Compression(),
            averager_opts={"bandwidth": 100.0, "target_group_size": 256, "request_timeout": 1.0},
            tracker_opts={
                "min_refresh_period": 0.2,
                "max_refresh_period": 2.0,
                "default_refresh_period": 1.0,
                "expected_drift_peers": 3,
                "expected_drift_rate": 0.2,
                "metadata_expiration": 30.0,
            },
            verbose=True,
        )
        self.progress: list[Any] = []
        self.restored = False
        self._backup: tuple[Any, Any] | None = None

    def train(self, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        last_epoch = -1
        while self.optimizer.local_epoch < EPOCHS:
            x = torch.randn(BATCH, 8, generator=draws)
            self.optimizer.zero_grad()
            (self.model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
            if self.optimizer.local_epoch != last_epoch:
                last_epoch = self.optimizer.local_epoch
                self._on_epoch()
            threading.Event().wait(0.1)
        self.optimizer.state_averager.step(wait_for_delayed_updates=True)

    def _on_epoch(self) -> None:
        self.progress.append(self.optimizer.local_progress)
        self._backup = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        if self.optimizer.local_epoch == 2 and not self.restored:
            with torch.no_grad():
                self.model[0].weight.fill_(float("nan"))  # what the callback looks for in the parameters
            self._restore()

    def _restore(self) -> None:
        assert self._backup is not None
        self.model.load_state_dict(self._backup[0])
        self.optimizer.load_state_dict(self._backup[1])
        self.restored = True


def test_trainers_restore_go_on_and_a_monitor_loads_their_state(swarm: Swarm):
    run_id = swarm.prefix
    trainers = [Trainer(swarm.dht(), run_id, client_mode=client) for client in (False, True)]
    monitor_model = make_model()
    monitor = TrainingStateAverager(
        dht=swarm.dht(),
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        params=groups_of(monitor_model),
        scheduler=warm_up,
        prefix=f"{run_id}_state_averager",
        offload_optimizer=True,
        allow_state_sharing=False,
        start=True,
    )
    try:
        assert not trainers[0].optimizer.load_state_from_peers(timeout=5.0)
        threads = [threading.Thread(target=one.train, args=(seed,)) for seed, one in enumerate(trainers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        assert [one.optimizer.local_epoch for one in trainers] == [EPOCHS, EPOCHS]
        assert all(one.restored for one in trainers)
        for one in trainers:
            assert [progress.epoch for progress in one.progress][-1] == EPOCHS
            assert all(torch.isfinite(parameter).all() for parameter in one.model.parameters())
            assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
            assert [group["weight_decay"] for group in one.optimizer.param_groups] == [0.01, 0.0]
        wait_until(lambda: monitor.load_state_from_peers(timeout=10.0) is not None, 30.0)
        assert monitor.local_epoch == EPOCHS
        donor = trainers[0].optimizer.state_averager
        for own, given in zip(monitor.holder.parameters, donor.holder.parameters, strict=True):
            assert torch.equal(own, given)
    finally:
        monitor.shutdown()
        for one in trainers:
            one.optimizer.shutdown()
