"""States, transitions and histories."""

from __future__ import annotations

import enum

import pytest

from shoal.averaging.allreduce.events import TRANSITIONS as ALLREDUCE
from shoal.averaging.matchmaking.states import TRANSITIONS as MATCHMAKING
from shoal.averaging.state.choice import TRANSITIONS as DOWNLOAD
from shoal.averaging.state.queue import TRANSITIONS as UPLOADS
from shoal.dht.bootstrap_core import TRANSITIONS as BOOTSTRAP
from shoal.dht.lookup_core import TRANSITIONS as LOOKUP
from shoal.sansio.machine import IllegalTransition, Machine, mermaid


class Light(enum.Enum):
    RED = enum.auto()
    GREEN = enum.auto()
    OFF = enum.auto()


TABLE = {Light.RED: {Light.GREEN, Light.OFF}, Light.GREEN: {Light.RED}, Light.OFF: set()}


def test_it_moves_as_its_table_says():
    machine = Machine(Light.RED, TABLE)
    machine.move(Light.GREEN)
    machine.move(Light.RED)
    assert not machine.is_final
    machine.move(Light.OFF)
    assert machine.is_final


@pytest.mark.parametrize("to", [Light.GREEN, Light.OFF])
def test_what_is_not_in_the_table_is_an_error_with_its_history(to):
    machine = Machine(Light.RED, TABLE)
    machine.note("pressed", 1.5)
    machine.move(Light.GREEN)
    machine.note("pressed again", 2.5)
    with pytest.raises(IllegalTransition, match=f"GREEN -> {to.name} is no transition") as caught:
        machine.move(to)
    assert [entry.event for entry in caught.value.history] == ["pressed", "pressed again"]
    assert "1.500 RED: 'pressed'" in str(caught.value)
    assert machine.state is Light.GREEN


def test_an_event_is_heard_only_in_the_states_in_which_it_may_come():
    """What may not come is an error, and the last line of that error's history."""
    machine = Machine(Light.RED, TABLE, {Light.RED: {str}, Light.GREEN: {str, int}})
    machine.hear("pressed", 1.5)
    with pytest.raises(IllegalTransition, match=r"Light\.RED: int cannot happen") as caught:
        machine.hear(5, 2.5)
    assert [entry.event for entry in caught.value.history] == ["pressed", 5]
    machine.move(Light.GREEN)
    machine.hear(5, 3.5)
    machine.state = Light.OFF
    with pytest.raises(IllegalTransition, match=r"Light\.OFF: str cannot happen"):
        machine.hear("pressed", 4.5)


def test_only_the_latest_events_are_remembered():
    machine = Machine(Light.RED, TABLE, length=3)
    for number in range(10):
        machine.note(number, float(number))
    assert [entry.event for entry in machine.history] == [7, 8, 9]


@pytest.mark.parametrize("table", [ALLREDUCE, MATCHMAKING, DOWNLOAD, UPLOADS, BOOTSTRAP, LOOKUP])
def test_every_state_of_a_core_is_in_its_table_and_can_be_reached(table):
    states = set(type(next(iter(table))))
    assert set(table) == states
    first = next(iter(table))
    reached, waiting = {first}, [first]
    while waiting:
        for following in table[waiting.pop()]:
            if following not in reached:
                reached.add(following)
                waiting.append(following)
    assert reached == states


def test_a_table_can_be_drawn():
    assert mermaid(TABLE).splitlines() == [
        "stateDiagram-v2",
        "    RED --> GREEN",
        "    RED --> OFF",
        "    GREEN --> RED",
    ]
