"""docs/timeouts.md: its defaults are those of the code, and it lists every timeout."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import shoal
from shoal.averaging.allreduce import deadlines, lateness
from shoal.averaging.allreduce.events import RoundTimeouts
from shoal.averaging.config import AveragerConfig
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.timeouts import ADAPTIVE_CEILING
from shoal.dht.config import DHTConfig
from shoal.p2p.config import HostConfig
from shoal.utils.options import options_of

PAGE = (Path(__file__).parents[2] / "docs" / "timeouts.md").read_text()
SOURCE = Path(shoal.__file__).parent
CONSTANT = re.compile(r"^\| `([A-Z_]+)` \| ([\d.]+) \| `([\w.]+)` \|", re.MULTILINE)
OPTION = re.compile(r"^\| `([a-z_]+)` \| ([\d.]+|none) \|", re.MULTILINE)
IN_SOURCE = re.compile(
    r"^([A-Z_]*(?:TIMEOUT|GRACE|PATIENCE)|TURN|GATHER|LAG|STAND) = ([\d.]+)$", re.MULTILINE
)
ELSEWHERE = {"REDUCER_PATIENCE", "OWNER_PATIENCE"}
"""Factors, no seconds."""


def test_each_constant_has_the_value_of_the_code():
    rows = CONSTANT.findall(PAGE)
    assert len(rows) >= 20
    for name, seconds, module in rows:
        assert float(seconds) == getattr(importlib.import_module(f"shoal.{module}"), name), (name, module)


def test_every_timeout_of_averaging_is_listed():
    listed = {(module, name) for name, _, module in CONSTANT.findall(PAGE)}
    for part in ("allreduce", "background", "matchmaking"):
        for path in (SOURCE / "averaging" / part).glob("*.py"):
            for name, _ in IN_SOURCE.findall(path.read_text()):
                assert name in ELSEWHERE or (f"averaging.{part}.{path.stem}", name) in listed, (path, name)


def test_each_option_has_the_default_of_the_configuration():
    options = options_of(AveragerConfig) | options_of(MatchmakingConfig)
    rows = dict(OPTION.findall(PAGE))
    for name, default in rows.items():
        assert options[name].default == (None if default == "none" else float(default)), name
    assert {name for name in options if name.endswith("_timeout")} <= rows.keys()


def test_what_the_text_says_is_so():
    assert f"{RoundTimeouts().leader:g} s (`leader`)" in PAGE
    assert f"{RoundTimeouts().doubt:g} s (`doubt`)" in PAGE
    for name in ("probe_after", "min_answer_time", "max_answer_time"):
        assert f"{getattr(HostConfig(), name):g} s (`{name}`)" in re.sub(r"\s+", " ", PAGE)
    for name in options_of(DHTConfig):
        assert not name.endswith("_timeout") or name == "refresh_timeout" or f"`{name}`" in PAGE


def test_what_the_text_says_of_deadlines_that_adapt_is_so():
    text = re.sub(r"\s+", " ", PAGE)
    for words in (
        f"its last {deadlines.ROUNDS} rounds",
        f"the median plus {deadlines.TIMES_SPREAD:g} times the median absolute deviation",
        f"It is never below {lateness.FLOOR:g} s",
        f"before a peer has seen {deadlines.ENOUGH} such times",
        f"It is {ADAPTIVE_CEILING:g} s by default",
        f"{lateness.TIMES_THE_OTHERS:g} times as long as for half of the others",
    ):
        assert words in text
    assert deadlines.LEAST_SPREAD == 1 / 5
    assert lateness.GIVEN_UP == 2
