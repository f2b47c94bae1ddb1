"""How this program was called, for lines that a person copies into another terminal."""

from __future__ import annotations

import os
import shlex
import shutil
import sys


def command_line(*arguments: str) -> str:
    """``shoal ARGUMENTS`` as it works in any other terminal.

    In a virtual environment the program is named by its path: elsewhere the environment may not be active.
    """
    return shlex.join([*_program(), *arguments])


def _program() -> list[str]:
    installed = shutil.which("shoal")
    if installed is not None and sys.prefix == sys.base_prefix:
        return ["shoal"]
    beside = os.path.join(os.path.dirname(sys.executable), "shoal")
    if os.access(beside, os.X_OK):
        return [beside]
    return [sys.executable, "-m", "shoal.cli.main"]
