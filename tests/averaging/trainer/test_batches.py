from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.averaging.partition import Layout
from shoal.averaging.trainer.batches import BATCH_NBYTES, SMALL_NBYTES, batches_of
from shoal.averaging.trainer.lost_updates import UpdateWatch
from shoal.averaging.trainer.tensors import TensorStore
from shoal.compression.base import FLOATING_DTYPES
from shoal.testing.arena import tensor_in

dtypes = pytest.mark.parametrize("dtype", FLOATING_DTYPES.values(), ids=str)
alphas = pytest.mark.parametrize("alpha", [1.0, 0.5])


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16]),
            st.sampled_from([0, 1, 3000, SMALL_NBYTES // 4, SMALL_NBYTES // 4 + 1, SMALL_NBYTES]),
        ),
        max_size=40,
    )
)
def test_batches_hold_all_tensors_in_order(specs):
    layout = Layout.from_tensors([torch.empty(count, dtype=dtype) for dtype, count in specs])
    batches = list(batches_of(layout))
    assert [index for batch in batches for index in batch.indices] == list(range(len(specs)))
    assert [slot for batch in batches for slot in batch.slots] == list(layout.slots)
    for batch in batches:
        assert batch.whole.nbytes == sum(slot.nbytes for slot in batch.slots)
        if len(batch.slots) > 1:
            assert len({slot.dtype for slot in batch.slots}) == 1
            assert max(slot.nbytes for slot in batch.slots) <= SMALL_NBYTES
            assert batch.whole.nbytes <= BATCH_NBYTES


def test_thousands_of_small_tensors_are_few_batches():
    layout = Layout.from_tensors([torch.empty(1000)] * 1000)
    assert len(list(batches_of(layout))) == 32  # of 32 tensors each, but for the last


def small_tensors(dtype, count=300):
    """Of many shapes, more than one batch of them; one in ten has gaps, and nine in a row have none."""
    torch.manual_seed(0)
    shapes = [(5, 7), (), (3, 0), (64, 64), (1, 5), (2,)]
    tensors = [torch.randn(shapes[index % len(shapes)]).to(dtype) for index in range(count)]
    tensors[100:200:10] = [torch.randn(6, 4).to(dtype).t() for _ in range(10)]
    return tensors


def a_round(tensors, alpha, train, *, watch=None, stored=None):
    """Of the tensors together: what they are after an average, if they are trained meanwhile."""
    store = stored or TensorStore(tensors, Layout.from_tensors(tensors), watch=watch)
    before, after = (torch.frombuffer(bytearray(store.layout.nbytes), dtype=torch.uint8) for _ in range(2))
    store.snapshot(before)
    generator = torch.Generator().manual_seed(7)
    for index, slot in enumerate(store.layout.slots):
        tensor_in(store.layout, after, index).copy_(torch.randn(slot.count, generator=generator))
    train(tensors)
    store.apply(before, after, alpha)
    return store


def nothing(tensors):
    pass


def every_seventh(tensors):
    for tensor in tensors[::7]:
        tensor += 1


@dtypes
@alphas
@pytest.mark.parametrize("train", [nothing, every_seventh])
def test_tensors_in_company_become_what_each_becomes_by_itself(dtype, alpha, train):
    together, alone = small_tensors(dtype), small_tensors(dtype)
    a_round(together, alpha, train)
    # The debug switch has each tensor written by itself.
    a_round(alone, alpha, train, watch=UpdateWatch("alone", compares=True, updates_while_copying=True))
    untrained = small_tensors(dtype)
    for one, other, before in zip(together, alone, untrained, strict=True):
        assert torch.equal(one, other)
        assert one.numel() == 0 or not torch.equal(one, before)


def test_replaced_memory_is_followed_and_the_old_left_alone():
    tensors = small_tensors(torch.float32)
    store = a_round(tensors, 1.0, nothing)
    old = tensors[7].data
    kept = old.clone()
    tensors[7].data = torch.full_like(old, 5.0)
    a_round(tensors, 1.0, nothing, stored=store)
    fresh = small_tensors(torch.float32)
    a_round(fresh, 1.0, nothing)
    assert torch.equal(old, kept)
    assert torch.equal(tensors[7], fresh[7])


def test_memory_that_comes_to_have_gaps_is_followed():
    tensors, fresh = small_tensors(torch.float32), small_tensors(torch.float32)
    stores = [a_round(values, 1.0, nothing) for values in (tensors, fresh)]
    for index in (3, 9, 15):
        fresh[index].zero_()
    tensors[3].data = torch.zeros(64, 64).t()
    tensors[9].data = torch._neg_view(torch.zeros(64, 64))
    tensors[15].data = torch.zeros(64, 64).expand(2, 64, 64)[1]
    for values, store in zip((tensors, fresh), stores, strict=True):
        a_round(values, 1.0, every_seventh, stored=store)
    assert all(map(torch.equal, tensors, fresh))


def test_memory_of_replaced_tensors_is_not_kept():
    tensors = small_tensors(torch.float32)
    store = a_round(tensors, 1.0, nothing)
    old = weakref.ref(tensors[5].untyped_storage())
    tensors[5].data = torch.zeros_like(tensors[5])
    assert old() is None
    a_round(tensors, 1.0, nothing, stored=store)


@pytest.mark.parametrize("where", ["first", "both"])
def test_a_round_inside_inference_mode(where):
    tensors = small_tensors(torch.float32)
    with torch.inference_mode():
        store = a_round(tensors, 1.0, nothing)
        if where == "both":
            a_round(tensors, 1.0, nothing, stored=store)
    a_round(tensors, 0.5, nothing, stored=store)


def test_inference_tensors():
    with torch.inference_mode():
        tensors = small_tensors(torch.float32)
    fresh = small_tensors(torch.float32)
    for values in (tensors, fresh):
        a_round(values, 0.5, nothing)
    assert all(map(torch.equal, tensors, fresh))


def test_torch_starts_no_threads():
    program = """
import os, torch
from tests.averaging.trainer.test_batches import a_round, every_seventh, small_tensors

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
tensors = small_tensors(torch.bfloat16)
large = torch.empty(1 << 20)
before = threads()
a_round(tensors, 1.0, every_seventh)
a_round(tensors, 0.5, every_seventh)
assert threads() == before, threads()
large.fill_(1)  # this does
assert threads() > before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
