"""Shoal beside hivemind, in turn on this machine: medians and ratios of the figures in docs/performance.md.

    python benchmarks/compare.py --hivemind-python /path/to/venv/bin/python

The other environment needs `pip install torch hivemind==1.1.12 psutil numpy`. Without it, Shoal is measured
alone. Each workload of `workloads.py` is run for both libraries alternately, `--repeat` times, in processes of
their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

WORKLOADS = Path(__file__).with_name("workloads.py")
WORK: dict[str, list[str]] = {
    "DHT of 8": ["dht", "--peers", "8"],
    "group of 8, 1 MB": ["averaging", "--peers", "8", "--floats", "256e3"],
    "2 peers, 256 MB": ["averaging", "--peers", "2", "--floats", "64e6"],
    "4 peers, 64 MB": ["averaging", "--peers", "4", "--floats", "16e6"],
}
FIGURES = {
    "start_s": "start of a DHT node, s",
    "store_ms": "store, ms",
    "get_ms": "get, ms",
    "median_s": "start of an averager, s",
    "form_s": "group formed, s",
    "mb_per_s": "all-reduce, MB/s per peer",
    "cpu_s_per_gb": "CPU s per GB",
    "pss_mb": "PSS, MB per peer",
}
TIMEOUT = 600


def measure(python: str, library: str, arguments: list[str]) -> dict[str, list[float]]:
    """Run one workload; every figure of its rounds but the first, which is cold."""
    command = [python, str(WORKLOADS), *arguments, "--library", library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line.get("round") == 0:
            continue
        for name in FIGURES:
            if name in line:
                figures[name].append(line[name])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hivemind-python", help="interpreter of the environment that has hivemind")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=list(WORK), action="append")
    options = parser.parse_args()
    libraries = {"shoal": sys.executable}
    if options.hivemind_python:
        libraries["hivemind"] = options.hivemind_python
    table = Table("work", "figure", *libraries, "shoal / hivemind" if len(libraries) > 1 else "")
    for work in options.only or WORK:
        samples: dict[str, dict[str, list[float]]] = {library: defaultdict(list) for library in libraries}
        for _ in range(options.repeat):
            for library, python in libraries.items():
                for name, values in measure(python, library, WORK[work]).items():
                    samples[library][name] += values
        for name, title in FIGURES.items():
            if name not in samples["shoal"]:
                continue
            medians = [statistics.median(samples[library][name]) for library in libraries]
            ratio = f"{medians[0] / medians[1]:.2f}" if len(medians) > 1 else ""
            table.add_row(work, title, *(f"{median:.4g}" for median in medians), ratio)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
