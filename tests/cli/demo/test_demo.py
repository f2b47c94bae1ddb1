"""The demo as users run it: real processes, sockets, training and averaging."""

from __future__ import annotations

import re
import signal
import subprocess

import psutil
import pytest

from shoal.cli.demo import protocol
from shoal.cli.demo.process import WORKER_COMMAND
from shoal.cli.demo.settings import Settings

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.sweep
@pytest.mark.timeout(180)
def test_demo_that_another_terminal_joins(start_command, tmp_path) -> None:
    plot = tmp_path / "plot.png"
    demo = start_command("demo", "--peers", "3", "--rounds", "60", "--output", str(plot))
    line = demo.wait_for("shoal demo --join")
    guest = start_command(*line.split()[1:], "--output", str(tmp_path / "guest.png"))
    killed = int(re.search(r"kill -9 (\d+)", demo.wait_for("kill -9"))[1])
    families = [*demo.family(), *guest.family()]
    status, output, errors = demo.finish()
    assert status == 0, output + errors
    assert not psutil.pid_exists(killed)
    for said in ("peer 4 has caught up", "guest 1 is here", "swarm: mean", "central, on all images"):
        assert said in output
    assert re.search(r"guest 1: round \d+/60", output), "the first terminal shows how the guest gets on"
    percent = [float(found) for found in re.findall(r"swarm: peer \d +│ +([0-9.]+) %", output)]
    assert len(percent) == 3
    assert min(percent) > 90
    assert plot.read_bytes().startswith(PNG)
    guest_status, guest_output, guest_errors = guest.finish()
    assert guest_status == 0, guest_output + guest_errors
    assert "peer 1: round" in guest_output
    _, alive = psutil.wait_procs(families, timeout=5)
    assert alive == []


@pytest.mark.sweep
def test_ctrl_c_leaves_nothing_behind(start_command, tmp_path) -> None:
    demo = start_command("demo", "--peers", "2", "--rounds", "2000", "--output", str(tmp_path / "plot.png"))
    demo.wait_for("round 1")
    family = demo.family()
    assert len(family) >= 6, "the command, two workers, and a background process for each"
    demo.process.send_signal(signal.SIGINT)
    status, output, errors = demo.finish()
    assert status == 130, output + errors
    assert "interrupted" in output
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert list(tmp_path.iterdir()) == []


def test_joining_where_no_demo_runs(start_command) -> None:
    peer = start_command("peer")
    address = peer.wait_for("/p2p/").strip()
    status, _, errors = start_command("demo", "--join", address).finish()
    assert status == 2
    assert "no demo runs at" in errors.splitlines()[-1]


@pytest.mark.sweep
def test_worker_ends_with_its_terminal() -> None:
    """A worker's standard input ends when its terminal is killed."""
    assignment = protocol.Assignment(
        "peer 1", Settings("test"), protocol.Part(0), (), "127.0.0.1", seed=1, newcomer=True
    )
    worker = subprocess.Popen(WORKER_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    assert worker.stdout is not None
    with worker:
        worker.stdin.write(protocol.encode(assignment))
        worker.stdin.flush()
        loaded = protocol.decode_report(worker.stdout.readline())
        assert isinstance(loaded, protocol.Loaded)
        assert loaded.classes == (0, 4, 8)
        worker.stdin.close()
        assert worker.wait(timeout=30) == 0
