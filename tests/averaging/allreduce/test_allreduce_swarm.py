"""Sweeps over seeds on whole groups of pure cores: whatever happens, no two members end a round differently.

What must hold is in :mod:`tests.averaging.allreduce.swarm`. A failing seed prints itself, what happened, and where
everybody stands; ``run_seed(SEED, KINDS)`` replays it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from tests.averaging.allreduce.swarm import MIXTURE, Swarm, run_seed, sweep
from tests.swept import rest_swept

from shoal.averaging.allreduce.events import Phase
from shoal.testing.allreduce_cores import Violation

COMMITTED = {"committed", "committed without some", "repaired"}
SWEEPS: dict[str, tuple[tuple[str, ...], int, set[str]]] = {
    "no faults": ((), 50, {"committed"}),
    "kill": (("kill",), 250, COMMITTED | {"failed", "in doubt"}),
    "freeze": (("freeze",), 250, COMMITTED | {"failed"}),
    "cut": (("cut",), 150, COMMITTED | {"failed", "committed with doubts"}),
    "flap": (("flap",), 50, COMMITTED),
    "isolate": (("isolate",), 150, COMMITTED | {"failed"}),
    "halves": (("halves",), 150, COMMITTED | {"failed"}),
    "reset": (("reset",), 50, COMMITTED),
    "withdraw": (("withdraw",), 100, COMMITTED | {"failed"}),
    "lag": (("lag",), 50, {"committed"}),
    "firewall": (("firewall",), 60, COMMITTED | {"committed with doubts"}),
    "late": (("late",), 50, {"committed", "repaired"}),
    "quit": (("quit",), 100, COMMITTED | {"failed"}),
    "ends": (("kill", "quit", "restart", "firewall", "forget"), 150, COMMITTED | {"failed", "in doubt"}),
    "values": (("nan", "no snapshot"), 100, {"committed without some", "failed"}),
    "mixture": (MIXTURE, 250, COMMITTED | {"failed"}),
}
"""For each kind of faults: how many seeds, and how rounds must have ended, or the sweep would show nothing."""
IN_THE_MIXTURE = {"kill", "freeze", "cut", "isolate", "halves", "ends"}
"""Kinds that take seconds by themselves; ``make test`` has them among the others."""
SOAKED = 20_000


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.sweep if name in IN_THE_MIXTURE else ()) for name in SWEEPS],
)
def test_whatever_happens_no_two_members_end_differently(name: str):
    kinds, count, endings = SWEEPS[name]
    seen = sweep(range(count), kinds)
    assert set(seen) >= endings, seen


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(20))
def test_whatever_happens_no_two_members_end_differently_soak(block: int):
    """Each run has a random subset of the kinds of faults: a rare one is not drowned by the frequent ones."""
    size = SOAKED // 20
    seen: Counter[str] = Counter()
    for seed in range(1_000_000 + block * size, 1_000_000 + (block + 1) * size):
        swarm = Swarm(seed)
        kinds = swarm.rng.sample(MIXTURE, swarm.rng.randint(1, len(MIXTURE)))
        seen[run_seed(seed, kinds)] += 1
    assert set(seen) >= COMMITTED | {"failed"}, seen


# what a fault may cost


def run_with(
    seeds: range, strike: Callable[[Swarm], None], check: Callable[[Swarm], None], **options: object
):
    """One scripted fault in each group; a violation names the seed."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        swarm = Swarm(seed, **options)
        try:
            strike(swarm)
            seen[swarm.finish()] += 1
            check(swarm)
        except Exception as e:
            raise Violation(f"seed {seed}: {type(e).__name__}: {e}; {swarm.log}") from e
    return seen


def all_commit(but: Callable[[Swarm], Sequence[int]] = lambda _: ()) -> Callable[[Swarm], None]:
    """Every living contributor commits, except for some."""

    def check(swarm: Swarm) -> None:
        for me, one in enumerate(swarm.members):
            waits = one.is_alive and one.core.roles.contributes[me] and me not in but(swarm)
            if waits and one.core.phase is not Phase.COMMITTED:
                raise Violation(f"{me} did not commit: {swarm.describe()}")

    return check


EVERYBODY_SERVES = {"clients": 0.0, "auxiliaries": 0.0, "sizes": range(3, 9)}


def test_kills_of_a_minority_fail_the_round_for_nobody_else():
    seen = Counter(run_seed(seed, ("kill",), Swarm.check_survival) for seed in range(2000, 2150))
    assert seen["repaired"] > 20, seen


def test_a_killed_leader_costs_a_second_or_two():
    """Nobody listens at its address: the next one stands at once, and waits a moment for its promise."""

    def check(swarm: Swarm) -> None:
        all_commit()(swarm)
        assert swarm.now < 5.0, swarm.now

    seen = run_with(
        range(60),
        lambda swarm: swarm.at(swarm.rng.random() * 0.4, lambda: swarm.kill(0)),
        check,
        **EVERYBODY_SERVES,
    )
    assert {"repaired", "committed without some"} <= set(seen), seen


@pytest.mark.sweep
def test_leader_and_successor_killed_in_a_group_of_eight():
    def strike(swarm: Swarm) -> None:
        for member in (0, 1):
            swarm.at(swarm.rng.random() * 0.5, lambda member=member: swarm.kill(member))

    run_with(range(60), strike, all_commit(), **(EVERYBODY_SERVES | {"sizes": (8,)}))


def test_one_frozen_member_fails_the_round_for_nobody_else():
    victims: dict[int, int] = {}

    def strike(swarm: Swarm) -> None:
        victim = victims[swarm.seed] = swarm.someone()
        swarm.at(swarm.rng.random() * 0.5, lambda: swarm.suspend(victim, 60.0))

    run_with(range(100), strike, all_commit(lambda swarm: (victims[swarm.seed],)), **EVERYBODY_SERVES)


@pytest.mark.parametrize("one_way", rest_swept([True, False]), ids=["one way", "both ways"])
def test_two_followers_that_cannot_hear_each_other_both_commit(one_way: bool):
    def strike(swarm: Swarm) -> None:
        pair = swarm.rng.sample(range(1, swarm.size), 2)
        swarm.at(0.0, lambda: swarm.part([(pair[0], pair[1])], None, one_way=one_way))

    run_with(range(100), strike, all_commit(), **EVERYBODY_SERVES)


def test_what_waits_for_a_late_leader_comes_in_its_order():
    """Else it would take a member for a liar that says twice how many averages it has taken."""

    def strike(swarm: Swarm) -> None:
        swarm.come_late(0, 6.0)
        swarm.come_late(swarm.size - 1, 3.0)

    few = {"sizes": (6, 7, 8), "auxiliaries": 0.5, "clients": 0.0}
    run_with(range(20), strike, all_commit(), **few)


@pytest.mark.sweep
def test_a_group_in_halves_never_commits_in_both():
    """Founder and half of the others decide; the rest is excluded, or in doubt until it hears of it. While members have
    not joined yet, one of the founder's half may be excluded, too: it complains of several that the founder has not
    lost, since it never had them.
    """
    joined: dict[int, int] = {}

    def halve(swarm: Swarm) -> None:
        joined[swarm.seed] = len(swarm.members[0].followers)
        side = range(swarm.size // 2)
        swarm.part([(one, other) for one in side for other in range(swarm.size) if other not in side], None)

    def strike(swarm: Swarm) -> None:
        swarm.at(swarm.rng.random() * 0.6, lambda: halve(swarm))

    def check(swarm: Swarm) -> None:
        half = list(range(swarm.size // 2))
        if swarm.size % 2 == 0 and joined.get(swarm.seed, swarm.size - 1) == swarm.size - 1:
            assert [me for me in swarm.committed if me in half] == half, swarm.describe()

    seen = run_with(range(100), strike, check, **EVERYBODY_SERVES)
    assert min(seen[ending] for ending in ("committed", "repaired", "committed with doubts")) > 10, seen
