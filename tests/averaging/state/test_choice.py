"""Which donor a joiner asks next, and when it stays, resumes or gives up."""

from __future__ import annotations

import random

import pytest

from shoal.averaging.state.choice import (
    FIRST_BACKOFF,
    MAX_RESUMPTIONS,
    WAIT_PATIENCE,
    Action,
    AskDonor,
    ChunkReceived,
    ConnectionBroke,
    Donor,
    DonorBusy,
    DonorChoice,
    DonorFailed,
    DonorsFound,
    GiveUp,
    LookForDonors,
    Stay,
)
from shoal.testing.peers import make_identity

PEERS = [make_identity(f"donor{number}").peer_id for number in range(10)]


def donor(number: int, priority: float = 0.0, tiebreak: float | None = None) -> Donor:
    return Donor(PEERS[number], priority, number / 10 if tiebreak is None else tiebreak)


def asked(action: Action) -> int:
    assert isinstance(action, AskDonor), action
    return PEERS.index(action.donor.peer)


def test_the_highest_priority_comes_first_and_a_draw_decides_among_equals():
    choice = DonorChoice()
    donors = (donor(0, 1.0), donor(1, 5.0, 0.9), donor(2, 5.0, 0.2), donor(3, -2.5))
    order = [asked(choice.handle(DonorsFound(donors)))]
    order += [asked(choice.handle(DonorFailed("no"))) for _ in range(3)]
    assert order == [2, 1, 0, 3]
    assert choice.handle(DonorFailed("no")) == LookForDonors()


def test_nobody_there_is_the_end_and_newcomers_are_asked_after_a_second_look():
    assert DonorChoice().handle(DonorsFound(())) == GiveUp()
    choice = DonorChoice()
    choice.handle(DonorsFound((donor(0),)))
    assert choice.handle(DonorFailed("no")) == LookForDonors()
    assert asked(choice.handle(DonorsFound((donor(0), donor(1))))) == 1
    choice.handle(DonorFailed("neither"))
    assert choice.handle(DonorsFound((donor(0), donor(1)))) == GiveUp()
    assert choice.story() == f"{PEERS[0]} (priority 0): no. {PEERS[1]} (priority 0): neither"


def test_a_broken_connection_is_made_again_with_growing_pauses_and_each_chunk_renews_patience():
    choice = DonorChoice()
    choice.handle(DonorsFound((donor(0), donor(1))))
    assert choice.handle(ChunkReceived()) == Stay()
    for _ in range(2):
        delays = []
        for _ in range(MAX_RESUMPTIONS):
            action = choice.handle(ConnectionBroke("lost"))
            assert asked(action) == 0
            assert isinstance(action, AskDonor)
            delays.append(action.delay)
        assert delays == [FIRST_BACKOFF * 2**n for n in range(MAX_RESUMPTIONS)]
        choice.handle(ChunkReceived())
    for _ in range(MAX_RESUMPTIONS):
        choice.handle(ConnectionBroke("lost"))
    assert asked(choice.handle(ConnectionBroke("lost"))) == 1


def test_a_donor_that_has_sent_nothing_is_left_at_once():
    choice = DonorChoice()
    choice.handle(DonorsFound((donor(0), donor(1))))
    assert asked(choice.handle(ConnectionBroke("refused"))) == 1


def test_a_connection_that_breaks_while_the_donor_makes_its_copy_is_made_again():
    choice = DonorChoice()
    choice.handle(DonorsFound((donor(0),)))
    choice.handle(DonorBusy(0))
    assert asked(choice.handle(ConnectionBroke("lost"))) == 0


def test_a_queue_is_left_for_an_equal_donor_but_not_for_a_lesser_one():
    choice = DonorChoice()
    choice.handle(DonorsFound((donor(0, 1.0), donor(1, 1.0), donor(2, 0.0))))
    assert choice.handle(DonorBusy(0)) == Stay()  # its copy is being made
    assert asked(choice.handle(DonorBusy(3))) == 1
    assert asked(choice.handle(DonorBusy(7))) == 0  # the shortest queue
    assert choice.handle(DonorBusy(9)) == Stay()  # once is enough: each change costs the place
    assert asked(choice.handle(DonorFailed("gone"))) == 1
    assert choice.handle(DonorBusy(2)) == Stay()
    assert asked(choice.handle(DonorFailed("gone"))) == 2


def test_a_donor_that_only_asks_to_wait_is_left_for_any_other_but_each_only_once():
    choice = DonorChoice()
    choice.handle(DonorsFound((donor(0, 9.0), donor(1, 1.0), donor(2, 1.0))))
    assert choice.handle(DonorBusy(0, WAIT_PATIENCE - 1)) == Stay()
    assert asked(choice.handle(DonorBusy(0, WAIT_PATIENCE))) == 1
    assert asked(choice.handle(DonorBusy(3, 0.0))) == 2
    assert asked(choice.handle(DonorBusy(5, 0.0))) == 1
    assert asked(choice.handle(DonorBusy(3, WAIT_PATIENCE))) == 2
    assert choice.handle(DonorBusy(5, 10 * WAIT_PATIENCE)) == Stay()  # all others were left so
    assert asked(choice.handle(DonorFailed("gone"))) == 0
    assert choice.handle(DonorBusy(0, WAIT_PATIENCE)) == Stay()
    assert "nothing but place 0 in its queue for 2 min" in choice.story()


def test_a_donor_alone_is_waited_for():
    choice = DonorChoice()
    choice.handle(DonorsFound((donor(0),)))
    assert choice.handle(DonorBusy(0, 1e6)) == Stay()


def test_who_waits_to_resume_stays():
    choice = DonorChoice()
    choice.handle(DonorsFound((donor(0), donor(1))))
    choice.handle(ChunkReceived())
    assert asked(choice.handle(ConnectionBroke("lost"))) == 0
    assert choice.handle(DonorBusy(2)) == Stay()


@pytest.mark.parametrize("seed", range(100))
def test_whatever_donors_answer_it_ends_and_everybody_was_asked(seed: int):
    rng = random.Random(seed)
    donors = tuple(donor(n, rng.choice([0.0, 1.0, 2.0]), rng.random()) for n in range(rng.randrange(1, 8)))
    choice, seen = DonorChoice(), set()
    action = choice.handle(DonorsFound(donors))
    for _ in range(10_000):
        match action:
            case AskDonor(one):
                seen.add(one.peer)
                action = choice.handle(
                    rng.choice(
                        [
                            DonorFailed("no"),
                            ConnectionBroke("lost"),
                            ChunkReceived(),
                            DonorBusy(rng.randrange(5), rng.choice([0.0, WAIT_PATIENCE])),
                        ]
                    )
                )
            case Stay():
                action = choice.handle(rng.choice([DonorFailed("no"), ConnectionBroke("lost"), DonorBusy(1)]))
            case LookForDonors():
                action = choice.handle(DonorsFound(donors))
            case GiveUp():
                break
    else:
        pytest.fail("it goes on for ever")
    assert seen == {one.peer for one in donors}
