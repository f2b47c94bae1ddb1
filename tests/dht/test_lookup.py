from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.ids import node_id
from shoal.dht.lookup import Answered, Event, Failed, Lookup, Stalled
from shoal.p2p.identity import PeerID

PEERS = [PeerID.from_public_key(number.to_bytes(32, "big")) for number in range(150)]
TARGET = 12345 << 130
BY_DISTANCE = sorted(PEERS, key=lambda peer: node_id(peer) ^ TARGET)


def make(seeds: list[PeerID], width: int = 5, parallel: int = 3, **options: object) -> Lookup:
    return Lookup(TARGET, width=width, parallel=parallel, seeds=seeds, **options)  # type: ignore[arg-type]


def test_asks_the_nearest_first_and_no_more_than_allowed() -> None:
    lookup = make(BY_DISTANCE[:10])
    assert lookup.start() == BY_DISTANCE[:3]
    assert lookup.handle(Answered(BY_DISTANCE[1], [])) == [BY_DISTANCE[3]]
    assert lookup.handle(Answered(BY_DISTANCE[1], [])) == []  # it was not asked twice
    assert lookup.handle(Answered(BY_DISTANCE[9], BY_DISTANCE[20:])) == []  # it was not asked at all


def test_finishes_when_the_nearest_have_answered() -> None:
    lookup = make(BY_DISTANCE[:10])
    asked = lookup.start()
    while asked:
        asked += lookup.handle(Answered(asked.pop(0), []))
    assert lookup.finished
    assert lookup.nearest_answered() == BY_DISTANCE[:5]


def test_follows_nearer_nodes_that_answers_name() -> None:
    lookup = make([BY_DISTANCE[50]])
    assert lookup.start() == [BY_DISTANCE[50]]
    assert lookup.handle(Answered(BY_DISTANCE[50], BY_DISTANCE[20:25])) == BY_DISTANCE[20:23]
    assert lookup.handle(Answered(BY_DISTANCE[20], BY_DISTANCE[:2])) == [BY_DISTANCE[0]]
    assert not lookup.finished
    assert lookup.known(3) == [BY_DISTANCE[0], BY_DISTANCE[1], BY_DISTANCE[20]]


def test_a_node_that_failed_makes_room_for_the_next() -> None:
    lookup = make(BY_DISTANCE[:4], width=2, parallel=2)
    assert lookup.start() == BY_DISTANCE[:2]
    assert lookup.handle(Failed(BY_DISTANCE[0])) == [BY_DISTANCE[2]]
    lookup.handle(Answered(BY_DISTANCE[1], []))
    lookup.handle(Answered(BY_DISTANCE[2], []))
    assert lookup.finished
    assert lookup.nearest_answered() == BY_DISTANCE[1:3]


def test_a_stalled_node_is_passed_over_but_may_still_answer() -> None:
    lookup = make(BY_DISTANCE[:3], width=2, parallel=2)
    lookup.start()
    assert lookup.handle(Stalled(BY_DISTANCE[0])) == [BY_DISTANCE[2]]
    lookup.handle(Answered(BY_DISTANCE[1], []))
    assert not lookup.finished
    lookup.handle(Answered(BY_DISTANCE[0], []))
    assert lookup.nearest_answered() == BY_DISTANCE[:2]
    assert lookup.finished


def test_waits_for_a_stalled_node_if_there_is_nobody_else() -> None:
    lookup = make(BY_DISTANCE[:1])
    lookup.start()
    lookup.handle(Stalled(BY_DISTANCE[0]))
    assert not lookup.finished
    lookup.handle(Failed(BY_DISTANCE[0]))
    assert lookup.finished
    assert lookup.nearest_answered() == []


def test_nobody_to_ask_is_finished_at_once() -> None:
    lookup = make([], answered=BY_DISTANCE[:1])
    assert lookup.start() == []
    assert lookup.finished
    assert lookup.nearest_answered() == BY_DISTANCE[:1]


def test_the_searching_node_counts_among_the_nearest() -> None:
    lookup = make(BY_DISTANCE[1:9], width=2, answered=BY_DISTANCE[:1])
    assert lookup.start() == [BY_DISTANCE[1]]
    lookup.handle(Answered(BY_DISTANCE[1], []))
    assert lookup.finished
    assert lookup.nearest_answered() == BY_DISTANCE[:2]


def test_only_so_many_nodes_of_one_answer_are_heard() -> None:
    lookup = make([BY_DISTANCE[100]], max_nodes_per_answer=4)
    lookup.start()
    lookup.handle(Answered(BY_DISTANCE[100], BY_DISTANCE[:50]))
    assert lookup.known(100) == [*BY_DISTANCE[:4], BY_DISTANCE[100]]


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
        event: Event = Stalled(peer)
        if kind != "stalled":
            waiting.remove(peer)
            event = Failed(peer) if kind == "failed" else Answered(peer, data.draw(peers))
        elif steps > 300:
            continue
        more = lookup.handle(event)
        waiting += more
        asked += more
        steps += 1
    assert lookup.finished
    assert len(asked) == len(set(asked)) <= max_asked
    assert len(lookup.known(1000)) <= max_asked + lookup.max_nodes_per_answer
