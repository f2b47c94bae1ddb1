"""Peers whose addresses are of different families stand back for one that has both."""

from __future__ import annotations

import pytest

from shoal.averaging.matchmaking.families import Station, families_of, why_stand_back

FOUR = ("/ip4/192.88.99.1/tcp/1",)
SIX = ("/ip6/2620:4f:8000::1/tcp/1",)
BOTH = FOUR + SIX
CLIENT = Station(False, ())


def station(addresses: tuple[str, ...], *, can_lead: bool = True) -> Station:
    return Station(can_lead, addresses)


@pytest.mark.parametrize(
    ("addresses", "families"),
    [
        (BOTH, {"IPv4", "IPv6"}),
        (("/dns4/a.example/tcp/1",), {"IPv4"}),
        (("/dns6/a.example/tcp/1",), {"IPv6"}),
        (("/onion/x", "nonsense", ""), set()),
        ((), set()),
    ],
)
def test_families_of_addresses(addresses: tuple[str, ...], families: set[str]):
    assert families_of(addresses) == families


@pytest.mark.parametrize(("own", "other"), [(FOUR, SIX), (SIX, FOUR)])
def test_peers_that_cannot_dial_each_other_stand_back_for_one_with_both(own, other):
    reason = why_stand_back(own, [station(other), station(BOTH)], 3)
    assert reason is not None
    assert "IPv4" in reason
    assert "IPv6" in reason
    # the other one has done so: nothing changes
    assert why_stand_back(own, [station(other, can_lead=False), station(BOTH)], 3) == reason


@pytest.mark.parametrize(
    ("own", "others"),
    [
        (BOTH, [station(FOUR), station(SIX)]),  # it leads them
        (FOUR, [station(FOUR), station(BOTH)]),  # all can dial each other
        (FOUR, [station(SIX)]),  # nobody has both
        (FOUR, [station(SIX), station(BOTH, can_lead=False)]),  # who has both does not lead
        (FOUR, [CLIENT, station(BOTH)]),  # of a client nothing is known
        ((), [station(SIX), station(BOTH)]),  # it is a client anyhow
    ],
)
def test_others_do_not_stand_back(own, others):
    assert why_stand_back(own, others, None) is None


def test_nobody_stands_back_where_one_group_does_not_hold_all():
    others = [station(SIX), station(BOTH), station(FOUR)]
    assert why_stand_back(FOUR, others, 4) is not None
    assert why_stand_back(FOUR, others, 3) is None
