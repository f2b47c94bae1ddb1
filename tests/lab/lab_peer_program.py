"""What a peer of the laboratory runs: a user's program that does as it is told, a line at a time, and says all in JSON.

Commands come on the standard input: ``average`` runs one step, ``describe`` says how others reach it. The end of the
input ends the peer.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

import torch

import shoal
from shoal.dht.node import DHTNode

ELEMENTS = 50_000
STEP_TIMEOUT = 20.0
PATIENCE = 90.0
"""Seconds; only a step that hangs takes as long."""


def run(program: dict[str, Any]) -> None:
    """Be a peer: ``dht`` are the options of its DHT, ``averager`` those of its averager, ``value`` what it averages."""
    logger = logging.getLogger("shoal")
    logger.addHandler(_Told())
    logger.setLevel(logging.INFO)
    began = time.monotonic()
    try:
        dht = shoal.DHT(start=True, **program["dht"])
    except shoal.ShoalError as error:
        _say("failed", error=f"{type(error).__name__}: {error}")
        return
    with dht:
        tensor = torch.full((ELEMENTS,), program["value"])
        averager = shoal.DecentralizedAverager([tensor], dht, start=True, **program["averager"])
        _say("joined", seconds=round(time.monotonic() - began, 2), **_describe(dht, averager))
        for line in sys.stdin:
            if line.strip() == "average":
                _average(averager, tensor)
            else:
                _say("described", **_describe(dht, averager))


def _average(averager: shoal.DecentralizedAverager, tensor: torch.Tensor) -> None:
    began = time.monotonic()
    step = averager.step(wait=False, timeout=STEP_TIMEOUT)
    found: dict[str, Any] = {"members": 0, "error": None}
    try:
        step.result(PATIENCE)
        found["members"] = len(step.report.members)
    except (shoal.ShoalError, TimeoutError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    with averager.get_tensors() as (now,):
        values = sorted(set(now.tolist()))
    _say("averaged", seconds=round(time.monotonic() - began, 2), values=values[:3], **found)


def _describe(dht: shoal.DHT, averager: shoal.DecentralizedAverager) -> dict[str, Any]:
    addresses = [str(address) for address in dht.get_visible_maddrs()]
    return {
        "addresses": addresses,
        "client": averager.client_mode,
        "known": dht.run_coroutine(_known_addresses),
        "peer_id": str(dht.peer_id),
    }


async def _known_addresses(dht: Any, node: DHTNode) -> dict[str, list[str]]:
    """In the background process: where it would dial each peer that it is connected to."""
    return {
        str(peer): [str(address) for address in node.host.addresses_of(peer)]
        for peer in node.host.connected_peers()
    }


def _say(event: str, **fields: Any) -> None:
    os.write(1, (json.dumps({"event": event, **fields}) + "\n").encode())


class _Told(logging.Handler):
    """Says each record of the log."""

    def emit(self, record: logging.LogRecord) -> None:
        _say("logged", level=record.levelname, logger=record.name, message=record.getMessage())
