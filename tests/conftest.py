"""For every test: loggers as they were before it, since a level that a test or command sets belongs to it alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _own_log_level() -> Iterator[None]:
    logger = logging.getLogger("shoal")
    level = logger.level
    yield
    logger.setLevel(level)
