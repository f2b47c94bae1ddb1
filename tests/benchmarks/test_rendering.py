"""The report as Markdown and JSON."""

from __future__ import annotations

import json

import pytest

from benchmarks.rendering import markdown, number
from benchmarks.requirements import at_least, at_most
from benchmarks.results import Report, RowResult
from benchmarks.rows import Row
from benchmarks.work import HIVEMIND, SHOAL, Averaging, raw

ROW = Row(
    "link",
    "a link",
    Averaging(2, 32),
    (SHOAL, HIVEMIND, *raw(1, 16)),
    ("mbit_per_s", "form_s"),
    (at_least("mbit_per_s", 1.0, of="raw"), at_most("form_s", 1.0)),
)


def measured() -> RowResult:
    result = RowResult(ROW)
    for rate in (40.0, 60.0, 50.0):
        result.add("shoal", {"mbit_per_s": rate, "form_s": 0.25})
    result.add("hivemind", {"mbit_per_s": 4.0})
    result.add("raw 1", {"mbit_per_s": 5.0})
    result.add("raw 16", {"mbit_per_s": 80.0})
    return result


def report(*results: RowResult, quick: bool = False) -> Report:
    return Report({"CPU": "a fast one"}, list(results), quick)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1234.5, 3, "1,230"),
        (12.345, 3, "12.3"),
        (1.0, 3, "1.00"),
        (0.123, 2, "0.12"),
        (99.96, 3, "100"),
        (-3.14, 2, "-3.1"),
        (0.0, 3, "0"),
    ],
)
def test_numbers_have_as_many_digits_as_they_are_worth(value: float, digits: int, text: str):
    assert number(value, digits) == text


def test_a_row_shows_medians_spreads_ratios_and_verdicts():
    lines = markdown(report(measured())).splitlines()
    rate = next(line for line in lines if line.startswith("| a link |"))
    assert rate == (
        "| a link | rate | 50.0 Mbit/s (40.0 to 60.0) | 4.00 Mbit/s: 12.5 x | raw 16 80.0 Mbit/s; raw 1 5.00 Mbit/s | "
        "rate >= 1 x raw: 0.625, **missed** |"
    )
    assert "|  | group formed | 0.25 s (0.25 to 0.25) |  |  | group formed <= 1 s: 0.250, met |" in lines


def test_what_was_not_measured_is_not_called_missed():
    result = RowResult(ROW)
    result.add("shoal", {"mbit_per_s": 50.0})
    assert "rate >= 1 x raw: not measured" in markdown(report(result))


def test_what_was_left_out_is_told_with_its_reason():
    skipped = RowResult(ROW, skipped="network namespaces need root")
    text = markdown(report(skipped))
    assert "- a link: left out: network namespaces need root" in text
    assert "| work |" not in text


def test_sockets_are_counted_by_their_congestion_control():
    result = measured()
    result.controls = {"shoal": {"cubic": 6, "bbr": 1}, "raw 16": {"cubic": 32}}
    assert "| a link | shoal: 1 bbr, 6 cubic; raw 16: 32 cubic |" in markdown(report(result))


def test_a_quick_run_says_so():
    assert "quick run" in markdown(report(measured(), quick=True))
    assert "quick run" not in markdown(report(measured()))


def test_remarks_are_told_once():
    result = measured()
    result.note("hivemind failed: it hung")
    result.note("hivemind failed: it hung")
    assert markdown(report(result)).count("hivemind failed: it hung") == 1


def test_json_has_every_sample_and_verdict():
    (row,) = json.loads(json.dumps(report(measured()).as_json()))["rows"]
    assert row["samples"]["shoal"]["mbit_per_s"] == [40.0, 60.0, 50.0]
    assert row["required"][0] == {
        "text": "rate >= 1 x raw",
        "value": 0.625,
        "met": False,
        "aim_met": None,
    }
