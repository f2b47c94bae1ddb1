"""Windows grow to what a path holds in two round trips, and shrink again."""

from __future__ import annotations

import pytest

from shoal.averaging.flow_window import FlowWindow, first_size

MIB = 1 << 20


def settle(window: FlowWindow, rate: float, rtt: float, seconds: float, begin: float = 0.0) -> int:
    """A path that carries ``rate`` bytes a second at most, and a window a round trip; payloads of 64 KiB."""
    now, payload = begin, 65536
    while now < begin + seconds:
        now += max(payload / rate, payload * rtt / window.size)
        window.receive(payload, now, rtt)
    return window.size


@pytest.mark.parametrize(
    ("rate", "rtt"), [(125e6, 0.2), (25e6, 0.1), (6e6, 0.1), (1e9, 0.0002), (2.5e6, 0.02)]
)
def test_it_holds_what_the_path_holds(rate: float, rtt: float):
    size = settle(FlowWindow(4 * MIB, 4 * MIB, 64 * MIB), rate, rtt, 60.0)
    need = rate * rtt
    assert size >= min(1.1 * need, 64 * MIB)
    assert size <= max(5 * need, 10 * MIB)


def test_it_shrinks_again_but_not_below_the_least():
    window = FlowWindow(4 * MIB, 2 * MIB, 64 * MIB)
    assert settle(window, 125e6, 0.2, 20.0) >= 32 * MIB
    assert settle(window, 1e6, 0.2, 60.0, 20.0) <= 4 * MIB
    assert settle(window, 1e4, 0.2, 300.0, 80.0) == 2 * MIB


def test_it_never_grows_beyond_the_most():
    assert settle(FlowWindow(4 * MIB, 4 * MIB, 8 * MIB), 1e9, 0.5, 20.0) == 8 * MIB


def test_it_says_when_it_has_changed():
    window = FlowWindow(MIB, MIB, 8 * MIB)
    assert not window.receive(MIB // 2, 0.0, 0.1)
    assert window.receive(MIB // 2, 0.1, 0.1)
    assert window.size == 2 * MIB
    assert not window.receive(MIB // 4, 0.2, 0.1)


def test_it_grows_where_what_is_late_holds_up_what_has_come():
    """All that the window allows comes within a round trip, and is taken when a late piece is there."""
    window, now = FlowWindow(4 * MIB, 4 * MIB, 64 * MIB), 0.0
    for _ in range(4):
        now += 0.6
        for _ in range(window.size // 65536):
            window.receive(65536, now, 0.1)
    assert window.size >= 16 * MIB


@pytest.mark.parametrize(
    ("rtt", "expected"), [(0.0, 4 * MIB), (0.0002, 4 * MIB), (0.1, 16_000_000), (0.5, 64 * MIB)]
)
def test_it_is_larger_at_first_where_the_round_trip_is_longer(rtt: float, expected: int):
    assert first_size(rtt, 4 * MIB, 64 * MIB) == expected
