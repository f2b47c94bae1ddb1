"""Real workers do small work: what the runner, the protocol and the links are for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import psutil
import pytest

from benchmarks.network.controls import controls_of
from benchmarks.network.laboratory import laboratory, why_not
from benchmarks.process import Worker, WorkerFailed
from benchmarks.results import RowResult
from benchmarks.rows import Row
from benchmarks.runner import Runner
from benchmarks.work import GLOO, HIVEMIND, SHOAL, Averaging, Network, Side, raw

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.xdist_group("benchmarks"),  # they set what congestion controls the machine allows
]

PYTHONS = dict.fromkeys(("shoal", "gloo", "raw"), sys.executable)
LINK = Network("cubic", rtt_ms=40, rate=100)


def measure(work: Averaging, *sides: Side) -> RowResult:
    """The result of two rounds of each side; hivemind is not there."""
    result = RowResult(Row("row", "a row", work, sides, ("mbit_per_s",), rounds=2))
    Runner(PYTHONS, {"hivemind": "it is elsewhere"}, 1, lambda line: None).run(result)
    assert result.skipped is None
    return result


@pytest.fixture
def long_links() -> None:
    reason = why_not(LINK)
    if reason is not None:
        pytest.skip(reason)


def test_sides_on_loopback_have_figures_of_every_measured_round():
    before = set(psutil.Process().children(recursive=True))
    result = measure(Averaging(2, 1), SHOAL, GLOO, HIVEMIND)
    assert result.notes == ["hivemind left out: it is elsewhere"]
    for side in ("shoal", "gloo"):
        figures = result.samples[side]
        assert len(figures["mb_per_s"]) == 2
        assert min(figures["mb_per_s"]) > 0
        assert min(figures["cpu_s_per_gb"]) > 0
        assert min(figures["pss_mb"]) > 1
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.usefixtures("long_links")
def test_a_long_link_gives_its_rate_and_sockets_have_its_control():
    """8 MB over 100 Mbit/s: raw TCP gets most of it, and nothing gets more. The machine's settings are put back."""
    allowed = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
    with open(allowed) as file:
        before = file.read()
    result = measure(Averaging(2, 8, LINK), *raw(4), SHOAL)
    assert result.notes == []
    assert set(result.controls["raw 4"]) == set(result.controls["shoal"]) == {"cubic"}
    for side in ("raw 4", "shoal"):
        assert max(result.samples[side]["mbit_per_s"]) < 100
    assert max(result.samples["raw 4"]["mbit_per_s"]) > 20
    with open(allowed) as file:
        assert file.read() == before


@pytest.mark.usefixtures("long_links")
def test_a_machine_is_as_far_away_as_the_network_says():
    with laboratory(replace(LINK, rtt_ms=200), 2) as lab, lab.machines[1].do(make_listener) as listener:
        address = listener.getsockname()

        def connect() -> float:
            began = time.monotonic()
            with socket.create_connection(address, timeout=10):
                return time.monotonic() - began

        assert 0.2 <= lab.machines[0].do(connect) < 1.2


def make_listener() -> socket.socket:
    return socket.create_server(("192.88.99.2", 0))


def test_a_worker_that_fails_is_told_with_its_last_words():
    program = "import sys; sys.exit('no memory left')"
    with (
        closing(Worker("shoal (0)", [sys.executable, "-c", program])) as worker,
        pytest.raises(WorkerFailed) as told,
    ):
        worker.expect("ready", 30)
    assert str(told.value) == "shoal (0) ended before it was ready; its last line: no memory left"


def test_a_worker_ends_with_all_that_it_started():
    """Also a child in a session of its own, as a daemon; a process of somebody else stays."""
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        'print(\'{"event": "ready", "child": %d}\' % child.pid, flush=True)\n'
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        worker = Worker("shoal (0)", [sys.executable, "-c", program])
        child = psutil.Process(worker.expect("ready", 30)["child"])
        worker.close()
        child.wait(10)
        assert stranger.poll() is None
        stranger.kill()


def test_workers_end_with_a_runner_that_is_killed():
    """Also one that waits for something else: here for a connection that nobody makes."""
    program = (
        "import json, subprocess, sys\n"
        "spec = json.dumps({'host': 0, 'ip': '127.0.0.1', 'connections': 1})\n"
        "child = subprocess.Popen([sys.executable, '-m', 'benchmarks.workers.raw_tcp', spec],\n"
        "    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        worker = psutil.Process(int(runner.stdout.readline()))
        runner.kill()
    worker.wait(30)


def test_sockets_of_another_process_tell_their_congestion_control():
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
        default = file.read().strip()
    program = (
        "import socket, sys\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "one = socket.create_connection(listener.getsockname())\n"
        "print('connected', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = controls_of([process.pid])
        process.stdin.close()
    assert found == {default: 1} or os.geteuid() != 0
