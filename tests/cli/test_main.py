"""What the command line answers before it starts anything."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import shoal
from shoal.cli.main import EXIT_FAILURE, app, run


def test_version_and_help() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output == f"shoal {shoal.__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0
        assert "demo" in result.output
        assert "peer" in result.output
    assert "--join ADDRESS" in runner.invoke(app, ["demo", "--help"]).output
    assert runner.invoke(app, ["peer", "-h"]).exit_code == 0


def test_summaries_of_commands_fit_a_line_of_80() -> None:
    assert CliRunner().invoke(app, ["-h"], terminal_width=80).output.count("...") == 1, "of the usage"


def test_a_shell_completes_commands() -> None:
    shoal_command = Path(sys.executable).parent / "shoal"
    asked = {"_SHOAL_COMPLETE": "complete_bash", "COMP_WORDS": "shoal de", "COMP_CWORD": "1"}
    done = subprocess.run([shoal_command], capture_output=True, text=True, env={**os.environ, **asked})
    assert done.stdout.split() == ["demo"], done.stderr


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from shoal.cli.main import run; assert run(['--help']) == 0;"
        "print([m for m in ('torch', 'sklearn', 'matplotlib', 'numpy', 'cryptography') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "nonsense"),
        (["demo", "--pears", "4"], "--pears"),
        (["demo", "--peers", "four"], "--peers"),
        (["demo", "--peers", "0"], "--peers must be 2 to 8, got 0"),
        (["demo", "--peers", "1"], "--peers must be 2 to 8, got 1"),
        (["demo", "--peers", "9"], "--peers must be 2 to 8, got 9"),
        (["demo", "--rounds", "1"], "--rounds must be "),
        (["demo", "--host", "here"], "--host must be an IP address, got here"),
        (["demo", "--output", "/no/such/folder/x.png"], "/no/such/folder"),
        (["demo", "--join", "nonsense"], "--join: "),
        (["demo", "--join", "/ip4/127.0.0.1/tcp/1"], "/p2p/PEERID"),
        (["peer", "--port", "70000"], "--port must be 0 (any free port) to 65535, got 70000"),
        (["peer", "--host", "here"], "--host must be an IP address, got here"),
        (["peer", "--interval", "0"], "--interval must be more than 0 s, got 0"),
        (["peer", "--initial-peers", "nonsense"], "nonsense"),
        (["peer", "--announce", "/ip4/0.0.0.0/tcp/0"], "/ip4/0.0.0.0/tcp/0"),
        (["peer", "--bootstrap-timeout", "-1"], "--bootstrap-timeout"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert run(arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("shoal: ")
    assert said in errors


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--output", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_damaged_identity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "identity"
    path.write_bytes(b"nonsense")
    path.chmod(0o600)
    assert run(["peer", "--identity", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert str(path) in errors


def test_a_key_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "private")

    monkeypatch.setattr("shoal.p2p.identity.os.link", no_space)
    path = tmp_path / "peer.key"
    assert run(["peer", "--identity", str(path)]) == EXIT_FAILURE
    assert capsys.readouterr().err == (f"shoal: {path}: the key cannot be written: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_missing_demo_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def find_all_but_matplotlib(name: str, package: str | None = None) -> Any:
        return None if name == "matplotlib" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_matplotlib)
    assert run(["demo"]) == 2
    assert (
        capsys.readouterr().err == "shoal: the demo needs matplotlib: pip install -e '.[demo]' in a clone\n"
    )
