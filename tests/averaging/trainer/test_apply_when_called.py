"""When an average is written: as soon as it is ready, or when the user calls. The user's process alone, without a
background process.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from user_side import AVERAGE, UserSide

import shoal
from shoal.averaging.commands import ApplyAverage, AveragingStage, ReachStage, TakeSnapshot
from shoal.averaging.trainer.control import StepControl
from shoal.averaging.trainer.pending import ApplyWhen
from shoal.errors import InvalidStateError, InvalidValueError

LIMIT = 20  # seconds, against hanging only


class Peer(UserSide):
    """Its rounds are run by the test."""

    def __init__(self, tensor: torch.Tensor, apply_when: ApplyWhen = "called") -> None:
        super().__init__(tensor, apply_when)
        self.make_average()
        self.told: list[str] = []
        self.writer.notify_written = lambda: self.told.append("written")

    def begin_round(self, step: int = 0) -> StepControl:
        control = self.add_step(step)
        self.link.carry_out(ReachStage(step, AveragingStage.LOOKING_FOR_GROUP))
        self.link.carry_out(TakeSnapshot(step))
        return control

    def commit(self, step: int = 0) -> Any:
        return self.link.carry_out(ApplyAverage(step))


def test_an_average_is_written_when_it_is_ready():
    tensor = torch.zeros(3)
    peer = Peer(tensor, "ready")
    peer.begin_round()
    assert peer.commit() is True
    assert tensor.tolist() == [AVERAGE] * 3
    assert not peer.writer.apply()


def test_an_average_waits_for_the_call():
    tensor = torch.zeros(3)
    peer = Peer(tensor)
    peer.begin_round()
    tensor[0] += 1  # an update of the trainer meanwhile is kept
    assert peer.commit() is False
    assert tensor.tolist() == [1.0, 0.0, 0.0]
    assert peer.told == []
    tensor[1] += 1
    assert peer.writer.apply()
    assert tensor.tolist() == [AVERAGE + 1, AVERAGE + 1, AVERAGE]
    assert peer.told == ["written"]
    assert not peer.writer.apply()
    assert tensor.tolist() == [AVERAGE + 1, AVERAGE + 1, AVERAGE]
    assert peer.told == ["written"]


def test_nothing_waits_for_the_call_if_the_round_failed():
    peer = Peer(torch.zeros(3))
    peer.begin_round()
    assert not peer.writer.apply()


def test_a_call_inside_get_tensors_is_fine():
    tensor = torch.zeros(3)
    peer = Peer(tensor)
    peer.begin_round()
    peer.commit()
    with peer.store.hold():
        assert peer.writer.apply()
    assert tensor.tolist() == [AVERAGE] * 3


def test_while_a_caller_waits_in_step_averages_are_written_at_once():
    tensor = torch.zeros(3)
    peer = Peer(tensor)
    peer.begin_round()
    peer.commit()
    with peer.writer.caller_in_step():
        assert tensor.tolist() == [AVERAGE] * 3  # what was there before
        assert peer.told == ["written"]
        tensor.zero_()
        peer.begin_round(1)
        assert peer.commit(1) is True
        assert tensor.tolist() == [AVERAGE] * 3
    assert peer.told == ["written"]  # the second one by the answer
    peer.begin_round(2)
    assert peer.commit(2) is False


def test_an_interrupted_caller_leaves_step_for_good():
    peer = Peer(torch.zeros(3))
    with pytest.raises(KeyboardInterrupt), peer.writer.caller_in_step():
        raise KeyboardInterrupt
    peer.begin_round()
    assert peer.commit() is False


def test_of_two_callers_in_step_the_first_to_leave_does_not_end_it():
    peer = Peer(torch.zeros(3))
    inside, over = threading.Event(), threading.Event()

    def wait_in_step() -> None:
        with peer.writer.caller_in_step():
            inside.set()
            over.wait(LIMIT)

    thread = threading.Thread(target=wait_in_step)
    thread.start()
    assert inside.wait(LIMIT)
    with peer.writer.caller_in_step():
        pass
    peer.begin_round()
    assert peer.commit() is True
    over.set()
    thread.join(LIMIT)


def test_an_average_that_cannot_be_written_is_named_and_dropped():
    tensor = torch.zeros(3)
    peer = Peer(tensor)
    peer.begin_round(7)
    peer.commit(7)
    tensor.data = torch.zeros(4)
    with pytest.raises(
        InvalidStateError, match=r"average of step 7 could not be .* averaged_tensors\[0\] was"
    ):
        peer.writer.apply()
    assert peer.told == ["written"]  # the arena is free
    assert not peer.writer.apply()


def test_autograd_notices_an_average_between_forward_and_backward():
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    peer = Peer(weight)
    peer.begin_round()
    loss = weight.square().sum()
    peer.commit()
    loss.backward(retain_graph=True)  # nothing is written yet: the gradient is that of the forward pass
    assert weight.grad.tolist() == [4.0] * 3
    peer.writer.apply()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_end_drops_an_average_with_a_warning(caplog: pytest.LogCaptureFixture):
    tensor = torch.zeros(3)
    peer = Peer(tensor)
    peer.begin_round(4)
    peer.commit(4)
    with caplog.at_level(logging.WARNING):
        peer.close()
    assert "test: shut down before the average of step 4 was applied" in caplog.text
    assert not peer.writer.apply()
    assert tensor.tolist() == [0.0] * 3


def test_an_end_with_nothing_pending_says_nothing(caplog: pytest.LogCaptureFixture):
    peer = Peer(torch.zeros(3))
    peer.begin_round()
    peer.commit()
    peer.writer.apply()
    with caplog.at_level(logging.WARNING):
        peer.close()
    assert not caplog.records


def make(**options: Any) -> shoal.DecentralizedAverager:
    dht = shoal.DHT(start=False)
    return shoal.DecentralizedAverager([torch.zeros(3)], dht, prefix="p", start=False, **options)


@pytest.mark.parametrize("value", ["later", None, True])
def test_a_time_to_apply_that_is_none_is_refused(value: Any):
    with pytest.raises(InvalidValueError, match="apply_when must be 'ready' or 'called', got "):
        make(apply_when=value)


def test_a_call_that_nothing_waits_for_says_which_option_it_needs():
    with pytest.raises(InvalidStateError, match="apply_when='called'"):
        make().apply_average()


def test_a_call_before_the_start_says_so():
    with pytest.raises(InvalidStateError, match="not started"):
        make(apply_when="called").apply_average()
