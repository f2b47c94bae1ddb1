"""What a caller of ``step(wait=False)`` holds, and the host's end of a step, without any process."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch

from shoal.averaging.commands import ApplyAverage, BoundByWord, ReachStage, TakeSnapshot
from shoal.averaging.config import MAX_RETRY_PAUSE, matchmaking_config, retry_pause, retry_start
from shoal.averaging.control import AveragingStage, Steering, StepControl
from shoal.averaging.hostside import TensorKeeper, close
from shoal.averaging.partition import Layout
from shoal.averaging.tensors import TensorStore
from shoal.errors import AllreduceException
from shoal.runtime.futures import MPFuture

LIMIT = 20  # seconds, against hanging only


def make_control() -> StepControl:
    return StepControl(
        scheduled_time=0.0,
        deadline=None,
        weight=1.0,
        needs_trigger=False,
        steering=Steering(trigger=lambda: None, reschedule=lambda _: None),
    )


class NoStates:
    def close(self) -> None:
        pass


def make_keeper(tensor: torch.Tensor) -> TensorKeeper:
    """With one step, number 0, and an average of 9."""
    layout = Layout.from_tensors([tensor])
    states: Any = NoStates()
    keeper = TensorKeeper(TensorStore([tensor], layout), layout, 1.0, False, states, "test")
    memory = keeper.create_memory()
    area = torch.frombuffer(memory.buffer, dtype=torch.uint8)[layout.nbytes :]
    layout.tensor_view(area, 0).fill_(9.0)
    keeper.controls[0] = make_control()
    return keeper


def test_of_several_threads_that_cancel_at_once_each_is_told_that_it_is_cancelled():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            control, barrier, answers = make_control(), threading.Barrier(2), []

            def cancel(control=control, barrier=barrier, answers=answers) -> None:
                barrier.wait(LIMIT)
                answers.append(control.cancel())

            threads = [threading.Thread(target=cancel) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)
            assert answers == [True, True]
    finally:
        sys.setswitchinterval(interval)


def test_a_step_that_is_bound_cannot_be_cancelled_until_another_group_is_looked_for():
    tensor = torch.zeros(3)
    keeper = make_keeper(tensor)
    control = keeper.controls[0]
    keeper.handle(TakeSnapshot(0))
    keeper.handle(BoundByWord(0))
    assert not control.cancel()
    assert not control.cancelled()
    keeper.handle(ApplyAverage(0))
    assert tensor.tolist() == [9.0] * 3
    keeper.handle(ReachStage(0, AveragingStage.LOOKING_FOR_GROUP))
    assert control.cancel()
    keeper.close()


def test_a_step_that_was_cancelled_writes_nothing_even_if_its_group_has_averaged():
    """The service hears of it too late: it has given its word, and the host does not know yet."""
    tensor = torch.zeros(3)
    keeper = make_keeper(tensor)
    keeper.handle(TakeSnapshot(0))
    assert keeper.controls[0].cancel()
    keeper.handle(BoundByWord(0))
    assert keeper.controls[0].cancel()
    with pytest.raises(AllreduceException):
        keeper.handle(ApplyAverage(0))
    assert tensor.tolist() == [0.0] * 3
    keeper.close()


def test_a_service_that_came_to_be_while_its_start_was_cancelled_is_closed():
    class Handle:
        closed = False

        def close(self) -> MPFuture[None]:
            self.closed = True
            done: MPFuture[None] = MPFuture()
            done.set_result(None)
            return done

    keeper, start, made = make_keeper(torch.zeros(3)), MPFuture(), MPFuture()
    made.set_result(Handle())
    keeper.creation = made
    close(start, keeper, LIMIT)  # start waits for the DHT, made comes of it
    assert start.cancelled()
    assert made.result().closed


def test_pauses_between_attempts_grow_and_leave_time_for_another():
    pauses = [retry_pause(failures, None) for failures in range(1, 10_000)]
    assert pauses[:3] == [0.1, 0.2, 0.4]
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_RETRY_PAUSE
    assert retry_pause(100, 1.0) == 0.5
    assert retry_pause(1, -3.0) == 0.0


def test_another_attempt_does_not_begin_before_the_time_that_was_asked_for():
    settings = matchmaking_config(None, 2, 5.0, 3.0)
    assert retry_start(100.0, 110.0, None, settings) == 115.0
    assert retry_start(3600.0, 110.0, None, settings) == 3600.0
