"""The table: what is measured, which sides take part, and what Shoal is required to reach. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.requirements import Requirement, at_least, at_most
from benchmarks.work import (
    GLOO,
    HIVEMIND,
    SHOAL,
    Averaging,
    Download,
    Lookups,
    Network,
    Side,
    Swarm,
    Training,
    Work,
    raw,
)

BOTH = (SHOAL, HIVEMIND)
WITH_GLOO = (*BOTH, GLOO)
LIBRARIES = ("shoal", "hivemind", "gloo", "raw")
SEVERAL = raw(1, 16, 32, 64)
"""One connection, and the numbers of which one fills a lossy link best."""
QUICK_CONNECTIONS = (0, 16)
"""Those of raw TCP in a quick run; the other sides have none."""


@dataclass(frozen=True)
class Row:
    """One piece of work, done by several sides in turn."""

    name: str
    title: str
    work: Work
    sides: tuple[Side, ...]
    figures: tuple[str, ...]
    """What is shown; the first one is drawn, and says which number of raw connections is best."""
    required: tuple[Requirement, ...] = ()
    rounds: int = 3
    """Measured ones of each process, after one that warms up."""
    quick: Work | None = None
    """Small work for a quick run; None: left out of it."""


LOSSY = Network("cubic", rtt_ms=100, rate=200, loss=0.001)
UNEVEN = Network("cubic", rtt_ms=20, rate=200, first_up=20)
RATE = ("mbit_per_s",)
TRAINED = ("goal_s", "seconds", "times_target", "rounds_ok_percent", "cpu_s", "pss_mb")
LOOPBACK = ("mb_per_s", "cpu_s_per_gb", "cpu_s_per_wire_gb", "pss_mb", "form_s", "averager_start_s")

LONG_LINKS = (
    Row(
        "lossy-cubic",
        "200 Mbit/s, 100 ms, 0.1 % loss, cubic, 2 peers, 32 MB",
        Averaging(2, 32, LOSSY),
        (*BOTH, *SEVERAL),
        RATE,
        (
            at_least("mbit_per_s", 1.0, of="raw"),
            at_least("mbit_per_s", 15, of="hivemind"),
        ),
        rounds=2,
        quick=Averaging(2, 0.5, LOSSY),
    ),
    Row(
        "lossy-bbr",
        "200 Mbit/s, 100 ms, 0.1 % loss, bbr, 2 peers, 32 MB",
        Averaging(2, 32, replace(LOSSY, control="bbr")),
        (*BOTH, *SEVERAL),
        RATE,
        (at_least("mbit_per_s", 0.9, of="raw"),),
    ),
    Row(
        "long-cubic",
        "200 Mbit/s, 100 ms, no loss, cubic, 2 peers, 32 MB",
        Averaging(2, 32, replace(LOSSY, loss=0.0)),
        (*BOTH, *SEVERAL),
        RATE,
        (at_least("mbit_per_s", 1.0, of="raw"),),
    ),
    Row(
        "medium-cubic",
        "200 Mbit/s, 50 ms, no loss, cubic, 2 peers, 32 MB",
        Averaging(2, 32, replace(LOSSY, loss=0.0, rtt_ms=50)),
        (*BOTH, *SEVERAL),
        RATE,
        (at_least("mbit_per_s", 0.9, of="raw"),),
    ),
    Row(
        "fast-cubic",
        "1 Gbit/s, 100 ms, 0.01 % loss, cubic, 2 peers, 128 MB",
        Averaging(2, 128, Network("cubic", rtt_ms=100, rate=1000, loss=0.0001)),
        (*BOTH, *SEVERAL),
        RATE,
        (at_least("mbit_per_s", 0.75, of="raw"),),
        rounds=2,
    ),
    Row(
        "little-loss",
        "200 Mbit/s, 100 ms, 0.01 % loss, cubic, 2 peers, 32 MB",
        Averaging(2, 32, replace(LOSSY, loss=0.0001)),
        (*BOTH, *SEVERAL),
        RATE,
        rounds=2,
    ),
    Row(
        "much-loss",
        "200 Mbit/s, 100 ms, 1 % loss, cubic, 2 peers, 8 MB",
        Averaging(2, 8, replace(LOSSY, loss=0.01)),
        (*BOTH, *SEVERAL),
        RATE,
        rounds=2,
    ),
    Row(
        "small-model",
        "50 Mbit/s, 100 ms, bbr, 4 peers, 4 MB each",
        Averaging(4, 4, Network("bbr", rtt_ms=100, rate=50)),
        (*BOTH, *SEVERAL),
        RATE,
        (at_least("mbit_per_s", 20, aim=25),),
        rounds=5,
    ),
    Row(
        "group",
        "8 ready peers at 100 ms to a formed group",
        Averaging(8, 0.1, Network("cubic", rtt_ms=100, rate=200)),
        BOTH,
        ("form_s",),
        (at_most("form_s", 1.0),),
        rounds=5,
    ),
    Row(
        "uneven-given",
        "one peer of 4 has 20 Mbit/s up, the others 200, 16 MB; bandwidth given",
        Averaging(4, 16, UNEVEN, bandwidth_given=True),
        BOTH,
        ("times_optimum", "mbit_per_s"),
        (at_most("times_optimum", 1.3),),
    ),
    Row(
        "uneven-measured",
        "one peer of 4 has 20 Mbit/s up, the others 200, 16 MB; no bandwidth given",
        Averaging(4, 16, UNEVEN),
        BOTH,
        ("times_optimum", "mbit_per_s"),
        (at_most("times_optimum", 1.3),),
    ),
)

ON_ONE_MACHINE = (
    Row(
        "loopback-2",
        "loopback, 2 peers, 256 MB fp32",
        Averaging(2, 256),
        WITH_GLOO,
        LOOPBACK,
        (
            at_least("mb_per_s", 5, of="hivemind", aim=8),
            at_least("mb_per_s", 0.40, of="gloo", aim=0.65),
            at_most("cpu_s_per_gb", 1.9, aim=1.3),
            at_most("pss_mb", 1000),
        ),
        quick=Averaging(2, 32),
    ),
    Row(
        "handed-over",
        "loopback, 2 peers, 256 MB fp32, buffers handed over (shoal.averaging.SharedBuffers)",
        Averaging(2, 256, handed_over=True),
        (SHOAL,),
        LOOPBACK,
        (at_most("pss_mb", 800),),
    ),
    Row(
        "loopback-4",
        "loopback, 4 peers, 64 MB fp32",
        Averaging(4, 64),
        WITH_GLOO,
        LOOPBACK,
        (
            at_least("mb_per_s", 4.5, of="hivemind", aim=6),
            at_least("mb_per_s", 0.33, of="gloo", aim=0.45),
            at_most("cpu_s_per_gb", 2.7, aim=2.0),
        ),
        quick=Averaging(4, 8),
    ),
    Row(
        "loopback-8",
        "loopback, 8 peers, 32 MB fp32",
        Averaging(8, 32),
        WITH_GLOO,
        LOOPBACK,
        (
            at_least("mb_per_s", 6, of="hivemind", aim=9),
            at_least("mb_per_s", 0.33, of="gloo", aim=0.5),
            at_most("cpu_s_per_gb", 3.2, aim=2.4),
        ),
    ),
    Row(
        "tiny",
        "loopback, 2 peers, 4 KB",
        Averaging(2, 0.004096),
        BOTH,
        ("latency_ms", "form_s"),
        (at_most("latency_ms", 4),),
        rounds=20,
        quick=Averaging(2, 0.004096),
    ),
    Row(
        "tiny-busy",
        "loopback, 2 peers, 4 KB, on a busy machine",
        Averaging(2, 0.004096, busy=True),
        BOTH,
        ("latency_ms",),
        (at_most("latency_ms", 1.0, of="hivemind"),),
        rounds=20,
    ),
    Row(
        "swarm",
        "hivemind's averaging benchmark: 16 peers, groups of 4, 5 steps",
        Swarm(peers=16, group=4, steps=5),
        BOTH,
        ("seconds", "steps_ok"),
        (at_least("steps_ok", 80), at_most("seconds", 1.0, of="hivemind")),
        rounds=1,
    ),
    Row(
        "optimizer",
        "hivemind's optimizer benchmark: 8 peers, 3 clients, digits, steps of 1 to 4.5 s, 12 epochs",
        Training(peers=8, clients=3, epochs=12, step_s=(1.0, 4.5)),
        BOTH,
        TRAINED,
        (at_least("rounds_ok_percent", 100),),
        rounds=1,
    ),
    Row(
        "optimizer-fast",
        "the same with steps of 0.1 to 0.45 s, so that communication dominates, 25 epochs",
        Training(peers=8, clients=3, epochs=25, step_s=(0.1, 0.45)),
        BOTH,
        TRAINED,
        (at_most("goal_s", 1 / 3, of="hivemind"), at_least("rounds_ok_percent", 100)),
        rounds=1,
    ),
    Row(
        "dht",
        "DHT of 8 nodes",
        Lookups(nodes=8, operations=200),
        BOTH,
        ("store_ms", "get_ms", "node_start_s"),
        rounds=1,
    ),
    Row(
        "download",
        "download of a state of 256 MB, loopback",
        Download(256),
        BOTH,
        ("mb_per_s",),
        (at_least("mb_per_s", 4, of="hivemind"),),
    ),
)

AT_LAST = (
    Row(
        "fair",
        "a foreign cubic connection beside rounds of 2 peers, 8 MB, 20 Mbit/s, 50 ms, no loss",
        Averaging(2, 8, Network("cubic", rtt_ms=50, rate=20), foreign=True),
        (*BOTH, *raw(1)),
        ("foreign_mbit_per_s", "ping_rise_ms", "mbit_per_s"),
        (at_least("foreign_mbit_per_s", 0.8, of="raw 1"),),
    ),
    Row(
        "download-lossy",
        "download of a state of 32 MB over the lossy link, cubic",
        Download(32, LOSSY),
        (*BOTH, *SEVERAL),
        RATE,
        (at_least("mbit_per_s", 0.8, of="raw"),),
        rounds=2,
    ),
    Row(
        "trainer",
        "a loop on one core while rounds run with a peer of 20 Mbit/s",
        Averaging(2, 8, replace(UNEVEN, control="cubic"), training=True),
        BOTH,
        ("slowdown_percent",),
        (at_most("slowdown_percent", 10),),
        rounds=3,
    ),
)

ROWS: tuple[Row, ...] = (*LONG_LINKS, *ON_ONE_MACHINE, *AT_LAST)


def quick_rows() -> tuple[Row, ...]:
    """Small work and few connections, for a run of three minutes. Its figures meet or miss no requirement."""
    return tuple(
        replace(
            row,
            title=f"{row.title} (quick: {_size(row.quick)})" if row.quick != row.work else row.title,
            work=row.quick,
            sides=tuple(side for side in row.sides if side.connections in QUICK_CONNECTIONS),
            required=(),
            rounds=2,
        )
        for row in ROWS
        if row.quick is not None
    )


def choose(rows: Sequence[Row], names: Sequence[str]) -> tuple[Row, ...]:
    """The rows with these names, in the order of the table; all if there are no names.

    :raises ValueError: there is no row of one of the names
    """
    known = {row.name for row in rows}
    for name in names:
        if name not in known:
            raise ValueError(f"row must be one of {', '.join(sorted(known))}, got {name!r}")
    return tuple(row for row in rows if not names or row.name in names)


def among(rows: Sequence[Row], libraries: Sequence[str]) -> tuple[Row, ...]:
    """The rows with only the sides of these libraries, if they have any; all sides if there are no names.

    :raises ValueError: there is no side of one of the names
    """
    for name in libraries:
        if name not in LIBRARIES:
            raise ValueError(f"side must be one of {', '.join(LIBRARIES)}, got {name!r}")
    kept = (
        replace(row, sides=tuple(side for side in row.sides if not libraries or side.library in libraries))
        for row in rows
    )
    return tuple(row for row in kept if row.sides)


def network_of(work: Work) -> Network | None:
    """The long links that the work needs; None: it is done on loopback."""
    return work.network if isinstance(work, Averaging | Download) else None


def _size(work: Work) -> str:
    assert isinstance(work, Averaging)
    return f"{work.megabytes:g} MB"
