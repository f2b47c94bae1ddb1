"""A module of Lightning that a swarm trains: it learns to read handwritten digits.

    python lightning_digits.py            # the first peer prints what others have to be told
    python lightning_digits.py ADDRESS    # each further one, in another terminal

Each peer draws its own batches. Ctrl+C ends a peer, and the others go on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from shoal.frameworks.lightning import ShoalStrategy

BATCH = 16
HELD_OUT = 360


class Digits(lightning.LightningModule):
    """Nothing in the module knows of the swarm."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)]  # epochs of the swarm


class Batches(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random batches without end; other ones in each program."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self._images, self._labels = images, labels

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            chosen = torch.randint(len(self._labels), (BATCH,))
            yield self._images[chosen], self._labels[chosen]


class Progress(lightning.Callback):
    """Says what each epoch of the swarm was like."""

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._said = -1

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, ShoalStrategy)
        report = trainer.strategy.optimizer.report
        if report is not None and report.epoch > self._said:
            self._said = report.epoch
            print(report, flush=True)
        time.sleep(self._pause)

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            print(f"reads {trainer.callback_metrics['accuracy']:.1%} of the test images", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("addresses", nargs="*", metavar="ADDRESS", help="addresses of peers that train")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's own IP address in your network")
    parser.add_argument("--target", type=int, default=512, help="samples of one epoch of the swarm")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the swarm to train for")
    parser.add_argument("--folder", default="lightning_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="FILE", help="a checkpoint to go on from")
    parser.add_argument(
        "--pause", type=float, default=0.02, help="seconds a step, as if the model were larger"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    training = DataLoader(Batches(images[:-HELD_OUT], labels[:-HELD_OUT]), batch_size=None)
    held_out = DataLoader(TensorDataset(images[-HELD_OUT:], labels[-HELD_OUT:]), batch_size=HELD_OUT)
    trainer = lightning.Trainer(
        strategy=ShoalStrategy(
            target_batch_size=options.target,
            run_id="digits",
            initial_peers=options.addresses,
            host_maddrs=f"/ip4/{options.host}/tcp/0",
            stop_at_epoch=options.epochs,
            averaging_timeout=15.0,
        ),
        accelerator="cpu",
        devices=1,
        max_epochs=-1,  # passes over the data, which has no end here
        val_check_interval=100,
        callbacks=[Progress(options.pause), ModelCheckpoint(options.folder, every_n_train_steps=100)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    module = Digits()
    trainer.fit(module, training, held_out, ckpt_path=options.resume)
    trainer.validate(module, held_out, verbose=False)


if __name__ == "__main__":
    main()
