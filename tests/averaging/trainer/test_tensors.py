from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.averaging.partition import Layout
from shoal.averaging.trainer import merging
from shoal.averaging.trainer.chunk_size import READ_NBYTES
from shoal.averaging.trainer.tensors import TensorStore
from shoal.compression.base import FLOATING_DTYPES, tensor_bytes
from shoal.errors import DeadlineExceeded, InvalidStateError, InvalidValueError
from shoal.testing.arena import tensor_in

dtypes = pytest.mark.parametrize("dtype", FLOATING_DTYPES.values(), ids=str)
DEVICES = ["cpu", "cuda"]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def store_of(*tensors):
    return TensorStore(tensors, Layout.from_tensors(tensors))


def area_of(store):
    return torch.zeros(store.layout.nbytes, dtype=torch.uint8)


def snapshot_of(store):
    area = area_of(store)
    store.snapshot(area)
    return area


def fill(store, area, value):
    for index in range(len(store.tensors)):
        tensor_in(store.layout, area, index).copy_(torch.as_tensor(value, dtype=torch.float64))


def bits(tensor):
    return bytes(tensor_bytes(tensor.detach().cpu().contiguous()))


def zoo(dtype, device):
    """Tensors of every admissible kind, one larger than a chunk."""
    torch.manual_seed(0)
    return [
        torch.randn(READ_NBYTES // dtype.itemsize + 1001).to(dtype).to(device),
        torch.nn.Parameter(torch.randn(5, 7).to(dtype).to(device)),
        torch.randn(6, 4).to(dtype).to(device).t(),
        torch.randn(8, 6).to(dtype).to(device)[::2, 1:3],
        torch.randn(()).to(dtype).to(device),
        torch.randn(3, 0).to(dtype).to(device),
        torch.randn(2).to(dtype).to(device)[::2],
        torch.randn(1, 5).to(dtype).to(device)[:, 2],
    ]


@dtypes
def test_snapshot_has_every_element_in_order(dtype, device):
    tensors = zoo(dtype, device)
    store = store_of(*tensors)
    area = snapshot_of(store)
    for index, tensor in enumerate(tensors):
        assert bits(tensor_in(store.layout, area, index)) == bits(tensor)


@dtypes
def test_untouched_tensors_become_the_average_bit_for_bit(dtype, device):
    tensors = zoo(dtype, device)
    store = store_of(*tensors)
    before, after = snapshot_of(store), area_of(store)
    for index, slot in enumerate(store.layout.slots):
        tensor_in(store.layout, after, index).copy_(torch.randn(slot.count))
    store.apply(before, after)
    for index, tensor in enumerate(tensors):
        assert bits(tensor) == bits(tensor_in(store.layout, after, index))


@dtypes
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_what_the_trainer_changed_is_kept(dtype, alpha, device):
    tensors = zoo(dtype, device)
    store = store_of(*tensors)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 0.25)
    with torch.no_grad():
        for tensor in tensors:
            tensor += 1
    expected = []
    for index, tensor in enumerate(tensors):
        old, new = (tensor_in(store.layout, area, index).double() for area in (before, after))
        expected.append(tensor.detach().cpu().double() + alpha * (new - old).view(tensor.shape))
    store.apply(before, after, alpha)
    tolerance = {2: 2**-8, 4: 1e-6, 8: 1e-14}[dtype.itemsize]
    for tensor, goal in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.detach().cpu().double(), goal, rtol=tolerance, atol=2 * tolerance)


@dtypes
def test_untouched_tensors_move_by_alpha(dtype, device):
    tensors = zoo(dtype, device)
    store = store_of(*tensors)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 3.0)
    expected = [(tensor.detach().double() + 3.0) / 2 for tensor in tensors]
    store.apply(before, after, 0.5)
    for tensor, goal in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.detach().double(), goal, rtol=2**-7, atol=2**-7)


@dtypes
def test_the_decision_is_made_for_each_element(dtype, device):
    tensor = torch.full((100_000,), 0.1, dtype=dtype, device=device)
    store = store_of(tensor)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 0.3)
    tensor[::7] += 1
    store.apply(before, after)
    untouched = torch.ones(100_000, dtype=torch.bool)
    untouched[::7] = False
    result = tensor.cpu()
    assert torch.equal(result[untouched], torch.full((100_000,), 0.3, dtype=dtype)[untouched])
    torch.testing.assert_close(
        result[~untouched].double(), torch.full((14286,), 1.3).double(), rtol=0.01, atol=0
    )


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(list(FLOATING_DTYPES.values())),
    st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100), st.booleans()), min_size=1, max_size=30),
)
def test_the_rule_for_any_values(dtype, elements):
    tensor = torch.tensor([old for old, _, _ in elements]).to(dtype)
    store = store_of(tensor)
    before, after = snapshot_of(store), area_of(store)
    new = torch.tensor([new for _, new, _ in elements]).to(dtype)
    fill(store, after, new)
    for index, (_, _, touched) in enumerate(elements):
        if touched:
            tensor[index] += 3
    wide = torch.promote_types(dtype, torch.float32)
    old = tensor_in(store.layout, before, 0)
    moved = ((new.to(wide) - old.to(wide)) + tensor.to(wide)).to(dtype)
    expected = torch.where(tensor == old, new, moved)
    store.apply(before, after)
    assert torch.equal(tensor, expected)


@dtypes
def test_equal_bits_are_untouched_even_if_nan(dtype):
    tensor = torch.tensor([math.nan, -0.0, 0.0], dtype=dtype)
    store = store_of(tensor)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 7.0)
    tensor[2] = -0.0
    store.apply(before, after)
    assert tensor.tolist() == [7.0, 7.0, 7.0]


def test_infinities_of_the_trainer_warn_nobody():
    tensor = torch.zeros(3)
    store = store_of(tensor)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, math.inf)
    tensor.fill_(-math.inf)
    store.apply(before, after)  # warnings are errors here
    assert tensor.isnan().all()


def test_a_round_between_forward_and_backward(device):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(device)
    parameters = list(model.parameters())
    store = store_of(*parameters)
    loss = model(torch.ones(2, 4, device=device)).sum()
    versions = [parameter._version for parameter in parameters]
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 0.5)
    for alpha in (1.0, 0.5):
        store.apply(before, after, alpha)
    assert [parameter._version for parameter in parameters] == versions
    loss.backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in parameters)


def test_replaced_storage_is_followed():
    parameter = torch.nn.Parameter(torch.zeros(3))
    store = store_of(parameter)
    parameter.data = torch.ones(3)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 5.0)
    store.apply(before, after)
    assert parameter.tolist() == [5.0] * 3


@pytest.mark.parametrize(
    ("replacement", "words"),
    [
        (torch.zeros(4), r"float32 \[4\] now"),
        (torch.zeros(3).double(), r"float64 \[3\] now"),
        (torch.zeros(1).expand(3), "share memory now"),
    ],
)
def test_changed_storage_that_cannot_be_averaged_is_named_and_nothing_is_written(replacement, words):
    first, second = torch.zeros(2), torch.zeros(3)
    store = store_of(first, second)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 9.0)
    second.data = replacement
    for call in (lambda: store.snapshot(before), lambda: store.apply(before, after)):
        with pytest.raises(InvalidStateError, match=r"averaged_tensors\[1\].*" + words):
            call()
    assert first.tolist() == [0.0, 0.0]


def test_memory_that_was_given_back_is_named_and_not_read():
    first, second = torch.zeros(2), torch.zeros(3)
    store = store_of(first, second[1:])
    second.untyped_storage().resize_(8)
    with pytest.raises(InvalidStateError, match=r"averaged_tensors\[1\] has a storage of 8 bytes now"):
        snapshot_of(store)
    second.untyped_storage().resize_(12)
    snapshot_of(store)


def test_tensors_that_share_memory_since_are_named_and_nothing_is_written():
    first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    store = store_of(first, second)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 9.0)
    second.data = first.data
    for call in (lambda: store.snapshot(before), lambda: store.apply(before, after)):
        with pytest.raises(InvalidStateError, match=r"averaged_tensors\[1\] shares memory with .*\[0\] now"):
            call()
    assert first.tolist() == [0.0] * 3
    second.data = torch.ones(3)
    store.apply(before, after)
    assert first.tolist() == [9.0] * 3


def test_tensors_that_lie_where_they_lay_are_not_checked_again(monkeypatch):
    first, second = torch.zeros(2), torch.zeros(3)
    store = store_of(first, second)
    checked = []
    current = store._current
    check = current._check_unchanged
    monkeypatch.setattr(
        current, "_check_unchanged", lambda index, tensor: (checked.append(index), check(index, tensor))
    )
    before = snapshot_of(store)
    first += 1
    store.apply(before, before)
    assert checked == [0, 1]
    second.data = torch.ones(3)
    store.snapshot(before)
    assert checked == [0, 1, 1]
    second.untyped_storage().resize_(0)
    with pytest.raises(InvalidStateError, match=r"averaged_tensors\[1\] has a storage of 0 bytes now"):
        store.snapshot(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_values_far_apart_move_without_overflow(dtype, alpha, device):
    largest = torch.finfo(dtype).max
    tensor = torch.tensor([-largest, 1.0], dtype=dtype, device=device)
    store = store_of(tensor)
    before, after = snapshot_of(store), area_of(store)
    tensor_in(store.layout, after, 0).copy_(torch.tensor([largest, 2.0], dtype=torch.float64))
    tensor[0] *= 0.5
    store.apply(before, after, alpha)
    goal = torch.tensor(
        [-0.5 * largest + alpha * largest + alpha * largest, 1.0 + alpha], dtype=torch.float64
    )
    if alpha == 1:
        goal[0] = math.inf  # 1.5 times the largest value
    torch.testing.assert_close(tensor.cpu().double(), goal, rtol=0.01, atol=0)


@dtypes
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_what_was_not_finite_takes_the_average_unless_the_trainer_has_mended_it(dtype, alpha, device):
    tensor = torch.tensor([math.nan, -math.inf, math.nan, 1.0], dtype=dtype, device=device)
    store = store_of(tensor)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 3.0)
    tensor[2] = 5.0
    store.apply(before, after, alpha)
    assert tensor.tolist() == [3.0, 3.0, 5.0, 1.0 + 2.0 * alpha]


@dtypes
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_round_leaves_storages_resizable(dtype, alpha):
    tensors = zoo(dtype, "cpu")
    store = store_of(*tensors)
    before, after = snapshot_of(store), area_of(store)
    for _ in range(2):  # as in the snapshot, then not
        store.apply(before, after, alpha)
        with torch.no_grad():
            for tensor in tensors:
                tensor += 1
    assert all(tensor.untyped_storage().resizable() for tensor in tensors)


def test_areas_in_plain_memory():
    tensor = torch.arange(5.0)
    store = store_of(tensor)
    before, after = bytearray(store.layout.nbytes), bytearray(store.layout.nbytes)
    store.snapshot(memoryview(before))
    assert bytes(before[:20]) == bits(tensor)
    store.apply(before, memoryview(after))
    assert tensor.tolist() == [0.0] * 5


def test_empty_areas():
    store = store_of(torch.zeros(0))
    store.snapshot(bytearray())
    store.apply(bytearray(), bytearray())


@pytest.mark.parametrize(
    "area", [bytearray(63), torch.zeros(128, dtype=torch.uint8), torch.zeros(64), torch.zeros(8, 8).byte()]
)
def test_wrong_areas(area):
    store = store_of(torch.zeros(3))
    with pytest.raises(InvalidValueError, match="64 bytes"):
        store.snapshot(area)


def test_thread_pool_of_torch_is_left_alone(monkeypatch):
    # What is computed at a time is never more than the largest piece that torch works on in the calling thread.
    sizes = []
    original = merging.merge
    monkeypatch.setattr(
        merging,
        "merge",
        lambda current, *rest: (sizes.append(len(current)), original(current, *rest)),
    )
    tensor = torch.zeros(200_000, dtype=torch.bfloat16)
    store = store_of(tensor)
    before, after = snapshot_of(store), area_of(store)
    tensor += 1
    store.apply(before, after)
    assert sum(sizes) == 200_000
    assert max(sizes) <= 1 << 15


# The lock


def test_hold_yields_the_callers_own_tensors_and_is_reentrant():
    tensor = torch.zeros(2)
    store = store_of(tensor)
    assert not store.held_by_this_thread
    with store.hold() as outer, store.hold(timeout=0) as inner:
        assert outer[0] is inner[0] is tensor
        assert store.held_by_this_thread
        store.snapshot(area_of(store))
        assert store.held_by_this_thread
    assert not store.held_by_this_thread


def test_held_tensors_are_changed_in_place_and_never_replaced():
    tensor, parameter = torch.zeros(2), torch.nn.Parameter(torch.zeros(2))
    store = store_of(tensor, parameter)
    with store.hold() as tensors:
        tensors[0] += 1
        with torch.no_grad():
            tensors[-1] += 2
        with pytest.raises(TypeError, match=r"tensors\[0\].copy_"):
            tensors[0] = torch.ones(2)
        with pytest.raises(TypeError, match="another object"):
            tensors[:] = tensors[:]
    assert tensor.tolist() == [1, 1]
    assert parameter.tolist() == [2, 2]


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), name="the-other")
    thread.start()
    thread.join(60)
    return results[0]


def test_others_wait_for_the_lock_and_learn_who_holds_it():
    store = store_of(torch.zeros(2))

    def attempt():
        assert not store.held_by_this_thread
        try:
            store.snapshot(area_of(store), timeout=0.01)
        except DeadlineExceeded as e:
            return str(e)
        return None

    with store.hold():
        message = in_thread(attempt)
    assert message is not None
    assert "not free within 0.01 s" in message
    assert threading.current_thread().name in message
    assert in_thread(attempt) is None


def test_a_wait_for_the_lock_ends_when_nobody_needs_it_any_more():
    store = store_of(torch.zeros(2))
    over = threading.Event()

    def attempt():
        try:
            store.snapshot(area_of(store), abandoned=over.is_set)
        except InvalidStateError as e:
            return str(e)
        return None

    with store.hold():
        threading.Timer(0.1, over.set).start()
        assert in_thread(attempt) == "nobody needs the averaged tensors any more"
    assert in_thread(attempt) == "nobody needs the averaged tensors any more"
    over.clear()
    assert in_thread(attempt) is None


def test_lock_is_free_after_an_error():
    store = store_of(torch.zeros(2))
    with pytest.raises(KeyError), store.hold():
        raise KeyError
    assert in_thread(lambda: store.snapshot(area_of(store), timeout=0)) is None


def test_an_endless_timeout_is_allowed():
    store = store_of(torch.zeros(2))
    with store.hold(math.inf):
        assert store.held_by_this_thread


# CUDA


def test_snapshot_waits_for_the_trainers_stream():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tensor = torch.zeros(1 << 20, device="cuda")
    store = store_of(tensor)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        tensor += 1
        store.mark_stream()
    area = area_of(store)
    thread = threading.Thread(target=store.snapshot, args=(area,))
    thread.start()
    thread.join(60)
    assert tensor_in(store.layout, area, 0).min() == 1


def test_apply_waits_for_the_trainers_stream():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tensor = torch.zeros(1 << 20, device="cuda")
    store = store_of(tensor)
    before, after = snapshot_of(store), area_of(store)
    fill(store, after, 5.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        tensor += 1
        store.mark_stream()
    store.apply(before, after)
    assert tensor.min() == 6


def test_cpu_and_cuda_have_one_schema():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    here, there = store_of(torch.arange(5.0)), store_of(torch.arange(5.0, device="cuda"))
    assert here.layout == there.layout
    assert bits(snapshot_of(here)) == bits(snapshot_of(there))
