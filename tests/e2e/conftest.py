"""The swarm of a test, on DHTs that all tests of one worker share: files with ``xdist_group("averaging")``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)

from real_swarm import Swarm  # noqa: E402 - beside this file


@pytest.fixture(scope="session")
def shared_dhts() -> Iterator[list[shoal.DHT]]:
    dhts: list[shoal.DHT] = []
    yield dhts
    for dht in dhts:
        dht.shutdown()


@pytest.fixture
def swarm(shared_dhts: list[shoal.DHT], request: pytest.FixtureRequest) -> Iterator[Swarm]:
    with contextlib.closing(Swarm(shared_dhts, request.node.name.replace(".", "_"))) as made:
        yield made
