"""Running the command line in a process of its own, and finding what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence

import psutil
import pytest

MARK = "SHOAL_TEST_MARK"
LIMIT = 100.0
"""Seconds; only a command that hangs takes as long."""


class Command:
    """A running ``shoal`` command whose output is read line by line."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, MARK: self._mark, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
        )
        self.lines: list[str] = []

    def wait_for(self, text: str) -> str:
        """Read until a line has ``text`` in it, and return that line."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"the command ended without {text!r}: {self.finish()}")

    def finish(self) -> tuple[int, str, str]:
        """Wait for the end: exit status, all of the output, errors."""
        output, errors = self.process.communicate(timeout=LIMIT)
        self.lines += output.splitlines()
        return self.process.returncode, "\n".join(self.lines), errors

    def family(self) -> list[psutil.Process]:
        """The processes that it has started, directly or not, wherever they are now, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue  # it has ended, or is somebody else's
        return found

    def end(self) -> None:
        for process in self.family():
            process.kill()
        self.process.stdout.close()
        self.process.stderr.close()
        self.process.wait()


@pytest.fixture
def start_command() -> Iterator[Callable[..., Command]]:
    """Run ``shoal ARGUMENTS``; nothing of it is left after the test, whatever happens in it."""
    commands: list[Command] = []

    def start(*arguments: str) -> Command:
        commands.append(Command(arguments))
        return commands[-1]

    yield start
    for command in commands:
        command.end()
