"""What a step says of itself: figures that people can read, in a line and in a notebook."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import pytest

import shoal
from shoal.averaging.report import DoubtOutcome, DoubtReport, Exclusion, Phases, StepReport

PHASES = Phases(search=6.162, snapshot=0.0012, allreduce=0.0359999999, apply=0.001)
REPORT = StepReport(
    3,
    members=("a", "b"),
    attempts=1,
    bytes_sent=12,
    bytes_received=60,
    spread_distance=0.5,
    spread_relative=1.0,
    phases=PHASES,
)


def test_a_report_is_one_line_of_readable_figures():
    assert str(REPORT) == (
        "step 3: 2 peers in 6.2 s (search 6.16 s, all-reduce 38.2 ms), 72 bytes, "
        "peers differed by 100 % of the average (root mean square)"
    )


def test_a_rate_is_told_where_it_says_something_of_the_link():
    large = replace(REPORT, bytes_sent=30_000_000, bytes_received=30_000_000, phases=Phases(allreduce=2.0))
    assert ", 60 MB at 240 Mbit/s," in str(large)
    assert "bit/s" not in str(REPORT)
    assert "bit/s" not in str(replace(large, phases=Phases(allreduce=0.001)))


def test_what_became_of_an_earlier_doubt_is_told():
    doubt = DoubtReport(1, DoubtOutcome.DROPPED, "a later round has taken the tensors")
    told = "step 1, which was in doubt: dropped (a later round has taken the tensors)"
    for report in (REPORT, replace(REPORT, failure="no group")):
        report = replace(report, doubt=doubt)
        assert str(report).endswith(f"; {told}")
        assert told in report._repr_html_()
        assert report.to_dict()["doubt"]["outcome"] == "dropped"


def test_one_peer_is_not_plural():
    assert str(replace(REPORT, members=("a",))).startswith("step 3: 1 peer in ")


@pytest.mark.parametrize(
    ("distance", "relative", "shown"),
    [
        (0.5, 0.0123456, "peers differed by 1.23 % of the average (root mean square)"),
        (7.25e-3, None, "peers differed by 0.00725 (root mean square)"),
    ],
)
def test_how_far_peers_were_apart_is_told(distance: float, relative: float | None, shown: str):
    assert str(replace(REPORT, spread_distance=distance, spread_relative=relative)).endswith(f", {shown}")


def test_what_was_not_measured_and_nobody_excluded_takes_no_words():
    text = str(replace(REPORT, spread_distance=None, spread_relative=None))
    assert text.endswith("72 bytes")


def test_excluded_members_are_named():
    exclusion = Exclusion("c", "exchange", 1.23456, "it sent nothing")
    assert str(replace(REPORT, excluded=(exclusion,))).endswith(
        ", excluded: c (exchange, after 1.23 s: it sent nothing)"
    )


def test_a_failure_is_told_with_its_reason():
    assert str(replace(REPORT, failure="no group")) == "step 3: failed after 6.2 s: no group"


@pytest.mark.parametrize("report", [REPORT, replace(REPORT, failure="<b>no</b> & group", attempts=2)])
def test_a_notebook_shows_a_table_with_three_digits(report: StepReport):
    html = report._repr_html_()
    assert not re.search(r"\d{5}", html)
    assert "<th>search</th><td>6.16 s</td>" in html
    assert "<b>" not in html
    assert ("averaged" in html) == report.succeeded


def test_the_former_name_is_the_same_class_also_in_old_pickles():
    old = pickle.dumps(REPORT, protocol=0).replace(b"StepReport", b"RoundReport")
    assert pickle.loads(old) == REPORT
    assert shoal.RoundReport is shoal.averaging.RoundReport is shoal.StepReport
