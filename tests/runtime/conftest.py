"""A background process that the tests of a module share, and services for it beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shoal.runtime.process import BackgroundProcess

# As if this folder held the user's script: modules beside it are imported in the background process by name.
FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)


@pytest.fixture(scope="module")
def process():
    made = BackgroundProcess.start("shared")
    yield made
    made.shutdown(5)
    assert made.exit_status == 0


@pytest.fixture
def own_process():
    """One that the test may end."""
    made = BackgroundProcess.start("own")
    yield made
    made.shutdown(5)
