"""Delayed work is told of in the first report after its end."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shoal.averaging.report import StepReport
from shoal.optim.late_work import LateWork
from shoal.optim.report import EpochReport


@dataclass
class Averager:
    averaging_in_progress: bool = True
    last_report: StepReport | None = None


def test_a_delayed_round_of_gradients_is_told_of_once():
    late, report = LateWork(), StepReport(3)
    late.gradients("own", report)
    assert late.take() == ({"gradients": "own"}, [report])
    assert late.take() == ({}, [])


@pytest.mark.parametrize("before", [None, StepReport(1)])
@pytest.mark.parametrize(
    ("report", "outcome"),
    [(None, "failed"), (StepReport(2, failure="nobody came"), "failed"), (StepReport(2), "averaged")],
)
def test_a_delayed_round_of_parameters_is_told_of_when_it_has_ended(
    before: StepReport | None, report: StepReport | None, outcome: str
):
    late, averager = LateWork(), Averager(last_report=before)
    late.state_begun(before)
    late.look_at_state(averager)
    assert late.take() == ({}, [])
    averager.averaging_in_progress = False
    averager.last_report = report or before  # without a group there is no report
    late.look_at_state(averager)
    assert late.take() == ({"state": outcome}, [report] if report else [])
    late.look_at_state(averager)
    assert late.take() == ({}, [])


def test_a_report_says_it_to_people_and_programs():
    report = EpochReport(4, 2, 64, 32, seconds={"epoch": 1.0}, late={"gradients": "own", "state": "failed"})
    assert "of earlier epochs gradients own, state failed; epoch 1 s" in str(report)
    values = report.to_dict()
    assert (values["late/gradients"], values["late/state"]) == ("own", "failed")
    assert "of earlier epochs" not in str(EpochReport(4, 2, 64, 32))
