"""Which lane carries what: pieces are shared out, and sent again where a lane stalls or dies."""

from __future__ import annotations

import gc
import random
from collections import Counter, deque

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.errors import ProtocolViolation
from shoal.p2p.lanes.forecast import Flow
from shoal.p2p.lanes.scheduler import MAX_COPIES, Outgoing, Scheduler
from shoal.p2p.protocol.frames import CHUNK_BYTES


def payload(number: int, pieces: int) -> Outgoing:
    data = memoryview(bytes(pieces * CHUNK_BYTES - 1))
    return Outgoing(1, 1, number, number, data, is_wanted=lambda: True, on_taken=lambda: None)


class Wire:
    """One lane: bytes a second, which may be 0 for a while."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.written = 0
        self.acknowledged = 0.0
        self.queue: deque[tuple[int, Outgoing, int]] = deque()
        self.given: list[tuple[Outgoing, int]] = []

    def pass_time(self, seconds: float) -> list[tuple[Outgoing, int]]:
        self.acknowledged = min(self.written, self.acknowledged + self.rate * seconds)
        arrived = []
        while self.queue and self.queue[0][0] <= self.acknowledged:
            _, one, offset = self.queue.popleft()
            arrived.append((one, offset))
        return arrived


class Story:
    """Lanes of several speeds, each with room for two pieces."""

    def __init__(self, rates: list[float], payloads: list[Outgoing]) -> None:
        self.scheduler = Scheduler()
        self.wires = {number: Wire(rate) for number, rate in enumerate(rates)}
        self.now = 0.0
        self.arrived: dict[Outgoing, set[int]] = {one: set() for one in payloads}
        for one in payloads:
            self.scheduler.add(one)
        self.look()

    def look(self) -> None:
        for key, wire in self.wires.items():
            self.scheduler.note_progress(key, 0.05, wire.written, int(wire.acknowledged), self.now)

    def step(self, seconds: float = 0.05) -> None:
        self.now += seconds
        for wire in self.wires.values():
            for one, offset in wire.pass_time(seconds):
                self.arrived[one].add(offset)
                if len(self.arrived[one]) * CHUNK_BYTES >= len(one.data):
                    self.scheduler.receive_confirmation(one.home, one.stream_id, one.number)
        self.look()
        self.scheduler.look_for_late(self.now)
        for key, wire in self.wires.items():
            while len(wire.queue) < 2:
                found = self.scheduler.next_piece(key)
                if found is None:
                    break
                one, offset = found
                wire.written += one.piece(offset).size
                wire.queue.append((wire.written, one, offset))
                wire.given.append((one, offset))
                self.scheduler.note_sent(key, one, offset, wire.written, self.now)

    def kill(self, key: int) -> None:
        del self.wires[key]
        self.scheduler.remove_lane(key)

    def check_copies(self) -> None:
        """The scheduler knows how often each piece is on a lane that lives, or was brought by one."""
        copies = Counter(piece for wire in self.wires.values() for piece in wire.given)
        for one in self.arrived:
            if not one.is_done:
                known = {offset: count for offset, count in one.copies.items() if count}
                assert known == {offset: count for (sent, offset), count in copies.items() if sent is one}
                assert all(count <= MAX_COPIES for count in known.values())

    def run(self, limit: float = 100.0) -> float:
        while not self.scheduler.is_idle:
            self.step()
            assert self.now < limit, "it does not end"
        return self.now


def test_each_lane_carries_what_it_can():
    one = payload(0, 200)
    story = Story([2.5e5, 1e6], [one])
    story.run()
    slow, fast = story.wires[0].written, story.wires[1].written
    assert 3 < fast / slow < 5
    assert story.scheduler.resent <= 4 * CHUNK_BYTES


def test_payloads_of_several_streams_take_turns():
    first, second = payload(0, 100), payload(1, 100)
    story = Story([4e6], [first, second])
    for _ in range(20):
        story.step()
    assert abs(len(story.arrived[first]) - len(story.arrived[second])) <= 1


def test_what_a_stalled_lane_holds_is_sent_on_another():
    one = payload(0, 60)
    story = Story([2e6, 2e6], [one])
    for _ in range(5):
        story.step()
    story.wires[0].rate = 0.0  # in its back-off
    undisturbed = 60 * CHUNK_BYTES / 2e6
    assert story.run() < undisturbed + 3.0
    assert 0 < story.scheduler.resent <= 4 * CHUNK_BYTES


def test_nothing_is_sent_twice_while_lanes_are_alike():
    story = Story([2e6] * 4, [payload(number, 20) for number in range(8)])
    story.run()
    assert story.scheduler.resent == 0


def test_what_a_dead_lane_carried_is_sent_again_unless_it_is_known_to_have_come():
    first, second = payload(0, 2), payload(1, 2)
    scheduler = Scheduler()
    scheduler.add(first)
    scheduler.add(second)
    scheduler.note_progress("a", 0.05, 0, 0, 0.0)
    for index in range(4):
        found = scheduler.next_piece("a")
        assert found is not None
        scheduler.note_sent("a", *found, (index + 1) * CHUNK_BYTES, 0.0)
    scheduler.receive_confirmation(1, 1, 0)
    scheduler.remove_lane("a")
    scheduler.note_progress("b", 0.05, 0, 0, 0.0)
    again = [scheduler.next_piece("b") for _ in range(3)]
    assert sorted(again[:2], key=str) == sorted([(second, 0), (second, CHUNK_BYTES)], key=str)
    assert again[2] is None


def test_a_payload_whose_stream_has_failed_is_forgotten():
    is_wanted = True
    one = Outgoing(1, 1, 0, 0, memoryview(bytes(3 * CHUNK_BYTES)), lambda: is_wanted, lambda: None)
    scheduler = Scheduler()
    scheduler.add(one)
    scheduler.note_progress("a", 0.05, 0, 0, 0.0)
    assert scheduler.next_piece("a") == (one, 0)
    is_wanted = False
    assert scheduler.next_piece("a") is None
    assert scheduler.is_idle
    assert len(one.data) == 3 * CHUNK_BYTES, "to ask changes nothing"
    scheduler.forget_done()
    assert scheduler.is_idle
    assert len(one.data) == 0


@pytest.mark.parametrize("ends", ["received", "failed"])
def test_nothing_is_kept_of_payloads_that_are_done(ends: str):
    """What is sent may be shared memory, which its owner wants to give back."""
    is_wanted = True
    memory = bytearray(5 * CHUNK_BYTES)
    one = Outgoing(1, 1, 0, 0, memoryview(memory), lambda: is_wanted, lambda: None)
    story = Story([1e6, 1e6], [one])
    story.step()
    if ends == "received":
        story.run()
    else:
        is_wanted = False
        assert story.scheduler.is_idle
        story.scheduler.forget_done()
    for wire in story.wires.values():
        wire.queue.clear()
        wire.given.clear()
    del one
    story.arrived.clear()
    gc.collect()
    memory.append(0)  # BufferError while anything refers to it


@pytest.mark.parametrize("ends", ["received", "failed"])
def test_nothing_is_kept_of_payloads_that_are_done_while_others_are_not(ends: str):
    """One after the other without a pause, as in a download: the memory of each is given back in its turn."""
    is_wanted = True
    memory = bytearray(2 * CHUNK_BYTES)
    one = Outgoing(1, 1, 0, 0, memoryview(memory), lambda: is_wanted, lambda: None)
    other = payload(1, 400)
    story = Story([1e6, 1e6], [one, other])
    for _ in range(4):
        story.step()
        if ends == "failed":
            is_wanted = False
    assert not story.scheduler.is_idle
    memory.append(0)  # BufferError while anything refers to it
    story.run()
    assert len(story.arrived[other]) == 400


def test_a_lane_that_stalls_is_not_given_its_own_pieces_again():
    one = payload(0, 4)
    scheduler = Scheduler()
    scheduler.add(one)
    for lane in ("a", "b"):
        scheduler.note_progress(lane, 0.05, 0, 0, 0.0)
    for index in range(4):
        found = scheduler.next_piece("a")
        assert found is not None
        scheduler.note_sent("a", *found, (index + 1) * CHUNK_BYTES, 0.0)
    scheduler.look_for_late(2.0)
    assert scheduler.next_piece("a") is None
    assert scheduler.next_piece("b") is not None


def test_a_piece_has_few_copies():
    """Lanes that all stall are not filled with copies of what they hold."""
    one = payload(0, 4)
    story = Story([1e6] * 8, [one])
    story.step()
    for wire in story.wires.values():
        wire.rate = 0.0
    for _ in range(200):
        story.step()
    held = [(sent, offset) for wire in story.wires.values() for _, sent, offset in wire.queue]
    assert max(held.count(piece) for piece in held) <= MAX_COPIES


@settings(deadline=None)
@given(st.integers(0, 2**32))
@example(1600)  # lanes that stalled held all copies of a piece, one of them more than one
@example(1281880)
def test_everything_arrives_whatever_the_lanes_do(seed: int):
    rng = random.Random(seed)
    payloads = [payload(number, rng.randint(1, 12)) for number in range(rng.randint(1, 6))]
    story = Story([rng.choice([2e5, 1e6, 5e6]) for _ in range(rng.randint(2, 6))], payloads)
    for _ in range(rng.randint(1, 30)):
        story.step()
        story.check_copies()
        key = rng.choice(list(story.wires))
        what = rng.random()
        if what < 0.1 and len(story.wires) > 1:
            story.kill(key)
        elif what < 0.3 and sum(wire.rate > 0 for wire in story.wires.values()) > 1:
            story.wires[key].rate = 0.0
        elif what < 0.5:
            story.wires[key].rate = rng.choice([2e5, 1e6, 5e6])
    if all(wire.rate == 0.0 for wire in story.wires.values()):
        next(iter(story.wires.values())).rate = 1e6
    stalled = [key for key, wire in story.wires.items() if wire.rate == 0.0]
    if len(stalled) >= MAX_COPIES:  # they may hold all copies of a piece, until they are ended as dead
        for key in stalled:
            story.kill(key)
    story.check_copies()
    story.run()
    assert all(len(offsets) * CHUNK_BYTES >= len(one.data) for one, offsets in story.arrived.items())


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_a_lane_that_opens_late_is_used(lanes: int):
    one = payload(0, 100)
    story = Story([1e6] * lanes, [one])
    for _ in range(5):
        story.step()
    story.wires[99] = Wire(1e6)
    story.look()
    story.run()
    assert story.wires[99].written > 0


def sent_by(scheduler: Scheduler, lane: str, pieces: int, written: int = 0) -> int:
    """Give a lane so many pieces; returns what it has written."""
    for _ in range(pieces):
        found = scheduler.next_piece(lane)
        assert found is not None
        written += found[0].piece(found[1]).size
        scheduler.note_sent(lane, *found, written, 0.0)
    return written


FAST, STALLED = Flow(0.05, 1 << 20, 1 << 18, 0.25, 0), Flow(0.05, 1448, 1 << 15, 2.0, 3)


def test_a_piece_that_one_lane_has_brought_is_not_sent_again_for_another_that_has_it_too():
    scheduler = Scheduler()
    scheduler.add(payload(0, 4))
    for lane in ("a", "b"):
        scheduler.note_progress(lane, 0.05, 0, 0, 0.0, FAST)
    held = sent_by(scheduler, "a", 1)
    written = sent_by(scheduler, "b", 3)
    scheduler.note_progress("a", 0.05, held, 0, 1.0, STALLED, 1.0)
    scheduler.note_progress("b", 0.05, written, written, 1.0, FAST)
    scheduler.look_for_late(1.0)
    found = scheduler.next_piece("b")
    assert found is not None
    assert found[1] == 0
    written += CHUNK_BYTES
    scheduler.note_sent("b", *found, written, 1.0)
    scheduler.note_progress("b", 0.05, written, written, 3.0, FAST)
    scheduler.look_for_late(3.0)
    assert scheduler.next_piece("b") is None  # until the peer says that it has all, or the lane dies
    scheduler.remove_lane("b")
    scheduler.note_progress("c", 0.05, 0, 0, 3.0, FAST)
    again = [scheduler.next_piece("c") for _ in range(4)]
    assert sorted(one[1] // CHUNK_BYTES for one in again if one is not None) == [1, 2, 3]
    scheduler.look_for_late(3.0)
    found = scheduler.next_piece("c")
    assert found is not None
    assert found[1] == 0  # the other lane has it still, and stalls


@pytest.mark.parametrize("landed_on", ["", "b", "ab"])
def test_what_a_dead_lane_shared_with_another_is_not_sent_again(landed_on: str):
    one = payload(0, 2)
    scheduler = Scheduler()
    scheduler.add(one)
    for lane in ("a", "b", "c"):
        scheduler.note_progress(lane, 0.05, 0, 0, 0.0, FAST)
    held = sent_by(scheduler, "a", 2)
    scheduler.note_progress("a", 0.05, held, 0, 1.0, STALLED, 1.0)
    scheduler.look_for_late(1.0)
    written = sent_by(scheduler, "b", 2)
    scheduler.note_progress("b", 0.05, written, written if "b" in landed_on else 0, 1.1, FAST)
    scheduler.note_progress("a", 0.05, held, held if "a" in landed_on else 0, 1.1, STALLED)
    scheduler.look_for_late(1.1)
    scheduler.remove_lane("a")
    assert one.copies == {0: 1, CHUNK_BYTES: 1}
    assert one.landed == ({0, CHUNK_BYTES} if landed_on else set())
    assert scheduler.next_piece("c") is None
    scheduler.remove_lane("b")
    assert sorted(found[1] for _ in range(2) if (found := scheduler.next_piece("c"))) == [0, CHUNK_BYTES]
    assert one.landed == set()


def test_what_was_late_on_a_lane_that_died_is_sent_again_once():
    scheduler = Scheduler()
    scheduler.add(payload(0, 1))
    for lane in ("a", "b", "c"):
        scheduler.note_progress(lane, 0.05, 0, 0, 0.0, FAST)
    held = sent_by(scheduler, "a", 1)
    scheduler.note_progress("a", 0.05, held, 0, 1.0, STALLED, 1.0)
    scheduler.look_for_late(1.0)
    scheduler.remove_lane("a")
    sent_by(scheduler, "b", 1)
    assert scheduler.next_piece("c") is None


def test_a_payload_is_confirmed_when_all_of_it_was_sent():
    """A peer that confirms what it cannot have would keep the sender waiting for ever."""
    first, second = payload(0, 2), payload(1, 2)
    scheduler = Scheduler()
    for one in (first, second):
        scheduler.add(one)
    for lane in ("a", "b"):
        scheduler.note_progress(lane, 0.05, 0, 0, 0.0, FAST)
    held = sent_by(scheduler, "a", 3)
    assert (first.is_taken, second.is_taken) == (True, False)
    with pytest.raises(ProtocolViolation, match="of which"):
        scheduler.receive_confirmation(1, 1, 1)
    sent_by(scheduler, "a", 1, held)
    scheduler.note_progress("a", 0.05, held, 0, 1.0, STALLED, 1.0)
    scheduler.look_for_late(1.0)
    sent_by(scheduler, "b", 1)  # a copy is still on its way when the confirmation comes
    for number in (0, 1, 1):
        scheduler.receive_confirmation(1, 1, number)
    assert scheduler.is_idle


def test_a_confirmation_that_comes_after_its_stream_has_failed_is_no_violation():
    is_wanted = True
    one = Outgoing(1, 1, 0, 0, memoryview(bytes(3 * CHUNK_BYTES)), lambda: is_wanted, lambda: None)
    scheduler = Scheduler()
    scheduler.add(one)
    is_wanted = False
    scheduler.receive_confirmation(1, 1, 0)
    assert scheduler.is_idle


def test_a_slow_start_is_no_reason_to_send_a_piece_twice():
    """Its window doubles. What it has carried until now would say that it takes seconds."""
    scheduler = Scheduler()
    scheduler.add(payload(0, 2))
    slow = Flow(0.1, 20 * 1448, 1 << 30, 0.3, 0)
    for lane in ("a", "b"):
        scheduler.note_progress(lane, 0.1, 0, 0, 0.0, slow)
    held = sent_by(scheduler, "a", 2)
    scheduler.note_progress("a", 0.1, held, 10 * 1448, 0.25, slow)
    scheduler.note_progress("b", 0.1, 0, 0, 0.25, slow)
    scheduler.look_for_late(0.25)
    assert scheduler.next_piece("b") is None


@pytest.mark.parametrize("others_move", [True, False])
def test_a_lane_whose_packets_vanish_is_dead_only_if_others_move(others_move: bool):
    scheduler = Scheduler()
    scheduler.add(payload(0, 100))
    written = {}
    for lane in ("a", "b", "c"):
        scheduler.note_progress(lane, 0.05, 0, 0, 0.0, FAST)
        written[lane] = sent_by(scheduler, lane, 2)
    for step in range(1, 60):
        now = step * 0.05
        scheduler.note_progress("a", 0.05, written["a"], 0, now, STALLED, 9.0)
        for lane in ("b", "c"):
            moved = min(written[lane], 2000 * step) if others_move else 0
            scheduler.note_progress(lane, 0.05, written[lane], moved, now, FAST, 0.0 if others_move else 9.0)
        if now < 2.0:
            assert scheduler.dead_lanes(now) == []
    assert scheduler.dead_lanes(now) == (["a"] if others_move else [])


def test_little_is_kept_of_payloads_that_were_confirmed_behind_one_that_never_is():
    scheduler = Scheduler()
    scheduler.note_progress("a", 0.05, 0, 0, 0.0)
    written = 0
    for number in range(50):
        scheduler.add(payload(number, 2))
        written = sent_by(scheduler, "a", 2, written)
        scheduler.note_progress("a", 0.05, written, written, 0.1)
        if number:
            scheduler.receive_confirmation(1, 1, number)
    assert len(scheduler.lanes["a"].landed) == 1
    assert not scheduler.lanes["a"].flying
