"""How long `load_state_from_peers` takes, with Shoal and with hivemind in turn: medians and their ratio.

    python benchmarks/state_sharing.py --hivemind-python /path/to/venv/bin/python

The other environment needs `pip install torch hivemind==1.1.12`. Without it, Shoal is measured alone. Each library
runs `--repeat` times, alternately, in processes of its own: one donor, one joiner, over loopback on this machine.
Before each download the donor stops sharing and begins again, so that each one includes the donor's copy of its
state, which Shoal would keep for a minute. The first download of a process is cold and not counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from typing import Any

DOWNLOAD_TIMEOUT = 120
SETTLE_SECONDS = 2.0
"""Until a donor's declaration is known, and its process has loaded torch."""


def measure(library: Any, megabytes: int, rounds: int) -> None:
    """Download a state of four fp32 tensors `rounds` times; print a JSON line for each."""
    import torch

    torch.set_num_threads(1)
    floats = megabytes * 1_000_000 // 16
    state = [torch.randn(floats) for _ in range(4)]
    donor_dht = library.DHT(start=True)
    joiner_dht = library.DHT(initial_peers=donor_dht.get_visible_maddrs(), start=True)
    donor, joiner = (
        library.averaging.DecentralizedAverager(
            tensors,
            dht,
            prefix="bench",
            target_group_size=2,
            min_matchmaking_time=2.0,
            request_timeout=1.0,
            allow_state_sharing=shares,
            start=True,
        )
        for tensors, dht, shares in ((state, donor_dht, True), ([torch.zeros(1)], joiner_dht, False))
    )
    for index in range(rounds):
        donor.allow_state_sharing = False
        donor.allow_state_sharing = True
        time.sleep(SETTLE_SECONDS)
        began = time.perf_counter()
        loaded = joiner.load_state_from_peers(timeout=DOWNLOAD_TIMEOUT)
        seconds = time.perf_counter() - began
        if loaded is None or not all(map(torch.equal, loaded[1], state)):
            raise SystemExit(f"{library.__name__} did not load the state")
        line = {"round": index, "seconds": round(seconds, 4), "mb_per_s": round(megabytes / seconds, 1)}
        print(json.dumps(line), flush=True)
    for one in (donor, joiner, joiner_dht, donor_dht):
        one.shutdown()


def run_worker(library: str, megabytes: int, rounds: int) -> None:
    """Be the process that measures one library."""
    module = importlib.import_module(library)
    importlib.import_module(f"{library}.averaging")
    status = 1
    try:
        measure(module, megabytes, rounds)
        status = 0
    except Exception:  # noqa: BLE001 - the outer edge: shown before the process ends by force
        traceback.print_exc()
    finally:
        if library == "hivemind":  # its daemons outlive it otherwise
            import psutil

            for child in psutil.Process().children(recursive=True):
                child.kill()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


def seconds_of(python: str, library: str, megabytes: int, rounds: int) -> list[float]:
    """Run a worker; the seconds of each download but the first."""
    arguments = ["--library", library, "--megabytes", str(megabytes), "--rounds", str(rounds)]
    done = subprocess.run(
        [python, __file__, *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) < rounds:
        raise SystemExit(f"{library} failed:\n{done.stderr[-2000:]}")
    return [line["seconds"] for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hivemind-python", help="interpreter of the environment that has hivemind")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4, help="downloads of each process")
    parser.add_argument("--repeat", type=int, default=3, help="processes of each library")
    parser.add_argument("--library", choices=["shoal", "hivemind"], help="measure only this, in this process")
    options = parser.parse_args()
    if options.library:
        run_worker(options.library, options.megabytes, options.rounds)
    from rich.console import Console
    from rich.table import Table

    libraries = {"shoal": sys.executable}
    if options.hivemind_python:
        libraries["hivemind"] = options.hivemind_python
    samples: dict[str, list[float]] = {library: [] for library in libraries}
    for _ in range(options.repeat):
        for library, python in libraries.items():
            samples[library] += seconds_of(python, library, options.megabytes, options.rounds)
    table = Table("library", "seconds", "MB/s", title=f"load_state_from_peers, {options.megabytes} MB")
    medians = {library: statistics.median(seconds) for library, seconds in samples.items()}
    for library, median in medians.items():
        table.add_row(library, f"{median:.3f}", f"{options.megabytes / median:.0f}")
    Console(width=100).print(table)
    if len(medians) > 1:
        print(f"shoal / hivemind, MB/s: {medians['hivemind'] / medians['shoal']:.2f}")


if __name__ == "__main__":
    main()
