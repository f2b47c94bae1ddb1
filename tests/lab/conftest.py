"""The laboratory of namespaces, for tests of machines with real addresses: it needs root, ``ip`` and ``nft``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)

from lab_internet import Internet  # noqa: E402 - beside this file
from lab_peers import Swarm, Template  # noqa: E402

from shoal.testing.namespaces import why_not  # noqa: E402


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip what needs namespaces where there can be none."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def internet(namespaces: None) -> Iterator[Internet]:
    with contextlib.closing(Internet()) as made:
        yield made


@pytest.fixture(scope="session")
def template(namespaces: None) -> Iterator[Template]:
    with contextlib.closing(Template()) as made:
        yield made


@pytest.fixture
def swarm(template: Template, internet: Internet, request: pytest.FixtureRequest) -> Iterator[Swarm]:
    """The peers of one test; if it fails, all that they printed and logged is a part of its report."""
    made = Swarm(template)
    request.node.swarm = made
    yield made
    made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    swarm = getattr(item, "swarm", None)
    if swarm is not None and report.failed:
        report.sections.append(("what the peers said", swarm.story()))
    return report
