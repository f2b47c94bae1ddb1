from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from shoal.averaging.partition import Layout
from shoal.averaging.trainer import chunk_size
from shoal.averaging.trainer import tensors as tensor_store
from shoal.averaging.trainer.batches import SMALL_NBYTES, SMALLER, Batch, Runs, runs_of
from shoal.averaging.trainer.chunk_size import ChunkSize
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
def test_runs_hold_all_tensors_in_order(specs):
    layout = Layout.from_tensors([torch.empty(count, dtype=dtype) for dtype, count in specs])
    runs = list(runs_of(layout))
    assert [index for run in runs for index in run.indices] == list(range(len(specs)))
    assert [slot for run in runs for slot in run.slots] == list(layout.slots)
    for run in runs:
        assert len({slot.dtype for slot in run.slots}) == 1
        assert len(run.slots) == 1 or max(slot.nbytes for slot in run.slots) <= SMALL_NBYTES


class Size(ChunkSize):
    """Of these sizes, one after the other; the last one stays."""

    def __init__(self, *sizes):
        self._sizes = list(sizes)

    def next(self):
        return self._sizes.pop(0) if len(self._sizes) > 1 else self._sizes[0]


def test_batches_are_as_large_as_asked_and_hold_at_least_one_tensor():
    tensors = [torch.full((1000,), float(index)) for index in range(100)]
    (located,) = Runs(Layout.from_tensors(tensors)).locate(tensors, object())
    sizes = [SMALLER * nbytes for nbytes in (4000, 3999, 16_000, 100_000)]
    batches = list(located.batches(tensors, Size(*sizes)))
    assert [len(batch.flats) for batch in batches] == [1, 1, 4, 25, 25, 25, 19]
    assert [flat.data_ptr() for batch in batches for flat in batch.flats] == [
        one.data_ptr() for one in tensors
    ]
    end = 0
    for batch in batches:
        assert batch.run.whole.offset == end
        assert batch.run.whole.nbytes == sum(slot.nbytes for slot in batch.run.slots)
        end += batch.run.whole.nbytes
    assert end == 400_000


def small_tensors(dtype):
    """Of many shapes; in their middle one in ten has gaps."""
    torch.manual_seed(0)
    shapes = [(5, 7), (), (3, 0), (64, 64), (1, 5), (2,)]
    tensors = [torch.randn(shapes[index % len(shapes)]).to(dtype) for index in range(300)]
    tensors[100:200:10] = [torch.randn(6, 4).to(dtype).t() for _ in range(10)]
    return tensors


def a_round(tensors, alpha, train, *, stored=None):
    """Of the tensors together: what they are after an average, if they are trained meanwhile."""
    store = stored or TensorStore(tensors, Layout.from_tensors(tensors))
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


def each_by_itself(tensors, alpha, train):
    """As :func:`a_round` of them all, which draws their averages one after the other."""
    generator = torch.Generator().manual_seed(7)
    originals = [tensor.clone() for tensor in tensors]
    train(tensors)
    for tensor, original in zip(tensors, originals, strict=True):
        store = TensorStore([tensor], Layout.from_tensors([tensor]))
        before, after = (torch.zeros(store.layout.nbytes, dtype=torch.uint8) for _ in range(2))
        tensor_in(store.layout, before, 0).copy_(original.reshape(-1))
        tensor_in(store.layout, after, 0).copy_(torch.randn(tensor.numel(), generator=generator))
        store.apply(before, after, alpha)


@dtypes
@alphas
@pytest.mark.parametrize("train", [nothing, every_seventh])
@pytest.mark.parametrize("chunk_nbytes", [1 << 10, 1 << 15, chunk_size.WRITE_NBYTES])
def test_tensors_in_company_become_what_each_becomes_by_itself(
    dtype, alpha, train, chunk_nbytes, monkeypatch
):
    monkeypatch.setattr(tensor_store, "READ_NBYTES", chunk_nbytes)
    monkeypatch.setattr(tensor_store, "WRITE_NBYTES", chunk_nbytes)
    together, alone = small_tensors(dtype), small_tensors(dtype)
    a_round(together, alpha, train)
    each_by_itself(alone, alpha, train)
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
    for index in (3, 15):
        fresh[index].zero_()
    tensors[3].data = torch.zeros(64, 64).t()
    tensors[15].data = torch.zeros(64, 64).expand(2, 64, 64)[1]
    for values, store in zip((tensors, fresh), stores, strict=True):
        a_round(values, 1.0, every_seventh, stored=store)
    assert all(map(torch.equal, tensors, fresh))


def test_those_that_have_gaps_are_copied_by_themselves_and_the_others_together():
    tensors = small_tensors(torch.float32)
    located = Runs(Layout.from_tensors(tensors)).locate(tensors, object())
    alone = [index for run, flats in located if not flats for index in run.indices]
    assert alone == list(range(100, 200, 10))
    assert [index for run, _ in located for index in run.indices] == list(range(300))


def test_where_tensors_lie_is_looked_up_again_when_asked():
    tensors = [torch.zeros(10) for _ in range(3)]
    runs, places = Runs(Layout.from_tensors(tensors)), object()

    def found(places):
        ((_, flats),) = runs.locate(tensors, places)
        return flats

    first = found(places)
    tensors[1] = torch.zeros(10)
    assert found(places) is first
    second = found(object())
    assert [one.data_ptr() for one in second] == [one.data_ptr() for one in tensors]
    assert second[0] is first[0]
    assert second[2] is first[2]


def to_shared_memory(tensors):
    for tensor in tensors:
        tensor.share_memory_()


def get_other_memory(tensors):
    for tensor in tensors:
        tensor.data = tensor.data.clone()


def one_is_updated(tensors):
    tensors[7] += 1


@pytest.mark.parametrize("meanwhile", [to_shared_memory, get_other_memory, one_is_updated])
def test_what_others_do_while_a_batch_is_read_is_neither_lost_nor_fatal(meanwhile, monkeypatch):
    """Without the lock: a thread puts the tensors into a queue of torch.multiprocessing, or trains."""
    tensors, fresh = small_tensors(torch.float32), small_tensors(torch.float32)
    gather = Batch.gather

    def gather_and(batch, target):
        gather(batch, target)
        if applying:
            applying.clear()
            meanwhile(tensors)

    applying: list[bool] = []
    monkeypatch.setattr(Batch, "gather", gather_and)
    a_round(tensors, 1.0, lambda _: applying.append(True))
    a_round(fresh, 1.0, meanwhile if meanwhile is one_is_updated else nothing)
    assert not applying
    assert all(map(torch.equal, tensors, fresh))


def test_memory_whose_sign_is_turned_is_followed():
    tensors, fresh = small_tensors(torch.float32), small_tensors(torch.float32)
    stores = [a_round(values, 1.0, nothing) for values in (tensors, fresh)]
    fresh[9].neg_()
    tensors[9].data = torch._neg_view(tensors[9].data)  # at the same address
    for values, store in zip((tensors, fresh), stores, strict=True):
        a_round(values, 1.0, nothing, stored=store)
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


def in_make_fx(call):
    make_fx(lambda x: (call(), x + 1)[1])(torch.ones(1))


def in_grad(call):
    torch.func.grad(lambda x: (call(), x.sum())[1])(torch.ones(2))


@pytest.mark.parametrize("inside", [in_make_fx, in_grad])
def test_an_average_is_written_inside_modes_that_trace(inside):
    """apply_average() runs on the user's thread, whatever is active there."""
    tensors = [tensor for tensor in small_tensors(torch.float32) if tensor.is_contiguous()]
    store = TensorStore(tensors, Layout.from_tensors(tensors))
    before, after = bytearray(store.layout.nbytes), bytearray(store.layout.nbytes)
    store.snapshot(before)
    tensors[7].data = tensors[7].data.clone()  # so that it is looked for inside
    inside(lambda: store.apply(before, after))
    assert not any(bool(tensor.any()) for tensor in tensors)
    a_round(tensors, 1.0, nothing, stored=store)
    assert all(bool(tensor.any()) for tensor in tensors if tensor.numel())


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
from shoal.averaging.partition import Layout
from shoal.averaging.trainer.tensors import TensorStore

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    tensors = [
        torch.frombuffer(bytearray(nbytes), dtype=dtype)
        for nbytes in [*20 * [1 << 10], *20 * [1 << 14], *4 * [1 << 15], *4 * [1 << 17], 1 << 21]
    ]
    store = TensorStore(tensors, Layout.from_tensors(tensors))
    before, after = bytearray(store.layout.nbytes), bytearray(store.layout.nbytes)
    count = threads()
    for alpha in (1.0, 0.5):
        assert store.snapshot(before, checks_finite=True) is None
        for tensor in tensors[::2]:
            tensor[:5].add_(1)
        store.apply(before, after, alpha)
    assert threads() == count, (dtype, threads())
torch.empty(1 << 20).fill_(1)  # this does
assert threads() > count
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
