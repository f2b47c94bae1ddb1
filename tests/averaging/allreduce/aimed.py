"""Faults that are aimed at moments of the vote, for safeguards that matter in rare ones: random scripts, by seed.

A moment is what a member is about to do, such as to propose. A fault happens just before, or a while after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tests.averaging.allreduce.swarm import Swarm

from shoal.averaging.allreduce.effects import (
    AnnounceRepair,
    AskForAcceptance,
    AskForPromise,
    Effect,
    LeadMembers,
    ReturnAverage,
)
from shoal.averaging.allreduce.events import Event, RoundTimeouts

Moment: TypeAlias = Callable[[int, Effect], bool]
EVERYBODY_SERVES = {"clients": 0.0, "auxiliaries": 0.0, "parts": (1, 3, 5)}


class Aimed(Swarm):
    """A group with faults that wait for their moments."""

    def __init__(self, seed: int, **options: object) -> None:
        self._waiting: list[tuple[Moment, Callable[[int], None]]] = []
        super().__init__(seed, **(EVERYBODY_SERVES | options))

    def when(self, moment: Moment, happens: Callable[[int], None]) -> None:
        """Have something happen once, just before the first member does what makes this moment."""
        self._waiting.append((moment, happens))

    def carry_out(self, me: int, effect: Effect) -> list[Event]:
        for waiting in [one for one in self._waiting if one[0](me, effect)]:
            self._waiting.remove(waiting)
            waiting[1](me)
        return super().carry_out(me, effect)

    def hide(self, member: int, seconds: float | None) -> None:
        """Cut a member off from all others."""
        self.part([(member, other) for other in range(self.size) if other != member], seconds)


def founder_proposes(me: int, effect: Effect) -> bool:
    return me == 0 and isinstance(effect, AskForAcceptance) and effect.outcome.reason is None


def later_leader_repairs(_: int, effect: Effect) -> bool:
    return isinstance(effect, AnnounceRepair) and effect.order.epoch.term > 0


def later_leader_leads(_: int, effect: Effect) -> bool:
    return isinstance(effect, LeadMembers)


def averages_come_back(_: int, effect: Effect) -> bool:
    return isinstance(effect, ReturnAverage)


def candidate_tells_its_floor(_: int, effect: Effect) -> bool:
    return isinstance(effect, AskForPromise) and effect.floor > 0


def _leave_one_behind(swarm: Aimed) -> None:
    """The founder loses a member, which the others can reach, and proposes without it. A later leader has to repair the
    founder's share for that one.
    """
    behind = swarm.rng.randrange(2, swarm.size)
    swarm.at(swarm.rng.uniform(0.0, 0.3), lambda: swarm.part([(0, behind)], None))


def adopt_what_was_dropped(seed: int) -> Aimed:
    """The founder is cut off as it proposes. A later leader orders a repair, and dies with so many others that the rest
    needs the founder, which comes back.
    """
    swarm = Aimed(seed, sizes=(5, 6, 7))
    rng = swarm.rng
    _leave_one_behind(swarm)
    swarm.when(founder_proposes, lambda me: swarm.hide(me, rng.uniform(6.0, 12.0)))

    def die(me: int) -> None:
        others = [one for one in range(1, swarm.size) if one != me]
        for victim in [me, *rng.sample(others, len(others) - (swarm.size - 1) // 2)]:
            swarm.later(rng.uniform(0.1, 1.0), lambda victim=victim: swarm.kill(victim))  # type: ignore[misc]

    swarm.when(later_leader_repairs, die)
    return swarm


def split_after_the_election(seed: int) -> Aimed:
    """As above, but the later leader loses three of its followers as it begins to lead. With the others it averages
    anew, and dies. The three meet the founder, and adopt what it had proposed.
    """
    swarm = Aimed(seed, sizes=(7,))
    rng = swarm.rng
    _leave_one_behind(swarm)
    swarm.when(founder_proposes, lambda me: swarm.hide(me, rng.uniform(14.0, 20.0)))

    def split(me: int) -> None:
        lost = rng.sample([one for one in range(1, swarm.size) if one != me], 3)
        kept = [one for one in range(1, swarm.size) if one not in lost]
        swarm.part([(one, other) for one in kept for other in lost], rng.uniform(12.0, 20.0))
        swarm.later(rng.uniform(6.0, 10.0), lambda: swarm.kill(me))

    swarm.when(later_leader_leads, split)
    return swarm


def speak_after_the_election(seed: int) -> Aimed:
    """A founder that lives waits for a member, which waits for an owner that is silent. The others lose patience and
    elect another leader, just as the founder gives the owner up, and repairs its spans.
    """
    timeouts = RoundTimeouts(None, 20.0, 40.0, leader=random_patience(seed))
    swarm = Aimed(seed, sizes=(7, 8), timeouts=timeouts)
    owner, waiting = swarm.rng.sample(range(1, swarm.size), 2)

    def fall_silent(_: int) -> None:
        swarm.slow_down(owner, waiting, 5.0, 60.0)
        swarm.later(swarm.rng.uniform(0.4, 0.8), lambda: swarm.kill(owner, machine=True))

    swarm.when(lambda me, effect: me == owner and isinstance(effect, ReturnAverage), fall_silent)
    return swarm


def die_before_the_election_ends(seed: int) -> Aimed:
    """The founder dies amid the exchange, and a follower of the candidate after it has said twice where it stands."""
    swarm = Aimed(seed, sizes=(5, 6, 7, 8), latency=0.1)
    swarm.when(averages_come_back, lambda _: swarm.kill(0))

    def die(me: int) -> None:
        victim = swarm.rng.choice([one for one in range(1, swarm.size) if one != me])
        swarm.later(swarm.rng.uniform(0.0, 0.3), lambda: swarm.kill(victim))

    swarm.when(candidate_tells_its_floor, die)
    return swarm


def random_patience(seed: int) -> float:
    """Seconds, fewer than those in which silence is noticed, or a little more."""
    return 1.0 + (seed * 0.618034 % 1.0) * 4.0
