"""The scripts of ``examples/`` are run as users run them, and their pure modules are imported."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LANGUAGE_MODEL = str(EXAMPLES / "language_model")
if LANGUAGE_MODEL not in sys.path:  # its modules import each other by their plain names, as scripts do
    sys.path.insert(0, LANGUAGE_MODEL)


class Script:
    """An example that runs in a process of its own; its lines can be waited for."""

    def __init__(self, *arguments: Any, folder: Path) -> None:
        command = [sys.executable, *map(str, arguments)]
        self._output = folder / f"{time.monotonic_ns()}.txt"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for_line(self, text: str, limit: float = 60) -> str:
        """The first line with ``text`` in it, once it has been written."""
        deadline = time.monotonic() + limit
        while True:
            for line in self.output.splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line.strip()
            assert self.process.poll() is None, f"it has ended without {text!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r} in time:\n{self.output}"
            time.sleep(0.05)

    def finish(self, limit: float = 60) -> int:
        """Wait for its end; the exit status."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.output}") from None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Scripts:
    """Starts examples; all end with the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Script] = []

    def start(self, script: Path, *arguments: Any) -> Script:
        self._started.append(Script(script, *arguments, folder=self._folder))
        return self._started[-1]

    def close(self) -> None:
        for script in self._started:
            script.kill()


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    started = Scripts(tmp_path)
    yield started
    started.close()
