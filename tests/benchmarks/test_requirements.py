"""Requirements as predicates on medians."""

from __future__ import annotations

import pytest

from benchmarks.requirements import Requirement, Verdict, at_least, at_most

MEDIANS = {"shoal": {"mb_per_s": 300.0, "cpu_s_per_gb": 2.0}, "hivemind": {"mb_per_s": 100.0}}


def test_a_multiple_of_another_side_is_met_from_the_limit_on():
    assert at_least("mb_per_s", 3.0, of="hivemind").check(MEDIANS) == Verdict(3.0, met=True)
    assert at_least("mb_per_s", 3.01, of="hivemind").check(MEDIANS) == Verdict(3.0, met=False)


def test_an_absolute_limit_needs_no_other_side():
    assert at_most("cpu_s_per_gb", 2.0).check(MEDIANS).met is True
    assert at_most("cpu_s_per_gb", 1.9).check(MEDIANS).met is False


def test_a_side_that_was_not_measured_decides_nothing():
    assert at_least("mb_per_s", 0.1, of="gloo").check(MEDIANS) == Verdict(None, None)
    assert at_least("mb_per_s", 0.1).check({"hivemind": {"mb_per_s": 1.0}}) == Verdict(None, None)


def test_an_aim_is_judged_apart_from_the_limit():
    assert at_most("cpu_s_per_gb", 2.5, aim=1.5).check(MEDIANS) == Verdict(2.0, met=True, aim_met=False)
    assert at_most("cpu_s_per_gb", 2.5, aim=2.0).check(MEDIANS).aim_met is True


def test_the_text_names_figure_limit_measure_and_aim():
    assert at_least("mb_per_s", 5, of="hivemind", aim=8).text == "rate >= 5 x hivemind (aim 8)"
    assert at_most("form_s", 1.0).text == "group formed <= 1 s"


def test_an_unknown_figure_is_an_error_at_once():
    with pytest.raises(ValueError, match=r"figure must be one of .*, got 'speed'"):
        Requirement("speed", "at least", 1.0)
