"""Parameters of which ``make test`` takes the first ones, and the sweep the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def rest_swept(values: Sequence[Any], kept: int = 1) -> list[Any]:
    """The values for ``parametrize``: all but the first ``kept`` are run by ``make sweep`` only."""
    return [*values[:kept], *(pytest.param(value, marks=pytest.mark.sweep) for value in values[kept:])]
