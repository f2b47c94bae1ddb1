"""Local training, the same for a peer of a swarm, a peer alone and central training; and its settings."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from data import random_batch
from model import ByteModel, loss_of

MODEL_SEED = 0
"""Everybody starts from the same parameters."""


def option(default: Any, text: str) -> Any:
    """A field of :class:`Settings`."""
    return field(default=default, metadata={"help": f"{text} (%(default)s)"})


@dataclass(frozen=True)
class Settings:
    """What all peers of a run have to agree on. Each field is an option on the command line."""

    peers: int = option(4, "parts that the text is dealt into, and peers in a full group")
    steps: int = option(4500, "local steps of each peer")
    local_steps: int = option(50, "local steps in a round (H in the DiLoCo paper)")
    hidden: int = option(128, "size of the GRU's state")
    table: int = option(4096, "rows of each table of n-grams, a power of 2")
    batch: int = option(16, "windows of text in a batch")
    length: int = option(64, "bytes in a window")
    learning_rate: float = option(1e-2, "of AdamW, at its highest")
    outer_learning_rate: float = option(0.7, "of the outer Nesterov step")
    outer_momentum: float = option(0.8, "of the outer Nesterov step")
    pause: float = option(0.0, "seconds to wait after each local step, as if the model were larger")
    windows: int = option(512, "windows of held-out text that a model is evaluated on")
    text: str = option("", "folder of Python files to learn from, in place of the standard library")

    def __post_init__(self) -> None:
        for name in ("peers", "steps", "local_steps", "hidden", "table", "batch", "length", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("settings, the same for all peers of a run")
        for setting in fields(cls):
            name = "--" + setting.name.replace("_", "-")
            default, text = setting.default, setting.metadata["help"]
            group.add_argument(name, type=type(default), default=default, help=text, metavar="VALUE")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Settings:
        return cls(**{setting.name: getattr(options, setting.name) for setting in fields(cls)})

    def to_arguments(self) -> list[str]:
        """The options that say the same, for a command line."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]


class LocalTrainer:
    """A model, its AdamW and the text that it learns from.

    :param text: ``torch.uint8``
    :param batches: how many times the batch of the settings a step takes (central training takes what all
      peers take)
    """

    WARMUP = 50
    FINAL_RATE = 0.05

    def __init__(self, text: torch.Tensor, settings: Settings, *, seed: int, batches: int = 1) -> None:
        self.model = make_model(settings)
        self.step = 0
        """Of the schedule of the learning rate; a peer that joins late goes on where the others are."""
        self.tokens = 0
        """Bytes that this trainer has learnt from."""
        self._text = text
        self._settings = settings
        self._batch = settings.batch * batches
        self._rng = torch.Generator().manual_seed(seed)
        self._own_steps = 0
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.05,
            fused=True,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def train_step(self) -> float:
        """One step of AdamW.

        :returns: the loss of its batch before the step, in bits per byte
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        inputs, following = random_batch(self._text, self._batch, self._settings.length, self._rng)
        loss = loss_of(self.model, inputs, following)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        self._own_steps += 1
        self.tokens += inputs.numel()
        if self._settings.pause:
            time.sleep(self._settings.pause)
        return loss.item() / math.log(2)

    def _rate(self) -> float:
        """Linear warm-up of one's own AdamW, whose averages are not there yet; cosine decay over the run."""
        warmup = min(1.0, (self._own_steps + 1) / self.WARMUP)
        progress = min(1.0, self.step / self._settings.steps)
        decay = self.FINAL_RATE + (1 - self.FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2
        return self._settings.learning_rate * warmup * decay


def make_model(settings: Settings) -> ByteModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        return ByteModel(settings.hidden, table=settings.table)
