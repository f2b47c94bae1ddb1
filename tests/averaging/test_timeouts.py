"""Times that a user gives: defaults follow them, and those that contradict each other are named with their values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shoal
from shoal.averaging.checks import OrderOfTimes
from shoal.averaging.config import AveragerConfig
from shoal.averaging.matchmaking_config import MatchmakingConfig, matchmaking_config
from shoal.averaging.timeouts import LOAD_TIMEOUT, ORDERS, RECORD_TIME, STEP_TIMEOUT, given_times, settle
from shoal.utils.ordering import DefaultSeconds, Order, contradictions

OF_THE_AVERAGER = (
    "min_matchmaking_time",
    "request_timeout",
    "allreduce_timeout",
    "next_chunk_timeout",
    "sender_timeout",
    "reducer_timeout",
)
OF_CALLS = (STEP_TIMEOUT, LOAD_TIMEOUT, RECORD_TIME)
seconds = st.floats(1e-3, 1e4)


def make(**options: object) -> shoal.DecentralizedAverager:
    dht = shoal.DHT(start=False)
    return shoal.DecentralizedAverager([torch.zeros(1)], dht, start=False, prefix="p", **options)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order.shorter} < {order.longer}")
def test_each_contradiction_names_both_with_their_values(order: Order, caplog: pytest.LogCaptureFixture):
    times = {order.shorter: 40.0, order.longer: 30.0}
    (text,) = contradictions(times, ORDERS)
    assert f"{order.shorter}=40 " in text
    assert f"{order.longer}=30:" in text
    assert contradictions({**times, order.shorter: 29.0}, ORDERS) == []
    if order.longer in OF_CALLS:
        checked = OrderOfTimes("p", {order.shorter: 40.0})
        for _ in range(3):
            checked.check(order.longer, 30.0)
    else:
        make(**times)
    assert [record.getMessage() for record in caplog.records] == [f"p: {text}"]


@pytest.mark.parametrize("name", [*OF_THE_AVERAGER, "declare_state_period"])
@pytest.mark.parametrize("value", [0.2, 2.0, 60.0, 1000.0])
def test_one_time_that_is_given_contradicts_nothing(
    name: str, value: float, caplog: pytest.LogCaptureFixture
):
    make(**{name: value})
    assert not caplog.records


def test_no_time_at_all_gives_the_usual_ones(caplog: pytest.LogCaptureFixture):
    make()
    assert not caplog.records
    times = settle({})
    assert (times.min_matchmaking_time, times.request_timeout) == (5.0, 3.0)
    assert (times.sender_timeout, times.reducer_timeout, times.each_part) == (180.0, 360.0, 60.0)


@given(st.dictionaries(st.sampled_from(OF_THE_AVERAGER), seconds))
def test_times_that_do_not_contradict_each_other_end_in_order(chosen: dict[str, float]):
    times = settle(chosen)
    for name, value in chosen.items():
        assert getattr(times, name, value) == value
    if contradictions(chosen, ORDERS):
        return
    all_times = {**chosen, **{name: getattr(times, name) for name in times.__dataclass_fields__}}
    assert contradictions(all_times, [order for order in ORDERS if order.longer not in OF_CALLS]) == []
    if "sender_timeout" in chosen or "reducer_timeout" in chosen or "next_chunk_timeout" in chosen:
        assert times.each_part is None  # what the user says how long a part may take holds for each of them


@pytest.mark.parametrize(
    ("chosen", "sender", "reducer"),
    [
        ({"next_chunk_timeout": 10.0}, 10.0, 20.0),
        ({"sender_timeout": 4.0}, 4.0, 8.0),
        ({"next_chunk_timeout": 10.0, "sender_timeout": 4.0}, 4.0, 8.0),
        ({"reducer_timeout": 30.0}, 15.0, 30.0),
        ({"next_chunk_timeout": 40.0, "reducer_timeout": 30.0}, 15.0, 30.0),
        ({"next_chunk_timeout": 40.0, "allreduce_timeout": 30.0}, 10.0, 20.0),
        ({"sender_timeout": 20.0, "allreduce_timeout": 30.0}, 20.0, 25.0),
        ({"allreduce_timeout": 30.0}, 10.0, 20.0),
        ({"allreduce_timeout": 3600.0}, 180.0, 360.0),
        ({"adaptive_timeouts": True}, 60.0, 120.0),
        ({"adaptive_timeouts": True, "allreduce_timeout": 90.0}, 30.0, 60.0),
        ({"adaptive_timeouts": True, "next_chunk_timeout": 10.0}, 10.0, 20.0),
        ({"adaptive_timeouts": True, "sender_timeout": 600.0}, 600.0, 1200.0),
        ({}, 180.0, 360.0),
    ],
)
def test_defaults_of_a_round_follow_what_is_given(chosen: dict[str, float], sender: float, reducer: float):
    config = AveragerConfig("p", MatchmakingConfig(), None, **chosen)
    assert (config.effective_sender_timeout, config.effective_reducer_timeout) == (sender, reducer)


@pytest.mark.parametrize(
    ("wait", "request_timeout", "settled"),
    [
        (2.0, DefaultSeconds(3.0), (2.0, 1.2)),
        (DefaultSeconds(5.0), 6.0, (10.0, 6.0)),
        (DefaultSeconds(5.0), 1.0, (5.0, 1.0)),
        (60.0, DefaultSeconds(3.0), (60.0, 3.0)),
        (2.0, 3.0, (2.0, 3.0)),
    ],
)
def test_defaults_of_a_search_follow_what_is_given(
    wait: float, request_timeout: float, settled: tuple[float, float]
):
    config = matchmaking_config(None, 2, wait, request_timeout)
    assert (config.min_matchmaking_time, config.request_timeout) == pytest.approx(settled)


def test_a_leader_that_does_not_answer_costs_half_of_a_short_search():
    config = MatchmakingConfig(request_timeout=3.0)
    assert config.within(None) == config.within(60.0) == config
    assert config.within(4.0).request_timeout == 2.0
    assert config.within(0.5).request_timeout == 1.0


def test_only_what_a_user_gave_counts_as_given():
    assert given_times(a=DefaultSeconds(3.0), b=3.0, c=None) == {"a": None, "b": 3.0, "c": None}
    assert math.isclose(DefaultSeconds(3.0), 3.0)


def test_times_of_a_dht_follow_each_other():
    assert shoal.DHT(start=False, wait_timeout=1.0)._setup.config.stall_timeout == 0.25
    assert shoal.DHT(start=False, wait_timeout=10.0)._setup.config.stall_timeout == 0.7
    assert shoal.DHT(start=False, stall_timeout=2.0)._setup.config.wait_timeout == 8.0


@pytest.mark.parametrize(
    ("shorter", "longer"), [("stall_timeout", "wait_timeout"), ("wait_timeout", "bootstrap_timeout")]
)
def test_times_of_a_dht_that_contradict_each_other_are_named(shorter: str, longer: str):
    with pytest.warns(UserWarning, match=f"{shorter}=4 should be smaller than {longer}=2: "):
        shoal.DHT(start=False, **{shorter: 4.0, longer: 2.0})
