"""How a host is reached by others, from what it has and from what helpers found."""

from __future__ import annotations

from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.reachability import Evidence, Findings, Means, Standing, assess
from shoal.p2p.reach.vantage import Interface, Vantage

INNER = Multiaddr("/ip4/10.0.0.5/tcp/4000")
OUTER = Multiaddr("/ip4/198.51.100.7/tcp/4000")
LOOPBACK = Multiaddr("/ip4/127.0.0.1/tcp/4000")
EVERYWHERE = Multiaddr("/ip4/0.0.0.0/tcp/4000")
NOTHING = Findings(None)
INTERFACES = [Interface("eth0", "10.0.0.5", 24), Interface("lo", "127.0.0.1", 8)]


def test_a_host_that_does_not_listen_is_meant_as_a_client():
    now = assess(Means(), Standing.FULL, Evidence.PRESUMED, NOTHING, 16)
    assert (now.standing, now.is_intended, now.reason) == (Standing.CLIENT, True, "")


def test_a_host_that_nobody_was_asked_about_tells_its_candidates():
    means = Means.of([EVERYWHERE], [], INTERFACES)
    now = assess(means, Standing.FULL, Evidence.PRESUMED, NOTHING, 16)
    assert now.is_full
    assert now.addresses == (INNER,)


def test_a_host_in_doubt_tells_no_address_and_says_why():
    means = Means.of([EVERYWHERE], [], INTERFACES)
    now = assess(means, Standing.IN_DOUBT, Evidence.PRESUMED, NOTHING, 16)
    assert now.is_in_doubt
    assert not now.is_full
    assert now.addresses == ()
    assert "no peer has told yet" in now.reason


def test_confirmed_addresses_come_first_and_refuted_ones_are_left_out():
    means = Means.of([INNER, Multiaddr("/ip4/10.0.0.6/tcp/4000")], [], [])
    found = Findings(True, (OUTER,), {}, frozenset({INNER}), Vantage.TRANSLATED)
    now = assess(means, Standing.FULL, Evidence.HELPERS, found, 16)
    assert now.addresses == (OUTER, Multiaddr("/ip4/10.0.0.6/tcp/4000"))


def test_addresses_that_a_person_gave_are_the_only_ones():
    means = Means.of([INNER], [OUTER], [])
    now = assess(means, Standing.FULL, Evidence.GIVEN, Findings(True, (INNER,)), 16)
    assert now.addresses == (OUTER,)


def test_a_client_says_what_was_tried_and_what_to_do():
    found = Findings(False, (), {str(INNER): "refused"}, frozenset({INNER}), Vantage.TRANSLATED)
    now = assess(Means.of([INNER], [], []), Standing.CLIENT, Evidence.HELPERS, found, 16)
    assert now.tried == (f"{INNER}: refused",)
    assert "behind a NAT" in now.advice
    assert now.advice in now.reason


def test_loopback_addresses_are_told_on_this_machine_only():
    now = assess(Means.of([LOOPBACK], [], []), Standing.FULL, Evidence.PRESUMED, NOTHING, 16)
    assert now.told(beyond_machine=False) == (LOOPBACK,)
    assert now.told(beyond_machine=True) == ()
