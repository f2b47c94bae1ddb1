"""Peers train with accelerate on images of their own, and average their models every N steps.

    python accelerate_local_sgd.py                      # prints the address that others join with
    python accelerate_local_sgd.py --join ADDRESS       # in further terminals; on other machines with --host

A peer that comes later begins with the model of another one. Start and stop peers (Ctrl+C) as you like.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn

import shoal
from shoal.frameworks.accelerate import LocalSGD

IMAGES = 300
BATCH = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--join", metavar="ADDRESS", help="address of a peer that trains already")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's own IP address in your network")
    parser.add_argument("--peers", type=int, default=2, help="peers in a full group, which begins at once")
    parser.add_argument("--every", type=int, default=50, help="steps between averages (N)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="decides which images this peer has")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    data = torch.utils.data.TensorDataset(images.float() / 16, labels)
    rng = torch.Generator().manual_seed(options.seed)
    mine = torch.utils.data.Subset(data, torch.randperm(len(data) - 360, generator=rng)[:IMAGES].tolist())
    test_images, test_labels = data[-360:]

    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        torch.utils.data.DataLoader(mine, BATCH, shuffle=True),
    )

    listen = f"/ip4/{options.host}/tcp/0"
    with shoal.DHT([options.join] if options.join else [], host_maddrs=[listen], start=True) as dht:
        print(f"others join with: --join {dht.get_visible_maddrs()[0]}", flush=True)
        with LocalSGD(
            accelerator=accelerator,
            model=model,
            local_sgd_steps=options.every,
            dht=dht,
            run_id="digits",
            averaging_timeout=15.0,
            averager_opts={"target_group_size": options.peers},
        ) as local_sgd:
            while local_sgd.num_steps < options.steps:
                for batch, answers in loader:
                    accelerator.backward(nn.functional.cross_entropy(model(batch), answers))
                    optimizer.step()
                    optimizer.zero_grad()
                    local_sgd.step()
                    if local_sgd.num_steps % options.every == 0:
                        report = local_sgd.last_report
                        averaged = report is not None and report.succeeded
                        outcome = "averaged" if averaged else "went on alone"
                        score = accuracy(model, test_images, test_labels)
                        print(f"step {local_sgd.num_steps}: {outcome}, reads {score:.1%}", flush=True)
                    if local_sgd.num_steps == options.steps:
                        break


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model(images).argmax(dim=1) == labels).float().mean())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped")
        raise SystemExit(130) from None
