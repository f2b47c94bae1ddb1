"""What every test gets: loggers as they were before it, since commands and levels set in one test belong to that test."""

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
