"""One peer that trains a model of handwritten digits with the optimizer of Shoal or of hivemind.

The shape is that of hivemind's ``benchmark_optimizer.py``: peers of different speed, some of them clients, take
batches of random sizes, and all together make one update for each 256 samples.
"""

from __future__ import annotations

import importlib
import multiprocessing
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from benchmarks.work import TRAINING_TARGET
from benchmarks.workers.protocol import address_from_first, main, serve

HELD_OUT = 300
GOAL = 0.6
"""The loss on held-out digits that central training comes to after 13 updates."""
BATCH_SIZES = (2, 16)
LEARNING_RATE = 0.3
MATCHMAKING_TIME = 5.0
AVERAGING_TIMEOUT = 15.0
TOO_LONG = 1200.0
"""Seconds after which a peer that never comes to its last epoch gives up."""


class Digits:
    """Pictures of 8 x 8 dots, in the same order at all peers; each draws batches of its own."""

    def __init__(self, seed: int) -> None:
        loaded = load_digits()
        order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
        self._pictures = torch.tensor(loaded.data, dtype=torch.float32)[order] / 16
        self._labels = torch.tensor(loaded.target)[order]
        self._own = torch.Generator().manual_seed(seed)

    def loss(self, model: torch.nn.Module, size: int) -> torch.Tensor:
        """Of one batch."""
        count = len(self._labels) - HELD_OUT
        chosen = HELD_OUT + torch.randint(count, (size,), generator=self._own)
        return cross_entropy(model(self._pictures[chosen]), self._labels[chosen])

    @torch.no_grad()
    def held_out_loss(self, model: torch.nn.Module) -> float:
        return float(cross_entropy(model(self._pictures[:HELD_OUT]), self._labels[:HELD_OUT]))


class Peer:
    """Trains until its epoch is the last one."""

    def __init__(self, spec: dict[str, Any], dht: Any, library: Any) -> None:
        self._spec = spec
        self._random = random.Random(spec["host"])
        self._digits = Digits(seed=spec["host"])
        torch.manual_seed(0)
        self._model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        self._rounds = ROUNDS[library.__name__]()
        self._optimizer = library.Optimizer(
            dht=dht,
            run_id="digits",
            target_batch_size=TRAINING_TARGET,
            optimizer=torch.optim.SGD(self._model.parameters(), lr=LEARNING_RATE, momentum=0.9),
            matchmaking_time=MATCHMAKING_TIME,
            averaging_timeout=AVERAGING_TIMEOUT,
            client_mode=spec["client"],
            averager_opts={"request_timeout": 1.0, "target_group_size": 8},
            tracker_opts={"max_refresh_period": 5.0},
            **self._rounds.options,
        )

    def prepare(self) -> None:
        """Nothing: peers begin with the trigger."""

    def go(self) -> dict[str, Any]:
        began, epochs, samples, goal_after = time.monotonic(), 0, 0, TOO_LONG
        while self._optimizer.local_epoch < self._spec["epochs"] and time.monotonic() < began + TOO_LONG:
            size = self._random.randint(*BATCH_SIZES)
            torch.autograd.backward(self._digits.loss(self._model, size))
            time.sleep(self._random.uniform(*self._spec["step_s"]))
            before = self._optimizer.local_epoch
            self._optimizer.step(batch_size=size)
            self._optimizer.zero_grad()
            samples += size
            if self._optimizer.local_epoch > before:
                epochs += 1
                self._rounds.note_epoch(self._optimizer)
                if goal_after == TOO_LONG and self._digits.held_out_loss(self._model) <= GOAL:
                    goal_after = time.monotonic() - began
        ended = time.monotonic()
        return {
            "began": began,
            "ended": ended,
            "extra": {
                "goal_s": goal_after,
                "samples": float(samples),
                "epochs": float(epochs),
                "averaged": float(self._rounds.averaged),
                "loss": self._digits.held_out_loss(self._model),
            },
        }

    def close(self) -> None:
        self._optimizer.shutdown()


class Rounds(Protocol):
    """Counts the gradient rounds of one peer that averaged with others."""

    @property
    def options(self) -> Mapping[str, Any]:
        """What the optimizer is told besides."""

    @property
    def averaged(self) -> int:
        """How many there were."""

    def note_epoch(self, optimizer: Any) -> None:
        """Look at an epoch that has just ended."""


class HivemindRounds:
    """hivemind tells nobody how a round has ended. Its averagers live in processes that are forked: they count in
    memory that this process shares.
    """

    def __init__(self) -> None:
        self._count = multiprocessing.Value("i", 0)

    @property
    def options(self) -> dict[str, Any]:
        count, base = self._count, importlib.import_module("hivemind.optim.grad_averager").GradientAverager

        class Counting(base):  # type: ignore[misc, valid-type] # known at run time only
            async def _aggregate_with_group(self, *args: Any, **options: Any) -> Any:
                gathered = await super()._aggregate_with_group(*args, **options)
                with count.get_lock():
                    count.value += len(gathered) > 1
                return gathered

        return {"grad_averager_factory": Counting}

    def note_epoch(self, optimizer: Any) -> None:
        """Its rounds are counted already."""

    @property
    def averaged(self) -> int:
        return int(self._count.value)


class ShoalRounds:
    """The optimizer's reports say it."""

    options: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.averaged = 0

    def note_epoch(self, optimizer: Any) -> None:
        self.averaged += optimizer.report is not None and optimizer.report.gradients == "averaged"


ROUNDS: Mapping[str, Callable[[], Rounds]] = {"shoal": ShoalRounds, "hivemind": HivemindRounds}


def run(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    library = importlib.import_module(spec["library"])
    node: list[Any] = []

    def first() -> list[str]:
        node.append(library.DHT(start=True))
        return [str(one) for one in node[0].get_visible_maddrs()]

    join = address_from_first(spec, first)
    if not node:
        node.append(library.DHT(initial_peers=join, client_mode=spec["client"], start=True))
    serve(Peer(spec, node[0], library))


if __name__ == "__main__":
    main(run)
