"""The record of a run: a file with one line of JSON an epoch, which ``shoal plot`` draws."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from shoal.errors import InvalidValueError
from shoal.optim.report import EpochReport
from shoal.utils.logging import get_logger

logger = get_logger(__name__)

Entry: TypeAlias = dict[str, Any]
"""What :meth:`~shoal.optim.report.EpochReport.to_dict` gives, and "time": seconds since 1970."""


class RunRecord:
    """Adds a line for each epoch. A program that is started again goes on in the same file.

    :param path: of the file; its folder must exist
    :raises InvalidValueError: it can't be written
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = Path(path).absolute(), clock
        try:
            ends_in_line = self._ends_in_line()
            with self.path.open("a", encoding="utf-8") as file:
                if not ends_in_line:
                    file.write("\n")  # a program that was killed has left half a line
        except OSError as e:
            raise InvalidValueError(
                f"record must be a file that can be written, got {str(path)!r}: {e.strerror}"
            ) from e

    def __call__(self, report: EpochReport) -> None:
        """Add the line; a warning says if that can't be done, such as on a full disk: training goes on."""
        entry = {"time": round(self._clock(), 3), **report.to_dict()}
        finite = {name: None if _is_infinite(value) else value for name, value in entry.items()}
        line = json.dumps(finite, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as e:
            logger.warning("epoch %d is not in the record %s: %s", report.epoch, self.path, e.strerror)

    def _ends_in_line(self) -> bool:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"


def read_record(path: str | os.PathLike[str]) -> list[Entry]:
    """The epochs of a record, in the order in which they ended. Half a line, of a program that was killed, is left out.

    :raises InvalidValueError: it is no record, or has no epoch
    :raises OSError: it can't be read
    """
    entries: list[Entry] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        entry = _decoded(line)
        if entry is None:
            if entries or line.lstrip().startswith(b"{"):
                continue
            raise InvalidValueError(
                f"{path} must be the record of a run, got something else in line {number}"
            )
        entries.append(entry)
    if not entries:
        raise InvalidValueError(f"{path} must have at least one epoch, got none")
    return entries


def _decoded(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    known = isinstance(entry, dict) and all(
        isinstance(entry.get(name), int | float) for name in ("time", "epoch", "peers")
    )
    return entry if known else None


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
