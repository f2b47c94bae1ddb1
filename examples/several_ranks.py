"""A machine with several processes is one peer: DistributedDataParallel inside of it, Shoal between the machines.

    torchrun --standalone --nproc-per-node 2 several_ranks.py                   # prints the address to join with
    torchrun --standalone --nproc-per-node 2 several_ranks.py --join ADDRESS    # in further terminals

Each process has images of its own. Rank 0 talks to the other peers; the others take over what it has. Start and stop
(Ctrl+C) peers as you like: the others go on. With GPUs, give as many processes as the machine has of them.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal

IMAGES = 200
BATCH = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--join", metavar="ADDRESS", help="address of a peer that trains already")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's own IP address in your network")
    parser.add_argument("--epochs", type=int, default=20, help="updates of the whole swarm")
    parser.add_argument("--target", type=int, default=2048, help="samples of all peers for one update")
    parser.add_argument(
        "--pause", type=float, default=0.1, help="seconds a step, as if the model were larger"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    has_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if has_gpus else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, labels = images.float().to(device) / 16, labels.to(device)
    test_images, test_labels = images[-360:], labels[-360:]
    rng = torch.Generator()
    rng.seed()
    mine = torch.randperm(len(labels) - 360, generator=rng)[:IMAGES]

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    wrapped = DistributedDataParallel(model)

    dht = None
    if rank == 0:
        listen = f"/ip4/{options.host}/tcp/0"
        dht = shoal.DHT(
            initial_peers=[options.join] if options.join else [], host_maddrs=[listen], start=True
        )
        print(f"others join with: --join {dht.get_visible_maddrs()[0]}", flush=True)
    opt = shoal.Optimizer(
        dht=dht,
        run_id="digits_ranks",
        target_batch_size=options.target,
        batch_size_per_step=BATCH,  # of one rank
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
        matchmaking_time=2.0,
        averaging_timeout=15.0,
        load_state_timeout=60.0,
    )
    try:
        opt.load_state_from_peers()
        while opt.local_epoch < options.epochs:
            batch = mine[torch.randint(len(mine), (BATCH,), generator=rng)]
            opt.zero_grad()
            nn.functional.cross_entropy(wrapped(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            epoch = opt.local_epoch
            opt.step()
            if rank == 0 and opt.local_epoch > epoch and opt.report is not None:
                score = accuracy(model, test_images, test_labels)
                print(
                    f"epoch {opt.report.epoch}: {opt.report.peers} peers, "
                    f"{opt.report.local_samples} of {opt.report.samples} samples here, gradients "
                    f"{opt.report.gradients}; reads {score:.1%} of the test images",
                    flush=True,
                )
            time.sleep(options.pause)
        total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
        print(f"rank {rank} ends with weights of sum {total:.6f}", flush=True)
    finally:
        opt.shutdown()
        if dht is not None:
            dht.shutdown()
    dist.destroy_process_group()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model(images).argmax(dim=1) == labels).float().mean())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped")
        raise SystemExit(130) from None
