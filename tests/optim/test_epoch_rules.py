"""The rules of an epoch."""

from __future__ import annotations

from shoal.optim import epoch as rules


def test_one_behind_is_behind_only_after_an_epoch_of_its_own():
    assert not rules.lags(4, 5, exact=False)
    assert rules.lags(4, 5, exact=True)
    assert rules.lags(3, 5, exact=False)
    assert not rules.lags(6, 5, exact=True)


def test_a_peer_that_is_behind_catches_up():
    assert rules.next_epoch(3, 3) == 4
    assert rules.next_epoch(3, 7) == 7


def test_a_round_of_parameters_is_due_every_few_epochs_among_several_peers():
    assert rules.state_round_due(4, 2, False, False)
    assert not rules.state_round_due(5, 2, False, False)
    assert not rules.state_round_due(4, 2, True, False)
    assert not rules.state_round_due(4, 2, False, True)


def test_members_of_another_epoch_count_if_their_gradients_did():
    gathered = {"a": {"epoch": 3}, "b": {"epoch": 2}, "c": {"epoch": 2}, "d": None}
    assert rules.mixed_epochs(gathered, {"a": 1.0, "b": 4.0, "c": 0.0, "d": 2.0}, 3) == ["b", "d"]


def test_parameters_agree_if_all_who_have_some_tell_the_same_digest():
    assert rules.parameters_agree([{"digest": b"x"}, {"digest": b"x"}, {"digest": None}])
    assert not rules.parameters_agree([{"digest": b"x"}, {"digest": b"y"}])
    assert not rules.parameters_agree([{"digest": b"x"}, "hostile"])
    assert not rules.parameters_agree([{"digest": b"x"}, {}])
    assert not rules.parameters_agree([{"digest": None}])


def test_a_peer_that_meets_the_next_epoch_ends_that_one_and_no_later():
    assert rules.ended_epoch([{"epoch": 3}, {"epoch": 4}, "hostile"], 3) == 4
    assert rules.ended_epoch([{"epoch": 3}, {"epoch": 10**9}], 3) == 3
    assert rules.ended_epoch([{"epoch": 4}, {"epoch": 3}], 4) == 4


def test_epochs_that_are_under_way_together_have_bits_of_their_own():
    assert rules.group_bits(9) == "0000000000001001"
    assert len({rules.group_bits(epoch) for epoch in range(65_530, 65_545)}) == 15


def test_rounds_are_shorter_where_the_others_may_be_elsewhere():
    """Two peers at different places would wait for each other in turns otherwise."""
    assert rules.round_timeout(60.0, 15.0, may_be_elsewhere=False) == 60.0
    assert rules.round_timeout(60.0, 15.0, may_be_elsewhere=True) == 30.0
    assert rules.round_timeout(5.0, 15.0, may_be_elsewhere=True) == 5.0
