"""What is told of each epoch: a file of lines, a bar on a terminal, and calls."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from shoal.errors import InvalidValueError
from shoal.optim.progress.values import GlobalTrainingProgress
from shoal.optim.progress_bar import ProgressBar
from shoal.optim.record import RunRecord, read_record
from shoal.optim.report import EpochReport
from shoal.optim.watching import Watchers


def report(epoch: int = 0, **values: object) -> EpochReport:
    return EpochReport(epoch=epoch, peers=2, samples=64, local_samples=32, seconds={"epoch": 1.5}, **values)  # type: ignore[arg-type]


def progress(samples: int, peers: int = 3, epoch: int = 5) -> GlobalTrainingProgress:
    return GlobalTrainingProgress(
        epoch=epoch, samples_accumulated=samples, target_batch_size=64, num_peers=peers, num_clients=0,
        eta_next_epoch=0.0, next_fetch_time=0.0,
    )  # fmt: skip


def test_a_record_has_a_line_for_each_epoch_and_goes_on_after_a_restart(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    for epoch in range(2):
        RunRecord(path, clock=lambda: 1000.0)(report(epoch, loss=0.5))
    entries = read_record(path)
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert entries[0] == {"time": 1000.0, **report(0, loss=0.5).to_dict()}


def test_a_loss_that_is_no_number_is_none_and_every_line_is_json(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    RunRecord(path)(report(loss=math.nan))
    assert json.loads(path.read_text())["loss"] is None


def test_half_a_line_of_a_program_that_was_killed_is_left_out(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    RunRecord(path)(report(0))
    path.write_bytes(path.read_bytes() + b'{"time": 10')
    assert [entry["epoch"] for entry in read_record(path)] == [0]
    RunRecord(path)(report(1))
    assert [entry["epoch"] for entry in read_record(path)] == [0, 1]


@pytest.mark.parametrize("content", ["", "epoch 1\n", "\x00\x01", "[1]\n", "{}\n"])
def test_what_is_no_record_is_said(tmp_path: Path, content: str):
    path = tmp_path / "other"
    path.write_text(content)
    with pytest.raises(
        InvalidValueError, match=r"other must (be the record of a run|have at least one epoch)"
    ):
        read_record(path)


def test_a_record_that_cannot_be_written_is_named_at_once(tmp_path: Path):
    with pytest.raises(
        InvalidValueError, match=r"record must be a file that can be written, got .*: Is a directory"
    ):
        RunRecord(tmp_path)
    with pytest.raises(InvalidValueError, match="No such file"):
        RunRecord(tmp_path / "missing" / "run.jsonl")


def test_training_goes_on_where_a_line_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Also in another folder: a relative path is that of the folder in which the record was made."""
    monkeypatch.chdir(tmp_path)
    record = RunRecord("run.jsonl")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    record(report(0))
    (tmp_path / "run.jsonl").rename(tmp_path / "kept.jsonl")
    (tmp_path / "run.jsonl").mkdir()
    record(report(1))
    assert [entry["epoch"] for entry in read_record(tmp_path / "kept.jsonl")] == [0]
    assert "epoch 1 is not in the record" in caplog.text


def screen(terminal: bool = True) -> tuple[io.StringIO, Console]:
    text = io.StringIO()
    return text, Console(file=text, force_terminal=terminal, width=80, color_system=None)


def test_a_bar_shows_the_epoch_of_the_swarm_in_one_line(monkeypatch: pytest.MonkeyPatch):
    times = itertools.count(0.0, 1.0)
    monkeypatch.setattr("shoal.optim.progress_bar.steady_time", lambda: next(times))
    text, console = screen()
    bar = ProgressBar("digits", 64, console)
    bar.show(progress(16))
    bar.note(report(5, loss=0.25))
    bar.show(progress(70, peers=1, epoch=6))
    bar.close()
    bar.close()
    lines = text.getvalue().replace("\r", "\n").splitlines()
    assert any("digits: epoch 5" in line and "16/64 samples, 3 peers" in line for line in lines)
    assert any("64/64 samples, 1 peer; last epoch 1.5 s, loss 0.25" in line for line in lines)
    assert max(map(len, lines)) <= 80 + len("\x1b[2K\x1b[?25l\x1b[?25h")


def test_a_bar_draws_no_more_often_than_an_eye_can_see(monkeypatch: pytest.MonkeyPatch):
    times = iter((0.0, 0.05, 0.11))
    monkeypatch.setattr("shoal.optim.progress_bar.steady_time", lambda: next(times))
    text, console = screen()
    bar = ProgressBar("digits", 64, console)
    for samples in (1, 2, 3):
        bar.show(progress(samples))
    shown = text.getvalue()
    bar.close()
    assert "1/64" in shown
    assert "2/64" not in shown
    assert "3/64" in shown


def test_a_bar_is_silent_where_there_is_no_terminal():
    text, console = screen(terminal=False)
    bar = ProgressBar("digits", 64, console)
    bar.show(progress(16))
    bar.close()
    assert text.getvalue().strip() == ""


def test_all_that_watch_are_told_and_progress_is_asked_for_a_bar_alone(tmp_path: Path):
    told: list[EpochReport] = []
    watchers = Watchers(tmp_path / "run.jsonl", None, told.append)

    def never() -> GlobalTrainingProgress:
        raise AssertionError

    watchers.step(never)
    watchers.epoch(report(3))
    watchers.close()
    assert [one.epoch for one in told] == [3]
    assert [entry["epoch"] for entry in read_record(tmp_path / "run.jsonl")] == [3]
