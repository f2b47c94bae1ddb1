"""Rules for what users hand over: one text for errors and documentation, and Python's own values as a result."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.checks import Choice, Count, Flag, Number, Rule, Text


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        (Number(), "a number"),
        (Number(minimum=0, unit="s"), "at least 0 s"),
        (Number(above=0), "more than 0"),
        (Number(maximum=2), "at most 2"),
        (Number(0.1, maximum=3000, unit="s"), "0.1 to 3000 s"),
        (Number(above=0, maximum=2), "more than 0 and at most 2"),
        (Count(1), "at least 1"),
        (Count(1, 4096, "peers"), "1 to 4096 peers"),
        (Flag(), "True or False"),
        (Choice(("ready", "called")), "'ready' or 'called'"),
        (Text(), "a text"),
    ],
)
def test_a_rule_says_what_it_allows(rule: Rule, allowed: str):
    assert rule.allowed == allowed


@pytest.mark.parametrize(
    ("rule", "value", "error", "text"),
    [
        (Number(minimum=0), -1, InvalidValueError, "x must be at least 0, got -1"),
        (Number(above=0), 0.0, InvalidValueError, "x must be more than 0, got 0.0"),
        (Number(0, maximum=2, unit="s"), 2.5, InvalidValueError, "x must be 0 to 2 s, got 2.5"),
        (Number(), math.nan, InvalidValueError, "x must be a finite number, got nan"),
        (Number(), -math.inf, InvalidValueError, "x must be a finite number, got -inf"),
        (Number(), True, InvalidTypeError, "x must be a number, got True"),
        (Number(), "1", InvalidTypeError, "x must be a number, got '1'"),
        (Count(1, 3), 4, InvalidValueError, "x must be 1 to 3, got 4"),
        (
            Count(0, 3, "bytes", "it is full"),
            4,
            InvalidValueError,
            "x must be 0 to 3 bytes, got 4: it is full",
        ),
        (Count(1), 0, InvalidValueError, "x must be at least 1, got 0"),
        (Count(1), 1.0, InvalidTypeError, "x must be a whole number, got 1.0"),
        (Count(1), False, InvalidTypeError, "x must be a whole number, got False"),
        (Flag(), 1, InvalidTypeError, "x must be True or False, got 1"),
        (Choice(("a", "b")), "c", InvalidValueError, "x must be 'a' or 'b', got 'c'"),
        (Text(), b"t", InvalidTypeError, "x must be a text, got b't'"),
    ],
)
def test_what_breaks_a_rule_is_an_error_with_name_rule_and_value(
    rule: Rule, value: Any, error: type[Exception], text: str
):
    with pytest.raises(error) as caught:
        rule.check("x", value)
    assert str(caught.value) == text


@pytest.mark.parametrize("rule", [Number(), Count(0)])
def test_a_number_too_long_to_be_written_is_told_by_its_length(rule: Rule):
    with pytest.raises(InvalidValueError, match=r"a whole number of \d+ bits$"):
        rule.check("x", -(10**5000))


@pytest.mark.parametrize(
    ("rule", "value", "own"),
    [
        (Number(), np.float32(0.5), 0.5),
        (Count(0), np.int64(3), 3),
        (Flag(), np.bool_(True), True),
        (Text(), np.str_("t"), "t"),
    ],
)
def test_values_of_numpy_come_back_as_pythons_own(rule: Rule, value: Any, own: Any):
    checked = rule.check("x", value)
    assert checked == own
    assert type(checked) is type(own)


def test_a_text_may_have_a_further_check():
    def no_blanks(name: str, text: str) -> None:
        if " " in text:
            raise InvalidValueError(f"{name} must be without blanks, got {text!r}")

    rule = Text("a word", no_blanks)
    assert rule.check("x", "word") == "word"
    with pytest.raises(InvalidValueError, match="x must be without blanks, got 'a b'"):
        rule.check("x", "a b")
