from __future__ import annotations

import pytest

from shoal.utils.text import MAX_FOREIGN_TEXT, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("refused", "refused"),
        ("naïve 値 \\n", "naïve 値 \\n"),
        ("a\nb\r\tc\0", "a\\nb\\r\\tc\\x00"),
        ("\x1b[2J\x9b1m", "\\x1b[2J\\x9b1m"),
        ("\u2028\u202e\udce9\U000e0001", "\\u2028\\u202e\\udce9\\U000e0001"),
    ],
)
def test_what_is_not_printable_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize("character", ["x", "\n", "\U000e0001"])
def test_it_is_cut_to_its_limit_escapes_included(character):
    for limit in (32, MAX_FOREIGN_TEXT):
        for length in (limit - 1, limit, limit + 1, 10 * limit):
            text = printable(character * length, limit)
            assert len(text) <= limit
            assert (text == character * length) == (character == "x" and length <= limit)
            assert printable(text, limit) == text
