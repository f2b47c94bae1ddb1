from __future__ import annotations

import math

import pytest

from shoal.utils import figures


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (7.2e-05, "7.2e-05"), (0.02364, "0.0236"), (1, "1"), (1.5, "1.5"), (2.0, "2"), (9.999, "10"),
        (99.95, "100"), (1234.5, "1,230"), (12345678, "12,300,000"), (-3.14159, "-3.14"), (1e16, "1e+16"),
        (math.inf, "inf"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, shown):
    assert figures.number(value) == shown


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0 peers"), (1, "1 peer"), (2, "2 peers"), (1024, "1,024 peers")]
)
def test_counts_agree_with_their_noun(number, shown):
    assert figures.count(number, "peer") == shown


def test_a_noun_may_have_a_plural_of_its_own():
    assert [figures.count(number, "copy", "copies") for number in (1, 2)] == ["1 copy", "2 copies"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"), (2e-6, "0.002 ms"), (0.0724, "72.4 ms"), (0.9999, "1 s"), (1.5, "1.5 s"), (59.96, "60 s"),
        (99.96, "1 min 40 s"), (125, "2 min 5 s"), (120, "2 min"), (3599.7, "1 h"), (12000, "3 h 20 min"),
        (1795821465, "20,784 days 23 h"), (-1.5, "-1.5 s"), (-125, "-2 min 5 s"),
    ],
)  # fmt: skip
def test_durations_have_the_unit_that_fits(seconds, shown):
    assert figures.duration(seconds) == shown


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 bytes"), (1, "1 byte"), (72, "72 bytes"), (999.7, "1,000 bytes"), (7200, "7.2 kB"), (999_600, "1 MB"),
     (256e6, "256 MB"), (1.5e9, "1.5 GB")],
)  # fmt: skip
def test_sizes_have_the_unit_that_fits(nbytes, shown):
    assert figures.size(nbytes) == shown


@pytest.mark.parametrize(
    ("bytes_per_second", "shown"),
    [(0, "0 bit/s"), (295, "2.36 kbit/s"), (1.9e6, "15.2 Mbit/s"), (125e6, "1 Gbit/s")],
)
def test_rates_are_in_bits(bytes_per_second, shown):
    assert figures.rate(bytes_per_second) == shown
