"""Any number of peers learn to read digits, and average their models every N steps while they train on.

    python average_every_n_steps.py                      # prints the address that others join with
    python average_every_n_steps.py --join ADDRESS       # in further terminals; on other machines with --host

Each peer has images of its own. Start and stop (Ctrl+C) peers as you like: the others go on.
``client_mode.py`` joins the same swarm from a machine that nobody can dial.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import shoal

IMAGES = 200
BATCH = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--join", metavar="ADDRESS", help="address of a peer that trains already")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's own IP address in your network")
    parser.add_argument("--peers", type=int, default=2, help="peers in a full group, which begins at once")
    parser.add_argument("--every", type=int, default=50, help="steps between averages (N)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--pause", type=float, default=0.02, help="seconds a step, as if the model were larger"
    )
    parser.add_argument("--seed", type=int, help="decides which images this peer has; default: chance")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    test_images, test_labels = images[-360:], labels[-360:]
    rng = torch.Generator()
    seed = rng.seed() if options.seed is None else options.seed
    mine = torch.randperm(len(labels) - 360, generator=rng.manual_seed(seed))[:IMAGES]

    torch.manual_seed(0)  # everybody starts from the same model
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    initial_peers = [options.join] if options.join else []
    listen = f"/ip4/{options.host}/tcp/0"
    with shoal.DHT(initial_peers=initial_peers, host_maddrs=[listen], start=True) as dht:
        print(f"others join with: --join {dht.get_visible_maddrs()[0]}", flush=True)
        with shoal.DecentralizedAverager(
            model.parameters(),
            dht,
            prefix="digits",
            target_group_size=options.peers,
            min_matchmaking_time=2,  # seconds that a group that is not full waits for others
            request_timeout=1,
            start=True,
        ) as averager:
            averaging: Any = None
            for step in range(1, options.steps + 1):
                batch = mine[torch.randint(len(mine), (BATCH,), generator=rng)]
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                with averager.get_tensors():  # no average is written while the optimizer writes
                    optimizer.step()
                time.sleep(options.pause)

                # Averaging runs beside training, and nothing that is learnt meanwhile is lost: the average is
                # of the parameters as they were when the group began; what has changed since is added to it.
                if averaging is None and step % options.every == 0:
                    averaging = averager.step(wait=False, timeout=10)
                elif averaging is not None and averaging.done():
                    error = averaging.exception()
                    outcome = f"failed: {error}" if error else f"averaged by {len(averaging.result())} peers"
                    score = accuracy(model, test_images, test_labels)
                    print(f"step {step}: reads {score:.1%} of the test images; {outcome}", flush=True)
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
