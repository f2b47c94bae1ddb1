"""For every test: loggers and Ctrl+C as they were before it, since what a test or command sets belongs to it alone."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    gc.disable()  # until the tests are collected: what they are made of stays


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one group share processes, and pytest-xdist must send them to one worker: it marks their names by @."""
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if getattr(config.option, "loadgroup", False) and any("@" not in item.nodeid for item in grouped):
        raise pytest.UsageError(f"pytest {pytest.__version__} and pytest-xdist must group tests, and do not")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of tests and the modules that they import are there to the end: no collection looks at them again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _heeds_ctrl_c() -> Iterator[None]:
    """Programs that a test starts and sends Ctrl+C inherit whether it is ignored. Shells have it ignored in what they
    start in the background, and Lightning leaves it ignored when it was interrupted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    yield
    if before is not None:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _own_log_level() -> Iterator[None]:
    logger = logging.getLogger("shoal")
    level = logger.level
    yield
    logger.setLevel(level)
