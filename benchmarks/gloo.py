"""What torch.distributed does over Gloo: the upper bound for peers that never change. Prints JSON lines.

    python benchmarks/gloo.py --peers 2 --floats 64e6

Gloo sends plain text among a fixed number of processes, and a process that dies ends the work of all. `mb_per_s` is
one peer's tensor by the time from a barrier to the last result, as `allreduce_s` of `workloads.py` is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

FLOAT_BYTES = 4


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peer(rank: int, peers: int, floats: int, rounds: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=peers)
    tensor = torch.randn(floats)
    gigabytes = floats * FLOAT_BYTES / 1e9
    for index in range(rounds):
        dist.barrier()
        cpu_before, began = cpu_seconds(), time.perf_counter()
        dist.all_reduce(tensor)
        dist.barrier()
        seconds = time.perf_counter() - began
        cpu = torch.tensor(cpu_seconds() - cpu_before)
        dist.all_reduce(cpu)
        if rank == 0:
            figures = {
                "allreduce_s": seconds,
                "mb_per_s": gigabytes * 1e3 / seconds,
                "cpu_s_per_gb": cpu.item() / (peers * gigabytes),
            }
            rounded = {name: round(value, 4) for name, value in figures.items()}
            work = {"system": "gloo", "round": index, "peers": peers, "mb": gigabytes * 1e3}
            print(json.dumps(work | rounded), flush=True)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--floats", type=lambda text: int(float(text)), default=64_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    work = (options.peers, options.floats, options.rounds, free_port())
    mp.spawn(peer, work, nprocs=options.peers)  # type: ignore[attr-defined, no-untyped-call]


if __name__ == "__main__":
    main()
