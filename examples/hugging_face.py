"""Hugging Face's Trainer, as one peer of a swarm: a small network learns to read digits.

    python hugging_face.py                      # prints the address that others join with
    python hugging_face.py --join ADDRESS       # in further terminals; on other machines with --host

All peers together process 2048 images, then all make one update. Stop a peer (Ctrl+C), and start it again with
``--resume``: it goes on from its last checkpoint, or from the state of the others if they are further.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

import shoal
from shoal.frameworks.transformers import ShoalCallback, SwarmScheduler


class Reader(nn.Module):
    """A Trainer takes any module that returns a loss, and models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--join", metavar="ADDRESS", help="address of a peer that trains already")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's own IP address in your network")
    parser.add_argument("--epochs", type=int, default=40, help="updates of the swarm")
    parser.add_argument("--target", type=int, default=2048, help="images of one epoch, of all peers together")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides in which order this peer sees the images"
    )
    parser.add_argument("--folder", default="hugging_face", help="for checkpoints; one for each peer")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    images, labels = load_digits(return_X_y=True)
    data = [
        {"pixels": torch.tensor(image / 16, dtype=torch.float32), "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]
    set_seed(0)  # all peers begin with the same model
    model = Reader()

    listen = f"/ip4/{options.host}/tcp/0"
    with shoal.DHT(
        initial_peers=[options.join] if options.join else [], host_maddrs=[listen], start=True
    ) as dht:
        print(f"others join with: --join {dht.get_visible_maddrs()[0]}", flush=True)
        opt = shoal.Optimizer(
            dht=dht,
            run_id="digits",
            target_batch_size=options.target,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
            params=model.parameters(),
            scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, warm_up),
            matchmaking_time=2.0,
            averaging_timeout=15.0,
            max_grad_norm=1.0,
        )
        trainer = Trainer(
            model,
            TrainingArguments(
                options.folder,
                per_device_train_batch_size=16,
                num_train_epochs=1000,  # passes over the data: the swarm's epochs end the training
                max_grad_norm=0,
                data_seed=options.seed,
                logging_steps=50,
                eval_strategy="steps",
                eval_steps=100,
                save_steps=100,
                save_total_limit=2,
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=data[:-360],
            eval_dataset=data[-360:],
            compute_metrics=accuracy,
            callbacks=[ShoalCallback(stop_at_epoch=options.epochs)],
            optimizers=(opt, SwarmScheduler(opt)),
        )
        trainer.train(resume_from_checkpoint=options.resume)
        print(f"reads {trainer.evaluate()['eval_accuracy']:.1%} of the test images", flush=True)


def warm_up(epoch: int) -> float:
    return min(1.0, (epoch + 1) / 10)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped")
        raise SystemExit(130) from None
