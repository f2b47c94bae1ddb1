"""A peer that nobody can dial, as behind NAT or a firewall, takes part in the swarm of
``average_every_n_steps.py``.

    python average_every_n_steps.py --host 203.0.113.5     # on a machine that can be reached: prints its address
    python client_mode.py ADDRESS                          # on one that can't

A client opens no port. It dials others, and joins groups that one of them leads; two clients alone can't form
one.
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
    parser.add_argument("address", help="of a peer that runs average_every_n_steps.py")
    parser.add_argument("--peers", type=int, default=2, help="peers in a full group, which begins at once")
    parser.add_argument("--every", type=int, default=50, help="steps between averages")
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

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    # client_mode=True is all it takes: the averager takes it over from its DHT.
    with shoal.DHT(initial_peers=[options.address], client_mode=True, start=True) as dht:
        assert not dht.get_visible_maddrs(), "a client has no address"
        with shoal.DecentralizedAverager(
            model.parameters(),
            dht,
            prefix="digits",
            target_group_size=options.peers,
            min_matchmaking_time=2,
            request_timeout=1,
            start=True,
        ) as averager:
            print(f"a client that nobody can dial, {dht.peer_id}", flush=True)
            for step in range(1, options.steps + 1):
                batch = mine[torch.randint(len(mine), (BATCH,), generator=rng)]
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                time.sleep(options.pause)
                if step % options.every == 0:
                    # To average in the background, as average_every_n_steps.py does, would work here as well.
                    group: Any = averager.step(timeout=10)
                    outcome = "nobody to average with" if group is None else f"averaged by {len(group)} peers"
                    score = accuracy(model, test_images, test_labels)
                    print(f"step {step}: reads {score:.1%} of the test images; {outcome}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model(images).argmax(dim=1) == labels).float().mean())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped")
        raise SystemExit(130) from None
