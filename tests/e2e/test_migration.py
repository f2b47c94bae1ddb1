"""The programs of docs/migration.md run, each at two peers."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from real_swarm import Swarm

import shoal

pytestmark = pytest.mark.xdist_group("averaging")

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
THE_IMPORT, IN_THE_BACKGROUND, GRADIENTS = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL
)


def run_at_two_peers(program: str, swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run it, on DHTs that are there already, and return what its names stand for at the end."""
    dhts = iter([swarm.dht(), swarm.dht()])
    given = ["the address that the first one has printed"]
    monkeypatch.setattr(sys, "argv", ["program.py", *given])

    def dht(*, initial_peers: list[str], start: bool) -> shoal.DHT:
        assert initial_peers == given
        assert start
        return next(dhts)

    monkeypatch.setattr(shoal, "DHT", dht)
    namespaces: list[dict[str, Any]] = [{}, {}]
    code = compile(program, PAGE.name, "exec")
    with ThreadPoolExecutor(2) as peers:
        list(peers.map(exec, [code] * 2, namespaces))
    swarm.averagers += [namespace["averager"] for namespace in namespaces]
    return namespaces


def test_the_program_in_which_the_import_was_changed(swarm: Swarm, monkeypatch: pytest.MonkeyPatch):
    one, other = (space["model"] for space in run_at_two_peers(THE_IMPORT, swarm, monkeypatch))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


def test_averaging_in_the_background_instead_of_the_optimizer(swarm: Swarm, monkeypatch: pytest.MonkeyPatch):
    for space in run_at_two_peers(IN_THE_BACKGROUND, swarm, monkeypatch):
        assert space["control"].report.succeeded
        assert space["control"].report.weight == 64


def test_averaged_gradients(swarm: Swarm, monkeypatch: pytest.MonkeyPatch):
    one, other = spaces = run_at_two_peers(GRADIENTS, swarm, monkeypatch)
    assert torch.equal(one["model"].weight, other["model"].weight)
    assert not torch.equal(one["model"].weight, torch.full((1, 10), 0.1))
    for space in spaces:
        assert space["averager"].last_report.succeeded
        assert space["averager"].last_report.step == 1
        assert space["averager"].last_report.weight == 64
