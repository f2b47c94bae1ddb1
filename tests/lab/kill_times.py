"""How long rounds of real processes on loopback take in which members are killed, beside rounds without.

Run as ``.venv/bin/python tests/lab/kill_times.py --help``, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab_faulty_peer import FaultyPeer
from lab_peers import Template

PHASES = ("scattering", "reducing", "gathering", "voting", "applying")
REPEATED = ("scattering", "reducing", "gathering")
STEP_TIMEOUT = 90.0
UNDISTURBED = 3
"""Rounds between the faults that say what a round takes."""


class Swarm:
    """Peers of one group on loopback. Those that were killed are replaced."""

    def __init__(self, template: Template, peers: int, megabytes: float) -> None:
        self._template = template
        self._elements = [int(megabytes * 250_000)]
        self._averager = {
            "prefix": "kills",
            "target_group_size": peers,
            "min_group_size": 2,
            "min_matchmaking_time": 4.0,
        }
        self._numbers = itertools.count(1)
        self._root = self._start("root", None, None)
        self._root.wait_until_joined()
        self.members = [self._join(number) for number in range(peers)]

    def round(self, faults: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
        """What the survivors of a round say. Each fault happens to the first that comes to it."""
        tag = f"step {next(self._numbers)}"
        records = [folder / f"{tag}, fault {number}" for number in range(len(faults))]
        for member in self.members:
            member.wait_until_joined()
            member.forget()
            for fault, record in zip(faults, records, strict=True):
                member.do("plant", action="kill", whom="both", record=str(record), **fault)
                member.expect("planted", time.monotonic() + STEP_TIMEOUT, new=False)
        for member in self.members:
            member.do("step", tag=tag, timeout=STEP_TIMEOUT)
        said = [member.hear("done", time.monotonic() + 2 * STEP_TIMEOUT, tag=tag) for member in self.members]
        for record in records:
            record.touch()  # what has not happened will not happen any more
        survivors = [one for one in said if one is not None]
        for place, member in enumerate(self.members):
            if len(member.alive()) < 2:
                member.end()
                self.members[place] = self._join(place)
        return survivors

    def _join(self, number: int) -> FaultyPeer:
        return self._start(f"member{number}", self._averager, self._root.joined["addresses"])

    def _start(self, name: str, averager: dict[str, Any] | None, root: list[str] | None) -> FaultyPeer:
        program = {
            "program": "faults",
            "dht": {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "initial_peers": root},
            "averager": averager,
            "elements": self._elements,
            "laboratory": "",
        }
        return FaultyPeer(name, self._template, program, None)

    def close(self) -> None:
        for peer in [*self.members, self._root]:
            peer.wait_until_joined()
            peer.end()


def work(said: dict[str, Any]) -> float:
    """Seconds of a round without its search."""
    phases = said["report"]["phases"]
    return float(phases["snapshot"] + phases["allreduce"] + phases["apply"])


def scripts(parts: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """One member killed, then two, in each phase and role."""
    for phase in PHASES:
        count = parts // 2 if phase in REPEATED else 1
        for role in ("leader", "follower"):
            yield f"{role}, {phase}", [{"phase": phase, "role": role, "count": count}]
        both = [{"phase": phase, "role": role, "count": count} for role in ("leader", "follower")]
        yield f"leader and another, {phase}", both


def run(swarm: Swarm, folder: Path, repeat: int, parts: int) -> None:
    swarm.round([], folder)  # connections are made
    for _ in range(repeat):
        for name, faults in scripts(parts):
            before = [max(map(work, swarm.round([], folder))) for _ in range(UNDISTURBED)]
            said = swarm.round(faults, folder)
            failed = [str(one["error"]) for one in said if one["error"] is not None]
            took, usual = max(map(work, said)), statistics.median(before)
            attempts = max(one["report"]["attempts"] for one in said)
            killed = len(swarm.members) - len(said)
            print(
                f"{name}: {killed} killed, {len(said) - len(failed)} of {len(said)} averaged, attempts {attempts}, "
                f"repairs {max(one['report']['repairs'] for one in said)}, {took:.2f} s, "
                f"undisturbed {usual:.2f} s ({min(before):.2f} to {max(before):.2f}), {took / usual:.2f} x",
                *failed,
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=32.0, help="of each peer's tensor")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    parts = max(1, round(options.megabytes * 1e6 / options.peers / 2**19))
    with (
        contextlib.closing(Template()) as template,
        contextlib.closing(Swarm(template, options.peers, options.megabytes)) as swarm,
        tempfile.TemporaryDirectory(prefix="shoal-kills-") as folder,
    ):
        run(swarm, Path(folder), options.repeat, parts)


if __name__ == "__main__":
    main()
