"""What the link itself gives: plain TCP between two machines over some connections, which are made beforehand.

Both send at once, as in an all-reduce of two peers; or only host 0 does, as in a download. A connection takes the
next piece when it has room, so that a slow one holds nothing up but its last pieces.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from typing import Any

from benchmarks.workers.protocol import address_from_first, main, serve

PIECE = 128 << 10
CONNECT_TIMEOUT = 30.0
STALLED = 120_000
"""Milliseconds without any progress after which a burst has failed."""


class Burst:
    """The connections, and the bytes that cross them in each round."""

    def __init__(self, connections: list[socket.socket], to_send: int, to_receive: int) -> None:
        for connection in connections:
            connection.setblocking(False)
        self._connections = {connection.fileno(): connection for connection in connections}
        self._to_send, self._to_receive = to_send, to_receive

    def prepare(self) -> None:
        """Nothing: the connections stand."""

    def go(self) -> dict[str, Any]:
        began = time.monotonic()
        sender = threading.Thread(target=self._send)
        sender.start()
        received = self._receive()
        sender.join()
        whole = received == self._to_receive
        return {"began": began, "ok": int(whole), "of": 1, "error": "" if whole else f"{received} bytes came"}

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _send(self) -> None:
        poll, left, rest = select.poll(), self._to_send, dict.fromkeys(self._connections, 0)
        for descriptor in self._connections:
            poll.register(descriptor, select.POLLOUT)
        piece, busy = memoryview(bytes(PIECE)), len(rest) if left else 0
        while busy:
            ready = poll.poll(STALLED)
            if not ready:
                return
            for descriptor, _ in ready:
                if not rest[descriptor]:
                    rest[descriptor] = min(PIECE, left)
                    left -= rest[descriptor]
                if not rest[descriptor]:
                    poll.unregister(descriptor)
                    busy -= 1
                    continue
                try:
                    rest[descriptor] -= self._connections[descriptor].send(piece[: rest[descriptor]])
                except BlockingIOError:
                    continue

    def _receive(self) -> int:
        poll, received, buffer = select.poll(), 0, bytearray(1 << 20)
        for descriptor in self._connections:
            poll.register(descriptor, select.POLLIN)
        while received < self._to_receive:
            ready = poll.poll(STALLED)
            if not ready:
                break
            for descriptor, _ in ready:
                try:
                    count = self._connections[descriptor].recv_into(buffer)
                except BlockingIOError:
                    continue
                if not count:
                    return received
                received += count
        return received


def connect(ip: str, port: int) -> socket.socket:
    return socket.create_connection((ip, port), timeout=CONNECT_TIMEOUT)


def run(spec: dict[str, Any]) -> None:
    if spec["host"] == 0:
        with socket.create_server((spec["ip"], 0), backlog=256) as listener:
            port = listener.getsockname()[1]
            address_from_first(spec, lambda: [spec["ip"], str(port)])
            connections = [listener.accept()[0] for _ in range(spec["connections"])]
    else:
        ip, number = address_from_first(spec, list)
        connections = [connect(ip, int(number)) for _ in range(spec["connections"])]
    serve(Burst(connections, spec["to_send"], spec["to_receive"]))


if __name__ == "__main__":
    main(run)
