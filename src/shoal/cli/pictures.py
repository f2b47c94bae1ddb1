"""What the commands that draw have in common."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from shoal.errors import InvalidValueError, UsageError


def check_output(path: Path) -> None:
    """:raises InvalidValueError: no file can be written there"""
    folder = path.absolute().parent
    if path.is_dir():
        reason = "it is a folder"
    elif not folder.is_dir():
        reason = f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = "no permission to write there"
    else:
        return
    raise InvalidValueError(f"--output {path}: {reason}")


def require_matplotlib() -> None:
    """:raises UsageError: it is missing"""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib: pip install matplotlib")
