"""The programs of README.md and docs/machines.md run as they are printed, in two terminals."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MACHINES = (ROOT / "docs" / "machines.md").read_text()
ADDRESS = re.compile(r"/ip4/\S+/tcp/\d+/p2p/\w+")


def blocks(page: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return [block for of, block in found if of == language]


class Terminal:
    """Runs one program and reads what it prints; what it logs is seen if the test fails."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # a terminal shows lines at once, too
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout

    def finish(self) -> str:
        """What it prints until it ends, which it does well."""
        printed = self.output.read()
        assert self.process.wait() == 0
        return printed

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def open_terminal(terminals: ExitStack, folder: Path, *arguments: str) -> Terminal:
    terminal = Terminal(*arguments, folder=folder)
    terminals.callback(terminal.close)
    return terminal


def session(block: str) -> tuple[list[str], str]:
    """The arguments of the command that a block shows behind its prompt, and the output below it."""
    command, _, output = block.removeprefix("$ ").replace("\\\n", "").partition("\n")
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/python"
    return arguments, output


@pytest.mark.sweep
def test_the_first_program_prints_what_the_front_page_shows(terminals: ExitStack, tmp_path: Path):
    """Only addresses differ from run to run: the second terminal is given the first one's."""
    first, second = (session(block) for block in blocks(README) if block.startswith("$ "))
    [program] = blocks(README, "python")
    (tmp_path / first[0][0]).write_text(program)

    one = open_terminal(terminals, tmp_path, *first[0])
    address = one.output.readline()
    shown = ADDRESS.search(first[1])
    assert shown is not None
    arguments = [address.strip() if argument == shown[0] else argument for argument in second[0]]
    assert arguments != second[0]
    other = open_terminal(terminals, tmp_path, *arguments)

    assert ADDRESS.sub("ADDRESS", address + one.finish()) == ADDRESS.sub("ADDRESS", first[1])
    assert ADDRESS.sub("ADDRESS", other.finish()) == ADDRESS.sub("ADDRESS", second[1])


@pytest.mark.sweep
def test_the_programs_for_two_machines_average(terminals: ExitStack, tmp_path: Path):
    """On loopback, with a free port in place of the one that the page chose."""
    first, second = (
        re.sub(r"192\.168\.1\.1[01]", "127.0.0.1", block) for block in blocks(MACHINES, "python")
    )
    one = open_terminal(terminals, tmp_path, "-c", first.replace("/tcp/31330", "/tcp/0"))
    address = one.output.readline().split()[0]
    program, replaced = re.subn(r"/ip4/127\.0\.0\.1/tcp/31330/p2p/12D3KooW\.\.\.", address, second)
    assert replaced == 1
    other = open_terminal(terminals, tmp_path, "-c", program)

    gathered, value = one.finish().splitlines()
    assert value == "tensor(0.5000)"
    assert gathered == other.finish().strip()
    assert "'first'" in gathered
    assert "'second'" in gathered
