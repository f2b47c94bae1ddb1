"""How donors make themselves known, and how joiners find them, on a simulated DHT."""

from __future__ import annotations

import asyncio

import pytest

from shoal.averaging.state.declarations import DonorDeclarations, Wish
from shoal.averaging.state.messages import (
    WITHDRAWN,
    DonorDeclaration,
    decode_donor,
    donors_key,
    encode_donor,
)
from shoal.dht.config import DHTConfig
from shoal.dht.validation import protected_key
from shoal.errors import InvalidValueError
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT

PERIOD = 30.0


class Peers:
    """Nodes of a simulated DHT, each with the declarations of one averager."""

    def __init__(self, count: int = 3) -> None:
        self.dht = SimulatedDHT(1)
        self.count = count
        self.declarations: list[DonorDeclarations] = []

    async def __aenter__(self) -> Peers:
        nodes = await self.dht.start_many(self.count, DHTConfig(check_reachability=False))
        for node in nodes:
            made = DonorDeclarations(node, "run", Wish(False, 0.0), period=PERIOD, clock=self.dht.now)
            made.start()
            self.declarations.append(made)
        return self

    async def __aexit__(self, *_: object) -> None:
        for made in self.declarations:
            await made.close()
        await self.dht.close()

    async def seen_by(self, number: int) -> dict[int, float]:
        """Donors and their priorities, by number."""
        ids = {self.dht.identity(n).peer_id: n for n in range(self.count)}
        return {ids[peer]: told.priority for peer, told in await self.declarations[number].read()}


def test_wishes_are_known_within_a_second_and_one_is_no_donor_for_oneself():
    async def main() -> None:
        async with Peers() as peers:
            assert await peers.seen_by(0) == {}
            peers.declarations[0].update(Wish(True, 1.5))
            peers.declarations[1].update(Wish(True, -2.0))
            await asyncio.sleep(1.0)
            assert await peers.seen_by(2) == {0: 1.5, 1: -2.0}
            assert await peers.seen_by(0) == {1: -2.0}
            peers.declarations[0].update(Wish(True, 7.0))
            peers.declarations[1].update(Wish(False, -2.0))
            await asyncio.sleep(1.0)
            assert await peers.seen_by(2) == {0: 7.0}
            peers.declarations[1].update(Wish(True, 3.0))
            await asyncio.sleep(1.0)
            assert await peers.seen_by(2) == {0: 7.0, 1: 3.0}

    run(main)


def test_a_donor_stays_known_for_hours_and_withdraws_when_it_ends():
    async def main() -> None:
        async with Peers() as peers:
            peers.declarations[0].update(Wish(True, 1.0))
            for _ in range(10):
                await asyncio.sleep(357.0)
                assert await peers.seen_by(1) == {0: 1.0}
            await peers.declarations[0].close()
            await asyncio.sleep(0.5)
            assert await peers.seen_by(1) == {}

    run(main, limit=7200.0)


def test_what_a_dead_donor_leaves_behind_expires_soon_after_a_period():
    async def main() -> None:
        async with Peers() as peers:
            peers.declarations[1].update(Wish(True, 1.0))
            await asyncio.sleep(PERIOD + 1.0)
            await peers.declarations[1]._tasks.close()  # no more of it: as if its process were gone
            assert await peers.seen_by(0) == {1: 1.0}
            await asyncio.sleep(2 * PERIOD)
            assert await peers.seen_by(0) == {}

    run(main)


def test_records_that_are_no_declarations_are_left_out():
    async def main() -> None:
        async with Peers() as peers:
            peers.declarations[0].update(Wish(True, 1.0))
            await asyncio.sleep(1.0)
            node = peers.dht.nodes[1]
            for value in (b"rubbish", 5, encode_donor(DonorDeclaration(True, float("nan"), ()))):
                key, subkey = protected_key(donors_key("run")), node.peer_id.to_bytes()
                assert await node.store(key, value, peers.dht.now() + 60, subkey=subkey)
                assert await peers.seen_by(2) == {0: 1.0}

    run(main)


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "text",
        b"",
        encode_donor(DonorDeclaration(True, float("inf"), ())),
        encode_donor(DonorDeclaration(True, 0.0, ("/ip4/1.2.3.4/tcp/1",) * 17)),
        encode_donor(DonorDeclaration(True, 0.0, ("nonsense",))),
    ],
)
def test_a_declaration_from_a_stranger_is_checked(raw: object):
    with pytest.raises(InvalidValueError):
        decode_donor(raw)


def test_a_donor_that_shares_nothing_has_withdrawn_whatever_else_it_says():
    told = DonorDeclaration(False, 3.0, ("/ip4/1.2.3.4/tcp/1",))
    assert decode_donor(encode_donor(told)) == WITHDRAWN


def test_a_declaration_survives_the_wire():
    told = DonorDeclaration(True, 2.5, ("/ip4/1.2.3.4/tcp/1",))
    assert decode_donor(encode_donor(told)) == told
