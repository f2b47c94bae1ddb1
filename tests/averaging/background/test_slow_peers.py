"""A peer that makes rounds long is named, with what helps."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest
import torch

from shoal.averaging.allreduce.pace import HeldUp, Wait, find_slowest
from shoal.averaging.background.slow_peers import AGAIN_AFTER, SlowPeers
from shoal.averaging.group import (
    GROUP_ID_BYTES,
    NONCE_BYTES,
    SCHEMA_HASH_BYTES,
    GroupInfo,
    MemberInfo,
    PeerMode,
)
from shoal.averaging.load_balancing import load_balance_peers
from shoal.averaging.partition import Layout, Partition
from shoal.compression.base import NoCompression
from shoal.p2p.identity import Identity
from shoal.testing.clock import run
from shoal.testing.rounds import SimulatedGroup

PEERS = sorted(Identity.generate(bytes([number]) * 32).peer_id for number in range(4))
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


LAYOUT = Layout.from_tensors([torch.zeros(4000)], [NoCompression()])


def group_of(bandwidths: list[float | None]) -> tuple[GroupInfo, Partition]:
    """The first members of PEERS, and how they divide the work."""
    schema, nonce = bytes(SCHEMA_HASH_BYTES), bytes(NONCE_BYTES)
    members = tuple(
        MemberInfo(
            peer.to_bytes(),
            PEERS[0].to_bytes(),
            "run.0b",
            schema,
            PeerMode.FULL,
            bandwidth,
            (),
            b"",
            0.0,
            0.0,
            nonce,
        )
        for peer, bandwidth in zip(PEERS, bandwidths, strict=False)
    )
    owned = load_balance_peers(LAYOUT.data_nbytes, bandwidths)
    return GroupInfo(bytes(GROUP_ID_BYTES), "run.0b", members), Partition.create(LAYOUT, owned, 1024)


def test_a_slow_peer_is_named_now_and_then(caplog):
    slow_peers = SlowPeers("run")
    group = group_of([100.0, 100.0, 100.0])
    for now, peer in ((0.0, 0), (1.0, 0), (2.0, 1), (AGAIN_AFTER, 0)):
        slow_peers.note((PEERS[peer], SLOW), 21.0, now, *group)
    slow_peers.note(None, 21.0, 3.0, *group)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert [str(PEERS[peer]) in caplog.messages[line] for line, peer in enumerate((0, 1, 0))] == [True] * 3
    assert "come at 400 kbit/s: 20 s of the 21 s" in caplog.messages[0]
    assert "bandwidth=0.4 (Mbit/s)" in caplog.messages[0]


@pytest.mark.parametrize(
    "others", [[None, None, None], [None, 100.0, 50.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
)
@pytest.mark.parametrize("own", [None, 100.0])
def test_who_follows_the_advice_gives_the_slow_peer_less_to_do(caplog, own, others):
    group, partition = group_of([own, *others])
    SlowPeers("run").note((PEERS[0], SLOW), 21.0, 0.0, group, partition)
    (figure,) = re.findall(r"bandwidth=([0-9.]+)", caplog.text)
    _, changed = group_of([float(figure), *others])
    assert len(changed.parts_of(0)) < len(partition.parts_of(0))


def test_a_peer_that_owns_nothing_is_not_told_to_own_less(caplog):
    SlowPeers("run").note((PEERS[0], SLOW), 21.0, 0.0, *group_of([0.0, None, None]))
    assert "it averages nothing for the others" in caplog.text
    assert "bandwidth" not in caplog.text


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
