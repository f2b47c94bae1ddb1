"""Without a safeguard of the whole stack the seeds find it, and so they do where an old bug is put back.

Safeguards of the vote are in ``tests/averaging/allreduce/test_ablations.py``.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable

import pytest
from tests.averaging.allreduce.aimed import die_before_the_election_ends
from tests.averaging.matchmaking.test_swarm import check_late_record, check_same_instant
from tests.sim.fault_script import Story
from tests.sim.test_bad_routes import groups_beside_a_silent_leader

from shoal.averaging.allreduce import exchange, reduction
from shoal.averaging.allreduce.decision import Decision
from shoal.averaging.allreduce.events import Lead
from shoal.averaging.group import GroupInfo
from shoal.averaging.matchmaking.asking import Asking
from shoal.averaging.matchmaking.left_out import LeftOut
from shoal.averaging.matchmaking.messages import Rejected, RejectReason, search_mark
from shoal.averaging.matchmaking.search import Search
from shoal.dht.neighbours import Neighbours
from shoal.p2p.protocol.keepalive import LOOK_EVERY, KeepAlive, Verdict
from shoal.testing.clock import VirtualTimeLimitExceeded, run
from shoal.testing.dht import SimulatedDHT

Patch = pytest.MonkeyPatch


def finds(play: Callable[[int], object], seeds: Iterable[int]) -> bool:
    """Whether one of these seeds fails."""
    for seed in seeds:
        try:
            play(seed)
        except (AssertionError, VirtualTimeLimitExceeded):
            return True
    return False


# safeguards


@pytest.mark.sweep
def test_without_a_check_for_finite_values_nan_spreads(monkeypatch: Patch):
    for module in (exchange, reduction):
        monkeypatch.setattr(module, "is_finite", lambda values: True)
    assert finds(lambda seed: Story(seed, (3, 4), ["wrong data"]).play(), range(5))


def test_without_keep_alive_a_machine_without_power_holds_the_others(monkeypatch: Patch):
    check = KeepAlive.check

    def never_dead(self: KeepAlive, now: float, *more: float) -> tuple[Verdict, float]:
        verdict, again = check(self, now, *more)  # type: ignore[arg-type]
        return (Verdict.WAIT, now + LOOK_EVERY) if verdict is Verdict.DEAD else (verdict, again)

    monkeypatch.setattr(KeepAlive, "check", never_dead)
    assert finds(lambda seed: Story(seed, (3, 4), ["crash"]).play(), range(20))


def test_without_a_redirect_a_peer_that_asks_a_follower_is_stranded(monkeypatch: Patch):
    monkeypatch.setattr(Asking, "redirect", lambda self: Rejected(RejectReason.CANNOT_LEAD))
    assert finds(check_late_record, range(50))


def part_and_heal(seed: int) -> None:
    """Nodes of a DHT that was in two parts for some time are one again, though their initial peer is gone."""
    rng = random.Random(f"parts {seed}")

    async def story() -> None:
        sim = SimulatedDHT(seed)
        try:
            count = rng.randint(5, 7)
            await sim.start_many(count)
            await sim.stop(0)
            half = rng.sample(range(1, count), count // 2)
            sim.network.partition([f"node{number}" for number in half])
            await asyncio.sleep(rng.uniform(150.0, 200.0))
            sim.network.heal()
            await asyncio.sleep(75.0)
            assert all(len(node.neighbours) == count - 2 for node in sim.nodes.values())
        finally:
            await sim.close()

    run(story)


@pytest.mark.sweep
def test_parts_of_a_dht_become_one_again():
    assert not finds(part_and_heal, range(2))


def test_without_calling_lost_nodes_again_a_dht_stays_in_parts(monkeypatch: Patch):
    monkeypatch.setattr(Neighbours, "lost_to_retry", lambda self, now: [])
    assert finds(part_and_heal, range(2))


# old bugs


def test_a_candidate_that_drops_what_its_followers_report(monkeypatch: Patch):
    """Such a leader waited for members that were ready, or gave spans to dead ones."""
    coordinate = Decision.coordinate

    def drop(self: Decision, event, now: float):
        if self.coordinator is None and self.election.lead is Lead.CANDIDATE:
            return []
        return coordinate(self, event, now)

    def play(seed: int) -> None:
        swarm = die_before_the_election_ends(seed)
        swarm.finish()
        swarm.check_survival()

    assert not finds(play, range(10))
    monkeypatch.setattr(Decision, "coordinate", drop)
    assert finds(play, range(20))


def test_a_full_group_hides_that_it_has_begun(monkeypatch: Patch):
    """Another leader counted on its members for the groups of others, began, and stranded one."""

    def as_it_was(self: LeftOut, peer_id, start_time: float, now: float):
        known = self._known.get(peer_id)
        if known is not None and now < known.until and start_time <= known.start_time:
            return known
        rumour = self._hearsay.get(search_mark(peer_id.to_bytes(), start_time))
        return rumour if rumour is not None and now < rumour.until else None

    monkeypatch.setattr(LeftOut, "why", as_it_was)
    assert finds(check_same_instant, range(1890, 1900))


@pytest.mark.sweep
def test_a_leader_that_cannot_be_dialed_is_not_reported(monkeypatch: Patch):
    """A peer whose leader was always the same found no group in any step."""

    def play(seed: int) -> None:
        assert all(isinstance(group, GroupInfo) for group in groups_beside_a_silent_leader(seed))

    monkeypatch.setattr(Search, "_leader_unreachable", lambda self, leader: None)
    assert finds(play, range(4))
