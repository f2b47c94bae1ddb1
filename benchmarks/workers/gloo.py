"""One rank of ``torch.distributed`` over Gloo: the upper bound for peers that never change.

Gloo sends plain text among a fixed number of processes, and a process that dies ends the work of all.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.workers.protocol import address_from_first, main, serve


class Rank:
    def __init__(self, floats: int) -> None:
        self._tensor = torch.randn(floats)

    def prepare(self) -> None:
        dist.barrier()

    def go(self) -> dict[str, Any]:
        began = time.monotonic()
        dist.all_reduce(self._tensor)
        ended = time.monotonic()
        dist.barrier()
        self._tensor /= dist.get_world_size()  # so that many rounds do not overflow
        return {"began": began, "ended": ended}

    def close(self) -> None:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def run(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    port = str(free_port())
    address = address_from_first(spec, lambda: [port]) or [port]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=address[0])
    dist.init_process_group("gloo", rank=spec["host"], world_size=spec["peers"])
    serve(Rank(spec["floats"]))


if __name__ == "__main__":
    main(run)
