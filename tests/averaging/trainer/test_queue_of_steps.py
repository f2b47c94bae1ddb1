"""Steps that are begun while an earlier one is under way: queued, with a warning when they get many, or not begun."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from user_side import UserSide

from shoal.averaging.commands import RunStep, StepOutcome
from shoal.averaging.report import StepReport
from shoal.averaging.trainer.control import StepControl
from shoal.averaging.trainer.steps import MANY_WAITING
from shoal.errors import AllreduceException, InvalidValueError
from shoal.runtime.futures import MPFuture
from shoal.utils.serializer import MSGPackSerializer

LIMIT = 20  # seconds, against hanging only


class Background:
    """In place of the averager's service: takes steps, which end when the test says so."""

    def __init__(self) -> None:
        self.outcomes: list[MPFuture[Any]] = []

    def call(self, command: object, *, timeout: float | None = None) -> MPFuture[Any]:
        assert isinstance(command, RunStep)
        assert command.step == len(self.outcomes)
        self.outcomes.append(MPFuture())
        return self.outcomes[-1]

    def end(self, step: int, failure: str | None = None) -> None:
        report = StepReport(step=step, failure=failure, attempts=1)
        self.outcomes[step].set_result(StepOutcome(report, found_group=True))


class User:
    def __init__(self) -> None:
        self.background = Background()
        self.steps = UserSide(torch.zeros(3), name="run").steps

    def begin(self, when_busy: Any = "queue", wait: bool = False, **options: Any) -> tuple[StepControl, bool]:
        handle: Any = self.background
        wishes = dict.fromkeys(("gather", "scheduled_time", "weight", "timeout")) | options
        return self.steps.submit(
            handle,
            MSGPackSerializer,
            allow_retries=True,
            require_trigger=False,
            when_busy=when_busy,
            wait=wait,
            **wishes,
        )


def test_many_waiting_steps_are_warned_of_once(caplog: pytest.LogCaptureFixture):
    user = User()
    with caplog.at_level(logging.WARNING):
        for _ in range(MANY_WAITING):
            user.begin()
        assert not caplog.records
        for _ in range(100):
            user.begin()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"run: {MANY_WAITING} steps wait behind step 0 (stage: idle): ")
    assert "when_busy='current'" in line


def test_steps_that_were_cancelled_wait_for_nothing(caplog: pytest.LogCaptureFixture):
    user = User()
    with caplog.at_level(logging.WARNING):
        for _ in range(10 * MANY_WAITING):
            user.begin()[0].cancel()
    assert not caplog.records


def test_the_step_under_way_is_returned_instead_of_another_one():
    user = User()
    control, is_new = user.begin("current")
    assert is_new
    assert user.begin("current", weight=3.0) == (control, False)
    assert control.weight == 1.0
    user.background.end(0)
    control.result(LIMIT)
    later, is_new = user.begin("current")
    assert is_new
    assert later is not control
    assert len(user.background.outcomes) == 2


def test_of_several_steps_the_first_is_under_way():
    user = User()
    controls = [user.begin()[0] for _ in range(3)]
    controls[0].cancel()
    assert user.begin("current") == (controls[1], False)


def test_threads_that_begin_at_once_get_the_same_step():
    user = User()
    barrier = threading.Barrier(8)
    got: list[StepControl] = []

    def begin() -> None:
        barrier.wait(LIMIT)
        got.append(user.begin("current")[0])

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(set(map(id, got))) == 1
    assert len(got) == 8
    assert len(user.background.outcomes) == 1


def test_what_is_asked_for_is_checked_even_if_it_is_of_no_effect():
    user = User()
    user.begin()
    with pytest.raises(InvalidValueError, match="timeout must be more than 0, got -1"):
        user.begin("current", timeout=-1)
    with pytest.raises(InvalidValueError, match="when_busy must be 'queue' or 'current', got 'wait'"):
        user.begin("wait")


def test_a_failure_that_a_caller_waits_for_is_warned_of(caplog: pytest.LogCaptureFixture):
    """Though the step itself was begun by a caller that does not."""
    user = User()
    user.begin()
    control, is_new = user.begin("current", wait=True)
    user.background.end(0, "nobody came")
    with caplog.at_level(logging.WARNING):
        assert user.steps.wait_for(control, is_new) is None
    assert "run: averaging failed, tensors are unchanged: nobody came" in caplog.text


@pytest.mark.parametrize("is_own", [True, False])
def test_an_interrupted_wait_cancels_a_step_of_its_own_only(is_own: bool):
    class Interrupted(StepControl):
        def result(self, timeout: float | None = None) -> Any:
            raise KeyboardInterrupt

    user = User()
    control, _ = user.begin(wait=True)
    control.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        user.steps.wait_for(control, is_own)
    assert control.cancelled() is is_own


def test_a_failure_that_nobody_waits_for_is_handed_out_only(caplog: pytest.LogCaptureFixture):
    user = User()
    control, _ = user.begin()
    with caplog.at_level(logging.WARNING):
        user.background.end(0, "nobody came")
        with pytest.raises(AllreduceException, match="nobody came"):
            control.result(LIMIT)
    assert not caplog.records
