"""One or more peers that average tensors in one group, by Shoal or by hivemind: the same code, as the API is."""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.workers.protocol import address_from_first, main, serve

LOADED_AFTER = 2.0
"""Seconds in which background processes load torch ahead of need."""
FORM_TIMEOUT = 60
ROUND_TIMEOUT = 600
LOOP_ALONE = 3.0
"""Seconds for which the trainer's loop runs alone before each round, to know its speed at that time."""


class Loop:
    """A trainer's calculation on one core."""

    def __init__(self) -> None:
        self._matrix = torch.randn(128, 128)
        self._alone = 0.0

    def run_alone(self) -> None:
        """Find out how fast it is now, without a round."""
        self._alone = self._speed(until=time.monotonic() + LOOP_ALONE)

    def slowdown(self, steps: Sequence[Any]) -> float:
        """By how many percent it is slower until all steps are done than it was alone."""
        return 100 * (1 - self._speed(steps) / self._alone)

    def _speed(self, steps: Sequence[Any] = (), until: float = float("inf")) -> float:
        """Calculations a second, until all steps are done or this moment has come."""
        count, began = 0, time.monotonic()
        while time.monotonic() < until and not (steps and all(step.done() for step in steps)):
            for _ in range(20):
                self._matrix @ self._matrix
            count += 20
        return count / (time.monotonic() - began)


class Peers:
    """The averagers of this process."""

    def __init__(self, averagers: list[Any], loop: Loop | None) -> None:
        self._averagers = averagers
        self._loop = loop
        self._steps: list[Any] = []

    def prepare(self) -> None:
        """Form the group."""
        if self._loop is not None:
            self._loop.run_alone()
        self._steps = [
            averager.step(wait=False, timeout=FORM_TIMEOUT, require_trigger=True)
            for averager in self._averagers
        ]
        while not all(step.stage.name == "AWAITING_TRIGGER" or step.done() for step in self._steps):
            time.sleep(0.001)

    def go(self) -> dict[str, Any]:
        """Average, from the trigger to the last result."""
        began, extra = time.monotonic(), {}
        for step in self._steps:
            step.allow_allreduce()
        if self._loop is not None:
            extra["slowdown_percent"] = self._loop.slowdown(self._steps)
        errors = [outcome for outcome in map(outcome_of, self._steps) if outcome]
        ended = time.monotonic()
        return {
            "began": began,
            "ended": ended,
            "ok": len(self._steps) - len(errors),
            "of": len(self._steps),
            "error": "; ".join(dict.fromkeys(errors))[:300],
            "extra": extra,
        }

    def close(self) -> None:
        for averager in self._averagers:
            averager.shutdown()


def outcome_of(step: Any) -> str:
    """What went wrong with a step; empty if it averaged."""
    try:
        return "" if step.result(timeout=ROUND_TIMEOUT) is not None else "no group"
    except Exception as error:  # noqa: BLE001 - each library has errors of its own, and the rounds go on
        return f"{type(error).__name__}: {error}"


def make_peers(library: Any, spec: dict[str, Any]) -> tuple[list[Any], list[float]]:
    """Start this process's averagers; also the seconds that each took."""
    listen = {"host_maddrs": [f"/ip4/{spec['ip']}/tcp/0"], "start": True}
    nodes: list[Any] = []
    own: list[str] = []
    if spec["host"] == 0:
        root = library.DHT(**listen)
        own = [str(address) for address in root.get_visible_maddrs()]
        nodes += [root] if spec["peers"] == 1 else []
    known = address_from_first(spec, lambda: own) or own
    nodes += [library.DHT(initial_peers=known, **listen) for _ in range(spec["peers"] - len(nodes))]
    time.sleep(LOADED_AFTER)
    averager_class = library.averaging.DecentralizedAverager  # imported before the time is taken
    averagers, seconds = [], []
    for node in nodes:
        tensors = make_tensors(library, spec)
        began = time.perf_counter()
        averagers.append(
            averager_class(
                tensors,
                node,
                prefix="bench",
                target_group_size=spec["group"],
                min_group_size=spec["group"],
                min_matchmaking_time=spec["matchmaking_s"],
                request_timeout=spec["request_s"],
                bandwidth=spec["bandwidth"],
                start=True,
            )
        )
        seconds.append(time.perf_counter() - began)
    return averagers, seconds


def make_tensors(library: Any, spec: dict[str, Any]) -> Any:
    """Four tensors with random values, in memory that the library shares if it is to have them handed over."""
    count = spec["floats"] // 4
    if not spec["handed_over"]:
        return [torch.randn(count) for _ in range(4)]
    buffers = library.averaging.SharedBuffers([(count, torch.float32)] * 4)
    for tensor in buffers.tensors:
        tensor.normal_()
    return buffers


def run(spec: dict[str, Any]) -> None:
    if spec["cores"]:
        os.sched_setaffinity(0, spec["cores"])  # background processes inherit it
    torch.set_num_threads(1)
    library = importlib.import_module(spec["library"])
    importlib.import_module(f"{spec['library']}.averaging")
    averagers, seconds = make_peers(library, spec)
    loop = Loop() if spec["training"] else None
    serve(Peers(averagers, loop), averager_start_s=statistics.median(seconds))


if __name__ == "__main__":
    main(run)
