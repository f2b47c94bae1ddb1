"""What is set up for long links, as lines and settings."""

from __future__ import annotations

import pytest

from benchmarks.network.plan import ip_lines, links, queue_bytes, settings, why_not_controlled
from benchmarks.work import Network

NETWORK = Network("cubic", rtt_ms=100, rate=200, loss=0.001, first_up=20)


def test_delays_of_two_links_there_and_back_make_the_round_trip():
    first, second = links(NETWORK, 2)
    assert 2 * (first.delay + second.delay) == pytest.approx(0.1)


def test_rates_are_bytes_and_only_the_first_uplink_is_slower():
    first, second = links(NETWORK, 2)
    assert (first.up, first.down) == (2.5e6, 25e6)
    assert (second.up, second.down) == (25e6, 25e6)


def test_queues_hold_50_ms_and_never_less_than_some_packets():
    assert queue_bytes(25e6) == 1.25e6
    assert queue_bytes(1e5) == 96_000


def test_a_machine_has_its_address_and_one_way_out():
    lines = ip_lines(links(NETWORK, 2)[1])
    assert "addr add 192.88.99.2/32 dev net0" in lines
    assert "route add default dev net0" in lines


def test_every_machine_uses_the_congestion_control_of_the_network():
    assert settings(NETWORK)["ipv4__tcp_congestion_control"] == "cubic"


def test_a_kernel_without_the_congestion_control_says_so():
    assert why_not_controlled("bbr", ["reno", "bbr"]) is None
    assert why_not_controlled("bbr", ["reno", "cubic"]) == "this kernel has no bbr (it has reno, cubic)"
