"""Two machines learn to read digits, each from half of them, and average their models after every few steps.

On the first machine, with its address in your network (leave ``--host`` away to try both on one machine):

    python two_machines.py first --host 192.168.1.10

It prints the line to type on the second machine.
"""

from __future__ import annotations

import argparse
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import shoal

LOCAL_STEPS = 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("machine", choices=["first", "second"])
    parser.add_argument("address", nargs="?", help="of the first machine, for the second")
    parser.add_argument("--host", default="127.0.0.1", help="this machine's own IP address in your network")
    parser.add_argument("--port", type=int, default=0, help="TCP port to listen on; 0: any free one")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if (options.machine == "second") != (options.address is not None):
        parser.error("the second machine needs the address that the first one prints, and the first one none")
    return options


def main() -> None:
    options = parse_arguments()

    # The first machine has the digits 0 to 4, the second 5 to 9. Both are tested on all, with images held out.
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    test_images, test_labels = images[-360:], labels[-360:]
    mine = labels[:-360] < 5 if options.machine == "first" else labels[:-360] >= 5
    images, labels = images[:-360][mine], labels[:-360][mine]

    torch.manual_seed(0)  # both start from the same model
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    # Machines find each other through a distributed hash table (DHT); one address is enough to enter it.
    initial_peers = [options.address] if options.address else []
    listen = f"/ip4/{options.host}/tcp/{options.port}"
    with shoal.DHT(initial_peers=initial_peers, host_maddrs=[listen], start=True) as dht:
        if options.machine == "first":
            address = dht.get_visible_maddrs()[0]
            host = "" if options.host == "127.0.0.1" else " --host ITS-OWN-ADDRESS"
            print(f"On the other machine:\n    python {sys.argv[0]} second {address}{host}", flush=True)

        # A group of two is full when both are there, so that a step takes no longer than it must.
        with shoal.DecentralizedAverager(
            model.parameters(), dht, prefix="two-machines", target_group_size=2, start=True
        ) as averager:
            print("waiting for the other machine (Ctrl+C to stop)", flush=True)
            for round_ in range(options.rounds):
                for _ in range(LOCAL_STEPS):
                    loss = nn.functional.cross_entropy(model(images), labels)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                alone = accuracy(model, test_images, test_labels)
                # The parameters become the average of both machines'. The first time, wait as long as it takes.
                group = averager.step(gather=options.machine, timeout=None if round_ == 0 else 30)
                if group is None:  # a warning has said why; the parameters are as they were
                    raise SystemExit("the other machine does not answer any more")
                together = accuracy(model, test_images, test_labels)
                print(
                    f"round {round_ + 1}: reads {alone:.0%} before averaging, {together:.0%} after",
                    flush=True,
                )


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model(images).argmax(dim=1) == labels).float().mean())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped")
        raise SystemExit(130) from None
