"""The average of a step that ended in doubt, when it comes late: the user's process alone."""

from __future__ import annotations

import logging

import pytest
import torch
from user_side import AVERAGE, LIMIT, Peer

from shoal.averaging.commands import ApplyAverage
from shoal.averaging.report import DoubtOutcome, DoubtReport
from shoal.averaging.trainer.pending import ApplyWhen
from shoal.errors import DeadlineExceeded, InDoubt, InvalidStateError, PeerProcessUnresponsive


def test_a_late_average_waits_for_the_next_step_and_keeps_what_was_trained():
    peer = Peer()
    peer.run_into_doubt()
    assert not peer.late.write()
    peer.settle(0)
    assert peer.outcome is DoubtOutcome.COMMITTED
    assert peer.tensor.tolist() == [0.0] * 3  # not before the user's call
    with peer.store.hold():
        peer.tensor[1] += 1
    assert peer.late.write()
    assert peer.tensor.tolist() == [AVERAGE, AVERAGE + 1, AVERAGE]
    assert peer.outcome is DoubtOutcome.WRITTEN
    assert not peer.late.write()


def test_the_next_report_tells_what_became_of_the_doubt():
    peer = Peer()
    assert peer.run_into_doubt().report.doubt is None
    peer.settle(0)
    peer.late.write()
    for number, expected in [(1, DoubtReport(0, DoubtOutcome.WRITTEN)), (2, None)]:
        control = peer.begin_step()
        peer.end_step(number)
        control.result(LIMIT)
        assert control.report is peer.steps.last_report
        assert control.report.doubt == expected


@pytest.mark.parametrize("knows_first", [True, False])
def test_a_later_snapshot_drops_it_with_a_warning(knows_first: bool, caplog: pytest.LogCaptureFixture):
    peer = Peer()
    peer.run_into_doubt()
    peer.begin_step()
    if knows_first:
        peer.settle(0)
    peer.take_snapshot(1)
    if not knows_first:
        peer.settle(0)
    assert peer.outcome is DoubtOutcome.DROPPED
    assert not peer.late.write()
    assert peer.tensor.tolist() == [0.0] * 3
    assert "step 0, which was in doubt: dropped (a later round has taken the tensors)" in caplog.text


@pytest.mark.parametrize("knows_first", [True, False])
def test_a_state_that_was_loaded_drops_it(knows_first: bool):
    """The donor may have the average already, which would count twice."""
    peer = Peer()
    peer.run_into_doubt()
    if knows_first:
        peer.settle(0)
    peer.late.drop("a state was loaded")
    if not knows_first:
        peer.settle(0)
    assert peer.late.last == DoubtReport(0, DoubtOutcome.DROPPED, "a state was loaded")


@pytest.mark.parametrize("outcome", [DoubtOutcome.FAILED, DoubtOutcome.UNKNOWN])
def test_what_was_not_committed_is_told_and_nothing_is_written(outcome: DoubtOutcome):
    peer = Peer()
    peer.run_into_doubt()
    peer.settle(0, outcome)
    assert peer.outcome is outcome
    assert not peer.late.write()


def test_news_that_overtake_the_end_of_their_step_wait_for_it():
    peer = Peer()
    control = peer.begin_step()
    peer.take_snapshot(0)
    peer.settle(0)
    assert peer.late.last is None
    peer.end_step(0, "others may have decided", in_doubt=True)
    assert isinstance(control.exception(LIMIT), InDoubt)
    assert peer.outcome is DoubtOutcome.COMMITTED


def test_news_of_a_step_that_was_not_in_doubt_change_nothing():
    """The user has cancelled it, say."""
    peer = Peer()
    peer.begin_step()
    peer.take_snapshot(0)
    peer.end_step(0, "cancelled")
    peer.settle(0)
    assert peer.late.last is None
    assert not peer.late.write()


def test_a_second_doubt_ends_the_first_one(caplog: pytest.LogCaptureFixture):
    peer = Peer()
    peer.run_into_doubt()
    control = peer.begin_step()
    peer.take_snapshot(1)
    peer.end_step(1, "others may have decided", in_doubt=True)
    assert isinstance(control.exception(LIMIT), InDoubt)
    assert "step 0, which was in doubt: unknown (a later step is in doubt, too)" in caplog.text
    peer.settle(0)
    assert peer.late.last == DoubtReport(1, DoubtOutcome.OPEN, "others may have decided")
    peer.settle(1)
    assert peer.late.write()


def test_autograd_notices_a_late_average_between_forward_and_backward():
    peer = Peer()
    peer.run_into_doubt()
    peer.settle(0)
    loss = peer.tensor.requires_grad_().square().sum()
    peer.late.write()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_that_cannot_be_written_is_named_and_dropped():
    peer = Peer()
    peer.run_into_doubt()
    peer.settle(0)
    peer.tensor.data = torch.zeros(4)
    with pytest.raises(
        InvalidStateError, match=r"late average of step 0 could not be .*averaged_tensors\[0\]"
    ):
        peer.late.write()
    assert peer.outcome is DoubtOutcome.DROPPED
    assert not peer.late.write()


def test_the_end_drops_it_with_a_warning(caplog: pytest.LogCaptureFixture):
    peer = Peer()
    peer.run_into_doubt()
    peer.settle(0)
    peer.late.drop("the averager was shut down")
    assert "dropped (the averager was shut down)" in caplog.text


# a background process that does not answer


@pytest.mark.parametrize("is_bound", [True, False], ids=["voted", "may have voted"])
def test_a_timeout_after_the_snapshot_ends_in_doubt_with_a_report(
    is_bound: bool, caplog: pytest.LogCaptureFixture
):
    peer = Peer()
    control = peer.begin_step(wait=True)
    peer.take_snapshot(0)
    if is_bound:
        peer.steps.bind(0)
    peer.calls[0].set_exception(PeerProcessUnresponsive("the background process is stopped"))
    with caplog.at_level(logging.WARNING):
        assert peer.steps.wait_for(control, True) is None
    assert isinstance(control.exception(), InDoubt)
    assert isinstance(control.exception().__cause__, DeadlineExceeded)
    assert control.report.in_doubt
    assert control.report is peer.steps.last_report
    assert ("had voted" if is_bound else "may have voted") in caplog.text
    assert peer.outcome is DoubtOutcome.OPEN


def test_a_timeout_before_the_snapshot_is_a_plain_failure():
    peer = Peer()
    control = peer.begin_step()
    peer.calls[0].set_exception(PeerProcessUnresponsive("the background process is stopped"))
    assert isinstance(control.exception(LIMIT), PeerProcessUnresponsive)
    assert peer.late.last is None


@pytest.mark.parametrize("apply_when", ["ready", "called"])
def test_a_process_that_goes_on_and_commits_leaves_a_late_average(apply_when: ApplyWhen):
    peer = Peer(apply_when)
    control = peer.begin_step()
    peer.take_snapshot(0)
    peer.calls[0].set_exception(PeerProcessUnresponsive("the background process is stopped"))
    assert isinstance(control.exception(LIMIT), InDoubt)
    assert peer.link.carry_out(ApplyAverage(0)) is True  # nothing waits for apply_average()
    assert peer.tensor.tolist() == [0.0] * 3
    assert peer.late.write()
    assert peer.tensor.tolist() == [AVERAGE] * 3
