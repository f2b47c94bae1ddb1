"""Nothing is left of 300 rounds with real faults: open files, threads, tasks and memory of two peers that go on."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from real_swarm import Swarm

import shoal
from shoal.testing import plant

pytestmark = [pytest.mark.xdist_group("averaging"), pytest.mark.soak, pytest.mark.timeout(1500)]

ELEMENTS = 50_000
FEW, MANY = 30, 300
FAULT_EVERY = 5
LIMIT = 60  # seconds, against hanging only

PEER = """
    import sys
    import torch, shoal

    prefix, elements, *peers = sys.argv[1:]
    with shoal.DHT(initial_peers=peers, start=True) as dht, shoal.DecentralizedAverager(
        [torch.ones(int(elements))], dht, prefix=prefix, target_group_size=3, min_matchmaking_time=1.0,
        request_timeout=0.5, start=True
    ) as averager:
        print(dht.background.pid, flush=True)
        while True:
            averager.step(timeout=10)
"""


class Victim:
    """A peer in a process of its own, which averages without a pause."""

    def __init__(self, prefix: str, dht: shoal.DHT) -> None:
        peers = [str(address) for address in dht.get_visible_maddrs()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PEER), prefix, str(ELEMENTS), *peers],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.background = int(self.process.stdout.readline())

    def signal(self, number: signal.Signals) -> None:
        for pid in (self.background, self.process.pid):
            os.kill(pid, number)

    def close(self) -> None:
        with self.process:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)


def tidy() -> None:
    """Lost connections are cycles, which Python collects later, and glibc keeps what was freed between other things."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def count_tasks(*_: object) -> int:
    """Of a background process, on its loop, which is tidied up."""
    tidy()
    return len(asyncio.all_tasks())


@dataclass
class Held:
    """What a process holds."""

    files: int
    threads: int
    tasks: int
    megabytes: float

    @classmethod
    def by(cls, pid: int, tasks: int = 0) -> Held:
        process = psutil.Process(pid)
        return cls(process.num_fds(), process.num_threads(), tasks, process.memory_info().rss / 1e6)

    def check_against(self, before: Held) -> None:
        # Connections come and go as the DHT needs them, and so do their tasks.
        assert self.files <= before.files + 6, (self, before)
        assert self.threads <= before.threads + 2, (self, before)
        assert self.tasks <= before.tasks + 10, (self, before)
        assert self.megabytes <= max(1.1 * before.megabytes, before.megabytes + 20), (self, before)


class Survivors:
    """Two peers of this process, and the one that has an accident now and then."""

    def __init__(self, swarm: Swarm, folder: Path) -> None:
        self.prefix = swarm.prefix
        self.folder = folder
        self.dhts = [swarm.own_dht(), swarm.own_dht()]
        options: dict[str, Any] = {"min_group_size": 2, "min_matchmaking_time": 1.0, "request_timeout": 0.5}
        self.averagers = [swarm.peer([torch.zeros(ELEMENTS)], 3, dht=dht, **options) for dht in self.dhts]
        self.victim = Victim(self.prefix, self.dhts[0])
        self.faults = itertools.cycle([self.kill, self.stop, self.cut, self.cancel])
        self.rounds = self.averaged = 0

    def run_rounds(self, until: int) -> None:
        while self.rounds < until:
            steps = [averager.step(wait=False, timeout=20.0) for averager in self.averagers]
            if self.rounds % FAULT_EVERY == 0:
                next(self.faults)(steps)
            for step in steps:
                with contextlib.suppress(CancelledError):
                    self.averaged += step.exception(LIMIT) is None
            self.rounds += 1

    def kill(self, steps: list[shoal.StepControl]) -> None:
        """Both of its processes; it is there again as a new peer."""
        self.victim.close()
        self.victim = Victim(self.prefix, self.dhts[0])

    def stop(self, steps: list[shoal.StepControl]) -> None:
        self.victim.signal(signal.SIGSTOP)
        threading.Event().wait(1.0)
        self.victim.signal(signal.SIGCONT)

    def cut(self, steps: list[shoal.StepControl]) -> None:
        """The connections of a survivor are closed, as it sends its parts."""
        record = self.folder / f"fault{self.rounds}.json"
        self.dhts[1].run_coroutine(
            partial(plant, phase="scattering", action="close", whom="background", record=str(record))
        )

    def cancel(self, steps: list[shoal.StepControl]) -> None:
        steps[0].cancel()

    def held(self) -> list[Held]:
        """By this process, and by the background processes."""
        tidy()
        background = [Held.by(dht.background.pid, dht.run_coroutine(count_tasks)) for dht in self.dhts]
        return [Held.by(os.getpid()), *background]


@pytest.fixture
def survivors(swarm: Swarm, tmp_path: Path) -> Iterator[Survivors]:
    made = Survivors(swarm, tmp_path)
    yield made
    made.victim.close()


def test_nothing_is_left_of_300_rounds_with_real_faults(survivors: Survivors):
    survivors.run_rounds(FEW)
    before = survivors.held()
    survivors.run_rounds(MANY)
    after = survivors.held()
    assert survivors.averaged > MANY
    for now, then in zip(after, before, strict=True):
        now.check_against(then)
