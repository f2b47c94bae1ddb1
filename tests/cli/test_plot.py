"""``shoal plot`` on records of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cli.main import run
from shoal.cli.plot import failures
from shoal.optim.record import RunRecord
from shoal.optim.report import EpochReport


def write(path: Path, *, loss: float | None = 1.0, failure: str | None = None) -> Path:
    times = iter(range(100, 200, 10))
    record = RunRecord(path, clock=lambda: next(times))
    for epoch in range(3):
        lost = failure if epoch == 1 else None
        kind = "own" if lost else "averaged"
        record(
            EpochReport(
                epoch,
                3 - epoch,
                64,
                32,
                loss,
                kind,
                lost,
                seconds={"epoch": 10.0, "gradients": 1.0, "update": 0.1},
            )
        )
    return path


def test_records_of_several_peers_become_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = write(tmp_path / "a.jsonl", failure="no average within 5 s")
    second = write(tmp_path / "b.jsonl", loss=None)
    output = tmp_path / "run.png"
    assert run(["plot", str(first), str(second), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{output}: 6 epochs of 2 records\n"


def test_epochs_without_an_average_are_found_and_those_of_a_lonely_peer_are_none():
    lost = {"gradients": "own", "failure": "no average within 5 s"}
    entries = [lost, {"gradients": "own", "failure": None}, {"gradients": "averaged", "failure": None}]
    assert failures(entries) == [lost]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.jsonl"], "shoal: missing.jsonl: No such file or directory"),
        (["."], "shoal: RUN must be a file, got the folder ."),
        (["text"], "shoal: text must be the record of a run, got something else in line 1"),
        (["good", "--output", "no/where.png"], "shoal: --output no/where.png: there is no folder"),
        ([], "Missing argument 'RUN...'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good")
    (tmp_path / "text").write_text("hello\n")
    assert run(["plot", *arguments]) in (1, 2)
    errors = capsys.readouterr().err
    assert said in errors
    assert len(errors.splitlines()) == 1
