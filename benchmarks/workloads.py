"""One piece of work, done by Shoal or by hivemind: the same code, since the API is the same. Prints JSON lines.

    python benchmarks/workloads.py averaging --library shoal --peers 2 --floats 64e6
    python benchmarks/workloads.py dht --library hivemind --peers 8

`averaging`: peers of one group average random fp32 tensors. `form_s`: from all of them calling step() to the last
one having its group; `allreduce_s`: from the trigger to the last result. `dht`: the start of each node, then stores
and gets through the public API from nodes in turn. Everybody lives on this machine and talks over loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from typing import Any

import psutil

FLOAT_BYTES = 4


def usage() -> tuple[float, float]:
    """CPU seconds and proportional memory (MB) of this process and all below it."""
    me, cpu, pss = psutil.Process(), 0.0, 0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            cpu += times.user + times.system
            pss += process.memory_full_info().pss
    return cpu, pss / 1e6


def report(**fields: Any) -> None:
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
    print(json.dumps(rounded), flush=True)


def averaging(library: Any, name: str, peers: int, floats: int, codec: str, rounds: int) -> None:
    """One group of ``peers`` that average ``floats`` fp32 elements each."""
    import torch

    torch.set_num_threads(1)
    codecs = importlib.import_module(f"{name}.compression")
    compression = codecs.NoCompression() if codec == "none" else codecs.Float16Compression()
    root = library.DHT(start=True)
    averagers, start_seconds = [], []
    for _ in range(peers):
        dht = library.DHT(initial_peers=root.get_visible_maddrs(), start=True)
        time.sleep(2.0)  # lets the process load torch ahead of need
        tensors = [torch.randn(floats // 4) for _ in range(4)]
        began = time.perf_counter()
        averagers.append(
            library.averaging.DecentralizedAverager(
                tensors,
                dht,
                prefix="bench",
                target_group_size=peers,
                min_group_size=peers,
                min_matchmaking_time=2.0,
                request_timeout=1.0,
                compression=compression,
                start=True,
            )
        )
        start_seconds.append(time.perf_counter() - began)
    report(system=name, work="averager start", median_s=statistics.median(start_seconds))
    gigabytes = floats * FLOAT_BYTES / 1e9
    for index in range(rounds):
        cpu_before, _ = usage()
        began = time.perf_counter()
        steps = [averager.step(wait=False, timeout=120, require_trigger=True) for averager in averagers]
        while not all(step.stage.name == "AWAITING_TRIGGER" or step.done() for step in steps):
            time.sleep(0.001)
        formed = time.perf_counter()
        for step in steps:
            step.allow_allreduce()
        complete = all(step.result(timeout=300) is not None for step in steps)
        ended = time.perf_counter()
        cpu_after, pss = usage()
        report(
            system=name,
            work="averaging",
            round=index,
            peers=peers,
            mb=gigabytes * 1e3,
            codec=codec,
            form_s=formed - began,
            allreduce_s=ended - formed,
            mb_per_s=gigabytes * 1e3 / (ended - formed),
            cpu_s_per_gb=(cpu_after - cpu_before) / (peers * gigabytes),
            pss_mb=pss / peers,
            ok=complete,
        )
    for averager in averagers:
        averager.shutdown()


def dht(library: Any, name: str, peers: int, operations: int) -> None:
    """A DHT of ``peers`` nodes, each in its background process."""
    nodes: list[Any] = []
    start_seconds: list[float] = []
    for _ in range(peers):
        initial = nodes[0].get_visible_maddrs() if nodes else None
        began = time.perf_counter()
        nodes.append(library.DHT(initial_peers=initial, start=True))
        start_seconds.append(time.perf_counter() - began)
    children = psutil.Process().children(recursive=True)
    pss = sum(child.memory_full_info().pss for child in children) / peers / 1e6
    time.sleep(1.0)
    stores, gets = [], []
    for index in range(operations):
        expiration = time.time() + 60
        began = time.perf_counter()
        stored = nodes[index % peers].store(f"key {index}", index, expiration)
        stores.append(time.perf_counter() - began)
        began = time.perf_counter()
        found = nodes[(index + peers // 2) % peers].get(f"key {index}", latest=True)
        gets.append(time.perf_counter() - began)
        if not stored or found is None or found.value != index:
            raise SystemExit(f"{name} lost record {index}")
    report(
        system=name,
        work="dht",
        nodes=peers,
        start_s=statistics.median(start_seconds),
        store_ms=statistics.median(stores) * 1e3,
        get_ms=statistics.median(gets) * 1e3,
        pss_mb=pss,
    )
    for node in nodes:
        node.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=["averaging", "dht"])
    parser.add_argument("--library", choices=["shoal", "hivemind"], default="shoal")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--floats", type=lambda text: int(float(text)), default=64_000_000)
    parser.add_argument("--codec", choices=["none", "fp16"], default="none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", type=int, default=200)
    options = parser.parse_args()
    library = importlib.import_module(options.library)
    importlib.import_module(f"{options.library}.averaging") if options.work == "averaging" else None
    status = 1
    try:
        if options.work == "averaging":
            averaging(library, options.library, options.peers, options.floats, options.codec, options.rounds)
        else:
            dht(library, options.library, options.peers, options.operations)
        status = 0
    except Exception:  # noqa: BLE001 - the outer edge: shown before the process ends by force
        traceback.print_exc()
    finally:
        if options.library == "hivemind":  # its daemons outlive it otherwise
            for child in psutil.Process().children(recursive=True):
                child.kill()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
