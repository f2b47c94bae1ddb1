"""The process of one peer of the demo: ``python -m shoal.cli.demo.worker``, told what to do through its standard input.

Ends by itself when its terminal is gone.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import IO

from shoal.cli.addresses import listen_address
from shoal.cli.demo import protocol
from shoal.cli.demo.peer import Orders, Peer, Stopped
from shoal.cli.demo.training import set_threads
from shoal.errors import ProtocolViolation, ShoalError

SECONDS_TO_LEAVE = 3.0
"""How long a worker without a terminal may take to leave the swarm in order."""


class Reports:
    """Writes reports to what was the standard output; anything printed goes to the standard error from then on."""

    def __init__(self) -> None:
        self._output = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)

    def send(self, report: protocol.Report) -> None:
        try:
            self._output.write(protocol.encode(report))
        except BrokenPipeError as error:  # the terminal is gone
            raise Stopped from error


class Listener:
    """Follows the terminal's commands on a thread of its own."""

    def __init__(self, commands: IO[bytes]) -> None:
        self._commands = commands
        self._begin = threading.Event()
        self.orders = Orders(stop=threading.Event(), hold=threading.Event())
        self._thread = threading.Thread(target=self._listen, name="commands", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            for line in iter(lambda: self._commands.readline(protocol.MAX_LINE_BYTES), b""):
                self._obey(protocol.decode_command(line))
        finally:
            self._stop()
            # The main thread may be in a call that takes long. Nobody waits for this process any more.
            threading.Event().wait(SECONDS_TO_LEAVE)
            os._exit(1)

    def _obey(self, command: protocol.Command) -> None:
        match command:
            case protocol.Begin():
                self._begin.set()
            case protocol.Hold():
                self.orders.hold.set()
            case protocol.Stop():
                self._stop()

    def _stop(self) -> None:
        self.orders.stop.set()
        self._begin.set()

    def wait_to_begin(self) -> None:
        """:raises Stopped: told to leave instead"""
        self._begin.wait()
        if self.orders.stop.is_set():
            raise Stopped


def main() -> int:
    """Be the peer that the first line of the standard input describes; returns the exit status."""
    reports = Reports()
    # Unbuffered: the interpreter could not end while a thread reads sys.stdin.
    commands = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - until the process ends
    assignment = protocol.decode_assignment(commands.readline(protocol.MAX_LINE_BYTES))
    listener = Listener(commands)
    try:
        run(assignment, listener, reports)
    except Stopped:
        pass
    except (ShoalError, ProtocolViolation) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


def run(assignment: protocol.Assignment, listener: Listener, reports: Reports) -> None:
    """Join the DHT, train and average.

    :raises Stopped: told to leave before the end
    :raises ShoalError: the peer failed
    """
    from shoal.cli.demo.data import deal, load_samples
    from shoal.dht.dht import DHT

    set_threads()
    digits = deal(load_samples(), assignment.settings.peers)
    samples = digits.part(assignment.part.index, reserve=assignment.part.reserve)
    with DHT(assignment.initial_peers, start=True, host_maddrs=[listen_address(assignment.host, 0)]) as dht:
        peer = Peer(assignment, samples, digits.held_out, dht, listener.orders, reports.send)
        try:
            reports.send(protocol.Loaded(samples.classes, len(samples)))
            if assignment.newcomer:
                listener.wait_to_begin()
            reports.send(protocol.Ready(peer.status))
            if not assignment.newcomer:
                listener.wait_to_begin()
            finished = peer.run()
        finally:
            peer.close()
    reports.send(finished)


if __name__ == "__main__":
    exit_status = main()
    sys.stderr.flush()
    # Everything was shut down in order. The interpreter would take half a second of CPU to take torch apart.
    os._exit(exit_status)
