"""The life of an averager: which state follows which, without threads or calls."""

from __future__ import annotations

import itertools

import pytest

from shoal.averaging.trainer.life import TRANSITIONS, Life, LifeState
from shoal.errors import InvalidStateError
from shoal.sansio.machine import IllegalTransition

A_START = (LifeState.WAITING_FOR_DHT, LifeState.CREATING, LifeState.ATTACHING, LifeState.RUNNING)
WAYS = {
    LifeState.NEW: (),
    **{state: A_START[: number + 1] for number, state in enumerate(A_START)},
    LifeState.FAILED: (*A_START[:2], LifeState.FAILED),
    LifeState.ENDED: (*A_START, LifeState.ENDED),
}


def life_in(state: LifeState) -> Life:
    life = Life()
    for one in WAYS[state]:
        assert life.enter(one, 0.0)
    assert life.state is state
    return life


@pytest.mark.parametrize("length", range(1, len(A_START) + 1))
def test_an_end_at_any_time_of_the_start_is_for_good(length: int):
    life = Life()
    for state in A_START[:length]:
        life.enter(state, 0.0)
    assert life.end(1.0)
    for late in (*A_START[length:], LifeState.FAILED):
        assert not life.enter(late, 2.0)
    assert not life.end(3.0)
    assert life.state is LifeState.ENDED


def test_a_shutdown_before_the_start_is_of_no_effect():
    life = Life()
    assert not life.end(0.0)
    assert life.enter(LifeState.WAITING_FOR_DHT, 1.0)


@pytest.mark.parametrize(("state", "to"), list(itertools.product(LifeState, LifeState)))
def test_what_the_table_does_not_have_is_an_error_and_changes_nothing(state: LifeState, to: LifeState):
    life = life_in(state)
    if to is LifeState.WAITING_FOR_DHT and state is not LifeState.NEW:  # a mistake of the user's
        with pytest.raises(InvalidStateError, match="started already"):
            life.enter(to, 0.0)
    elif state is LifeState.ENDED:
        assert not life.enter(to, 0.0)
    elif to in TRANSITIONS[state]:
        assert life.enter(to, 0.0)
        assert life.state is to
        return
    else:
        with pytest.raises(IllegalTransition, match=f"{state.name} -> {to.name} is no transition") as caught:
            life.enter(to, 0.0)
        assert len(caught.value.history) == len(WAYS[state]) + 1
    assert life.state is state


@pytest.mark.parametrize("state", LifeState)
def test_calls_are_for_averagers_that_run_or_will(state: LifeState):
    life = life_in(state)
    if state in (LifeState.NEW, LifeState.ENDED):
        with pytest.raises(InvalidStateError, match=state.value):
            life.check_running()
    else:
        life.check_running()  # also where the start has failed: its own error says more
    assert life.is_alive == (state not in (LifeState.NEW, LifeState.FAILED, LifeState.ENDED))
