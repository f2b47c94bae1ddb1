"""One process of a Trainer with several: ``python trainer_worker.py OPTIONS FOLDER`` with torchrun's environment.

It prints a line of JSON: what this rank has in the end, and what it logged.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import Trainer, TrainerCallback, TrainingArguments

import shoal
from shoal.frameworks.transformers import ShoalCallback, SwarmScheduler

ROWS = 18


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.linear(x)
        return {"loss": (found - labels).square().mean(), "logits": found}


class Seen(TrainerCallback):  # type: ignore[misc]
    """The weights at each save, and a model that diverges at one step."""

    def __init__(self, model: Model, spoiled_at: int | None) -> None:
        self.weights: list[Any] = []
        self._model, self._spoiled_at = model, spoiled_at

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.weights.append(self._model.linear.weight.tolist())

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self._spoiled_at:
            with torch.no_grad():
                self._model.linear.weight.fill_(float("nan"))


def rows() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": row.sum(0, keepdim=True)} for row in x]


def main(options: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=3, num_train_epochs=3, max_grad_norm=0, data_seed=0, logging_steps=1,
        save_strategy="epoch", use_cpu=True, disable_tqdm=True, report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    rank = arguments.process_index
    spoiled_at, alone = options.pop("spoiled_at", None), options.pop("alone", False)
    torch.manual_seed(rank)  # all become as rank 0 is
    model = Model()
    first, first_bias = model.linear.weight.tolist(), model.linear.bias.item()
    dht = shoal.DHT(start=True) if rank == 0 or alone else None
    if options:
        options = {"params": model.parameters(), **options}
    opt = shoal.Optimizer(
        dht=dht, run_id="ranks_of_a_trainer", target_batch_size=ROWS, matchmaking_time=1.0, averaging_timeout=5.0,
        load_state_timeout=5.0,
        optimizer=(lambda groups: torch.optim.SGD(groups, lr=0.1)) if options
        else torch.optim.SGD(model.parameters(), lr=0.1),
        process_group=torch.distributed.new_group([rank], use_local_synchronization=True) if alone else None,
        **options,
    )  # fmt: skip
    seen = Seen(model, spoiled_at)
    said: dict[str, Any] = {"first": first, "first_bias": first_bias}
    try:
        trainer = Trainer(
            model, arguments, train_dataset=rows(), callbacks=[ShoalCallback(backup_every=1), seen],
            optimizers=(opt, SwarmScheduler(opt)),
        )  # fmt: skip
        trainer.train()
        said |= {"logs": [entry for entry in trainer.state.log_history if "shoal/epoch" in entry]}
    except ValueError as e:
        said["error"] = str(e)
    said |= {"weights": model.linear.weight.tolist(), "saved": seen.weights, "epoch": opt.local_epoch}
    opt.shutdown()
    if dht is not None:
        dht.shutdown()
    print(json.dumps(said))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
    torch.distributed.destroy_process_group()
