"""Averagers of one process whose tensors overlap: one lock for one memory."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

from shoal.averaging.partition import Layout
from shoal.averaging.trainer.locks import MemoryGuard
from shoal.averaging.trainer.tensors import TensorStore
from shoal.errors import DeadlineExceeded
from shoal.testing.arena import tensor_in

LIMIT = 20  # seconds, against hanging only


def store_of(*tensors: torch.Tensor, name: str = "") -> TensorStore:
    return TensorStore(tensors, Layout.from_tensors(tensors), name=name)


def area_of(store: TensorStore, value: float | None = None) -> torch.Tensor:
    area = torch.zeros(store.layout.nbytes, dtype=torch.uint8)
    if value is not None:
        for index in range(len(store.tensors)):
            tensor_in(store.layout, area, index).fill_(value)
    return area


def is_free_elsewhere(store: TensorStore) -> bool:
    """Whether another thread gets the lock of a store."""
    answers: list[bool] = []

    def look() -> None:
        try:
            with store.hold(timeout=0):
                answers.append(True)
        except DeadlineExceeded:
            answers.append(False)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(LIMIT)
    return answers[0]


def excludes(first: TensorStore, second: TensorStore) -> bool:
    """Whether two stores can't be held by two threads at once; the same in both directions."""
    with first.hold():
        forth = not is_free_elsewhere(second)
    with second.hold():
        back = not is_free_elsewhere(first)
    assert forth == back
    return forth


BASE = torch.zeros(4, 6)

OVERLAPPING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the same": lambda tensor: tensor,
    "data": lambda tensor: tensor.data,
    "detached": lambda tensor: tensor.detach(),
    "a parameter of it": torch.nn.Parameter,
    "a row": lambda tensor: tensor[2],
    "a column": lambda tensor: tensor[:, 3],
    "transposed": lambda tensor: tensor.t(),
    "numpy's": lambda tensor: torch.from_numpy(tensor.numpy()),
    "another dtype": lambda tensor: tensor.view(torch.float16),
}


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_tensors_that_overlap_have_one_lock(kind: str):
    base = BASE.clone()
    assert excludes(store_of(base), store_of(torch.zeros(2), OVERLAPPING[kind](base)))


def test_tensors_that_do_not_overlap_have_two_locks():
    base = BASE.clone()
    assert not excludes(store_of(base[:2]), store_of(base[2:]))
    assert not excludes(store_of(base[:, ::2]), store_of(base[:, 1::2]))
    assert not excludes(store_of(base), store_of(base.clone()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_that_overlap_on_cuda_have_one_lock():
    base = BASE.cuda()
    assert excludes(store_of(base), store_of(base[1]))
    assert not excludes(store_of(base), store_of(BASE.clone()))


def test_one_that_overlaps_with_two_excludes_both_and_leaves_them_apart():
    base = BASE.clone()
    first, last = store_of(base[:2]), store_of(base[2:])
    both = store_of(base)
    assert excludes(first, both)
    assert excludes(last, both)
    assert not excludes(first, last)


def test_whoever_waits_for_several_locks_holds_up_nobody():
    """A user may hold two averagers, one inside the other, and a third one's tensors overlap with those of both."""
    base = BASE.clone()
    first, last = store_of(base[:2]), store_of(base[2:])
    both = store_of(base)
    done = threading.Event()

    def hold_both() -> None:
        with both.hold():
            done.set()

    for outer, inner in ((first, last), (last, first)):
        with outer.hold():
            thread = threading.Thread(target=hold_both)
            thread.start()
            for _ in range(1000):
                assert not done.is_set()
                with inner.hold(timeout=LIMIT):
                    pass
        thread.join(LIMIT)
        assert done.is_set()
        done.clear()


def test_locks_of_many_are_taken_in_any_order():
    """Threads that hold overlapping averagers in turn, each in an order of its own, never wait for each other."""
    base = torch.zeros(6, 6)
    stores = [store_of(base[row : row + 2]) for row in (2, 0, 4, 1, 3)] + [store_of(base)]
    count = torch.zeros(1)

    def work(order: list[TensorStore]) -> None:
        for _ in range(200):
            for store in order:
                with store.hold(timeout=LIMIT):
                    base.add_(1)
                    count.add_(1) if store is stores[-1] else None

    threads = [threading.Thread(target=work, args=(order,)) for order in (stores, stores[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert count.item() == 400


def test_whoever_holds_one_holds_the_other():
    """So that step(wait=True) of the other, which would wait for this thread, can be refused."""
    base = BASE.clone()
    first, second = store_of(base), store_of(base[1])
    with first.hold():
        assert second.held_by_this_thread
        with second.hold(timeout=0):
            pass
    with second.hold():
        assert first.held_by_this_thread
    assert not first.held_by_this_thread
    assert not second.held_by_this_thread


def test_tensors_that_come_to_overlap_have_one_lock_from_the_next_round_on():
    base, other = BASE.clone(), BASE.clone()
    first, second = store_of(base), store_of(other)
    second.snapshot(area_of(second))
    assert not excludes(first, second)
    other.data = base.data
    second.snapshot(area_of(second))
    assert excludes(first, second)


def test_a_copy_waits_for_whoever_holds_the_memory_it_has_come_to():
    base, other = BASE.clone(), BASE.clone()
    first, second = store_of(base), store_of(other)
    other.data = base.data
    with first.hold():
        failures: list[Exception] = []

        def copy() -> None:
            try:
                second.snapshot(area_of(second), timeout=0.01)
            except DeadlineExceeded as e:
                failures.append(e)

        thread = threading.Thread(target=copy)
        thread.start()
        thread.join(LIMIT)
        assert len(failures) == 1


def test_an_averager_that_is_gone_is_forgotten():
    base = BASE.clone()
    first, second = store_of(base), store_of(base)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    assert is_free_elsewhere(second)


def test_rounds_of_two_averagers_in_turn_lose_nothing():
    base = torch.zeros(4, dtype=torch.float64)
    first, second = store_of(base), store_of(base[1:3])
    for store, value in ((first, 2.0), (second, 5.0)):
        before = area_of(store)
        store.snapshot(before)
        base += 1  # the trainer's
        store.apply(before, area_of(store, value))
    assert base.tolist() == [4.0, 6.0, 6.0, 4.0]


def test_rounds_of_two_averagers_at_once_are_warned_of_once(caplog: pytest.LogCaptureFixture):
    """Two peers at 0 and 1 that average twice at once would change places."""
    base = torch.zeros(4)
    near, far = store_of(base, name="near"), store_of(base, name="far")
    elsewhere = store_of(torch.zeros(4), name="elsewhere")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            snapshots = {}
            for store in (near, far, elsewhere):
                snapshots[store] = area_of(store)
                store.snapshot(snapshots[store])
            for store in (near, far, elsewhere):
                store.apply(snapshots[store], area_of(store, 0.5))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("far: while a round of this averager ran, averager 'near' wrote its average")
    assert "one after the other" in line


def test_rounds_one_after_the_other_are_not_warned_of(caplog: pytest.LogCaptureFixture):
    base = torch.zeros(4)
    with caplog.at_level(logging.WARNING):
        for store in [store_of(base, name=str(number)) for number in range(3)] * 2:
            area = area_of(store)
            store.snapshot(area)
            store.apply(area, area_of(store, 0.5))
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_make_averagers_of_its_own():
    """Whoever holds the parent's lock is not there in the child."""
    base = BASE.clone()
    store = store_of(base)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with store.hold():
            held.set()
            over.wait(LIMIT)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(LIMIT)
    child = os.fork()
    if child == 0:
        try:
            guard = MemoryGuard(lambda: [base])
            with guard.hold(timeout=0):
                os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    over.set()
    thread.join(LIMIT)
    assert status == 0
