"""What the demo shows: table, lines, outcome, plot."""

from __future__ import annotations

import io
import re
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from shoal.cli.demo.history import History, Outcome
from shoal.cli.demo.plot import write_plot
from shoal.cli.demo.protocol import Part, State, Status
from shoal.cli.demo.table import LiveView, PlainView, describe, make_view, render_outcome, render_statuses
from shoal.cli.pictures import check_output
from shoal.errors import InvalidValueError

TRAINING = Status("peer 1", "12D3", Part(0), (0, 4, 8), State.TRAINING, 12, 4, 0.4321, 0.9, 1_234_567, 0.25)
STARTING = Status("peer 2", "", Part(1), (), State.STARTING)


def text_of(renderable: object, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def cells_of(text: str) -> list[list[str]]:
    """Of the lines of a table, which has two blanks or more between columns."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def test_table_has_a_row_for_each_peer() -> None:
    text = text_of(render_statuses([TRAINING, STARTING], rounds=60, seconds=14.4))
    title, headings, _, *rows = cells_of(text)
    assert title == ["14 s, round 12 of 60"]
    assert headings == ["peer", "state", "digits", "round", "group", "loss", "accuracy", "bytes", "sec."]
    assert rows == [
        ["peer 1", "training", "048", "12", "4", "0.432", "90.0 %", "1.2 MB", "0.25"],
        ["peer 2", "loads torch", "0", "-", "-", "-", "0 B", "-"],
    ]


LONGEST = Status(
    "guest 12", "12D3", Part(0), (0, 1, 2, 3, 4), State.CATCHING_UP, 9999, 8, 12.345, 1.0, 999_900_000, 12.34
)


@pytest.mark.parametrize("width", [54, 62, 69, 78, 80, 120])
def test_a_narrow_terminal_cuts_no_figure(width: int) -> None:
    text = text_of(render_statuses([TRAINING, LONGEST], 10_000, 99.0, width), width)
    assert "…" not in text
    for shown in ("guest 12", "catching up", "9999", "100.0 %", "12.34"):
        assert shown in text
    assert ("999.9 MB" in text) == (width >= 78)


def test_description_in_one_line() -> None:
    assert describe(TRAINING, 60) == (
        "peer 1: round 12/60, training, group 4, loss 0.432, accuracy 90.0 %, 1.2 MB, 0.25 s"
    )
    assert "loss -, accuracy -" in describe(STARTING, 60)


def test_plain_view_prints_now_and_then() -> None:
    console = Console(file=io.StringIO(), width=20)  # lines are not wrapped
    view = make_view(console)
    assert isinstance(view, PlainView)
    with view:
        view.tell("[peer] 1 is here")
        for round_ in (0, 1, 2, 9, 10, 11, 25):
            view.show([msgspec.structs.replace(TRAINING, round=round_)], 60, 1.0)
        for _ in range(2):
            view.show([msgspec.structs.replace(TRAINING, round=25, state=State.FINISHED)], 60, 1.0)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "[peer] 1 is here"
    assert [line.split("round ")[1].split(",")[0] for line in lines[1:]] == [
        "1/60",
        "10/60",
        "25/60",
        "25/60",
    ]
    assert "finished" in lines[-1]


def test_live_view_draws_a_table() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    view = make_view(console)
    assert isinstance(view, LiveView)
    with view:
        view.show([TRAINING], 60, 1.0)
        view.tell("peer 2 is here")
        view.show([TRAINING, STARTING], 60, 2.0)
    shown = console.file.getvalue()
    assert "peer 2 is here" in shown
    assert shown.count("peer 1") >= 2


def make_outcome(swarm: dict[str, float], central: float, failed: tuple[str, ...] = ()) -> Outcome:
    return Outcome({"alone: digits 0": 0.1}, swarm, central, failed)


def test_outcome_compares_the_swarm_with_central_training() -> None:
    outcome = make_outcome({"peer 1": 0.96, "peer 2": 0.97}, central=0.98)
    assert outcome.swarm_mean == pytest.approx(0.965)
    assert outcome.explain_failure() is None
    text = text_of(render_outcome(outcome))
    for part in ("alone: digits 0", "10.0 %", "swarm: peer 2", "97.0 %", "swarm: mean", "96.5 %", "98.0 %"):
        assert part in text


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (make_outcome({"peer 1": 0.95}, central=0.98), "3.0 points below"),
        (make_outcome({"peer 1": 0.98}, central=0.98, failed=("peer 2",)), "failed: peer 2"),
        (make_outcome({}, central=0.98), "points below"),
    ],
)
def test_outcomes_that_are_failures(outcome: Outcome, reason: str) -> None:
    assert reason in (outcome.explain_failure() or "")
    text_of(render_outcome(outcome))


def test_plot_is_a_png(tmp_path: Path) -> None:
    history = History()
    history.begin_training()
    for accuracy in (0.1, 0.5, 0.5, 0.9):
        history.add_swarm("peer 1", accuracy)
        history.add_references({"alone: digits 0": accuracy / 2}, accuracy)
    history.add_event("peer 2 killed")
    assert [accuracy for _, accuracy in history.swarm["peer 1"]] == [0.1, 0.5, 0.9]
    assert len(history.central) == 4
    path = tmp_path / "plot"
    write_plot(history, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 10_000


def test_output_is_checked_before(tmp_path: Path) -> None:
    check_output(tmp_path / "new.png")
    (tmp_path / "old.png").write_bytes(b"")
    check_output(tmp_path / "old.png")
    for path, reason in ((tmp_path, "folder"), (tmp_path / "no" / "x.png", "there is no folder")):
        with pytest.raises(InvalidValueError, match=reason):
            check_output(path)
    with pytest.raises(InvalidValueError, match="there is no folder"):
        check_output(tmp_path / "old.png" / "x.png")
