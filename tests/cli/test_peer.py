"""``shoal peer`` as a process."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil
import pytest

from shoal.cli.peer import stop_on_signals
from shoal.dht import DHT
from shoal.utils import get_dht_time

STARTED = "stops this peer"

TraceFunction = Callable[[FrameType, str, Any], Any]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_peer_stops_in_order(start_command, number: signal.Signals) -> None:
    command = start_command("peer", "--interval", "600")
    command.wait_for(STARTED)
    family = command.family()
    assert len(family) == 2, "the command and its background process"
    command.process.send_signal(number)
    status, output, errors = command.finish()
    assert status == 0
    assert output.splitlines()[-1] == "stopped"
    assert errors == ""
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


def test_others_join_by_the_printed_address(start_command) -> None:
    first = start_command("peer", "--interval", "0.1")
    address = first.wait_for("/p2p/").strip()
    with DHT([address], start=True) as dht:
        assert dht.store("key", "value", get_dht_time() + 600)
        first.wait_for("peers: 1, keys: 1")
    second = start_command("peer", "--initial-peers", address, "--interval", "0.1")
    second.wait_for("peers: 1, keys: ")


def test_identity_keeps_the_address(start_command, tmp_path) -> None:
    path = tmp_path / "identity"
    addresses = []
    for _ in range(2):
        command = start_command("peer", "--identity", str(path))
        addresses.append(command.wait_for("/p2p/").split("/p2p/")[1])
        command.process.send_signal(signal.SIGTERM)
        assert command.finish()[0] == 0
    assert addresses[0] == addresses[1]


def test_port_in_use(start_command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, output, errors = start_command("peer", "--port", str(port)).finish()
    assert status == 2
    assert output == ""
    assert f"tcp/{port}" in errors.splitlines()[-1]
    assert "in use" in errors.splitlines()[-1]


def test_unreachable_initial_peer(start_command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    arguments = ["peer", "--initial-peers", f"/ip4/127.0.0.1/tcp/{port}", "--bootstrap-timeout", "0.5"]
    status, _, errors = start_command(*arguments).finish()
    assert status == 1
    assert errors.splitlines()[-1].startswith("shoal: ")
    assert f"/ip4/127.0.0.1/tcp/{port}: refused" in errors.splitlines()[-1]


def test_signal_while_joining(start_command) -> None:
    """A peer whose initial peers do not answer stops at once, too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        command = start_command("peer", "--initial-peers", address, "--bootstrap-timeout", "600")
        silent.accept()[0].close()  # it is running, and dials
        command.process.send_signal(signal.SIGTERM)
        status, _, errors = command.finish()
    assert status == 0
    assert "shoal: " not in errors


def test_a_signal_at_any_line_of_the_wait_ends_it() -> None:
    """The handler runs on the thread that waits: it must not need what that thread holds."""

    def wait_with_signal_at(number: int) -> bool:
        """Whether there was such a line."""
        seen = 0

        def trace(frame: FrameType, event: str, argument: object) -> TraceFunction:
            nonlocal seen
            if event == "line":
                seen += 1
                if seen == number:
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGTERM)
            return trace

        with stop_on_signals() as stop:
            sys.settrace(trace)
            try:
                assert stop.wait(0.05) or seen < number
            finally:
                sys.settrace(None)
        return seen >= number

    lines = 0
    while wait_with_signal_at(lines + 1):
        lines += 1
    assert lines > 2
