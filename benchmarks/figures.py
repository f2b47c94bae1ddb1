"""The figures that rows show, and how they follow from what the processes of a round said. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.work import TRAINING_TARGET, Averaging, Download, Lookups, Swarm, Training, Work


@dataclass(frozen=True)
class Figure:
    """How a figure is called and written."""

    title: str
    unit: str
    digits: int
    """Significant ones."""


FIGURES: Mapping[str, Figure] = {
    "mbit_per_s": Figure("rate", "Mbit/s", 3),
    "mb_per_s": Figure("rate", "MB/s", 3),
    "cpu_s_per_gb": Figure("CPU", "s/GB", 3),
    "cpu_s_per_wire_gb": Figure("CPU on the wire", "s/GB", 3),
    "pss_mb": Figure("memory (PSS)", "MB", 3),
    "form_s": Figure("group formed", "s", 2),
    "latency_ms": Figure("trigger to result", "ms", 3),
    "times_optimum": Figure("beside the optimum", "x", 3),
    "slowdown_percent": Figure("trainer slowed", "%", 2),
    "foreign_mbit_per_s": Figure("a foreign connection keeps", "Mbit/s", 3),
    "ping_rise_ms": Figure("a ping takes longer by", "ms", 2),
    "steps_ok": Figure("steps that averaged", "", 3),
    "seconds": Figure("time", "s", 3),
    "goal_s": Figure("time to the goal", "s", 3),
    "times_target": Figure("samples beside the target", "x", 3),
    "rounds_ok_percent": Figure("epochs whose gradients were averaged", "%", 3),
    "cpu_s": Figure("CPU of a peer", "s", 3),
    "averager_start_s": Figure("start of an averager", "s", 2),
    "node_start_s": Figure("start of a node", "s", 2),
    "store_ms": Figure("store", "ms", 3),
    "get_ms": Figure("get", "ms", 3),
}


@dataclass(frozen=True)
class Answer:
    """What one process said of one round. Moments are of the machine's monotonic clock, which all share."""

    began: float
    ended: float
    prepared_s: float = 0.0
    """Between the order to prepare and being prepared: for averagers, until the group was there."""
    ok: int = 1
    """Results that came."""
    of: int = 1
    """Results that were expected."""
    cpu_s: float = 0.0
    """Of the process and all below it, preparation included."""
    pss_mb: float = 0.0
    extra: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    """What went wrong, where fewer results came."""


def of_round(work: Work, answers: Sequence[Answer]) -> dict[str, float]:
    """The figures of a round in which every result came."""
    seconds = max(one.ended for one in answers) - min(one.began for one in answers)
    extra = {name: value for one in answers for name, value in one.extra.items()}
    match work:
        case Averaging():
            return extra | _of_averaging(work, answers, seconds)
        case Download():
            return {"seconds": seconds, "mb_per_s": work.megabytes / seconds} | {
                "mbit_per_s": 8 * work.megabytes / seconds
            }
        case Swarm():
            return {"seconds": seconds, "steps_ok": float(sum(one.ok for one in answers))}
        case Training():
            return {"seconds": seconds} | _of_training(work, answers)
        case Lookups():
            return extra


def _of_averaging(work: Averaging, answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    tensors = work.peers * work.megabytes / 1e3
    cpu = sum(one.cpu_s for one in answers) / tensors
    figures = {
        "mb_per_s": work.megabytes / seconds,
        "mbit_per_s": 8 * work.megabytes / seconds,
        "cpu_s_per_gb": cpu,
        "cpu_s_per_wire_gb": cpu / (2 * (work.peers - 1) / work.peers),
        "pss_mb": sum(one.pss_mb for one in answers) / work.peers,
        "form_s": max(one.prepared_s for one in answers),
        "latency_ms": 1e3 * seconds,
    }
    if work.network is not None and work.network.first_up is not None:
        uplinks = [work.network.first_up] + [work.network.rate] * (work.peers - 1)
        figures["times_optimum"] = seconds / optimum(8 * work.megabytes, uplinks)
    return figures


def _of_training(work: Training, answers: Sequence[Answer]) -> dict[str, float]:
    """The median peer says when the goal was reached: a single one may reach it by chance."""
    said = [one.extra for one in answers]
    epochs = sum(one["epochs"] for one in said)
    return {
        "goal_s": statistics.median(one["goal_s"] for one in said),
        "times_target": sum(one["samples"] for one in said) / (TRAINING_TARGET * work.epochs),
        "rounds_ok_percent": 100 * sum(one["averaged"] for one in said) / epochs if epochs else 0.0,
        "cpu_s": sum(one.cpu_s for one in answers) / work.peers,
        "pss_mb": sum(one.pss_mb for one in answers) / work.peers,
    }


def optimum(megabits: float, uplinks: Sequence[float]) -> float:
    """Seconds of the fastest butterfly all-reduce, where only uplinks (Mbit/s) are slow: a linear programme's.

    Member ``i`` owns a share ``f`` of the vector. It sends its part of the others' shares, ``1 - f``, and the
    average of its own share to each of the others, ``(n - 1) f``. The shares that can be owned in a given time
    grow with that time, so the least time is found by bisection.
    """
    others = len(uplinks) - 1

    def owned(seconds: float) -> float:
        shares = [(seconds * rate / megabits - 1) / (others - 1) for rate in uplinks] if others > 1 else []
        if any(share < 0 for share in shares):
            return 0.0
        return sum(min(1.0, share) for share in shares)

    if others == 1:  # whatever its share, each member sends the size of the vector once
        return megabits / min(uplinks)
    low, high = 0.0, others * megabits / min(uplinks)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if owned(middle) >= 1 else (middle, high)
    return high
