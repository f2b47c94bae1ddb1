"""What a caller of ``step(wait=False)`` holds, and the user process's end of a step, without any process."""

from __future__ import annotations

import json
import sys
import threading
import types
from typing import Any

import pytest
import torch
from user_side import UserSide, make_control

from shoal.averaging.commands import (
    ApplyAverage,
    AveragingStage,
    BoundByWord,
    ReachStage,
    StepOutcome,
    TakeSnapshot,
)
from shoal.averaging.config import MAX_RETRY_PAUSE, retry_pause, retry_start
from shoal.averaging.matchmaking_config import matchmaking_config
from shoal.averaging.report import StepReport
from shoal.averaging.trainer.control import StepControl
from shoal.errors import AllreduceException, InvalidTypeError
from shoal.p2p.identity import Identity
from shoal.runtime.futures import MPFuture
from shoal.utils.serializer import MSGPackSerializer

LIMIT = 20  # seconds, against hanging only


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
    side = UserSide(tensor)
    side.make_average()
    control = side.add_step(0)
    side.link.carry_out(TakeSnapshot(0))
    side.link.carry_out(BoundByWord(0))
    assert not control.cancel()
    assert not control.cancelled()
    side.link.carry_out(ApplyAverage(0))
    assert tensor.tolist() == [9.0] * 3
    side.link.carry_out(ReachStage(0, AveragingStage.LOOKING_FOR_GROUP))
    assert control.cancel()
    side.close()


def test_a_step_that_was_cancelled_writes_nothing_even_if_its_group_has_averaged():
    """The service hears of it too late: it has given its word, and the user process does not know yet."""
    tensor = torch.zeros(3)
    side = UserSide(tensor)
    side.make_average()
    control = side.add_step(0)
    side.link.carry_out(TakeSnapshot(0))
    assert control.cancel()
    side.link.carry_out(BoundByWord(0))
    assert control.cancel()
    with pytest.raises(AllreduceException):
        side.link.carry_out(ApplyAverage(0))
    assert tensor.tolist() == [0.0] * 3
    side.close()


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


class Background:
    """In place of the averager's service: takes a step, whose outcome is told by the test."""

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self.outcome: MPFuture[Any] = MPFuture()

    def call(self, command: object, timeout: float | None = None) -> MPFuture[Any]:
        self.commands.append(command)
        return self.outcome


def begin_step(background: Background, serializer: Any, gather: Any = None) -> StepControl:
    steps = UserSide(torch.zeros(3)).steps
    wishes: dict[str, Any] = dict.fromkeys(("scheduled_time", "weight", "timeout"))
    handle: Any = background
    control, _ = steps.submit(
        handle,
        serializer,
        gather=gather,
        allow_retries=True,
        require_trigger=False,
        when_busy="queue",
        wait=False,
        **wishes,
    )
    return control


def own_serializer(**methods: Any) -> Any:
    return types.SimpleNamespace(**{"dumps": lambda _: b"data", "loads": bytes.upper, **methods})


PEER = Identity.generate(bytes(32)).peer_id.to_bytes()


def outcome_of_a_round(gathered: tuple[tuple[bytes, bytes], ...]) -> StepOutcome:
    report = StepReport(step=0, group_id="00", members=(), modes=(), failure=None, attempts=1)
    return StepOutcome(report, found_group=True, gathered=gathered)


@pytest.mark.parametrize(
    ("serializer", "says"),
    [
        (json, "serializer must make bytes of gather, got str from .*json"),
        (
            own_serializer(dumps=lambda _: memoryview(b"")),
            "serializer must make bytes of gather, got memoryview",
        ),
        (1, r"serializer must be a class with dumps\(\) and loads\(\), got 1"),
        (own_serializer(loads=None), "serializer must be a class with .*, got namespace"),
    ],
)
def test_a_serializer_that_makes_no_bytes_is_an_error_before_the_step_begins(serializer: Any, says: str):
    background = Background()
    with pytest.raises(InvalidTypeError, match=says):
        begin_step(background, serializer, gather="x")
    assert background.commands == []


def test_a_bytearray_will_do():
    background = Background()
    begin_step(background, own_serializer(dumps=lambda _: bytearray(b"abc")))
    assert background.commands[0].gather == b"abc"
    assert type(background.commands[0].gather) is bytes


@pytest.mark.parametrize("error", [ValueError("rubbish"), SystemExit("unreadable"), KeyboardInterrupt()])
def test_whatever_reading_what_was_gathered_raises_the_step_ends(error: BaseException):
    def loads(data: bytes) -> Any:
        raise error

    background = Background()
    control = begin_step(background, own_serializer(loads=loads))
    background.outcome.set_result(outcome_of_a_round(((PEER, b"data"),)))
    assert list(control.result(LIMIT).values()) == [None]


def test_a_step_whose_outcome_makes_no_sense_fails():
    background = Background()
    control = begin_step(background, MSGPackSerializer)
    background.outcome.set_result(outcome_of_a_round(((b"no peer", b"data"),)))
    with pytest.raises(ValueError):
        control.result(LIMIT)
