from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.ids import node_id
from shoal.dht.lookup_core import (
    FEWEST_NAMES,
    AskNode,
    Event,
    LookupBegan,
    LookupCore,
    LookupState,
    LookupStopped,
    NodeAnswered,
    NodeFailed,
)
from shoal.dht.routing import RoutingTable
from shoal.p2p.identity import PeerID
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import IllegalTransition

PEERS = [PeerID.from_public_key(number.to_bytes(32, "big")) for number in range(150)]
TARGET = 12345 << 130
BY_DISTANCE = sorted(PEERS, key=lambda peer: node_id(peer) ^ TARGET)


STALL = 2.0


class Search:
    """A core, and whom it asks."""

    def __init__(self, core: LookupCore) -> None:
        self.core = core
        self.now = 0.0

    def handle(self, event: Event) -> list[PeerID]:
        return [effect.peer for effect in self.core.handle(event, self.now)]

    def start(self) -> list[PeerID]:
        return self.handle(LookupBegan())

    def wait(self) -> list[PeerID]:
        """Until those that were asked stall."""
        self.now = self.core.deadline
        return self.handle(TimePassed())


def make(seeds: list[PeerID], width: int = 5, parallel: int = 3, **options: object) -> Search:
    core = LookupCore(TARGET, width=width, parallel=parallel, stall_timeout=STALL, seeds=seeds, **options)  # type: ignore[arg-type]
    return Search(core)


def test_asks_the_nearest_first_and_no_more_than_allowed() -> None:
    lookup = make(BY_DISTANCE[:10])
    assert lookup.start() == BY_DISTANCE[:3]
    assert lookup.handle(NodeAnswered(BY_DISTANCE[1], [])) == [BY_DISTANCE[3]]
    assert lookup.handle(NodeAnswered(BY_DISTANCE[1], [])) == []  # it was not asked twice
    assert lookup.handle(NodeAnswered(BY_DISTANCE[9], BY_DISTANCE[20:])) == []  # it was not asked at all


def test_finishes_when_the_nearest_have_answered() -> None:
    lookup = make(BY_DISTANCE[:10])
    asked = lookup.start()
    while asked:
        asked += lookup.handle(NodeAnswered(asked.pop(0), []))
    assert lookup.core.finished
    assert lookup.core.nearest_answered() == BY_DISTANCE[:5]


def test_follows_nearer_nodes_that_answers_name() -> None:
    lookup = make([BY_DISTANCE[50]])
    assert lookup.start() == [BY_DISTANCE[50]]
    assert lookup.handle(NodeAnswered(BY_DISTANCE[50], BY_DISTANCE[20:25])) == BY_DISTANCE[20:23]
    assert lookup.handle(NodeAnswered(BY_DISTANCE[20], BY_DISTANCE[:2])) == [BY_DISTANCE[0]]
    assert not lookup.core.finished
    assert lookup.core.known(3) == [BY_DISTANCE[0], BY_DISTANCE[1], BY_DISTANCE[20]]


def test_a_node_that_failed_makes_room_for_the_next() -> None:
    lookup = make(BY_DISTANCE[:4], width=2, parallel=2)
    assert lookup.start() == BY_DISTANCE[:2]
    assert lookup.handle(NodeFailed(BY_DISTANCE[0])) == [BY_DISTANCE[2]]
    lookup.handle(NodeAnswered(BY_DISTANCE[1], []))
    lookup.handle(NodeAnswered(BY_DISTANCE[2], []))
    assert lookup.core.finished
    assert lookup.core.nearest_answered() == BY_DISTANCE[1:3]


def test_a_stalled_node_is_passed_over_but_may_still_answer() -> None:
    lookup = make(BY_DISTANCE[:3], width=2, parallel=2)
    lookup.start()
    assert lookup.handle(NodeAnswered(BY_DISTANCE[1], [])) == []
    assert lookup.core.deadline == STALL
    assert lookup.handle(TimePassed()) == []  # too early
    assert lookup.wait() == [BY_DISTANCE[2]]
    assert not lookup.core.finished
    lookup.handle(NodeAnswered(BY_DISTANCE[0], []))
    assert lookup.core.nearest_answered() == BY_DISTANCE[:2]
    assert lookup.core.finished


def test_waits_for_a_stalled_node_if_there_is_nobody_else() -> None:
    lookup = make(BY_DISTANCE[:1])
    lookup.start()
    assert lookup.wait() == []
    assert lookup.core.deadline == NEVER
    assert not lookup.core.finished
    lookup.handle(NodeFailed(BY_DISTANCE[0]))
    assert lookup.core.finished
    assert lookup.core.nearest_answered() == []


def test_nobody_to_ask_is_finished_at_once() -> None:
    lookup = make([], answered=BY_DISTANCE[:1])
    assert lookup.start() == []
    assert lookup.core.finished
    assert lookup.core.nearest_answered() == BY_DISTANCE[:1]


def test_the_searching_node_counts_among_the_nearest() -> None:
    lookup = make(BY_DISTANCE[1:9], width=2, answered=BY_DISTANCE[:1])
    assert lookup.start() == [BY_DISTANCE[1]]
    lookup.handle(NodeAnswered(BY_DISTANCE[1], []))
    assert lookup.core.finished
    assert lookup.core.nearest_answered() == BY_DISTANCE[:2]


def test_only_so_many_nodes_of_one_answer_are_heard() -> None:
    lookup = make([BY_DISTANCE[100]], max_nodes_per_answer=4)
    lookup.start()
    lookup.handle(NodeAnswered(BY_DISTANCE[100], BY_DISTANCE[:50]))
    assert lookup.core.known(100) == [*BY_DISTANCE[:4], BY_DISTANCE[100]]


@settings(max_examples=200)
@given(st.data())
def test_terminates_and_stays_bounded_on_any_answers(data: st.DataObject) -> None:
    peers = st.lists(st.sampled_from(PEERS), max_size=12)
    max_asked = data.draw(st.integers(1, 30))
    lookup = make(
        data.draw(peers), data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4)), max_asked=max_asked
    )
    waiting = lookup.start()
    asked = list(waiting)
    steps = 0
    while waiting:
        peer = waiting[data.draw(st.integers(0, len(waiting) - 1))]
        kind = data.draw(st.sampled_from(["answered", "failed", "stalled"]))
        event: Event = TimePassed()
        lookup.now += data.draw(st.floats(0.0, 2 * STALL))
        if kind != "stalled":
            waiting.remove(peer)
            event = NodeFailed(peer) if kind == "failed" else NodeAnswered(peer, data.draw(peers))
        elif steps > 300:
            continue
        more = lookup.handle(event)
        waiting += more
        asked += more
        steps += 1
    assert lookup.core.finished
    assert len(asked) == len(set(asked)) <= max_asked
    assert len(lookup.core.known(1000)) <= max_asked + lookup.core.max_nodes_per_answer


LATER: list[Event] = [
    NodeAnswered(BY_DISTANCE[0], []),
    NodeFailed(BY_DISTANCE[0]),
    LookupStopped(),
    TimePassed(),
]


@pytest.mark.parametrize("event", LATER, ids=lambda event: type(event).__name__)
def test_nothing_happens_before_the_beginning(event: Event) -> None:
    lookup = make(BY_DISTANCE[:4])
    with pytest.raises(IllegalTransition, match="NEW: ") as caught:
        lookup.handle(event)
    assert [entry.event for entry in caught.value.history] == [event]


@pytest.mark.parametrize("last", [None, LookupStopped(), NodeAnswered(BY_DISTANCE[0], [])])
def test_it_begins_once(last: Event | None) -> None:
    lookup = make(BY_DISTANCE[:1])
    lookup.start()
    if last is not None:
        lookup.handle(last)
    with pytest.raises(IllegalTransition) as caught:
        lookup.start()
    assert caught.value.history[0].event == LookupBegan()


@pytest.mark.parametrize("event", LATER, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("last", [LookupStopped(), NodeFailed(BY_DISTANCE[0])])
def test_what_comes_when_it_is_over_changes_nothing(last: Event, event: Event) -> None:
    lookup = make(BY_DISTANCE[:1])
    lookup.start()
    lookup.handle(last)
    state, found = lookup.core.state, lookup.core.nearest_answered()
    assert state is (LookupState.STOPPED if isinstance(last, LookupStopped) else LookupState.FINISHED)
    lookup.now = 10.0
    assert lookup.handle(event) == []
    assert (lookup.core.state, lookup.core.nearest_answered()) == (state, found)
    assert lookup.core.deadline == NEVER


def test_one_that_was_stopped_has_not_finished_and_asks_nobody_more() -> None:
    lookup = make(BY_DISTANCE[:9])
    lookup.start()
    assert lookup.handle(LookupStopped()) == []
    assert lookup.core.is_over
    assert not lookup.core.finished


def test_each_node_that_was_asked_stalls_in_its_own_time() -> None:
    lookup = make(BY_DISTANCE[:9], parallel=1)
    lookup.start()
    lookup.now = 1.0
    assert lookup.core.handle(NodeFailed(BY_DISTANCE[0]), 1.0) == [AskNode(BY_DISTANCE[1])]
    assert lookup.core.deadline == 1.0 + STALL


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("dead_share", [0.1, 0.3, 0.5])
def test_the_nearest_that_live_are_found_though_many_have_just_died(width: int, dead_share: float):
    """Nobody's table knows of the dead yet, and answers name few nodes."""
    rng = random.Random(f"{width} {dead_share}")
    peers = [PeerID.from_public_key(rng.randbytes(32)) for _ in range(120)]
    tables = {peer: RoutingTable(node_id(peer), 20) for peer in peers}
    for peer, table in tables.items():
        for other in rng.sample(peers, len(peers)):
            if other != peer:
                table.answered(other, 0.0)
    for _ in range(25):
        target = node_id(PeerID.from_public_key(rng.randbytes(32)))
        dead = {peer for peer in peers if rng.random() < dead_share}
        living = sorted((peer for peer in peers if peer not in dead), key=lambda peer: node_id(peer) ^ target)
        caller = rng.choice(living[8:])
        seeds = [node.peer for node in tables[caller].nearest(target, 20)]
        core = LookupCore(target, width=width, parallel=3, seeds=seeds, answered=[caller])
        asked = core.handle(LookupBegan(), 0.0)
        while asked:
            peer = asked.pop(0).peer
            if peer in dead:
                asked += core.handle(NodeFailed(peer), 0.0)
                continue
            known = {caller, *core.known(core.names_wanted)}
            named = [node.peer for node in tables[peer].nearest(target, core.names_wanted)]
            asked += core.handle(NodeAnswered(peer, [one for one in named if one not in known]), 0.0)
        assert core.nearest_answered() == living[:width]


def test_names_are_few_until_a_node_has_failed():
    peers = [PeerID.from_public_key(bytes([number]) * 32) for number in range(4)]
    core = LookupCore(0, width=2, parallel=2, seeds=peers)
    assert core.names_wanted == FEWEST_NAMES
    first, second = core.handle(LookupBegan(), 0.0)
    core.handle(NodeAnswered(first.peer, []), 0.0)
    assert core.names_wanted == FEWEST_NAMES
    core.handle(NodeFailed(second.peer), 0.0)
    assert core.names_wanted == 20
