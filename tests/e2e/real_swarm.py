"""Averagers on real background processes and sockets, as a user would make them, and helpers to step them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil

import shoal
from shoal.averaging.commands import AveragingStage
from shoal.averaging.trainer.shared_buffers import SharedBuffers
from shoal.averaging.trainer.sources import AveragedTensors

Kind = TypeVar("Kind", bound=shoal.DecentralizedAverager)
STEP_TIMEOUT = 30.0


class Swarm:
    """The averagers of one test, under a prefix of its own, on DHTs that all tests of this folder share.

    Each DHT has a background process of its own, whose start takes longer than many tests.
    """

    def __init__(self, shared: list[shoal.DHT], prefix: str) -> None:
        self.prefix = prefix
        self.averagers: list[shoal.DecentralizedAverager] = []
        self.own: list[shoal.DHT] = []
        self._shared = shared
        self._free = list(shared)

    def dht(self) -> shoal.DHT:
        """A DHT that no other averager of this test lives with."""
        if not self._free:
            self._shared.append(new_dht(self._shared))
            return self._shared[-1]
        return self._free.pop(0)

    def own_dht(self) -> shoal.DHT:
        """A DHT that the test may kill or shut down."""
        self.own.append(new_dht([*self._shared, *self.own]))
        return self.own[-1]

    def peer(
        self,
        tensors: AveragedTensors | SharedBuffers,
        size: int,
        *,
        dht: shoal.DHT | None = None,
        **options: Any,
    ) -> shoal.DecentralizedAverager:
        return self.start(shoal.DecentralizedAverager, tensors, size=size, dht=dht, **options)

    def start(
        self,
        kind: Callable[..., Kind],
        *arguments: Any,
        size: int,
        dht: shoal.DHT | None = None,
        **options: Any,
    ) -> Kind:
        """An averager of this kind, for groups of ``size``; it ends with the swarm."""
        settings: dict[str, Any] = {
            "prefix": self.prefix,
            "target_group_size": size,
            "min_group_size": size,
            "min_matchmaking_time": 2.0,
            "request_timeout": 1.0,
            "start": True,
            **options,
        }
        averager = kind(*arguments, dht=dht or self.dht(), **settings)
        self.averagers.append(averager)
        return averager

    def close(self) -> None:
        for averager in self.averagers:
            averager.shutdown()
        for dht in self.own:
            dht.shutdown()


def new_dht(others: list[shoal.DHT]) -> shoal.DHT:
    return shoal.DHT(initial_peers=others[0].get_visible_maddrs() if others else None, start=True)


def step_all(averagers: list[Any], **options: Any) -> list[Any]:
    controls = [averager.step(wait=False, timeout=STEP_TIMEOUT, **options) for averager in averagers]
    return [control.result(60) for control in controls]


def wait_for_stage(steps: list[Any], stage: AveragingStage, limit: float = 30.0) -> None:
    deadline = time.monotonic() + limit
    while any(step.stage is not stage for step in steps):
        assert time.monotonic() < deadline, [step.stage for step in steps]
        assert not any(step.done() for step in steps), steps
        threading.Event().wait(0.002)


def wait_until(condition: Callable[[], bool], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def is_running(pid: int) -> bool:
    """Whether the process is there, and no zombie: in one look, since it may go between two."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
