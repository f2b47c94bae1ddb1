"""A peer that comes late begins where the others are: it downloads their parameters, momentum and step.

    python late_joiner.py                      # starts training, prints the address that others join with
    python late_joiner.py --join ADDRESS       # some seconds later: goes on from the others' step

All that is needed is a ``get_current_state`` that returns what a newcomer should get, and a call of
``load_state_from_peers``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import shoal

BATCH = 32


class Trainer:
    """A model, its optimizer, and how far it has come."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.step = 0

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images), labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1

    def get_state(self) -> tuple[dict[str, int], list[torch.Tensor]]:
        parameters = list(self.model.parameters())
        buffers = [self.optimizer.state[parameter].get("momentum_buffer") for parameter in parameters]
        momentum = [torch.zeros_like(p) if b is None else b for p, b in zip(parameters, buffers, strict=True)]
        return {"step": self.step}, [*parameters, *momentum]

    @torch.no_grad()
    def set_state(self, metadata: dict[str, int], tensors: list[torch.Tensor]) -> None:
        self.step = metadata["step"]
        parameters = list(self.model.parameters())
        for parameter, value, momentum in zip(
            parameters, tensors[: len(parameters)], tensors[len(parameters) :], strict=True
        ):
            parameter.copy_(value)
            self.optimizer.state[parameter]["momentum_buffer"] = momentum.clone()


class Averager(shoal.DecentralizedAverager):
    """Averages the trainer's parameters, and gives its whole state to peers that ask."""

    def __init__(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        self._trainer = trainer
        super().__init__(trainer.model.parameters(), *args, **options)

    def get_current_state(self) -> Any:
        """Runs in this process when a newcomer asks, on a thread of its own that holds the lock of `get_tensors()`:
        the trainer changes nothing meanwhile, and nothing needs to be copied.
        """
        return self._trainer.get_state()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--join", metavar="ADDRESS", help="address of a peer that trains already")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's own IP address in your network")
    parser.add_argument("--every", type=int, default=50, help="steps between averages")
    parser.add_argument("--steps", type=int, default=3000, help="step at which training ends")
    parser.add_argument(
        "--pause", type=float, default=0.02, help="seconds a step, as if the model were larger"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    test_images, test_labels = images[-360:], labels[-360:]
    trainer = Trainer(seed=0)

    initial_peers = [options.join] if options.join else []
    with (
        shoal.DHT(initial_peers=initial_peers, host_maddrs=[f"/ip4/{options.host}/tcp/0"], start=True) as dht,
        Averager(
            trainer,
            dht,
            prefix="late-joiner",
            target_group_size=2,
            min_matchmaking_time=2,
            request_timeout=1,
            start=True,
        ) as averager,
    ):
        if options.join:
            found = averager.load_state_from_peers(timeout=60)
            if found is None:
                raise SystemExit("no peer gave its state: is one training at that address?")
            with averager.get_tensors():
                trainer.set_state(*found)
            score = accuracy(trainer.model, test_images, test_labels)
            print(
                f"downloaded the state of step {trainer.step}: reads {score:.1%} of the test images",
                flush=True,
            )
        else:
            print(f"others join with: --join {dht.get_visible_maddrs()[0]}", flush=True)

        averaging: Any = None
        while trainer.step < options.steps:
            batch = torch.randint(len(labels) - 360, (BATCH,))
            with averager.get_tensors():  # no state is copied, and no average written, within a step
                trainer.train_step(images[batch], labels[batch])
            time.sleep(options.pause)
            if averaging is None and trainer.step % options.every == 0:
                averaging = averager.step(wait=False, timeout=10)
            elif averaging is not None and averaging.done():
                error = averaging.exception()
                outcome = (
                    "nobody to average with" if error else f"averaged by {len(averaging.result())} peers"
                )
                score = accuracy(trainer.model, test_images, test_labels)
                print(f"step {trainer.step}: reads {score:.1%} of the test images; {outcome}", flush=True)
                averaging = None


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model(images).argmax(dim=1) == labels).float().mean())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped")
        raise SystemExit(130) from None
