"""The command line of the benchmarks, and where hivemind comes from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import command, environment
from benchmarks.environment import CannotInstall
from benchmarks.results import RowResult
from benchmarks.rows import ROWS, among, choose


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(command.app, list(arguments), env={"COLUMNS": "80"})
    return done.exit_code, done.output


def test_rows_are_listed_with_their_titles():
    status, output = invoke("--list")
    assert status == 0
    assert len(output.splitlines()) == len(ROWS)
    assert "lossy-cubic      200 Mbit/s, 100 ms, 0.1 % loss" in output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "tinny"], "Invalid value for --only: row must be one of"),
        (["--side", "nccl"], "Invalid value for --side: side must be one of"),
        (["--hivemind-python", "/nowhere"], "/nowhere cannot be run: No such file or directory"),
        (["--hivemind-python", "/bin/false"], "/bin/false cannot import hivemind, psutil, sklearn and torch"),
        (["--repeat", "0"], "'--repeat'"),
    ],
)
def test_mistakes_are_told_by_the_option(arguments: list[str], complaint: str):
    status, output = invoke("--quick", *arguments)
    assert status == 2
    assert complaint in " ".join(output.split())


@pytest.fixture
def uninstalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine on which no run has made hivemind's environment."""
    monkeypatch.setattr(environment, "COMPLETE", tmp_path / "complete")


@pytest.mark.usefixtures("uninstalled")
def test_a_quick_run_does_not_install_hivemind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "make", lambda tell: pytest.fail("it was installed"))
    python, absence = command.find_hivemind(Console(quiet=True), ROWS, None, quick=True)
    assert (python, absence) == (None, command.NOT_MADE)


@pytest.mark.usefixtures("uninstalled")
def test_rows_without_hivemind_do_not_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "make", lambda tell: pytest.fail("it was installed"))
    rows = among(ROWS, ["shoal", "raw"])
    assert command.find_hivemind(Console(quiet=True), rows, None, quick=False)[0] is None


@pytest.mark.usefixtures("uninstalled")
def test_without_a_package_index_hivemind_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def fail(tell: object) -> str:
        raise CannotInstall("pip failed: no index")

    monkeypatch.setattr(environment, "make", fail)
    found = command.find_hivemind(Console(quiet=True), ROWS, None, quick=False)
    assert found == (None, "it could not be installed: pip failed: no index")


def test_a_step_of_the_installation_that_fails_tells_its_last_line():
    said: list[str] = []
    program = "import sys; print('Collecting torch'); sys.exit('no route to the index')"
    with pytest.raises(CannotInstall, match=r"failed: no route to the index$"):
        environment.run([sys.executable, "-c", program], said.append)
    assert said == ["  Collecting torch"]


def test_only_torch_is_pinned_for_hivemind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "FOLDER", tmp_path / "hivemind")
    (line,) = environment.torch_pin().read_text().splitlines()
    assert line.startswith("torch==")


def test_the_summary_tells_figures_and_what_went_wrong():
    result = RowResult(*choose(ROWS, ["tiny"]))
    assert command.summary(result) == "nothing measured"
    result.add("shoal", {"latency_ms": 7.0})
    result.note("hivemind left out: no index")
    assert command.summary(result) == "shoal 7.00 ms; (hivemind left out: no index)"
    assert command.summary(RowResult(result.row, skipped="no root")) == "left out: no root"
