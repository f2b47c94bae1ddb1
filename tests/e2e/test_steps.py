"""A step and its control, as a user sees them: what can be steered until all-reduce begins, what is reported, how
failures read.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm, step_all, wait_for_stage, wait_until

from shoal.averaging.background.step_runner import WARN_AFTER_ATTEMPTS
from shoal.averaging.commands import AveragingStage
from shoal.averaging.trainer.steps import LONELY_ROUNDS
from shoal.errors import AllreduceException, InvalidStateError, MatchmakingException
from shoal.utils.timed import get_dht_time

pytestmark = pytest.mark.xdist_group("averaging")


def test_the_weight_can_be_set_until_all_reduce_begins_and_no_longer(swarm: Swarm):
    tensors = [[torch.full((1000,), value)] for value in (0.0, 4.0)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    controls = [a.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True) for a in averagers]
    wait_for_stage(controls, AveragingStage.AWAITING_TRIGGER)
    controls[1].weight = 3
    for control in controls:
        control.allow_allreduce()
        control.allow_allreduce()  # twice is harmless
    for control in controls:
        control.result(60)
    assert torch.equal(tensors[0][0], torch.full((1000,), 3.0))
    assert torch.equal(tensors[1][0], tensors[0][0])
    assert controls[0].report.weight == 4.0
    with pytest.raises(InvalidStateError, match="weight can't be set any more: the step is finished"):
        controls[0].weight = 2.0


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1.0, ValueError), (float("nan"), ValueError), (1e301, ValueError), ("2", TypeError)],
)
def test_a_weight_that_is_none_is_refused_and_the_old_one_stays(
    swarm: Swarm, value: Any, error: type[Exception]
):
    control = swarm.peer([torch.zeros(2)], size=2).step(wait=False, timeout=STEP_TIMEOUT, weight=2.0)
    with pytest.raises(error, match="weight must be"):
        control.weight = value
    assert control.weight == 2.0
    assert control.cancel()


def test_a_member_of_weight_0_takes_the_average_and_adds_nothing_to_it_not_even_nan(swarm: Swarm):
    tensors = [[torch.full((1000,), value)] for value in (1.0, 3.0, float("nan"))]
    averagers = [swarm.peer(own, size=3) for own in tensors]
    controls = [
        averager.step(wait=False, timeout=STEP_TIMEOUT, weight=weight)
        for averager, weight in zip(averagers, (1.0, 1.0, 0.0), strict=True)
    ]
    for control in controls:
        assert len(control.result(60)) == 3
    for own in tensors:
        assert torch.equal(own[0], torch.full((1000,), 2.0))
    assert controls[0].report.weight == 2.0


def test_a_group_in_which_nobody_has_weight_fails_with_that_reason(swarm: Swarm):
    averagers = [swarm.peer([torch.ones(3)], size=2) for _ in range(2)]
    controls = [a.step(wait=False, timeout=STEP_TIMEOUT, weight=0, allow_retries=False) for a in averagers]
    for control in controls:
        with pytest.raises(AllreduceException, match="weight"):
            control.result(60)
        assert control.report.attempts == 1


def test_a_round_that_fails_again_and_again_is_retried_with_growing_pauses_and_warnings(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    averagers = [swarm.peer([torch.ones(3)], size=2) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        controls = [averager.step(wait=False, timeout=1.5, weight=0) for averager in averagers]
        for control in controls:
            with pytest.raises(AllreduceException):
                control.result(60)
            assert WARN_AFTER_ATTEMPTS <= control.report.attempts < 10
    assert f"attempt {WARN_AFTER_ATTEMPTS} failed" in caplog.text
    assert "attempt 1 failed" not in caplog.text


def test_a_step_can_be_brought_forward_and_put_off_while_it_looks_for_a_group(swarm: Swarm):
    averagers = [swarm.peer([torch.full((3,), float(i))], size=4, min_group_size=2) for i in range(2)]
    far = get_dht_time() + 3600
    controls = [averager.step(wait=False, scheduled_time=far) for averager in averagers]
    wait_for_stage(controls, AveragingStage.LOOKING_FOR_GROUP)
    soon = get_dht_time() + 1.0
    for control in controls:
        control.scheduled_time = soon
    for control in controls:
        assert len(control.result(60)) == 2
        assert control.scheduled_time == soon
        with pytest.raises(InvalidStateError, match="scheduled_time can't be set any more"):
            control.scheduled_time = far


def test_a_step_that_waits_for_its_turn_can_be_rescheduled(swarm: Swarm):
    averagers = [swarm.peer([torch.full((3,), float(i))], size=4, min_group_size=2) for i in range(2)]
    first = [a.step(wait=False, scheduled_time=get_dht_time() + 3600) for a in averagers]
    second = [a.step(wait=False, scheduled_time=get_dht_time() + 3600) for a in averagers]
    wait_for_stage(first, AveragingStage.LOOKING_FOR_GROUP)
    assert [control.stage for control in second] == [AveragingStage.IDLE] * 2
    for control in second:
        control.scheduled_time = get_dht_time() + 1.0
    for control in first:
        control.cancel()
    for control in second:
        assert len(control.result(60)) == 2


def test_a_time_that_cannot_be_is_refused(swarm: Swarm):
    control = swarm.peer([torch.zeros(2)], size=2).step(wait=False, timeout=10.0)
    for value in (get_dht_time() + 20, float("inf"), get_dht_time() + 1e6):
        with pytest.raises(ValueError, match="scheduled_time"):
            control.scheduled_time = value
    control.cancel()


def test_several_steps_at_once_run_in_their_order(swarm: Swarm):
    tensors = [[torch.full((10,), float(index))] for index in range(2)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    finished: list[tuple[int, int]] = []
    controls = []
    for number in range(3):
        for peer, averager in enumerate(averagers):
            control = averager.step(wait=False, timeout=STEP_TIMEOUT, gather=number)
            controls.append((number, control))
            control.add_done_callback(lambda _, at=(peer, number): finished.append(at))
    for number, control in controls:
        assert set(control.result(60).values()) == {number}
    deadline = time.monotonic() + 20
    while len(finished) < 6:
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
    assert [controls[index][1].report.step for index in (0, 2, 4)] == [0, 1, 2]


def test_get_tensors_does_not_wait_for_a_round_in_flight(swarm: Swarm):
    """The other member holds its lock, so that its snapshot and thereby the round waits: ours is free all the time."""
    tensors = [[torch.full((1000,), float(index))] for index in range(2)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    with averagers[1].get_tensors():
        controls = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
        wait_for_stage(controls, AveragingStage.RUNNING_ALLREDUCE)
        with averagers[0].get_tensors() as (mine,):
            mine += 10
        assert not controls[0].done()
    for control in controls:
        control.result(60)
    assert torch.equal(tensors[0][0], torch.full((1000,), 10.5))
    assert torch.equal(tensors[1][0], torch.full((1000,), 0.5))


def test_storage_that_is_replaced_between_rounds_is_averaged(swarm: Swarm):
    parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    averagers = [swarm.peer([parameter], size=2) for parameter in parameters]
    step_all(averagers)
    parameters[0].data = torch.full((5,), 8.0)
    step_all(averagers)
    assert all(torch.equal(parameter.data, torch.full((5,), 4.0)) for parameter in parameters)
    parameters[0].data = torch.zeros(6)
    controls = [a.step(wait=False, timeout=3.0, allow_retries=False) for a in averagers]
    with pytest.raises(AllreduceException, match=r"averaged_tensors\[0\] was float32 \[5\]"):
        controls[0].result(60)
    with pytest.raises(AllreduceException, match="fewer than min_group_size=2 members are left") as caught:
        controls[1].result(60)
    assert averagers[0].peer_id.to_base58() in str(caught.value)
    assert torch.equal(parameters[1].data, torch.full((5,), 4.0))


def test_an_average_that_cannot_be_written_fails_the_step_and_says_so(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    parameters = [torch.nn.Parameter(torch.full((5,), float(index))) for index in range(2)]
    averagers = [swarm.peer([parameter], size=2) for parameter in parameters]
    copied = when_copied(averagers[0])
    with averagers[1].get_tensors():
        controls = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
        assert copied.wait(20)
        parameters[0].data = torch.zeros(6)
    with pytest.raises(
        AllreduceException, match=r"could not be written .*averaged_tensors\[0\] was float32 \[5\]"
    ):
        controls[0].result(30)
    assert controls[0].report.failure == str(controls[0].exception())
    assert averagers[0].last_report is controls[0].report
    assert len(controls[1].result(30)) == 2
    assert parameters[1].tolist() == [0.5] * 5


def test_a_step_whose_round_is_decided_cannot_be_cancelled_and_takes_the_average(swarm: Swarm):
    tensors = [[torch.full((1000,), float(index))] for index in range(2)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    copied = when_copied(averagers[0])
    controls = [a.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True) for a in averagers]
    controls[0].allow_allreduce()
    assert copied.wait(20)
    with averagers[0].get_tensors() as (mine,):
        controls[1].allow_allreduce()
        controls[1].result(30)
        wait_until(lambda: controls[0]._is_bound)
        assert not controls[0].cancel()
        assert mine[0] == 0.0  # it waits for the lock
    assert len(controls[0].result(30)) == 2
    assert torch.equal(tensors[0][0], torch.full((1000,), 0.5))


def test_a_shutdown_inside_get_tensors_does_not_wait_for_the_average_that_is_to_be_written(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    tensors = [[torch.full((1000,), float(index))] for index in range(2)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    copied = when_copied(averagers[0])
    controls = [a.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True) for a in averagers]
    controls[0].allow_allreduce()
    assert copied.wait(20)
    with caplog.at_level(logging.WARNING), averagers[0].get_tensors():
        controls[1].allow_allreduce()
        controls[1].result(30)
        wait_until(lambda: controls[0]._is_bound)
        averagers[0].shutdown()
    assert "did not end" not in caplog.text
    with pytest.raises(AllreduceException):
        controls[0].result(30)
    assert torch.equal(tensors[0][0], torch.zeros(1000))


def test_a_cancelled_step_does_not_go_on_to_wait_for_the_lock(swarm: Swarm):
    averagers = [swarm.peer([torch.zeros(3)], size=2) for _ in range(2)]
    with averagers[0].get_tensors():
        controls = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
        wait_for_stage(controls[:1], AveragingStage.RUNNING_ALLREDUCE)
        for control in controls:
            assert control.cancel()
        # The next one needs the thread that waited for the lock, to tell that it looks for a group.
        following = averagers[0].step(wait=False, timeout=0.5)
        wait_until(following.done)
        with pytest.raises(MatchmakingException):
            following.result()


def test_failures_in_a_row_are_said_louder(swarm: Swarm, caplog: pytest.LogCaptureFixture):
    averager = swarm.peer([torch.zeros(3)], size=2, min_matchmaking_time=0.3, request_timeout=0.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(LONELY_ROUNDS):
            assert averager.step(timeout=0.2) is None
    lines = [record for record in caplog.records if "averaging failed" in record.message]
    assert [record.levelno for record in lines] == [logging.WARNING] * (LONELY_ROUNDS - 1) + [logging.ERROR]
    assert f"trained alone for {LONELY_ROUNDS} rounds" in lines[-1].message


def test_a_success_ends_a_row_of_failures(swarm: Swarm, caplog: pytest.LogCaptureFixture):
    tensor = torch.full((3,), float("nan"))
    averager = swarm.peer([tensor], size=1)
    with caplog.at_level(logging.WARNING):
        for value in (float("nan"), 1.0, float("nan")):
            tensor.fill_(value)
            for _ in range(1 if value == 1.0 else LONELY_ROUNDS - 1):
                assert (averager.step(timeout=STEP_TIMEOUT) is None) == (value != 1.0)
    lines = [record for record in caplog.records if "averaging failed" in record.message]
    assert [record.levelno for record in lines] == [logging.WARNING] * (2 * LONELY_ROUNDS - 2)


def test_a_step_begins_when_it_was_scheduled(swarm: Swarm):
    averagers = [
        swarm.peer([torch.zeros(3)], size=3, min_group_size=2, min_matchmaking_time=0.2, request_timeout=0.1)
        for _ in range(2)
    ]
    start = get_dht_time() + 1.0
    controls = [
        averager.step(wait=False, timeout=STEP_TIMEOUT, scheduled_time=start) for averager in averagers
    ]
    for control in controls:
        control.result(20)
        assert control.report.phases.search >= 0.8
    assert get_dht_time() >= start


def test_a_report_reads_well_and_is_made_of_plain_values(swarm: Swarm):
    averagers = [swarm.peer([torch.full((1_000_000,), float(i))], size=2) for i in range(2)]
    controls = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
    assert controls[0].report is None
    for control in controls:
        control.result(60)
    report = controls[0].report
    assert averagers[0].last_report is report
    plain = report.to_dict()
    assert_plain(plain)
    assert plain["members"] == controls[1].report.to_dict()["members"]
    assert plain["group_id"] == controls[1].report.to_dict()["group_id"]
    assert plain["modes"] == ["full", "full"]
    assert plain["weight"] == 2.0
    assert plain["phases"]["allreduce"] > 0
    (path,) = plain["paths"]
    assert path["member"] == str(averagers[1].peer_id)
    assert path["lanes"] == 1
    assert "2 peers" in str(report)


def when_copied(averager: Any) -> threading.Event:
    """Set when a round has copied this averager's tensors."""
    store, copied = averager._DecentralizedAverager__parts.store, threading.Event()
    snapshot = store.snapshot

    def note(*arguments: Any, **options: Any) -> None:
        snapshot(*arguments, **options)
        copied.set()

    store.snapshot = note
    return copied


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        for item in value.values():
            assert_plain(item)
    elif isinstance(value, list):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or isinstance(value, (bool, int, float, str)), value


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_model_of_4_gb_averages(swarm: Swarm, tmp_path: Path):
    """With both peers on one machine that takes 16 GB of arenas; one of the models lies in a file."""
    assert psutil.virtual_memory().available > 21e9, "this test needs 21 GB of free memory"
    models = [
        torch.zeros(10**9),
        torch.from_file(str(tmp_path / "model"), shared=True, size=10**9).fill_(1.0),
    ]
    averagers = [swarm.peer(list(model.view(4, -1)), size=2, dht=swarm.own_dht()) for model in models]
    controls = [averager.step(wait=False, timeout=600) for averager in averagers]
    for control in controls:
        control.result(900)
    assert all(float(model.min()) == float(model.max()) == 0.5 for model in models)
