"""What the machine is, and which versions run: the head of every report."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
VERSION_OF = "import importlib.metadata as m; print(m.version('{}'))"


def describe(hivemind_python: str | None) -> dict[str, str]:
    """Facts by what they are called."""
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "commit": commit(),
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "kernel": f"{platform.system()} {platform.release()}",
        "congestion control": CONTROL.read_text().strip() if CONTROL.exists() else "unknown",
        "Python": platform.python_version(),
        "torch": metadata.version("torch"),
        "shoal": metadata.version("shoal"),
    }
    if hivemind_python is not None:
        facts["hivemind"] = (
            f"{version(hivemind_python, 'hivemind')} with torch {version(hivemind_python, 'torch')}"
        )
    return facts


def commit() -> str:
    """The commit that is measured, and whether it was changed since."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def cpu_model() -> str:
    """The processor's name, where the system tells."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(python: str, package: str) -> str:
    """The version of a package in another environment."""
    found = subprocess.run([python, "-c", VERSION_OF.format(package)], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
