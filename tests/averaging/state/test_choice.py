"""Which donor a joiner asks next, and when it stays, resumes or gives up."""

from __future__ import annotations

import random

import pytest

from shoal.averaging.state.choice import (
    FIRST_BACKOFF,
    MAX_RESUMPTIONS,
    AllChunksReceived,
    AskDonor,
    ChunkReceived,
    ConnectionBroke,
    DonorBusy,
    DonorChoice,
    DonorFailed,
    DonorsFound,
    DownloadState,
    Effect,
    Event,
    GiveUp,
    LeaveDonor,
    LookFailed,
    LookForDonors,
    OfferReceived,
    StateReceived,
    StateWanted,
)
from shoal.averaging.state.policy import FRONT_PATIENCE, LAST_PATIENCE, SILENCE, WAIT_PATIENCE, Donor
from shoal.sansio.core import TimePassed
from shoal.sansio.machine import IllegalTransition
from shoal.testing.peers import make_identity

PEERS = [make_identity(f"donor{number}").peer_id for number in range(10)]


def donor(number: int, priority: float = 0.0, tiebreak: float | None = None) -> Donor:
    return Donor(PEERS[number], priority, number / 10 if tiebreak is None else tiebreak)


STAY: list[Effect] = []


class Joiner:
    """A core that has begun, and its clock."""

    def __init__(self) -> None:
        self.core = DonorChoice()
        self.now = 0.0
        assert self.core.handle(StateWanted(), 0.0) == [LookForDonors()]

    def handle(self, event: Event, after: float = 0.0) -> list[Effect]:
        self.now += after
        return self.core.handle(event, self.now)


def asked(effects: list[Effect]) -> int:
    last = effects[-1]
    assert isinstance(last, AskDonor), effects
    assert last.reason
    return PEERS.index(last.donor.peer)


def test_the_highest_priority_comes_first_and_a_draw_decides_among_equals():
    choice = Joiner()
    donors = (donor(0, 1.0), donor(1, 5.0, 0.9), donor(2, 5.0, 0.2), donor(3, -2.5))
    order = [asked(choice.handle(DonorsFound(donors)))]
    order += [asked(choice.handle(DonorFailed("no"))) for _ in range(3)]
    assert order == [2, 1, 0, 3]
    assert choice.handle(DonorFailed("no")) == [LookForDonors()]


def test_nobody_there_is_the_end_and_newcomers_are_asked_after_a_second_look():
    assert Joiner().handle(DonorsFound(())) == [GiveUp()]
    choice = Joiner()
    choice.handle(DonorsFound((donor(0),)))
    assert choice.handle(DonorFailed("no")) == [LookForDonors()]
    assert asked(choice.handle(DonorsFound((donor(0), donor(1))))) == 1
    choice.handle(DonorFailed("neither"))
    assert choice.handle(DonorsFound((donor(0), donor(1)))) == [GiveUp()]
    assert choice.core.story() == f"{PEERS[0]} (priority 0): no. {PEERS[1]} (priority 0): neither"


def test_a_broken_connection_is_made_again_with_growing_pauses_and_each_chunk_renews_patience():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0), donor(1))))
    assert choice.handle(ChunkReceived()) == STAY
    for _ in range(2):
        delays = []
        for _ in range(MAX_RESUMPTIONS):
            (effect,) = choice.handle(ConnectionBroke("lost"))
            assert asked([effect]) == 0
            assert isinstance(effect, AskDonor)
            delays.append(effect.delay)
        assert delays == [FIRST_BACKOFF * 2**n for n in range(MAX_RESUMPTIONS)]
        choice.handle(ChunkReceived())
    for _ in range(MAX_RESUMPTIONS):
        choice.handle(ConnectionBroke("lost"))
    assert asked(choice.handle(ConnectionBroke("lost"))) == 1


def test_a_donor_whose_process_has_ended_is_left_at_once_if_there_is_another_one():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0), donor(1))))
    choice.handle(ChunkReceived())
    assert asked(choice.handle(ConnectionBroke("refused", has_ended=True))) == 1
    choice.handle(ChunkReceived())
    assert (
        asked(choice.handle(ConnectionBroke("refused", has_ended=True))) == 1
    )  # it may be a firewall's word


def test_a_donor_that_has_sent_nothing_is_left_at_once():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0), donor(1))))
    assert asked(choice.handle(ConnectionBroke("refused"))) == 1


def test_a_connection_that_breaks_while_the_donor_makes_its_copy_is_made_again():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0),)))
    choice.handle(DonorBusy(0))
    assert asked(choice.handle(ConnectionBroke("lost"))) == 0


def test_a_queue_is_left_for_an_equal_donor_but_not_for_a_lesser_one():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0, 1.0), donor(1, 1.0), donor(2, 0.0))))
    assert choice.handle(DonorBusy(0)) == STAY  # its copy is being made
    assert asked(choice.handle(DonorBusy(3))) == 1
    assert asked(choice.handle(DonorBusy(7))) == 0  # the shortest queue
    assert choice.handle(DonorBusy(9)) == STAY  # once is enough: each change costs the place
    assert asked(choice.handle(DonorFailed("gone"))) == 1
    assert choice.handle(DonorBusy(2)) == STAY
    assert asked(choice.handle(DonorFailed("gone"))) == 2


def wait(choice: Joiner, position: int, seconds: float) -> list[Effect]:
    """Hear of nothing but a place in the queue, time and again."""
    effects: list[Effect] = STAY
    for _ in range(int(seconds)):
        effects = choice.handle(DonorBusy(position), 1.0)
        if effects:
            break
    return effects


def test_a_donor_that_only_asks_to_wait_is_left_for_any_other_but_each_only_once():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0, 9.0), donor(1, 1.0), donor(2, 1.0))))
    assert wait(choice, 7, WAIT_PATIENCE - 1) == STAY
    reason = "nothing but place 7 in its queue for 2 min"
    effects = choice.handle(DonorBusy(7), 1.0)
    assert effects[0] == LeaveDonor(PEERS[0], reason)
    assert asked(effects) == 1
    assert asked(choice.handle(DonorBusy(3))) == 2
    assert asked(choice.handle(DonorBusy(5))) == 1
    assert asked(wait(choice, 3, WAIT_PATIENCE)) == 2
    assert wait(choice, 5, LAST_PATIENCE - 1) == STAY  # all others were left so
    assert asked(choice.handle(DonorFailed("gone"))) == 0
    assert wait(choice, 9, WAIT_PATIENCE) == STAY
    assert reason in choice.core.story()


def test_a_donor_that_is_about_to_begin_for_ever_is_left_soon():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0, 9.0), donor(1))))
    assert wait(choice, 3, 50) == STAY
    assert wait(choice, 0, FRONT_PATIENCE) == STAY  # it begins to count with the first of these
    assert wait(choice, 3, 5) == STAY  # another request was resumed meanwhile
    assert wait(choice, 0, FRONT_PATIENCE) == STAY
    effects = choice.handle(DonorBusy(0), 1.0)
    assert isinstance(effects[0], LeaveDonor)
    assert asked(effects) == 1


@pytest.mark.parametrize("position", [0, 3])
def test_a_donor_alone_is_waited_for_but_not_for_ever(position: int):
    choice = Joiner()
    choice.handle(DonorsFound((donor(0),)))
    assert wait(choice, position, LAST_PATIENCE - 1) == STAY
    assert choice.core.deadline == choice.now + LAST_PATIENCE
    effects = choice.handle(DonorBusy(position), 1.0)
    assert isinstance(effects[0], LeaveDonor)
    assert effects[-1] == LookForDonors()
    assert choice.handle(DonorsFound((donor(0),))) == [GiveUp()]
    assert "in its queue for 3 min" in choice.core.story()


def test_a_silent_donor_is_left_for_another_one_and_not_twice():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0), donor(1))))
    assert choice.core.deadline == SILENCE
    choice.handle(DonorBusy(0), 1.0)
    assert choice.core.deadline == 1.0 + SILENCE
    assert choice.handle(TimePassed()) == STAY, "its time has not come"
    left = choice.handle(TimePassed(), SILENCE)
    assert left[0] == LeaveDonor(PEERS[0], "no sign of it for 6.0 s, and there are others to ask")
    assert asked(left) == 1
    assert choice.core.deadline == choice.now + LAST_PATIENCE  # nobody else is left


def test_patience_grows_with_what_has_come_and_goes_on_while_a_connection_is_made_again():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0), donor(1))))
    choice.handle(OfferReceived())
    choice.handle(ChunkReceived(), 100.0)
    assert choice.core.deadline == 100.0 + 25.0
    choice.handle(ConnectionBroke("lost"), 20.0)
    assert choice.core.deadline == 100.0 + (120.0 + FIRST_BACKOFF) / 4
    assert asked(choice.handle(TimePassed(), 11.0)) == 1
    choice.handle(AllChunksReceived())
    assert choice.core.deadline == choice.now + LAST_PATIENCE


def test_a_donor_that_still_hashes_is_waited_for():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0), donor(1))))
    choice.handle(AllChunksReceived())
    assert choice.core.deadline == choice.now + LAST_PATIENCE
    assert choice.handle(StateReceived(), 100.0) == STAY
    assert choice.core.state is DownloadState.DONE


@pytest.mark.parametrize("has_sent_all", [False, True], ids=["in the middle", "no digest"])
def test_a_donor_alone_may_be_silent_for_three_minutes(has_sent_all: bool):
    choice = Joiner()
    choice.handle(DonorsFound((donor(0),)))
    for event in (OfferReceived(), ChunkReceived(), *([AllChunksReceived()] if has_sent_all else [])):
        choice.handle(event)
    assert choice.handle(TimePassed(), LAST_PATIENCE - 1) == STAY
    left, look = choice.handle(TimePassed(), 1.0)
    assert isinstance(left, LeaveDonor)
    assert look == LookForDonors()


def test_a_dht_that_cannot_be_asked_is_the_end():
    choice = Joiner()
    assert choice.handle(LookFailed("it is off")) == [GiveUp("it is off")]
    assert choice.core.state is DownloadState.GIVEN_UP


def test_who_waits_to_resume_stays():
    choice = Joiner()
    choice.handle(DonorsFound((donor(0), donor(1))))
    choice.handle(ChunkReceived())
    assert asked(choice.handle(ConnectionBroke("lost"))) == 0
    assert choice.handle(DonorBusy(2)) == STAY


@pytest.mark.parametrize("seed", range(100))
def test_whatever_donors_answer_it_ends_and_everybody_was_asked(seed: int):
    rng = random.Random(seed)
    donors = tuple(donor(n, rng.choice([0.0, 1.0, 2.0]), rng.random()) for n in range(rng.randrange(1, 8)))
    choice, seen = Joiner(), set()
    effects = choice.handle(DonorsFound(donors))
    for _ in range(10_000):
        match effects[-1] if effects else None:
            case AskDonor(one):
                seen.add(one.peer)
                effects = choice.handle(
                    rng.choice(
                        [
                            DonorFailed("no"),
                            ConnectionBroke("lost"),
                            ChunkReceived(),
                            DonorBusy(rng.randrange(5)),
                        ]
                    ),
                    rng.choice([0.0, WAIT_PATIENCE]),
                )
            case None:
                effects = choice.handle(
                    rng.choice([DonorFailed("no"), ConnectionBroke("lost"), DonorBusy(1)])
                )
            case LookForDonors():
                effects = choice.handle(DonorsFound(donors))
            case GiveUp():
                break
    else:
        pytest.fail("it goes on for ever")
    assert seen == {one.peer for one in donors}


ONES = (donor(0), donor(1))
TO: dict[DownloadState, list[Event]] = {
    DownloadState.NEW: [],
    DownloadState.LOOKING: [StateWanted()],
    DownloadState.ASKING: [StateWanted(), DonorsFound(ONES)],
    DownloadState.DONE: [StateWanted(), DonorsFound(ONES), StateReceived()],
    DownloadState.GIVEN_UP: [StateWanted(), DonorsFound(())],
}
LEGAL: dict[DownloadState, set[type]] = {
    DownloadState.NEW: {StateWanted},
    DownloadState.LOOKING: {DonorsFound, LookFailed, TimePassed},
    DownloadState.ASKING: {
        *(DonorBusy, OfferReceived, ChunkReceived, AllChunksReceived, StateReceived, ConnectionBroke),
        *(DonorFailed, TimePassed),
    },
    DownloadState.DONE: {TimePassed},
    DownloadState.GIVEN_UP: {TimePassed},
}
EVENTS: list[Event] = [
    *(StateWanted(), DonorsFound(ONES), LookFailed("no"), DonorBusy(0), OfferReceived(), ChunkReceived()),
    *(AllChunksReceived(), StateReceived(), ConnectionBroke("lost"), DonorFailed("no"), TimePassed()),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", DownloadState)
def test_what_may_happen_in_each_state(state: DownloadState, event: Event):
    core = DonorChoice()
    for before in TO[state]:
        core.handle(before, 0.0)
    assert core.state is state
    if type(event) in LEGAL[state]:
        core.handle(event, 1.0)
    else:
        with pytest.raises(IllegalTransition, match=f"{state.name}: {type(event).__name__}") as caught:
            core.handle(event, 1.0)
        assert [entry.event for entry in caught.value.history] == [*TO[state], event]
