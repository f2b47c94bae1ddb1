"""Processes of a peer that are stopped (Ctrl+Z, SIGSTOP): the group goes on, and no timeout is a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from real_swarm import Swarm, new_dht, wait_for_stage

import shoal
from shoal.averaging.commands import AveragingStage

pytestmark = pytest.mark.xdist_group("averaging")

LIMIT = 60  # seconds, against hanging only

PEER = """
    import sys, time
    import torch, shoal
    from shoal.averaging.commands import AveragingStage

    prefix, *peers = sys.argv[1:]
    tensor = torch.full((1000,), 3.0)
    with shoal.DHT(initial_peers=peers, start=True) as dht, shoal.DecentralizedAverager(
        [tensor], dht, prefix=prefix, target_group_size=3, min_group_size=2, min_matchmaking_time=3.0, start=True
    ) as averager:
        print(dht.peer_id, dht.background.pid, flush=True)
        for line in sys.stdin:
            if line == "step\\n":
                control = averager.step(wait=False, require_trigger=True)
                while control.stage is not AveragingStage.AWAITING_TRIGGER:
                    time.sleep(0.01)
                print("ready", flush=True)
            else:
                control.allow_allreduce()
                print(len(control.result(60)), tensor[0].item(), flush=True)
"""


class StoppablePeer:
    """A peer in a process of its own."""

    def __init__(self, prefix: str, dht: shoal.DHT) -> None:
        peers = [str(address) for address in dht.get_visible_maddrs()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PEER), prefix, *peers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peer_id, pid = self.hear().split()
        self.background = int(pid)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has ended"
        return line.strip()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        with self.process:  # closes its pipes, and waits for its end
            pass


@pytest.fixture
def third(swarm: Swarm) -> Iterator[StoppablePeer]:
    peer = StoppablePeer(swarm.prefix, swarm.dht())
    yield peer
    peer.close()


@pytest.mark.parametrize("role", ["leader", pytest.param("follower", marks=pytest.mark.sweep)])
def test_a_stopped_user_is_left_behind_and_comes_back(swarm: Swarm, third: StoppablePeer, role: str):
    tensors = [torch.full((1000,), float(value)) for value in (0, 1)]
    settings = {"min_group_size": 2, "min_matchmaking_time": 3.0}
    swarm._free = list(swarm._shared)
    averagers = [swarm.peer([tensor], 3, **settings) for tensor in tensors]

    def step_of_all() -> list[Any]:
        """All three stand in a group and wait for their triggers."""
        late = shoal.get_dht_time() + (5.0 if role == "leader" else 1.0)
        if role == "leader":
            third.tell("step")
        steps = [
            averager.step(wait=False, require_trigger=True, scheduled_time=late) for averager in averagers
        ]
        if role == "follower":
            third.tell("step")
        assert third.hear() == "ready"
        wait_for_stage(steps, AveragingStage.AWAITING_TRIGGER)
        return steps

    steps = step_of_all()
    third.signal(signal.SIGSTOP)
    for step in steps:
        step.allow_allreduce()
    for step in steps:
        assert len(step.result(LIMIT)) == 3
        report = step.report
        assert (report.members[0] == third.peer_id) == (role == "leader")
        (excluded,) = report.excluded
        assert excluded.member == third.peer_id
        assert f"user's process (pid {third.process.pid}) is stopped" in excluded.reason
    assert all(torch.equal(tensor, torch.full((1000,), 0.5)) for tensor in tensors)

    third.signal(signal.SIGCONT)
    steps = [averager.step(wait=False) for averager in averagers]
    third.tell("trigger")
    gathered, value = third.hear().split()
    for step in steps:
        step.result(LIMIT)
    assert int(gathered) == 3
    assert float(value) == pytest.approx(4.0 / 3.0)


@pytest.mark.sweep
def test_the_own_background_process_stopped_keeps_no_timeout_waiting(shared_dhts: list[shoal.DHT]):
    dht = new_dht(shared_dhts)
    averager = shoal.DecentralizedAverager([torch.ones(10)], dht, prefix="own_stopped", start=True)
    pid = dht.background.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        other = shoal.DecentralizedAverager([torch.ones(10)], dht, prefix="own_stopped_too", start=False)
        waiting = [
            lambda: other.run_in_background(timeout=2),
            lambda: averager.step(timeout=2),
            lambda: averager.load_state_from_peers(timeout=2),
            lambda: averager.step(wait=False).result(4),
            lambda: dht.get("key", return_future=True).result(4),
            lambda: dht.store("key", 1, shoal.get_dht_time() + 9, return_future=True).result(4),
        ]
        with ThreadPoolExecutor(len(waiting)) as threads:
            for outcome in [threads.submit(call) for call in waiting]:
                with pytest.raises(shoal.PeerProcessUnresponsive, match=rf"\(pid {pid}\) is stopped"):
                    outcome.result(LIMIT)
    finally:
        averager.shutdown()
        dht.shutdown()
    deadline = time.monotonic() + LIMIT
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
