"""The head of a report says how fast the machine can be at best."""

from __future__ import annotations

import re

from benchmarks import limits


def test_each_limit_is_a_rate(monkeypatch):
    monkeypatch.setattr(limits, "TURNS", 1)
    rates = limits.measure()
    assert len(rates) == 3
    for rate in rates.values():
        found = re.fullmatch(r"(\d+\.\d) GB/s, (\d+\.\d\d) s of CPU a GB", rate)
        assert found is not None
        assert 0 < float(found[1]) < 1000
        assert 0 < float(found[2]) < 100
