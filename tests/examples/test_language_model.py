"""The whole experiment in a short form: real processes, a small model, one peer killed and one that joins late."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch

from evaluate import main as evaluate_runs
from evaluate import read_curve
from record import read_log

LANGUAGE_MODEL = Path(__file__).resolve().parents[2] / "examples" / "language_model"
SMALL = [
    "--steps=700",
    "--local-steps=40",
    "--pause=0.015",
    "--peers=2",
    "--hidden=16",
    "--table=256",
    "--batch=4",
    "--length=32",
    "--windows=32",
    f"--text={sysconfig.get_path('stdlib')}/asyncio",
]

FAULTS = [
    "--kill-at=0.2",
    "--join-at=0.25",
]  # early, so that there is time left when the newcomer has started


@pytest.mark.sweep
def test_a_swarm_of_which_one_is_killed_and_one_joins_late_trains_one_model(
    scripts, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    script = scripts.start(LANGUAGE_MODEL / "swarm.py", "--folder", run, "--save-every", 4, *FAULTS, *SMALL)
    assert script.finish(110) == 0, script.output

    summary = json.loads((run / "run.json").read_text())
    assert [event["event"] for event in summary["events"]] == ["killed", "started"]
    assert summary["status"] == {"peer-0": 0, "peer-1": -9, "peer-2": 0}
    logs = {peer: list(read_log(run / peer)) for peer in summary["status"]}
    rounds = {peer: [event for event in events if event["event"] == "round"] for peer, events in logs.items()}
    assert all(event["group"] == 2 for event in rounds["peer-1"])
    assert rounds["peer-1"]
    assert not any(event["event"] == "finished" for event in logs["peer-1"])

    (joined,) = (event for event in logs["peer-2"] if event["event"] == "began")
    assert joined["loaded"]
    assert joined["step"] >= 0.25 * 700
    assert any("group" in event for event in rounds["peer-2"])

    # what the survivors have in the end is one model, up to the float16 in which gradients travel, and it has learnt
    final = [torch.load(run / peer / "final.pt") for peer in ("peer-0", "peer-2")]
    for first, newcomer in zip(*final, strict=True):
        torch.testing.assert_close(first, newcomer, atol=2e-3, rtol=0)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--workers", "1", "--target", "5"])
    evaluate_runs()
    points = read_curve(run / "curve.csv")
    assert points[-1].bits_per_byte < 5 < points[0].bits_per_byte
    assert points[-1].tokens > max(event["tokens"] for event in rounds["peer-0"])
    assert "5 after" in capsys.readouterr().out


@pytest.mark.sweep
def test_reference_training_leaves_the_same_kind_of_record(scripts, tmp_path):
    folder = tmp_path / "run" / "peer-0"
    script = scripts.start(
        LANGUAGE_MODEL / "reference.py",
        "--parts",
        "0,1",
        "--batches",
        2,
        "--folder",
        folder,
        "--save-every",
        20,
        *SMALL,
        "--steps=40",
    )
    assert script.finish() == 0, script.output
    events = list(read_log(folder))
    assert [event["step"] for event in events if event["event"] == "round"] == [20, 40]
    assert json.loads((folder.parent / "run.json").read_text())["settings"]["steps"] == 40
    assert events[-1] == {**events[-1], "event": "saved", "file": "final.pt", "tokens": 40 * 2 * 4 * 32}
