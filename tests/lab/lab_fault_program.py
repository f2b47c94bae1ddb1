"""What a peer of the laboratory of faults runs: a user's program that does as it is told, and says all in JSON.

Commands are JSON objects, one a line; ``do`` says which. The end of the input ends the peer. Its tensors hold one
value, by which others know it in their averages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import shoal
from shoal.testing.faults import plant

ELEMENTS = (9_000, 3_000)
ANSWER_LIMIT = 5.0
"""Seconds for which a process waits for the laboratory to cut its link; only one that hangs takes as long."""


def run(program: dict[str, Any]) -> None:
    """Be a peer: ``dht`` are the options of its DHT, ``averager`` those of its averager, None: it has none.
    ``elements``: of each tensor.
    """
    logger = logging.getLogger("shoal")
    logger.addHandler(_Told())
    logger.setLevel(logging.INFO)
    dht = shoal.DHT(start=True, **program["dht"])
    with dht:
        tensors = [torch.zeros(count) for count in program.get("elements", ELEMENTS)]
        options, averager = program["averager"], None
        if options is not None:
            averager = shoal.DecentralizedAverager(
                tensors, dht, start=True, allow_state_sharing=False, **options
            )
        addresses = [str(address) for address in dht.get_visible_maddrs()]
        say("joined", addresses=addresses, peer_id=str(dht.peer_id), background=dht.background.pid)
        peer = FaultyPeer(dht, averager, program["laboratory"])
        for line in sys.stdin:
            command = json.loads(line)
            peer.commands[command.pop("do")](**command)


class FaultyPeer:
    """Carries out the laboratory's commands."""

    def __init__(self, dht: shoal.DHT, averager: Any, laboratory: str) -> None:
        self._dht = dht
        self._averager = averager
        self._laboratory = laboratory
        self._steps: dict[str, Any] = {}
        self.commands: dict[str, Callable[..., None]] = {
            "fill": self.fill,
            "plant": self.plant,
            "step": self.step,
            "trigger": self.trigger,
            "load": self.load,
            "share_state": self.share_state,
        }

    def share_state(self) -> None:
        self._averager.allow_state_sharing = True

    def fill(self, value: float) -> None:
        self._averager.drop_late_average()  # of a step in doubt: what it changed would be added to the value
        with self._averager.get_tensors() as tensors:
            for tensor in tensors:
                tensor.fill_(value)
        say("filled", digest=self._look()["digest"])

    def plant(self, action: str, **options: Any) -> None:
        what = partial(ask_laboratory, self._laboratory) if action == "ask" else action
        self._dht.run_coroutine(partial(plant, action=what, **options))
        say("planted")

    def step(self, tag: str, **options: Any) -> None:
        control = self._steps[tag] = self._averager.step(wait=False, **options)
        threading.Thread(target=self._conclude, args=(tag, control), daemon=True).start()

    def trigger(self, tag: str) -> None:
        self._steps[tag].allow_allreduce()

    def load(self, tag: str, timeout: float) -> None:
        threading.Thread(target=self._load, args=(tag, timeout), daemon=True).start()

    def _load(self, tag: str, timeout: float) -> None:
        found: dict[str, Any] = {"error": None, "values": []}
        try:
            loaded = self._averager.load_state_from_peers(timeout=timeout)
            found["values"] = [] if loaded is None else runs_of(loaded[1])
        except Exception as error:  # noqa: BLE001 - told to the laboratory, which judges it
            found["error"] = f"{type(error).__name__}: {error}"
        say("loaded", tag=tag, time=time.monotonic(), **found)

    def _conclude(self, tag: str, control: Any) -> None:
        error = control.exception()
        report = control.report
        say(
            "done",
            tag=tag,
            time=time.monotonic(),
            kind=None if error is None else type(error).__name__,
            error=None if error is None else str(error),
            report=None if report is None else report.to_dict(),
            **self._look(),
        )

    def _look(self) -> dict[str, Any]:
        with self._averager.get_tensors() as tensors:
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(tensor.numpy().tobytes())
            return {"digest": digest.hexdigest()[:20], "values": runs_of(tensors)}


def runs_of(tensors: Any) -> list[float]:
    """The values of a vector, one for each run of equal ones."""
    return torch.unique_consecutive(torch.cat([tensor.reshape(-1) for tensor in tensors])).tolist()


def ask_laboratory(path: str) -> None:
    """In the background process: have the laboratory do what it means to do to this peer, and wait for that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(ANSWER_LIMIT)
        line.connect(path)
        line.sendall(f"{os.getpid()}\n".encode())
        line.recv(1)


def say(event: str, **fields: Any) -> None:
    os.write(1, (json.dumps({"event": event, **fields}) + "\n").encode())


class _Told(logging.Handler):
    """Says each record of the log."""

    def emit(self, record: logging.LogRecord) -> None:
        say("logged", level=record.levelname, logger=record.name, message=record.getMessage())
