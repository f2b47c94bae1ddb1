"""A program whose wall clock is wrong, or is set while it runs, on a real DHT."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from real_swarm import Swarm

import shoal

pytestmark = [pytest.mark.xdist_group("averaging"), pytest.mark.timeout(300)]

PROGRAM = """
import sys, time
real, error = time.time, float(sys.argv[1])
time.time = lambda: real() + error
import torch
import shoal
dht = shoal.DHT(initial_peers=[sys.argv[2]], start=True)
assert abs(shoal.get_dht_time() - real()) < 5, shoal.get_dht_time() - real()
assert dht.store("from afar", 1, shoal.get_dht_time() + 60)
tensors = [torch.ones(4)]
averager = shoal.DecentralizedAverager(
    tensors, dht, prefix=sys.argv[3], target_group_size=2, min_matchmaking_time=2.0, request_timeout=1.0, start=True
)
for _ in range(3):
    assert len(averager.step(timeout=60, scheduled_time=shoal.get_dht_time() + 2)) == 2
    time.time = lambda: real() - error
print(float(tensors[0][0]))
"""


@pytest.mark.sweep
@pytest.mark.parametrize("error", [90.0, -90.0])
def test_a_program_whose_clock_is_wrong_averages(swarm: Swarm, error: float) -> None:
    tensor = torch.zeros(4)
    here = swarm.peer([tensor], 2)
    address = str(here.dht.get_visible_maddrs()[0])
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(error), address, here.prefix],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            for _ in range(3):
                assert len(here.step(timeout=120) or ()) == 2
            printed, logged = other.communicate(timeout=60)
        finally:
            other.kill()
    assert other.returncode == 0, logged
    assert printed.split() == ["0.5"]
    assert float(tensor[0]) == 0.5
    found = here.dht.get("from afar", latest=True)
    assert found is not None
    assert 0 < found.expiration_time - shoal.get_dht_time() < 60
    assert "the clock of this machine is 9" in logged or "the clock of this machine is 89." in logged


def test_a_wall_clock_that_is_set_changes_no_time_of_the_dht(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shoal.get_dht_time()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= shoal.get_dht_time() - before < 60
