"""Tensors that are handed over and averaged in place: the user's process alone, and what becomes of the memory."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from user_side import AVERAGE, LIMIT, Peer

from shoal.averaging import SharedBuffers
from shoal.averaging.commands import ApplyAverage, AwaitEnd
from shoal.averaging.report import DoubtOutcome
from shoal.averaging.trainer.shared_buffers import check_outside
from shoal.errors import (
    DeadlineExceeded,
    InDoubt,
    InvalidStateError,
    InvalidTypeError,
    InvalidValueError,
    PeerProcessDied,
    PeerProcessUnresponsive,
)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SPECS = [((2, 3), F32), ((), BF16), ((0, 4), F32), (5, F64)]
REASON = "written between the trigger of a round and its average"


def make_peer(*, apply_when: Any = "ready", alpha: float = 1.0, debug: bool = False) -> Peer:
    """With three zeros, which rounds average to 9."""
    return Peer(apply_when, SharedBuffers([((3,), F32)], debug=debug), alpha=alpha)


def buffers_of(peer: Peer) -> SharedBuffers:
    transfer: Any = peer.arena.transfer
    buffers: SharedBuffers = transfer._buffers
    return buffers


def begin_round(peer: Peer) -> Any:
    control = peer.begin_step()
    peer.take_snapshot(0)
    return control


# the tensors


def test_tensors_have_the_shapes_and_dtypes_of_the_specs_and_are_zero():
    buffers = SharedBuffers(SPECS)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in buffers.tensors] == [
        ((2, 3), F32),
        ((), BF16),
        ((0, 4), F32),
        ((5,), F64),
    ]
    assert all(tensor.is_leaf and tensor.is_contiguous() and not tensor.any() for tensor in buffers.tensors)
    assert buffers.tensors is buffers.tensors
    assert not buffers.in_use


def test_they_take_two_sizes_of_the_tensors():
    buffers = SharedBuffers([((1 << 16,), F32), ((1 << 16,), BF16)])
    assert buffers.nbytes == 2 * ((1 << 18) + (1 << 17)) == buffers._memory.nbytes


@pytest.mark.parametrize("given", [list, dict, lambda named: torch.nn.ParameterDict(dict(named))])
def test_like_takes_whatever_holds_tensors(given: Any):
    named = [
        ("a", torch.nn.Parameter(torch.ones(2, 3))),
        ("b", torch.nn.Parameter(torch.ones(4, dtype=BF16))),
    ]
    buffers = SharedBuffers.like(given(named))
    assert buffers._labels == ("averaged_tensors['a']", "averaged_tensors['b']")
    assert [(tensor.shape, tensor.dtype) for tensor in buffers.tensors] == [
        (p.shape, p.dtype) for _, p in named
    ]
    assert not any(tensor.any() for tensor in buffers.tensors)


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ([], InvalidValueError, "at least one"),
        ([((2,), torch.int64)], InvalidTypeError, r"the dtype of specs\[0\]"),
        ([((2, -1), F32)], InvalidValueError, r"a size in the shape of specs\[0\]"),
        ([((2, 0.5), F32)], InvalidTypeError, "whole number"),
        ([((1 << 40, 1 << 40), F32)], InvalidValueError, "must fit into memory"),
        ([("a", ((2,), F32)), ("a", ((2,), F32))], InvalidValueError, "each name once"),
        ([torch.zeros(2)], InvalidTypeError, r"SharedBuffers.like\(tensors\)"),
        (torch.zeros(2), InvalidTypeError, r"SharedBuffers.like\(tensors\)"),
        ([F32], InvalidTypeError, r"specs\[0\] must be \(shape, dtype\)"),
    ],
)
def test_wrong_specs_are_named(specs: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        SharedBuffers(specs)


def test_like_refuses_what_cannot_be_averaged():
    with pytest.raises(InvalidTypeError, match=r"averaged_tensors\[1\].*int64"):
        SharedBuffers.like([torch.zeros(1), torch.zeros(1, dtype=torch.int64)])
    with pytest.raises(InvalidTypeError, match="examples must be tensors or a module"):
        SharedBuffers.like(lambda: [torch.zeros(1)])  # type: ignore[arg-type]


def test_they_serve_as_gradients_and_as_parameters():
    model = torch.nn.Linear(2, 1)
    buffers = SharedBuffers.like(model.parameters())
    for parameter, buffer in zip(model.parameters(), buffers.tensors, strict=True):
        parameter.grad = buffer
    model(torch.ones(3, 2)).sum().backward()
    assert buffers.tensors[0].tolist() == [[3.0, 3.0]]
    weights = SharedBuffers.like(model)
    for parameter, buffer in zip(model.parameters(), weights.tensors, strict=True):
        parameter.data = buffer.copy_(parameter.detach())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(weights.tensors[0], model.weight)


def test_each_tensor_is_saved_and_copied_alone():
    small, large = SharedBuffers([((2,), F32), ((100_000,), F32)]).tensors
    file = io.BytesIO()
    torch.save(small, file)
    assert len(file.getvalue()) < 10_000
    assert copy.deepcopy(large.fill_(3)).sum() == 300_000


def test_the_object_is_neither_pickled_nor_copied():
    buffers = SharedBuffers(SPECS)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InvalidTypeError, match="can't be pickled or copied"):
            attempt(buffers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_the_same_memory_and_no_say():
    buffers = SharedBuffers([((1,), F32)])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            buffers.tensors[0].numpy()[0] = 5
            buffers.wait_until_free(0)
        except InvalidStateError as e:
            status = 0 if "was forked from it" in str(e) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert buffers.tensors[0].item() == 5


def mappings() -> int:
    """Blocks of shared memory that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:shoal")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_memory_lives_as_long_as_the_last_tensor():
    gc.collect()
    before, descriptors = mappings(), set(os.listdir("/proc/self/fd"))
    buffers = SharedBuffers([((1000,), F32), ((1000,), F32)])
    tensor = buffers.tensors[1]
    del buffers
    assert mappings() == before + 1
    assert tensor.fill_(2).sum() == 2000
    del tensor
    assert mappings() == before
    assert set(os.listdir("/proc/self/fd")) == descriptors


# rounds


def test_a_round_averages_the_tensors_where_they_are():
    buffers = SharedBuffers([("a", ((2, 3), F32)), ("b", (5, F64))])
    peer = Peer("ready", buffers)
    views, addresses = [t.numpy() for t in buffers.tensors], [t.data_ptr() for t in buffers.tensors]
    begin_round(peer)
    assert buffers.in_use
    peer.link.carry_out(ApplyAverage(0))
    assert not buffers.in_use
    assert all((view == AVERAGE).all() for view in views)
    assert [tensor.data_ptr() for tensor in buffers.tensors] == addresses


def test_what_is_sent_is_the_tensors_themselves():
    peer = make_peer()
    peer.tensor.fill_(4)
    memory = torch.frombuffer(peer.arena.create_memory().buffer, dtype=F32)
    assert memory[:3].tolist() == [4.0] * 3
    assert memory.data_ptr() == peer.tensor.data_ptr()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16])
def test_alpha_moves_them_a_part_of_the_way(dtype: torch.dtype):
    peer = Peer("ready", SharedBuffers([((3,), dtype)]), alpha=0.5)
    peer.tensor.copy_(torch.tensor([1.0, 9.0, -1.0]))
    begin_round(peer)
    peer.link.carry_out(ApplyAverage(0))
    assert peer.tensor.tolist() == [5.0, AVERAGE, 4.0]


def test_a_round_that_fails_changes_nothing_and_lets_go():
    peer = make_peer()
    control = begin_round(peer)
    peer.end_step(0, "a member was lost")
    assert control.exception(LIMIT) is not None
    assert peer.tensor.tolist() == [0.0] * 3
    assert not buffers_of(peer).in_use


def test_nan_is_found_at_the_trigger_unless_nothing_is_sent():
    peer = make_peer()
    peer.tensor[1] = torch.nan
    peer.add_step()
    with pytest.raises(InvalidValueError, match=r"averaged_tensors\[0\] has NaN"):
        peer.take_snapshot(0)
    peer.add_step(1).weight = 0
    peer.take_snapshot(1)
    peer.link.carry_out(ApplyAverage(1))
    assert peer.tensor.tolist() == [AVERAGE] * 3


@pytest.mark.parametrize("debug", [False, True])
def test_a_write_that_torch_counts_fails_the_step(debug: bool):
    peer = make_peer(debug=debug)
    begin_round(peer)
    peer.tensor.add_(1)
    with pytest.raises(InvalidStateError, match=rf"averaged_tensors\[0\] was {REASON}"):
        peer.link.carry_out(ApplyAverage(0))
    assert peer.tensor.tolist() == [1.0] * 3
    assert not buffers_of(peer).in_use
    peer.add_step(1)  # the next round goes by what the tensors are then
    peer.take_snapshot(1)
    peer.link.carry_out(ApplyAverage(1))
    assert peer.tensor.tolist() == [AVERAGE] * 3


@pytest.mark.parametrize("debug", [False, True])
def test_a_write_past_torchs_count_is_noticed_in_debug_mode(debug: bool):
    peer = Peer("ready", SharedBuffers([((3,), F32), ((3,), F32)], debug=debug))
    second = peer.store.tensors[1]
    begin_round(peer)
    second.data.add_(1)
    apply = partial(peer.link.carry_out, ApplyAverage(0))
    if debug:
        with pytest.raises(InvalidStateError, match=rf"averaged_tensors\[1\] was {REASON}"):
            apply()
    else:
        apply()
    assert second.tolist() == [1.0 if debug else AVERAGE] * 3
    assert peer.tensor.tolist() == [0.0 if debug else AVERAGE] * 3  # all of them or none


def test_a_tensor_that_was_given_other_memory_is_named():
    peer = make_peer()
    peer.add_step()
    peer.tensor.data = torch.zeros(3)
    with pytest.raises(InvalidStateError, match=r"averaged_tensors\[0\] no longer lies in its SharedBuffers"):
        peer.take_snapshot(0)


def test_an_average_that_waits_for_the_call_keeps_them_in_use():
    peer = make_peer(apply_when="called")
    begin_round(peer)
    assert peer.link.carry_out(ApplyAverage(0)) is False
    peer.end_step(0)
    assert buffers_of(peer).in_use
    assert peer.writer.apply()
    assert peer.tensor.tolist() == [AVERAGE] * 3
    assert not buffers_of(peer).in_use


def test_a_write_before_the_call_is_noticed_by_it():
    peer = make_peer(apply_when="called")
    begin_round(peer)
    peer.link.carry_out(ApplyAverage(0))
    peer.tensor.add_(1)
    with pytest.raises(InvalidStateError, match=rf"of step 0 could not be written: .*{REASON}"):
        peer.writer.apply()
    assert peer.tensor.tolist() == [1.0] * 3
    assert not buffers_of(peer).in_use


def test_autograd_notices_an_average_between_forward_and_backward():
    peer = make_peer(apply_when="called")
    begin_round(peer)
    peer.link.carry_out(ApplyAverage(0))
    loss = peer.tensor.requires_grad_().square().sum()
    peer.writer.apply()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# outcomes that come before the round has let go


@pytest.mark.parametrize("apply_when", ["ready", "called"])
def test_a_late_average_is_not_written(apply_when: Any, caplog: pytest.LogCaptureFixture):
    """The owner may have written since the outcome "in doubt", and no copy tells."""
    peer = make_peer(apply_when=apply_when)
    peer.run_into_doubt()
    assert not buffers_of(peer).in_use
    peer.tensor.fill_(2)
    peer.settle(0)
    assert peer.outcome is DoubtOutcome.DROPPED
    assert not peer.late.write()
    assert peer.tensor.tolist() == [2.0] * 3
    assert "the buffers may have been written since" in caplog.text


@pytest.mark.parametrize("dies", [False, True])
def test_a_cancelled_step_frees_them_when_its_round_has_ended(dies: bool):
    peer = make_peer()
    control, buffers = begin_round(peer), buffers_of(peer)
    assert control.cancel()
    concluded = threading.Event()
    peer.steps.strand.submit(concluded.set)
    assert concluded.wait(LIMIT)
    assert peer.commands[1:] == [AwaitEnd(0)]
    with pytest.raises(DeadlineExceeded, match="the round of step 0"):
        buffers.wait_until_free(0)
    if dies:
        peer.calls[1].set_exception(PeerProcessDied("it was killed", -9, ""))
    else:
        peer.calls[1].set_result(None)
    buffers.wait_until_free(LIMIT)


def test_a_step_given_up_since_the_process_is_stopped_keeps_them_in_use():
    peer = make_peer()
    control, buffers = begin_round(peer), buffers_of(peer)
    peer.calls[0].set_exception(PeerProcessUnresponsive("the background process is stopped"))
    assert isinstance(control.exception(LIMIT), InDoubt)
    assert peer.commands[1:] == [AwaitEnd(0)]
    assert buffers.in_use
    assert peer.link.carry_out(ApplyAverage(0)) is True  # it goes on, and commits
    assert peer.outcome is DoubtOutcome.DROPPED
    peer.calls[1].set_result(None)
    assert not buffers.in_use
    assert peer.tensor.tolist() == [0.0] * 3


def test_a_later_round_is_not_freed_by_an_earlier_one():
    peer = make_peer()
    begin_round(peer)
    peer.begin_step()
    peer.take_snapshot(1)
    peer.arena.transfer.release(0)
    assert buffers_of(peer).in_use


# one averager at a time


def test_one_averager_has_them_at_a_time():
    buffers = SharedBuffers(SPECS[:1])
    first, second = (Peer("ready", buffers).arena.transfer for _ in range(2))
    first.claim("first")
    with pytest.raises(InvalidStateError, match="the averager 'first' has these: shut it down first"):
        second.claim("second")
    assert "averaged by 'first'" in repr(buffers)
    first.snapshot(0, checks_finite=True, timeout=None, abandoned=lambda: False)
    first.close()
    first.give_back()
    assert not buffers.in_use
    second.claim("second")


def test_no_averager_takes_the_tensors_without_the_buffers():
    """It would write its average while a round of theirs reads them: a silent mixture."""
    buffers = SharedBuffers.like([torch.zeros(3), torch.zeros(2)])
    own = torch.zeros(3)
    for tensor in (*buffers.tensors, buffers.tensors[1][1:], torch.nn.Parameter(buffers.tensors[0])):
        with pytest.raises(
            InvalidValueError, match=r"lies in SharedBuffers.*pass the SharedBuffers object itself"
        ):
            check_outside([own, tensor], ["own", "averaged_tensors[1]"])
    check_outside([own, buffers.tensors[0].clone()], ["own", "other"])
    tensors = list(buffers.tensors)
    del buffers
    gc.collect()
    check_outside(tensors, ["a", "b"])
