"""Averaging through real background processes and sockets, as a user would do it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import time
import weakref
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from real_swarm import STEP_TIMEOUT, Swarm, step_all, wait_for_stage

import shoal
from shoal.averaging.commands import AveragingStage
from shoal.averaging.group import PeerMode
from shoal.averaging.trainer.control import StepControl
from shoal.errors import AllreduceException, InvalidStateError, MatchmakingException, PeerProcessDied
from shoal.p2p.reach.reachability import Standing
from shoal.utils.serializer import MSGPackSerializer
from shoal.utils.timed import get_dht_time

NODE, CLIENT = PeerMode.FULL, PeerMode.CLIENT

pytestmark = pytest.mark.xdist_group("averaging")  # one worker, so that the background processes are shared


def random_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in [(1000, 300), (), (7,), (0, 3)]]


def test_a_group_of_four_ends_with_the_exact_average_bit_for_bit_equal(swarm: Swarm):
    tensors = [random_tensors(seed) for seed in range(4)]
    inputs = [[tensor.double() for tensor in own] for own in tensors]
    averagers = [swarm.peer(own, size=4) for own in tensors]
    weights = [1.0, 2.0, 0.5, 3.0]
    controls = [
        averager.step(
            wait=False, timeout=STEP_TIMEOUT, weight=weight, gather={"number": index, "pair": (1, 2)}
        )
        for index, (averager, weight) in enumerate(zip(averagers, weights, strict=True))
    ]
    gathered = [control.result(60) for control in controls]

    for own in tensors[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(own, tensors[0], strict=True))
    for index, result in enumerate(tensors[0]):
        stack = torch.stack([own[index] for own in inputs])
        reference = (stack * torch.tensor(weights).view(-1, *[1] * result.dim())).sum(0) / sum(weights)
        assert bool(((result.double() - reference).abs() <= 1e-6 * stack.abs().mean(0)).all())
    expected = {
        averager.peer_id: {"number": index, "pair": (1, 2)} for index, averager in enumerate(averagers)
    }
    assert gathered == [expected] * 4
    report = averagers[0].last_report
    assert report is not None
    assert len(report.members) == 4
    assert report.bytes_sent > 0
    assert report.succeeded


@pytest.mark.sweep
def test_tensors_of_every_floating_type_average_together(swarm: Swarm):
    types = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    tensors = [[torch.full((50, 3), float(seed + 1)).to(dtype) for dtype in types] for seed in range(2)]
    tensors[1][0] = tensors[1][0].t().contiguous().t()  # strides are each peer's own business
    step_all([swarm.peer(own, size=2) for own in tensors])
    for own in tensors:
        for tensor in own:
            assert torch.equal(tensor, torch.full_like(tensor, 1.5))


@pytest.mark.sweep
def test_float16_compression_comes_within_its_resolution(swarm: Swarm):
    tensors = [random_tensors(seed) for seed in range(2)]
    reference = [(a.double() + b.double()) / 2 for a, b in zip(*tensors, strict=True)]
    largest = max(tensor.abs().max().item() for own in tensors for tensor in own if tensor.numel())
    step_all([swarm.peer(own, size=2, compression=shoal.Float16Compression()) for own in tensors])
    for own in tensors:
        for tensor, expected in zip(own, reference, strict=True):
            assert bool(((tensor.double() - expected).abs() <= 3 * largest * 2**-11).all())


def test_alpha_moves_tensors_a_part_of_the_way(swarm: Swarm):
    tensors = [[torch.zeros(10)], [torch.full((10,), 4.0)]]
    step_all([swarm.peer(own, size=2, averaging_alpha=0.25) for own in tensors])
    assert torch.equal(tensors[0][0], torch.full((10,), 0.5))
    assert torch.equal(tensors[1][0], torch.full((10,), 3.5))


def test_a_round_between_forward_and_backward_does_not_disturb_autograd_and_keeps_what_the_trainer_adds(
    swarm: Swarm,
):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    other = [torch.zeros_like(parameter) for parameter in model.parameters()]
    averagers = [swarm.peer(list(model.parameters()), size=2), swarm.peer(other, size=2)]
    with torch.no_grad():
        before = [parameter.clone() for parameter in model.parameters()]
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True) for averager in averagers]

    loss = model(torch.ones(4, 8)).square().sum()
    for step in steps:
        step.allow_allreduce()
    for step in steps:
        step.result(60)  # the round has landed: parameters have changed after forward
    loss.backward()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.data, old / 2)


def test_a_training_loop_averages_in_the_background_without_losing_its_own_updates(swarm: Swarm):
    tensors = [[torch.zeros(100_000)] for _ in range(2)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    added = [0, 0]
    for _ in range(3):
        steps = [averager.step(wait=False, timeout=STEP_TIMEOUT) for averager in averagers]
        while not all(step.done() for step in steps):
            for index, averager in enumerate(averagers):
                with averager.get_tensors() as (tensor,):
                    tensor += index + 1
                    added[index] += index + 1
        for step in steps:
            step.result()
    # whatever was added anywhere is still there, spread over both
    total = tensors[0][0].double() + tensors[1][0].double()
    assert torch.allclose(total, torch.full_like(total, float(sum(added))), rtol=1e-5)


def test_a_step_can_be_awaited(swarm: Swarm):
    averagers = [swarm.peer([torch.full((3,), float(index))], size=2) for index in range(2)]

    async def both() -> list[Any]:
        return await asyncio.gather(*(a.step(wait=False, timeout=STEP_TIMEOUT, gather=1) for a in averagers))

    assert [set(result.values()) for result in asyncio.run(both())] == [{1}, {1}]


def test_two_averagers_share_a_dht_under_different_prefixes(swarm: Swarm):
    dhts = [swarm.dht(), swarm.dht()]
    tensors = {prefix: [[torch.full((5,), float(i))] for i in range(2)] for prefix in ("weights", "moments")}
    averagers = [
        swarm.peer(tensors[prefix][index], size=2, dht=dht, prefix=prefix)
        for prefix in tensors
        for index, dht in enumerate(dhts)
    ]
    step_all(averagers)
    for own in tensors.values():
        assert all(torch.equal(tensor, torch.full((5,), 0.5)) for (tensor,) in own)
    with pytest.raises(ValueError, match=r"prefix must be .*, got 'weights', which is in use"):
        swarm.peer([torch.zeros(5)], size=2, dht=dhts[0], prefix="weights")


def test_more_peers_than_the_target_form_several_groups(swarm: Swarm):
    tensors = [[torch.full((4,), float(index))] for index in range(4)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    results = step_all(averagers, gather=True)
    assert [len(result) for result in results] == [2] * 4


def test_a_search_that_finds_nobody_says_so_and_changes_nothing(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    tensor = torch.ones(3)
    averager = swarm.peer([tensor], size=2, min_matchmaking_time=0.5, request_timeout=0.2)
    with caplog.at_level(logging.WARNING):
        assert averager.step(timeout=1.0) is None
    assert "averaging failed, tensors are unchanged" in caplog.text
    with pytest.raises(MatchmakingException, match=swarm.prefix):
        averager.step(wait=False, timeout=1.0).result(30)
    assert torch.equal(tensor, torch.ones(3))


def test_peers_with_other_tensors_never_group_and_the_error_says_which(swarm: Swarm):
    averagers = [
        swarm.peer([torch.zeros(size)], size=2, min_matchmaking_time=0.5, request_timeout=0.2)
        for size in (3, 4)
    ]
    steps = [averager.step(wait=False, timeout=2.0) for averager in averagers]
    for step in steps:
        with pytest.raises(
            MatchmakingException,
            match=r"averages something else under this prefix \(the shape of averaged_tensors\[0\] is",
        ):
            step.result(30)


def test_peers_with_other_parts_never_group_and_the_error_says_what_differs(swarm: Swarm):
    averagers = [
        swarm.peer(
            [torch.zeros(3000)],
            size=2,
            min_matchmaking_time=0.5,
            request_timeout=0.2,
            part_size_bytes=part_size_bytes,
        )
        for part_size_bytes in (1024, 2048)
    ]
    steps = [averager.step(wait=False, timeout=2.0) for averager in averagers]
    for step in steps:
        with pytest.raises(
            MatchmakingException, match=r"part_size_bytes is (1024 here, 2048|2048 here, 1024) there"
        ):
            step.result(30)


def test_not_a_number_in_a_pair_fails_both_steps_with_the_tensor_named(swarm: Swarm):
    """One of two is fewer than min_group_size."""
    tensors = [[torch.zeros(3), torch.tensor([1.0, float("nan")])], [torch.zeros(3), torch.zeros(2)]]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    steps = [averager.step(wait=False, timeout=3.0, allow_retries=False) for averager in averagers]
    with pytest.raises(AllreduceException, match=r"averaged_tensors\[1\] has NaN"):
        steps[0].result(30)
    with pytest.raises(AllreduceException, match="fewer than min_group_size=2 members are left") as caught:
        steps[1].result(30)
    assert f"{averagers[0].peer_id}: averaged_tensors[1] has NaN" in str(caught.value)
    assert torch.equal(tensors[1][1], torch.zeros(2))


def test_not_a_number_is_not_tried_again_and_does_not_hold_up_the_others(swarm: Swarm):
    tensors = [[torch.full((3,), value)] for value in (float("nan"), 1.0, 2.0)]
    averagers = [
        swarm.peer(own, size=3, min_group_size=2, min_matchmaking_time=0.5, request_timeout=0.2)
        for own in tensors
    ]
    steps = [averager.step(wait=False, scheduled_time=get_dht_time() + 2) for averager in averagers]
    with pytest.raises(AllreduceException, match=r"averaged_tensors\[0\] has NaN"):
        steps[0].result(30)
    for step in steps[1:]:
        step.result(30)
        assert sorted(step.report.weights) == [0.0, 1.0, 1.0]
    assert torch.equal(tensors[1][0], torch.full((3,), 1.5))


def test_a_step_behind_another_keeps_its_own_deadline(swarm: Swarm):
    averager = swarm.peer([torch.zeros(3)], size=2)
    first = averager.step(wait=False)
    with pytest.raises(MatchmakingException, match="earlier step"):
        averager.step(wait=False, timeout=0.5).result(10)
    assert not first.done()
    assert first.cancel()


def test_a_callback_of_a_step_may_run_another_step(swarm: Swarm):
    averager = swarm.peer([torch.zeros(3)], size=2)
    results: list[object] = []
    finished = threading.Event()

    def step_again(_: object) -> None:
        results.append(averager.step(timeout=0.5))
        finished.set()

    averager.step(wait=False, timeout=0.5).add_done_callback(step_again)
    assert finished.wait(20)
    assert results == [None]


def test_a_callback_of_any_call_may_run_a_step_and_make_an_averager(swarm: Swarm):
    """Both wait for answers of the very process whose callbacks wait for it."""
    averager = swarm.peer([torch.zeros(3)], size=2, min_matchmaking_time=0.5, request_timeout=0.2)
    results: list[object] = []
    finished = threading.Event()

    def callback(_: object) -> None:
        results.append(averager.step(timeout=0.3))
        other = swarm.peer([torch.zeros(3)], size=2, dht=averager.dht, prefix="made_in_a_callback")
        results.append(other.is_alive())
        finished.set()

    averager.dht.get("nothing", return_future=True).add_done_callback(callback)
    assert finished.wait(20)
    assert results == [None, True]


def test_steps_begun_by_several_threads_at_once_are_different_steps(swarm: Swarm):
    averager = swarm.peer([torch.zeros(3)], size=2, min_matchmaking_time=0.3, request_timeout=0.1)
    controls: list[Any] = []
    barrier = threading.Barrier(4)

    def begin() -> None:
        barrier.wait(20)
        # Encoding what is gathered takes long enough for each to begin before another has ended.
        controls.append(averager.step(wait=False, timeout=0.2, gather=list(range(60_000))))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for control in controls:
        with pytest.raises(MatchmakingException):
            control.result(20)
    assert sorted(control.report.step for control in controls) == [0, 1, 2, 3]


def test_gathered_data_that_one_member_cannot_read_does_not_hold_up_its_step(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    class Foreign(MSGPackSerializer):
        @classmethod
        def dumps(cls, obj: object) -> bytes:
            return b"\xc1"  # the one byte that MessagePack never uses

    averagers = [swarm.peer([torch.full((3,), float(index))], size=2) for index in range(2)]
    averagers[0].serializer = Foreign
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT, gather="hello") for averager in averagers]
    with caplog.at_level(logging.WARNING):
        assert steps[1].result(20) == {averagers[0].peer_id: None, averagers[1].peer_id: "hello"}
    assert str(averagers[0].peer_id) in caplog.text


def test_a_killed_peer_does_not_fail_the_round(swarm: Swarm):
    """Whatever it was: its share of the work goes to the others."""
    tensors = [[torch.full((1_000_000,), float(index))] for index in range(3)]
    averagers = [
        swarm.peer(own, 3, dht=dht, min_group_size=2, min_matchmaking_time=1.0, request_timeout=0.5)
        for own, dht in zip(tensors, [swarm.dht(), swarm.dht(), swarm.own_dht()], strict=True)
    ]
    steps = [averager.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True) for averager in averagers]
    wait_for_stage(steps, AveragingStage.AWAITING_TRIGGER)
    os.kill(averagers[2].dht.background.pid, signal.SIGKILL)
    with pytest.raises(PeerProcessDied):
        steps[2].result(30)
    for step in steps[:2]:
        step.allow_allreduce()
    for step in steps[:2]:
        assert len(step.result(60)) == 3
    assert torch.equal(tensors[0][0], torch.full((1_000_000,), 0.5))
    assert torch.equal(tensors[1][0], tensors[0][0])
    assert torch.equal(tensors[2][0], torch.full((1_000_000,), 2.0))
    assert steps[0].report.attempts == 1
    assert [one.member for one in steps[0].report.excluded] == [str(averagers[2].dht.peer_id)]


def test_cancelling_frees_the_groupmates_at_once(swarm: Swarm):
    tensors = [[torch.full((10,), float(index))] for index in range(2)]
    averagers = [swarm.peer(own, size=2) for own in tensors]
    steps = [
        averager.step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True, allow_retries=False)
        for averager in averagers
    ]
    wait_for_stage(steps, AveragingStage.AWAITING_TRIGGER)
    assert steps[0].cancel()
    with pytest.raises(AllreduceException, match="cancelled"):
        steps[1].result(30)
    assert steps[0].cancelled()
    assert steps[0].cancel()  # again: it is
    assert not steps[1].cancel()  # it has failed
    assert not steps[1].cancelled()
    assert torch.equal(tensors[1][0], torch.ones(10))
    # and both can go on
    step_all(averagers)
    assert torch.equal(tensors[0][0], torch.full((10,), 0.5))


def test_waiting_for_a_step_inside_get_tensors_is_an_error(swarm: Swarm):
    averager = swarm.peer([torch.zeros(2)], size=2)
    control = averager.step(wait=False)
    with averager.get_tensors():
        for wait in (averager.step, averager.load_state_from_peers, control.result, control.exception):
            with pytest.raises(InvalidStateError, match="get_tensors"):
                wait()
        with pytest.raises(TimeoutError):
            control.result(timeout=0)  # this only looks
        assert control.cancel()
        with pytest.raises(CancelledError):
            control.result()


def test_a_shutdown_during_a_step_that_is_waited_for_is_a_warning(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    averager = swarm.peer([torch.zeros(2)], size=2)
    threading.Timer(0.2, averager.shutdown).start()
    with caplog.at_level(logging.WARNING):
        assert averager.step() is None
    assert "the averager was shut down during the step" in caplog.text


def test_ctrl_c_during_a_step_that_is_waited_for_frees_the_groupmates(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
):
    averagers = [swarm.peer([torch.zeros(2)], size=2) for _ in range(2)]
    other = averagers[1].step(wait=False, timeout=STEP_TIMEOUT, require_trigger=True, allow_retries=False)

    def press_ctrl_c(control: Any, timeout: float | None = None) -> None:
        wait_for_stage([other], AveragingStage.AWAITING_TRIGGER)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepControl, "result", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            averagers[0].step(timeout=STEP_TIMEOUT)
    with pytest.raises(AllreduceException, match="cancelled"):
        other.result(20)


def test_a_step_that_has_ended_keeps_nothing_alive(swarm: Swarm):
    averager = swarm.peer([torch.zeros(2)], size=2, min_matchmaking_time=0.3, request_timeout=0.1)
    cancelled = averager.step(wait=False)
    cancelled.cancel()
    failed = averager.step(wait=False, timeout=0.1)
    with pytest.raises(MatchmakingException):
        failed.result(20)
    assert not cancelled.began_allreduce
    assert not failed.began_allreduce  # there never was a group
    gone = [threading.Event() for _ in range(2)]
    gc.disable()  # no cycle is in the way
    try:
        weakref.finalize(cancelled, gone[0].set)
        weakref.finalize(failed, gone[1].set)
        del cancelled, failed
        assert all(event.wait(20) for event in gone)
    finally:
        gc.enable()


def test_mistakes_in_a_step_name_the_parameter(swarm: Swarm):
    averager = swarm.peer([torch.zeros(2)], size=2)
    for options, named in (
        ({"gather": object()}, "gather: cannot serialize"),
        ({"gather": bytes(1 << 20)}, "gather must take at most 524,288 bytes"),
        ({"wait": "no"}, "wait must be True or False, got 'no'"),
        ({"weight": -1}, "weight must be .*, got -1"),
        ({"timeout": 0}, "timeout must be more than 0, got 0"),
    ):
        with pytest.raises(shoal.UsageError, match=named):
            averager.step(**options)


def test_calls_after_shutdown_say_so(swarm: Swarm):
    averager = swarm.peer([torch.zeros(2)], size=2)
    step = averager.step(wait=False)
    averager.shutdown()
    averager.shutdown()
    with pytest.raises(AllreduceException, match="shut down"):
        step.result(30)
    with pytest.raises(InvalidStateError):
        averager.step()


def test_a_step_after_a_shutdown_that_came_before_the_start_says_so(swarm: Swarm):
    averager = swarm.peer([torch.zeros(2)], size=2, start=False)
    averager.run_in_background(await_ready=False)
    averager.shutdown()
    with pytest.raises(InvalidStateError, match="shut down"):
        averager.step()


def test_a_start_does_not_wait_for_a_dht_that_is_not_ready_unless_it_is_told_to():
    other = shoal.DHT(start=True)
    nobody = f"/ip4/127.0.0.1/tcp/9/p2p/{other.peer_id}"
    other.shutdown()
    dht = shoal.DHT(initial_peers=[nobody], start=True, await_ready=False, bootstrap_timeout=90)
    began = time.monotonic()
    settings: dict[str, Any] = {"dht": dht, "start": False, "client_mode": False}
    averagers = [
        shoal.DecentralizedAverager([torch.zeros(2)], prefix=f"early{number}", **settings)
        for number in range(2)
    ]
    averagers[0].run_in_background(await_ready=False)
    assert averagers[0].is_alive()
    with pytest.raises(TimeoutError, match=r"not ready after 0\.1 s"):
        averagers[0].wait_until_ready(0.1)
    with pytest.raises(TimeoutError, match=r"not ready after 0\.1 s"):
        averagers[1].run_in_background(timeout=0.1)
    assert not averagers[1].is_alive()
    averagers[0].shutdown()
    dht.shutdown()
    assert time.monotonic() - began < 45


def test_an_averager_goes_on_as_a_client_when_nobody_can_dial_its_dht(swarm: Swarm):
    async def become_unreachable(dht: Any, node: Any) -> None:
        node.host.reach._standing = Standing.CLIENT  # what the reachability check finds out

    averager = swarm.peer([torch.zeros(3)], size=2, dht=swarm.own_dht())
    second, refused = (
        swarm.peer([torch.zeros(3)], size=2, dht=averager.dht, prefix=prefix, start=False, client_mode=mode)
        for prefix, mode in (("second", None), ("refused", False))
    )
    assert (averager.client_mode, averager.mode, averager.allow_state_sharing) == (False, NODE, True)
    averager.dht.run_coroutine(become_unreachable)
    assert (averager.client_mode, averager.mode) == (True, CLIENT)
    averager.allow_state_sharing = False
    averager.state_sharing_priority = 0.0
    with pytest.raises(ValueError, match="client mode"):
        averager.allow_state_sharing = True
    second.run_in_background()
    assert second.mode is CLIENT
    assert not second.allow_state_sharing
    with pytest.raises(ValueError, match="client_mode must be True or None, got False"):
        refused.run_in_background()


def test_a_start_that_failed_is_not_alive(swarm: Swarm):
    first = swarm.peer([torch.zeros(2)], size=2)
    second = swarm.peer([torch.zeros(2)], size=2, dht=first.dht, start=False)
    second.run_in_background(await_ready=False)
    with pytest.raises(ValueError, match="is in use"):
        second.wait_until_ready(20)
    assert not second.is_alive()
    assert "ended" in repr(second)
    with pytest.raises(ValueError, match="is in use"):
        second.step()


@pytest.mark.sweep
def test_the_garbage_collector_does_not_wait_for_the_end_of_an_averager(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
):
    """It may run on the thread that would receive the answer, and everything would stand still until the timeout."""
    dht = swarm.own_dht()
    averager = swarm.peer([torch.zeros(2)], size=2, dht=dht)
    other = swarm.peer([torch.zeros(2)], size=2, dht=dht, prefix="other", shutdown_timeout=0.1)
    step = averager.step(wait=False)
    os.kill(dht.background.pid, signal.SIGSTOP)
    with caplog.at_level(logging.WARNING):
        swarm.averagers.clear()
        del averager
        gc.collect()
        assert "did not end" not in caplog.text
        other.shutdown()  # this waits, for as long as was said
    os.kill(dht.background.pid, signal.SIGCONT)
    assert "did not end within 0.1 s" in caplog.text
    with pytest.raises(AllreduceException, match="shut down"):
        step.result(30)


def test_the_dht_may_be_shut_down_first(swarm: Swarm):
    averager = swarm.peer([torch.zeros(2)], size=2, dht=swarm.own_dht())
    seen = (averager.peer_id, averager.client_mode, averager.mode, averager.allow_state_sharing)
    averager.dht.shutdown()
    assert not averager.is_alive()
    assert (averager.peer_id, averager.client_mode, averager.mode, averager.allow_state_sharing) == seen
    averager.shutdown()
