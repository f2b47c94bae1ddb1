"""How fast this machine can be at best: the limits that no all-reduce passes. Each takes about half a second."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shoal.p2p.protocol.frames import MAX_PLAINTEXT_BYTES
from shoal.p2p.protocol.noise import TAG_BYTES

TURNS = 5
"""The best turn counts: what others did meanwhile is no limit."""
COPIED = 64 << 20
SEALED = 32 << 20
SENT = 128 << 20
PIECE = 256 << 10


def measure() -> dict[str, str]:
    """Rates by what they are called."""
    return {
        "copies of memory": _rate(COPIED, _copier()),
        "AES-256-GCM, one core": _rate(SEALED, _sealer()),
        "one TCP connection over loopback": _rate(SENT, _send),
    }


def _rate(nbytes: int, work: Callable[[], None]) -> str:
    """The best of some turns, and what it cost all cores together."""
    turns = []
    for _ in range(TURNS):
        began, spent = time.perf_counter(), time.process_time()
        work()
        turns.append((time.perf_counter() - began, time.process_time() - spent))
    seconds, cpu = min(turns)
    return f"{nbytes / seconds / 1e9:.1f} GB/s, {cpu / nbytes * 1e9:.2f} s of CPU a GB"


def _copier() -> Callable[[], None]:
    source, target = np.ones(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    return lambda: np.copyto(target, source)


def _sealer() -> Callable[[], None]:
    """Records as connections seal them."""
    cipher, plain = AESGCM(os.urandom(32)), bytes(MAX_PLAINTEXT_BYTES)
    sealed = bytearray(MAX_PLAINTEXT_BYTES + TAG_BYTES)

    def work() -> None:
        for number in range(SEALED // MAX_PLAINTEXT_BYTES):
            cipher.encrypt_into(number.to_bytes(12, "big"), plain, None, sealed)

    return work


def _send() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as out,
    ):
        receiver = server.accept()[0]
        sender = threading.Thread(target=_send_all, args=(out,))
        sender.start()
        with receiver:
            buffer, received = bytearray(PIECE), 0
            while received < SENT:
                received += receiver.recv_into(buffer)
        sender.join()


def _send_all(out: socket.socket) -> None:
    piece = bytes(PIECE)
    for _ in range(SENT // PIECE):
        out.sendall(piece)
