"""The queue of a donor: slots, one copy at a time, resumption, refusals."""

from __future__ import annotations

import random

import pytest

from shoal.averaging.codes import AveragingCode
from shoal.averaging.state.queue import (
    ALLOWANCE,
    DEFAULT_MAX_AGE,
    HOLD_OFF_SECONDS,
    KEEP_SECONDS,
    MAX_PATIENCE,
    MAX_REST,
    MAX_UPLOADS,
    MAX_WAITING,
    REST_FACTOR,
    RESUME_SECONDS,
    Copy,
    CopyFailed,
    CopyTaken,
    DropCopy,
    Effect,
    Event,
    Refuse,
    Request,
    RequestArrived,
    RequestEnded,
    Serve,
    SharingSwitched,
    Situation,
    TakeCopy,
    TellPosition,
    Turn,
    UploadQueue,
    decide_next,
)
from shoal.p2p.protocol.codes import ResetCode
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import IllegalTransition
from shoal.testing.peers import make_identity

PEERS = [make_identity(f"joiner{number}").peer_id for number in range(40)]


def arrive(request: int, state_id: bytes | None = None, peer: int | None = None) -> RequestArrived:
    return RequestArrived(request, PEERS[request if peer is None else peer], state_id)


def queue_with_copy(requests: int = 1, now: float = 0.0) -> UploadQueue:
    queue = UploadQueue()
    for request in range(requests):
        queue.handle(arrive(request), now)
    queue.handle(CopyTaken(b"first"), now)
    return queue


def kinds(effects: list[Effect]) -> list[type]:
    return [type(effect) for effect in effects]


def test_joiners_that_come_at_once_share_one_copy():
    queue = UploadQueue()
    assert queue.handle(arrive(0), 0.0) == [TakeCopy(), TellPosition(0, 0)]
    assert queue.handle(arrive(1), 0.1) == [TellPosition(1, 0)]
    assert queue.handle(CopyTaken(b"a"), 1.0) == [Serve(0), Serve(1)]
    assert queue.handle(arrive(2), DEFAULT_MAX_AGE) == [Serve(2)]


def test_more_joiners_than_slots_are_told_their_places_and_move_up():
    queue = queue_with_copy(MAX_UPLOADS)
    assert queue.handle(arrive(10), 1.0) == [TellPosition(10, 1)]
    assert queue.handle(arrive(11), 1.0) == [TellPosition(11, 2)]
    assert queue.handle(RequestEnded(0), 2.0) == [Serve(10), TellPosition(11, 1)]
    assert queue.handle(RequestEnded(11), 2.0) == []  # it left the queue
    assert queue.handle(RequestEnded(1), 2.0) == []


def test_a_copy_that_was_made_before_a_request_is_not_given_to_it():
    queue = queue_with_copy()
    queue.handle(RequestEnded(0, complete=True), 1.0)
    assert queue.handle(arrive(1), 1.1) == [DropCopy(), TakeCopy(), TellPosition(1, 0)]
    assert queue.handle(CopyTaken(b"second"), 1.2) == [Serve(1)]


def test_a_copy_that_is_too_old_to_be_shared_is_replaced_when_nobody_uses_it():
    queue = queue_with_copy(2)
    late = DEFAULT_MAX_AGE + 1
    assert queue.handle(arrive(5), late) == [TellPosition(5, 1)]
    assert queue.handle(RequestEnded(0, complete=True), late) == []
    assert queue.handle(RequestEnded(1, complete=True), late + 1) == [
        DropCopy(),
        TakeCopy(),
        TellPosition(5, 0),
    ]
    assert queue.handle(CopyTaken(b"second"), late + 2) == [Serve(5)]


def test_how_old_a_shared_copy_may_be_is_the_users_choice():
    strict, generous = UploadQueue(max_age=0.0), UploadQueue(max_age=None)
    for queue in (strict, generous):
        queue.handle(arrive(0), 0.0)
        queue.handle(CopyTaken(b"a"), 1.0)
    assert strict.handle(arrive(1), 1.0) == [TellPosition(1, 1)]
    assert generous.handle(arrive(1), 10_000.0) == [Serve(1)]


def test_a_slow_joiner_does_not_keep_newcomers_for_ever():
    queue = queue_with_copy(1)
    late = DEFAULT_MAX_AGE + 1
    assert queue.handle(arrive(5), late) == [TellPosition(5, 1)]
    assert queue.handle(arrive(6), late + 1) == [TellPosition(6, 2)]
    assert queue.deadline == late + MAX_PATIENCE
    assert queue.handle(TimePassed(), late + MAX_PATIENCE - 0.1) == []
    refused, told = queue.handle(TimePassed(), late + MAX_PATIENCE)
    assert isinstance(refused, Refuse)
    assert (refused.request, refused.code) == (5, ResetCode.BUSY)
    assert "max_state_age=60 s" in refused.reason
    assert told == TellPosition(6, 1)


def test_a_copy_is_kept_in_use_for_a_joiner_that_lost_its_connection():
    queue = queue_with_copy()
    queue.handle(RequestEnded(0), 1.0)
    assert queue.handle(arrive(1), 2.0) == [Serve(1)], "shared: there is no second copy beside it"
    queue.handle(RequestEnded(1, complete=True), 3.0)
    assert queue.handle(arrive(2, b"first", peer=0), 4.0) == [Serve(2)]
    queue.handle(RequestEnded(2, complete=True), 5.0)
    assert kinds(queue.handle(arrive(3), 6.0)) == [DropCopy, TakeCopy, TellPosition]


def test_a_joiner_that_does_not_come_back_is_waited_for_a_moment_only():
    queue = UploadQueue(max_age=0.0)
    queue.handle(arrive(0), 0.0)
    queue.handle(CopyTaken(b"first"), 0.0)
    queue.handle(RequestEnded(0), 1.0)
    assert queue.handle(arrive(1), 2.0) == [TellPosition(1, 1)]
    assert queue.deadline == 1.0 + RESUME_SECONDS
    assert kinds(queue.handle(TimePassed(), 1.0 + RESUME_SECONDS)) == [DropCopy, TakeCopy, TellPosition]


@pytest.mark.parametrize(("seconds", "rest"), [(ALLOWANCE + 0.5, 0.5 * REST_FACTOR), (100.0, MAX_REST)])
def test_joiners_that_ask_all_the_time_wait_for_the_same_next_copy(seconds: float, rest: float):
    queue = UploadQueue()
    queue.handle(arrive(0), 0.0)
    queue.handle(CopyTaken(b"first"), seconds)
    queue.handle(RequestEnded(0, complete=True), seconds)
    rested = seconds + rest
    assert queue.handle(arrive(1), seconds + 0.1) == [TellPosition(1, 1)]
    assert queue.handle(arrive(2), seconds + 0.2) == [TellPosition(2, 2)]
    assert queue.deadline == rested
    assert queue.handle(TimePassed(), rested) == [
        DropCopy(),
        TakeCopy(),
        TellPosition(1, 0),
        TellPosition(2, 0),
    ]


def copy_for_one(queue: UploadQueue, request: int, now: float, seconds: float) -> bool:
    """Whether a joiner that comes at ``now`` gets a copy of its own at once, and has downloaded it when it is there."""
    if TakeCopy() not in queue.handle(arrive(request), now):
        return False
    queue.handle(CopyTaken(b"copy"), now + seconds)
    queue.handle(RequestEnded(request, complete=True), now + seconds)
    return True


def test_a_donor_of_quick_copies_rests_after_many_of_them_alone():
    queue, now, seconds = UploadQueue(), 0.0, 0.25
    free = round(ALLOWANCE / seconds)
    for request in range(free + 1):
        assert copy_for_one(queue, request, now, seconds)
        now += seconds
    assert not copy_for_one(queue, free + 1, now, seconds)
    # The last one went beyond the allowance; while it was made, and all others, the donor did not rest.
    assert queue.deadline == pytest.approx(now + REST_FACTOR * seconds)


def test_a_copy_that_failed_costs_as_much_as_one_that_was_made():
    queue = UploadQueue()
    queue.handle(arrive(0), 0.0)
    queue.handle(CopyFailed("no lock"), ALLOWANCE + 1.0)
    assert not copy_for_one(queue, 1, ALLOWANCE + 1.0 + HOLD_OFF_SECONDS, 1.0)
    assert queue.deadline == pytest.approx(ALLOWANCE + 1.0 + REST_FACTOR)


def test_an_allowance_comes_back_with_time():
    queue = UploadQueue()
    assert copy_for_one(queue, 0, 0.0, 100.0)
    quiet = 100.0 + REST_FACTOR * ALLOWANCE + MAX_REST
    assert copy_for_one(queue, 1, quiet, ALLOWANCE)
    assert copy_for_one(queue, 2, quiet + ALLOWANCE, 1.0)
    assert not copy_for_one(queue, 3, quiet + ALLOWANCE + 1.0, 1.0)


def test_a_place_is_kept_while_the_copy_is_shared_and_then_waits_for_a_new_one():
    queue = queue_with_copy(MAX_UPLOADS)
    queue.handle(arrive(10), 10.0)
    assert queue.deadline == NEVER
    late = DEFAULT_MAX_AGE + 1
    assert queue.handle(RequestEnded(0, complete=True), late) == []
    for request in range(1, MAX_UPLOADS):
        effects = queue.handle(RequestEnded(request, complete=True), late + request)
    assert effects == [DropCopy(), TakeCopy(), TellPosition(10, 0)]


def test_a_copy_is_kept_for_a_minute_after_its_last_use_and_then_freed():
    queue = queue_with_copy()
    assert queue.deadline == NEVER
    queue.handle(RequestEnded(0, complete=True), 100.0)
    assert queue.deadline == 100.0 + KEEP_SECONDS
    assert queue.handle(TimePassed(), 99.9 + KEEP_SECONDS) == []
    assert queue.handle(TimePassed(), 100.0 + KEEP_SECONDS) == [DropCopy()]
    assert queue.deadline == NEVER


def test_a_joiner_whose_connection_broke_is_served_from_the_same_copy_before_those_who_wait():
    queue = queue_with_copy(MAX_UPLOADS)
    queue.handle(arrive(10), 1.0)
    effects = queue.handle(arrive(20, b"first", peer=0), DEFAULT_MAX_AGE + 5)
    # The donor has not noticed yet that request 0 is gone: the new one takes its place.
    assert Refuse(0, AveragingCode.REPLACED, "the same peer has asked again") in effects
    assert Serve(20) in effects
    assert Serve(10) not in effects


def test_a_copy_that_is_gone_cannot_be_resumed_and_a_new_one_is_made():
    queue = queue_with_copy()
    queue.handle(RequestEnded(0), 0.0)
    queue.handle(TimePassed(), KEEP_SECONDS)
    assert kinds(queue.handle(arrive(1, b"first"), KEEP_SECONDS + 1)) == [TakeCopy, TellPosition]


def test_a_failed_copy_refuses_those_who_wait_and_is_not_tried_again_for_each_of_them():
    queue = UploadQueue()
    queue.handle(arrive(0), 0.0)
    queue.handle(arrive(1), 0.0)
    assert queue.handle(CopyFailed("no"), 1.0) == [
        Refuse(0, AveragingCode.STATE_FAILED, "no"),
        Refuse(1, AveragingCode.STATE_FAILED, "no"),
    ]
    assert queue.handle(arrive(2), 2.0) == [Refuse(2, AveragingCode.STATE_FAILED, "no")]
    assert kinds(queue.handle(arrive(3), 1.0 + HOLD_OFF_SECONDS)) == [TakeCopy, TellPosition]


def test_switching_off_refuses_new_and_waiting_ones_at_once_and_lets_running_ones_finish():
    queue = queue_with_copy(MAX_UPLOADS)
    queue.handle(arrive(10), 1.0)
    assert [
        effect.request for effect in queue.handle(SharingSwitched(False), 2.0) if isinstance(effect, Refuse)
    ] == [10]
    (refused,) = queue.handle(arrive(11), 2.0)
    assert isinstance(refused, Refuse)
    assert refused.code == AveragingCode.NOT_SHARING
    for request in range(MAX_UPLOADS - 1):
        assert queue.handle(RequestEnded(request), 3.0) == []
    assert queue.handle(RequestEnded(MAX_UPLOADS - 1), 4.0) == [DropCopy()]
    queue.handle(SharingSwitched(True), 5.0)
    assert kinds(queue.handle(arrive(12), 5.0)) == [TakeCopy, TellPosition]


def test_switching_off_while_the_copy_is_made_refuses_everybody_and_drops_it_when_it_comes():
    queue = UploadQueue()
    queue.handle(arrive(0), 0.0)
    assert [type(e) for e in queue.handle(SharingSwitched(False), 0.5)] == [Refuse]
    assert queue.handle(CopyTaken(b"late"), 1.0) == [DropCopy()]


def test_queue_and_requests_of_one_peer_are_bounded():
    queue = queue_with_copy(MAX_UPLOADS)
    for request in range(100, 100 + MAX_WAITING):
        assert queue.handle(arrive(request, peer=4 + (request - 100) // 2), 1.0)[-1] == TellPosition(
            request, request - 99
        )
    (refused,) = queue.handle(arrive(200, peer=39), 1.0)
    assert isinstance(refused, Refuse)
    assert refused.code == ResetCode.BUSY
    # Who has a part of the state is not refused by that.
    assert Serve(201) in queue.handle(arrive(201, b"first", peer=0), 1.0)
    queue = queue_with_copy(1)
    queue.handle(arrive(50, peer=0), 1.0)
    (refused,) = queue.handle(arrive(51, peer=0), 1.0)
    assert isinstance(refused, Refuse)
    assert "2 requests" in refused.reason


class Model:
    """Checks every effect against what may happen at all, and remembers who is where."""

    def __init__(self) -> None:
        self.queue = UploadQueue()
        self.waiting: set[int] = set()
        self.served: set[int] = set()
        self.copies = 0
        self.copying = False

    def feed(self, event: Event, now: float) -> None:
        if isinstance(event, RequestArrived):
            self.waiting.add(event.request)
        if isinstance(event, RequestEnded):
            self.waiting.discard(event.request)
            self.served.discard(event.request)
        if isinstance(event, CopyTaken):
            self.copying, self.copies = False, self.copies + 1
        if isinstance(event, CopyFailed):
            self.copying = False
        for effect in self.queue.handle(event, now):
            match effect:
                case TakeCopy():
                    assert not self.copying
                    assert self.copies == 0
                    self.copying = True
                case DropCopy():
                    assert self.copies == 1
                    assert not self.served
                    self.copies = 0
                case Serve(request):
                    assert self.copies == 1
                    self.waiting.remove(request)
                    self.served.add(request)
                case Refuse(request, _, _):
                    assert request in self.waiting | self.served
                    self.waiting.discard(request)
                    self.served.discard(request)
                case TellPosition(request, _):
                    assert request in self.waiting
        assert len(self.served) <= MAX_UPLOADS
        assert self.copies <= 1


@pytest.mark.parametrize("seed", range(100))
def test_whatever_happens_there_is_one_copy_at_most_and_everybody_gets_an_answer(seed: int):
    rng = random.Random(seed)
    model, now, taken = Model(), 0.0, b"none"
    for ids in range(200):
        now += rng.choice([0.0, 0.1, 5.0, 40.0])
        state_id = rng.choice([None, taken])
        choices: list[Event] = [
            RequestArrived(ids, rng.choice(PEERS), state_id),
            RequestArrived(ids, rng.choice(PEERS), state_id),
            RequestEnded(rng.choice(sorted(model.waiting | model.served) or [0]), rng.random() < 0.5),
            SharingSwitched(rng.random() < 0.9),
            TimePassed(),
        ]
        if model.copying:
            choices += [CopyTaken(f"copy {ids}".encode())] * 3 + [CopyFailed("no")]
        event = rng.choice(choices)
        taken = event.state_id if isinstance(event, CopyTaken) else taken
        model.feed(event, now)
    model.feed(SharingSwitched(True), now)
    for _ in range(200):  # everybody who is served leaves: all others are served in turn
        now += 1.0
        model.feed(TimePassed(), now)
        if model.copying:
            model.feed(CopyTaken(b"last"), now)
        for request in sorted(model.served):
            model.feed(RequestEnded(request, complete=True), now)
    assert not model.waiting
    model.feed(TimePassed(), now + KEEP_SECONDS)
    assert model.copies == 0


def queue_in(state: Copy) -> UploadQueue:
    queue = UploadQueue()
    if state is not Copy.ABSENT:
        queue.handle(arrive(0), 0.0)
    if state is Copy.HELD:
        queue.handle(CopyTaken(b"first"), 0.0)
    return queue


EVENTS: list[Event] = [
    arrive(1),
    RequestEnded(0),
    SharingSwitched(False),
    TimePassed(),
    CopyTaken(b"second"),
    CopyFailed("no"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", Copy)
def test_a_copy_comes_or_fails_only_when_it_was_asked_for(state: Copy, event: Event):
    queue = queue_in(state)
    if isinstance(event, CopyTaken | CopyFailed) and state is not Copy.MAKING:
        with pytest.raises(IllegalTransition, match=f"Copy.{state.name}: {type(event).__name__}") as caught:
            queue.handle(event, 1.0)
        assert caught.value.history[-1].event == event
    else:
        queue.handle(event, 1.0)


ASKED_AT = 100.0
LATE = ASKED_AT + DEFAULT_MAX_AGE + 1


@pytest.mark.parametrize(
    ("turn", "reason", "arrived", "changes"),
    [
        (Turn.JOIN, "being made", 101.0, {"copy": Copy.MAKING}),
        (Turn.SERVE, "not older than the request", 100.0, {}),
        (Turn.SERVE, "young enough", 101.0, {"is_in_use": True}),
        (Turn.WAIT, "too old to be shared", LATE, {"now": LATE, "is_in_use": True}),
        (Turn.REFUSE, "max_state_age", LATE, {"now": LATE + MAX_PATIENCE, "is_in_use": True}),
        (Turn.WAIT, "rests", 101.0, {"rests_until": 110.0}),
        (Turn.REFUSE, "it was full", 101.0, {"copy": Copy.ABSENT, "hold_off_until": 110.0}),
        (Turn.COPY, "no copy", 101.0, {}),
    ],
)
def test_what_becomes_of_the_next_request_is_decided_with_a_reason(turn, reason, arrived, changes):
    known = {
        "now": 102.0,
        "copy": Copy.HELD,
        "state_id": b"first",
        "asked_at": ASKED_AT,
        "is_in_use": False,
        "max_age": DEFAULT_MAX_AGE,
        "rests_until": 0.0,
        "hold_off_until": 0.0,
        "failure": "it was full",
    }
    decision = decide_next(Request(1, PEERS[1], None, arrived), Situation(**{**known, **changes}))
    assert decision.turn is turn
    assert reason in decision.reason
    resumed = decide_next(Request(1, PEERS[1], b"first", arrived), Situation(**{**known, "now": LATE}))
    assert resumed.turn is Turn.SERVE
    assert "has a part" in resumed.reason
