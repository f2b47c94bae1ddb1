"""A peer that makes rounds long is named, with what helps."""

from __future__ import annotations

import asyncio
import logging

import pytest

from shoal.averaging.allreduce.pace import HeldUp, Wait, find_slowest
from shoal.averaging.background.slow_peers import AGAIN_AFTER, SlowPeers
from shoal.p2p.identity import Identity
from shoal.testing.clock import run
from shoal.testing.rounds import SimulatedGroup

PEERS = [Identity.generate(bytes([number]) * 32).peer_id for number in range(2)]
SLOW = Wait(1_000_000, 20.0)


@pytest.mark.parametrize(
    ("waits", "duration", "slow"),
    [
        ({1: Wait(10**6, 0.1), 2: SLOW}, 21.0, HeldUp(2, SLOW)),
        (
            {1: Wait(10**6, 0.1), 2: SLOW, 3: Wait(10**6, 19.0)},
            21.0,
            None,
        ),  # two of three: the link here, say
        ({1: Wait(10**6, 4.0), 2: SLOW, 3: Wait(10**6, 0.0)}, 21.0, HeldUp(2, SLOW)),
        ({1: Wait(10**6, 0.0), 2: SLOW}, 100.0, None),  # something else made the round long
        ({1: Wait(10**6, 0.0), 2: Wait(10**6, 1.0)}, 1.1, None),  # not worth a line
        ({2: SLOW}, 21.0, None),  # nobody to compare it with
        ({}, 21.0, None),
    ],
)
def test_the_slowest_is_the_one_that_most_of_the_round_waits_for(waits, duration, slow):
    assert find_slowest(waits, duration) == slow


def test_a_slow_peer_is_named_now_and_then(caplog):
    slow_peers = SlowPeers("run")
    for now, peer in ((0.0, 0), (1.0, 0), (2.0, 1), (AGAIN_AFTER, 0)):
        slow_peers.note((PEERS[peer], SLOW), 21.0, now)
    slow_peers.note(None, 21.0, 3.0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert [str(PEERS[peer]) in caplog.messages[line] for line, peer in enumerate((0, 1, 0))] == [True] * 3
    assert "come at 400 kbit/s: 20 s of the 21 s" in caplog.messages[0]
    assert "bandwidth=0.4 (Mbit/s)" in caplog.messages[0]


@pytest.mark.parametrize("slow", [0, 2], ids=["leader", "follower"])
def test_all_others_see_who_holds_their_round_up(slow: int):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=4, shapes=[(200_000,)]) as group:
            for other in set(range(4)) - {slow}:
                group.network.set_bandwidth(group.name(slow), group.name(other), 50_000.0)
            rounds = [group.round(member) for member in range(4)]
            results = await asyncio.gather(*map(group.run_round, range(4), rounds))
            for member, (current, result) in enumerate(zip(rounds, results, strict=True)):
                assert result.failure is None
                held_up = current.held_up(result.allreduce_seconds)
                if member == slow:
                    assert held_up is None, "all senders are equally slow for it"
                else:
                    assert held_up is not None
                    assert held_up[0] == group.group.peer_ids[slow]
                    assert held_up[1].rate < 55_000

    run(main)
