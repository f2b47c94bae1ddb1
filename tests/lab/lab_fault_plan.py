"""Which faults there are: what happens, to which process, when, and to which member. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

CELLS: dict[str, tuple[str, ...]] = {
    "searching": ("owner", "client"),
    "forming": ("leader", "owner", "client"),
    "waiting": ("leader", "owner", "client"),
    "scattering": ("leader", "owner", "client"),
    "reducing": ("leader", "owner"),
    "gathering": ("leader", "owner", "client"),
    "voting": ("leader", "owner", "client"),
    "deciding": ("leader",),
    "announcing": ("leader", "owner", "client"),
    "applying": ("leader", "owner", "client"),
    "sharing": ("owner",),
    "loading": ("client",),
}
"""Phase -> the members that come to it. A searching peer has no role yet; clients own nothing, and share nothing."""

REPEATED = ("scattering", "reducing", "gathering")
"""Phases that a member comes to with each part."""
PARTS = 3
"""A member comes to them at least so often, whatever it owns."""

SIGNALS = ("kill", "term", "stop")
PROCESSES = ("background", "user", "both")
LONG_STOPS = (12.0, 28.0, 30.0, 60.0)
LINKS = ("cut both", "cut incoming", "cut outgoing")
SHORT = 3.0


@dataclass(frozen=True)
class Trial:
    """One fault.

    :param action: kill, term, stop, close, or one of :data:`LINKS`
    :param whom: the process: background, user or both
    :param seconds: after which a process goes on, or a link is mended; 0: never
    :param count: at which time of the phase
    """

    action: str
    whom: str
    phase: str
    role: str
    seconds: float = 0.0
    count: int = 1

    @property
    def name(self) -> str:
        lasting = f" {self.seconds:g} s" if self.seconds else ""
        return f"{self.fault}{lasting}, {self.phase}, {self.role}"

    @property
    def fault(self) -> str:
        return f"{self.action} {self.whom}" if self.action in SIGNALS else self.action

    @property
    def is_fatal(self) -> bool:
        return self.action in ("kill", "term")

    @property
    def is_cut(self) -> bool:
        return self.action in LINKS

    @property
    def expects_state(self) -> bool:
        """The fault happens while state is shared, not in a step."""
        return self.phase in ("sharing", "loading")


def all_trials() -> list[Trial]:
    """Each fault, for ``make chaos``: those on loopback first, then those of links, which need root."""
    return [*_loopback(), *_links()]


def _loopback() -> Iterator[Trial]:
    """Every signal to every process in every cell, and long suspensions where a leader or owner is most needed."""
    draw = random.Random(0)
    for phase, roles in CELLS.items():
        for role in roles:
            for action in SIGNALS:
                for whom in PROCESSES:
                    yield _counted(Trial(action, whom, phase, role, SHORT if action == "stop" else 0.0), draw)
            yield _counted(Trial("close", "background", phase, role), draw)
    for seconds in LONG_STOPS:
        for phase, role in (("deciding", "leader"), ("voting", "owner"), ("scattering", "owner")):
            yield _counted(Trial("stop", "both", phase, role, seconds), draw)


def _links() -> Iterator[Trial]:
    draw = random.Random(1)
    cells = (("scattering", "owner"), ("voting", "leader"), ("voting", "owner"), ("deciding", "leader"))
    for seconds in (SHORT, 12.0):
        for phase, role in cells:
            for action in LINKS:
                yield _counted(Trial(action, "background", phase, role, seconds), draw)


def _counted(trial: Trial, draw: random.Random) -> Trial:
    return replace(trial, count=draw.randint(1, PARTS)) if trial.phase in REPEATED else trial


FAST = (
    Trial("kill", "background", "scattering", "owner"),
    Trial("kill", "both", "deciding", "leader"),
    Trial("term", "user", "gathering", "owner", count=2),
    Trial("kill", "user", "scattering", "client", count=3),
    Trial("close", "background", "reducing", "owner"),
    Trial("kill", "background", "voting", "leader"),
    Trial("term", "background", "reducing", "leader"),
    Trial("kill", "both", "applying", "owner"),
    Trial("kill", "background", "announcing", "leader"),
    Trial("term", "both", "voting", "client"),
    Trial("kill", "user", "waiting", "owner"),
    Trial("close", "background", "gathering", "client"),
    Trial("kill", "background", "forming", "owner"),
    Trial("term", "user", "waiting", "leader"),
    Trial("kill", "both", "announcing", "owner"),
    Trial("close", "background", "voting", "owner"),
    Trial("kill", "background", "sharing", "owner"),
    Trial("term", "background", "applying", "leader"),
    Trial("kill", "background", "gathering", "leader", count=2),
    Trial("stop", "both", "voting", "owner", seconds=1.0),
)
"""No wait in them is long: ``make test`` takes some of them."""


def rotating(trials: Sequence[Trial], count: int, seed: str) -> list[Trial]:
    """Some of the short trials, others for each seed; spread over all phases."""
    short = [trial for trial in trials if trial.seconds <= SHORT and not trial.is_cut]
    draw = random.Random(seed)
    by_phase = {
        phase: draw.sample(own, len(own))
        for phase in CELLS
        if (own := [t for t in short if t.phase == phase])
    }
    chosen: list[Trial] = []
    while len(chosen) < count and any(by_phase.values()):
        chosen += [own.pop() for own in by_phase.values() if own]
    return chosen[:count]
