"""What other users of the same link notice of a round: a TCP connection that always sends, and a ping.

Host 0 sends to host 1 as fast as the link lets it, and host 1 counts what comes. Host 1 also sends a small datagram
again and again, which host 0 sends back. Between ``prepare`` and ``go`` lies the time that is judged; before it, the
connection has the link for itself.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import threading
import time
from typing import Any

from benchmarks.workers.protocol import address_from_first, main, serve

PIECE = 64 << 10
PING_EVERY = 0.05
STAMP = struct.Struct("!d")


class Sender:
    """Host 0: it only sends, and answers."""

    def __init__(self, connection: socket.socket, pings: socket.socket) -> None:
        threading.Thread(target=send_forever, args=(connection,), daemon=True).start()
        threading.Thread(target=send_back, args=(pings,), daemon=True).start()

    def prepare(self) -> None:
        """Nothing: it sends all the time."""

    def go(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing: the process ends."""


class Observer:
    """Host 1: it counts what comes, and how long its pings take."""

    def __init__(self, connection: socket.socket, pings: socket.socket) -> None:
        self._connection = connection
        self._pings = pings
        self._received = 0
        self._times: list[float] = []
        self._began, self._count = time.monotonic(), 0
        self._usual = 0.0
        for target in (self._receive, self._ping, self._hear):
            threading.Thread(target=target, daemon=True).start()

    def prepare(self) -> None:
        """Begin the time that is judged."""
        self._usual = statistics.median(self._times) if self._times else 0.0
        self._times = []
        self._began, self._count = time.monotonic(), self._received

    def go(self) -> dict[str, Any]:
        """End it, and judge."""
        seconds = time.monotonic() - self._began
        figures = {"foreign_mbit_per_s": 8e-6 * (self._received - self._count) / seconds}
        if self._times:
            figures["ping_rise_ms"] = 1e3 * (statistics.median(self._times) - self._usual)
        self._times = []
        return {"extra": figures}

    def close(self) -> None:
        """Nothing: the process ends."""

    def _receive(self) -> None:
        buffer = bytearray(PIECE)
        while count := self._connection.recv_into(buffer):
            self._received += count

    def _ping(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._pings.send(STAMP.pack(time.monotonic()))
            time.sleep(PING_EVERY)

    def _hear(self) -> None:
        while True:
            (sent,) = STAMP.unpack(self._pings.recv(STAMP.size))
            self._times.append(time.monotonic() - sent)


def send_forever(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the observer has ended
        while True:
            connection.sendall(bytes(PIECE))


def send_back(pings: socket.socket) -> None:
    while True:
        data, sender = pings.recvfrom(STAMP.size)
        pings.sendto(data, sender)


def run(spec: dict[str, Any]) -> None:
    pings = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if spec["host"] == 0:
        with socket.create_server((spec["ip"], 0)) as listener:
            port = listener.getsockname()[1]
            pings.bind((spec["ip"], port))
            address_from_first(spec, lambda: [spec["ip"], str(port)])
            connection, _ = listener.accept()
        serve(Sender(connection, pings))
    else:
        ip, number = address_from_first(spec, list)
        pings.connect((ip, int(number)))
        serve(Observer(socket.create_connection((ip, int(number))), pings))


if __name__ == "__main__":
    main(run)
