"""Peers that average in groups whose members change, by Shoal or by hivemind.

The setting is that of hivemind's ``benchmark_averaging.py``: tensors of three layers of a transformer, fp16 on the
wire, 15 s for a step, and peers that begin 0.1 s apart. Its averagers start in threads, where hivemind 1.1.12 cannot
set its handlers of signals; here they start before that.
"""

from __future__ import annotations

import importlib
import math
import threading
import time
from typing import Any

import torch

from benchmarks.workers.protocol import address_from_first, main, serve

WIDTH, LAYERS = 256, 3
STEP_TIMEOUT = 15.0
APART = 0.1
"""Seconds between the first steps of two peers."""


def transformer_tensors() -> list[torch.Tensor]:
    """Weights and biases as one layer of a transformer has them, for each layer."""
    shapes: list[tuple[int, ...]] = [
        (WIDTH, 3 * WIDTH),
        (3 * WIDTH,),
        (3 * WIDTH,),
        (WIDTH, WIDTH),
        (WIDTH,),
        (WIDTH,),
        (WIDTH, 4 * WIDTH),
        (4 * WIDTH,),
        (4 * WIDTH,),
        (2, WIDTH, WIDTH, 2),
        (WIDTH,),
        (WIDTH,),
        (WIDTH,),
    ]
    return [torch.randn(shape) for _ in range(LAYERS) for shape in shapes]


class Swarm:
    def __init__(self, averagers: list[Any], steps: int) -> None:
        self._averagers = averagers
        self._steps = steps
        self._ok = 0
        self._lock = threading.Lock()

    def prepare(self) -> None:
        self._ok = 0

    def go(self) -> dict[str, Any]:
        threads = [threading.Thread(target=self._average, args=(one,)) for one in self._averagers]
        for thread in threads:
            thread.start()
            time.sleep(APART)
        for thread in threads:
            thread.join()
        # Steps that fail are a figure here, so each of them counts as a result that came.
        return {"ok": self._ok, "of": self._ok}

    def close(self) -> None:
        for averager in self._averagers:
            averager.shutdown()

    def _average(self, averager: Any) -> None:
        for _ in range(self._steps):
            try:
                averaged = averager.step(timeout=STEP_TIMEOUT) is not None
            except Exception:  # noqa: BLE001 - each library has errors of its own, and the next step follows
                averaged = False
            with self._lock:
                self._ok += averaged


def run(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    library = importlib.import_module(spec["library"])
    importlib.import_module(f"{spec['library']}.averaging")
    codecs = importlib.import_module(f"{spec['library']}.compression")
    root = library.DHT(start=True)
    address_from_first(spec, lambda: [str(one) for one in root.get_visible_maddrs()])
    bits = round(math.log2(spec["peers"] / spec["group"]))
    averagers = [
        library.averaging.DecentralizedAverager(
            transformer_tensors(),
            library.DHT(initial_peers=root.get_visible_maddrs(), start=True),
            prefix="my_tensor",
            initial_group_bits=format(number % 2**bits, f"0{bits}b"),
            compression=codecs.Float16Compression(),
            target_group_size=spec["group"],
            min_matchmaking_time=5.0,
            request_timeout=1.0,
            start=True,
        )
        for number in range(spec["peers"])
    ]
    serve(Swarm(averagers, spec["steps"]))


if __name__ == "__main__":
    main(run)
