"""The command in lines that a person copies into another terminal."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from shoal.cli.invocation import command_line


def make_program(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / "shoal"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


def test_the_command_is_found_in_any_terminal() -> None:
    """Without the environment that this test runs in."""
    program, *rest = shlex.split(command_line("demo", "--join", "/ip4/127.0.0.1/tcp/1"))
    assert rest[-3:] == ["demo", "--join", "/ip4/127.0.0.1/tcp/1"]
    assert shutil.which(program, path=os.defpath) is not None


def test_a_virtual_environment_is_named_by_its_path(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = make_program(tmp_path / "my env")
    monkeypatch.setattr(sys, "executable", str(program.parent / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(program.parent))
    assert shlex.split(command_line("peer")) == [str(program), "peer"]


def test_an_installed_command_goes_by_its_name(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setenv("PATH", str(make_program(tmp_path).parent))
    assert command_line("peer") == "shoal peer"


def test_without_the_command_python_runs_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_line("peer") == f"{tmp_path}/python -m shoal.cli.main peer"
