"""When Shoal's records are seen, and when they give way to the program's own logging."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from shoal.utils import get_logger

SHOW = "from shoal.utils import get_logger; import logging; log = get_logger('shoal.x'); "


def errors_of(code: str, level: str | None = None) -> str:
    """What a program prints to standard error, given a value of SHOAL_LOGLEVEL."""
    environment = {name: value for name, value in os.environ.items() if name != "SHOAL_LOGLEVEL"}
    if level is not None:
        environment["SHOAL_LOGLEVEL"] = level
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert result.stdout == ""
    return result.stderr


def test_names():
    assert get_logger("shoal.x") is logging.getLogger("shoal.x")
    assert get_logger() is logging.getLogger("shoal")


def test_info_is_seen_where_nothing_is_configured():
    out = errors_of(SHOW + "log.debug('fine'); log.info('seen')")
    assert out.endswith("[INFO] [shoal.x] seen\n")
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("level", "seen"),
    [("debug", ["d", "i", "e"]), ("10", ["d", "i", "e"]), ("ERROR", ["e"]), ("off", []), ("", ["i", "e"])],
)
def test_the_environment_decides(level, seen):
    out = errors_of(SHOW + "log.debug('d'); log.info('i'); log.error('e')", level)
    assert [line[-1] for line in out.splitlines()] == seen


def test_a_level_that_is_none_is_told():
    out = errors_of(SHOW + "log.info('seen')", "chatty")
    assert "SHOAL_LOGLEVEL='CHATTY' is not a level" in out
    assert "seen" in out


@pytest.mark.parametrize("order", ["before", "after"])
def test_it_gives_way_to_the_program_s_logging(order):
    configure = "import logging; logging.basicConfig(format='own %(message)s', level='INFO'); "
    code = configure + SHOW if order == "before" else SHOW + configure
    assert errors_of(code + "log.info('once')") == "own once\n"


def test_importing_alone_changes_nothing():
    code = "import shoal, shoal.utils, logging, sys; assert not logging.getLogger('shoal').handlers"
    assert errors_of(code) == ""
