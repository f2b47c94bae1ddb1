"""An update outside of the lock that meets the writing of an average: what is lost, and the switch that notices it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.averaging.partition import Layout
from shoal.averaging.trainer import lost_updates as watch_module
from shoal.averaging.trainer import merging
from shoal.averaging.trainer.lost_updates import UpdateWatch
from shoal.averaging.trainer.tensors import TensorStore
from shoal.testing.arena import tensor_in

AVERAGE = 0.5


def store_of(*tensors: torch.Tensor, compares: bool = True, **options: Any) -> TensorStore:
    watch = UpdateWatch("run", "Do this.", compares=compares, **options)
    return TensorStore(tensors, Layout.from_tensors(tensors), name="run", watch=watch)


def areas_of(store: TensorStore) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a snapshot, which is empty yet, and of an average."""
    snapshot, average = (torch.zeros(store.layout.nbytes, dtype=torch.uint8) for _ in range(2))
    for index in range(len(store.tensors)):
        tensor_in(store.layout, average, index).fill_(AVERAGE)
    return snapshot, average


def call_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, update: Callable[[], object]) -> None:
    """From now on ``update`` runs, once, after the next call of a function of the averager."""
    original, updates = getattr(owner, name), [update]

    def call(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        if updates:
            updates.pop()()
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "through data"])
def test_an_update_between_reading_and_writing_is_lost(
    through_data: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Why updates belong under the lock. Torch's count shows it, unless the update goes past it."""
    tensor = torch.zeros(4)
    store = store_of(tensor, compares=False)
    snapshot, average = areas_of(store)
    store.snapshot(snapshot)
    updated = tensor.data if through_data else tensor
    call_after(monkeypatch, merging, "_equal", lambda: updated.add_(1))  # the elements have been read
    with caplog.at_level(logging.WARNING):
        store.apply(snapshot, average)
    assert tensor.tolist() == [AVERAGE] * 4
    lines = [record.getMessage() for record in caplog.records]
    if through_data:
        assert not lines
    else:
        (line,) = lines
        assert line.startswith(
            "run: averaged_tensors[0] was updated while it was averaged. An update that meets"
        )
        assert line.endswith("Do this.")


def test_a_lost_update_is_noticed_with_the_tensor_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tensors = [torch.zeros(2), torch.zeros(4)]
    store = store_of(*tensors)
    snapshot, average = areas_of(store)
    store.snapshot(snapshot)
    merge = merging.Merge.__call__
    seen: list[int] = []

    def merge_and_update(self: Any, bits: Any, *rest: Any) -> None:
        merge(self, bits, *rest)
        seen.append(len(bits))
        if len(bits) == 4:
            tensors[1].data[:3] += 1  # past torch's own count

    monkeypatch.setattr(merging.Merge, "__call__", merge_and_update)
    with caplog.at_level(logging.WARNING):
        store.apply(snapshot, average)
        store.apply(snapshot, average)
    assert seen == [2, 4] * 2
    (line,) = [record.getMessage() for record in caplog.records]  # once is enough
    assert line.startswith("run: averaged_tensors[1] was updated while it was averaged, in 3 of 4 elements")
    assert line.endswith("Do this.")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_average_that_is_overwritten_is_noticed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """An optimizer has read the elements before, and writes them afterwards."""
    tensor = torch.zeros(4, 3, dtype=dtype).t()
    store = store_of(tensor)
    snapshot, average = areas_of(store)
    store.snapshot(snapshot)
    watch = store._watch
    write = watch.write

    def write_and_overwrite(*args: Any) -> None:
        write(*args)
        tensor.data.fill_(0.125)

    monkeypatch.setattr(watch, "write", write_and_overwrite)
    with caplog.at_level(logging.WARNING):
        store.apply(snapshot, average)
    assert "in 12 of 12 elements" in caplog.text


def test_an_update_during_the_copy_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tensor = torch.zeros(4)
    store = store_of(tensor)
    call_after(monkeypatch, merging.np, "copyto", lambda: tensor[1].fill_(7))
    with caplog.at_level(logging.WARNING):
        store.snapshot(areas_of(store)[0])
    assert "averaged_tensors[0] was updated while it was copied, in 1 of 4 elements" in caplog.text


def test_an_update_during_the_copy_is_fine_if_averages_wait_for_a_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tensor = torch.zeros(4)
    store = store_of(tensor, updates_while_copying=True)
    snapshot, average = areas_of(store)
    call_after(monkeypatch, merging.np, "copyto", lambda: tensor.add_(1))
    with caplog.at_level(logging.WARNING):
        store.snapshot(snapshot)
        store.apply(snapshot, average)
    assert tensor.tolist() == [1 + AVERAGE] * 4  # nothing is lost
    assert not caplog.records


def test_updates_between_copy_and_average_are_nothing_to_notice(caplog: pytest.LogCaptureFixture):
    tensors = [
        torch.zeros(3),
        torch.full((2,), float("nan")),
        torch.zeros(6)[::2],
        torch.zeros(0),
        torch.zeros(()),
    ]
    store = store_of(*tensors)
    snapshot, average = areas_of(store)
    with caplog.at_level(logging.WARNING, logger=watch_module.__name__):
        store.snapshot(snapshot)
        for tensor in tensors:
            tensor.add_(1)
        store.apply(snapshot, average)
    assert not caplog.records
    assert [tensor.tolist() for tensor in tensors[::2]] == [[1.5] * 3, [1.5] * 3, 1.5]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_switch_changes_no_result(alpha: float):
    torch.manual_seed(0)
    results = []
    for compares in (False, True):
        tensor = torch.arange(1000.0)
        store = store_of(tensor, compares=compares)
        snapshot, average = areas_of(store)
        store.snapshot(snapshot)
        tensor[::3] *= 1.1
        store.apply(snapshot, average, alpha)
        results.append(tensor)
    assert torch.equal(*results)
