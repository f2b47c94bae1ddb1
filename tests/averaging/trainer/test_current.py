"""The tensors of a source: found anew in each round, and known to fit before they are read or written."""

from __future__ import annotations

import logging
import weakref

import numpy as np
import pytest
import torch

from shoal.averaging.partition import Layout
from shoal.averaging.trainer.sources import take_tensors
from shoal.averaging.trainer.tensors import TensorStore
from shoal.errors import InvalidStateError, InvalidTypeError, UsageError
from shoal.testing.arena import tensor_in


class Bound:
    """A store, with the source that its averager would keep alive."""

    def __init__(self, given):
        named, self.source = take_tensors(given)
        self.store = TensorStore(named.tensors, Layout.from_tensors(named.tensors), named.labels, self.source)

    def snapshot(self):
        area = torch.zeros(self.store.layout.nbytes, dtype=torch.uint8)
        self.store.snapshot(area)
        return area

    def values_of(self, area):
        return [
            tensor_in(self.store.layout, area, index).mean().item() for index in range(len(self.store.labels))
        ]


def constant(size, value):
    return torch.full((size,), float(value))


def test_a_round_reads_and_writes_the_tensors_that_the_module_has_then():
    model = torch.nn.Linear(3, 2)
    bound = Bound(model)
    model.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, assign=True)
    before = bound.snapshot()
    assert bound.values_of(before) == [1, 1]
    model.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.full((2,), 5.0)}, assign=True)
    average = torch.zeros_like(before)
    for index in range(2):
        tensor_in(bound.store.layout, average, index).fill_(2)
    bound.store.apply(before, average)
    assert model.weight.eq(2).all()
    assert model.bias.eq(6).all()  # what the trainer changed in between is kept


def test_gradients_of_each_round_are_those_that_are_there():
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    bound = Bound(lambda: [parameter.grad for parameter in model.parameters()])
    bound.snapshot()
    model.zero_grad()
    with pytest.raises(
        InvalidTypeError, match=r"averaged_tensors\[0\] must be .* got NoneType: a gradient is None"
    ):
        bound.snapshot()
    model(torch.ones(1, 3)).sum().mul(3).backward()
    assert bound.values_of(bound.snapshot()) == [3, 3]


def frozen():
    array = np.zeros(3, dtype=np.float32)
    array.flags.writeable = False
    return torch.from_numpy(array)


MISFITS = {
    "shape": (
        lambda: constant(4, 0),
        r"was float32 \[3\] when the averager was made, and is float32 \[4\] now",
    ),
    "dtype": (lambda: constant(3, 0).double(), "and is float64"),
    "none": (lambda: None, "got NoneType"),
    "layout": (lambda: constant(3, 0).to_sparse(), "got a sparse_coo tensor"),
    "result": (lambda: torch.zeros(3, requires_grad=True).sigmoid(), "computed by autograd"),
    "expanded": (lambda: torch.zeros(1).expand(3), "elements that share memory"),
    "read-only": (frozen, "must be in memory that can be written"),
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_any_more_is_named_and_nothing_is_written(kind):
    make, words = MISFITS[kind]
    tensors = {"first": constant(2, 1), "second": constant(3, 1)}
    bound = Bound(lambda: tensors)
    area = bound.snapshot()
    with torch.enable_grad():
        tensors["second"] = make()
    for use in (lambda: bound.store.apply(area, torch.zeros_like(area)), bound.snapshot):
        with pytest.raises(UsageError, match=words) as caught:
            use()
        assert "averaged_tensors['second']" in str(caught.value)
    assert tensors["first"].eq(1).all()


def test_tensors_that_come_to_share_memory_are_named():
    tensors = {"first": constant(2, 1), "second": constant(2, 1)}
    bound = Bound(lambda: [("first", tensors["first"]), ("second", tensors["second"])])
    tensors["second"] = torch.zeros(3)[1:]
    tensors["first"] = tensors["second"].view(2)
    base = torch.zeros(3)
    tensors |= {"first": base[:2], "second": base[1:]}
    with pytest.raises(
        InvalidStateError, match=r"\['second'\] shares memory with averaged_tensors\['first'\] now"
    ):
        bound.snapshot()


def test_tensors_of_former_rounds_are_not_kept():
    tensors = [constant(2, 1)]
    bound = Bound(lambda: tensors)
    bound.snapshot()
    with bound.store.hold() as held:
        assert held[0] is tensors[0]
    del held
    gone = weakref.ref(tensors.pop())
    assert gone() is None


def test_parameters_of_an_averager_can_be_swapped():
    """torch refuses that for tensors to which weak references exist."""
    model = torch.nn.Linear(3, 2)
    for bound in (Bound(model), Bound(list(model.parameters()))):
        bound.snapshot()
        torch.utils.swap_tensors(model.weight, torch.nn.Parameter(torch.full((2, 3), 5.0)))
        assert bound.values_of(bound.snapshot())[0] == 5


def test_a_source_that_is_gone_with_its_averager_says_so():
    bound = Bound(lambda: [constant(2, 1)])
    del bound.source
    with pytest.raises(InvalidStateError, match="the averager is gone"):
        bound.snapshot()


def test_the_lock_alone_needs_no_tensors():
    """A donor of model and optimizer shares them while there are no gradients to average."""
    tensors = [constant(2, 1)]
    bound = Bound(lambda: tensors)
    tensors.clear()
    with bound.store.lock():
        assert bound.store.held_by_this_thread


@pytest.mark.parametrize("kind", ["module", "function"])
def test_averagers_that_come_to_the_same_tensors_share_their_lock(kind):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    first = Bound(model if kind == "module" else lambda: list(model.parameters()))
    second = Bound(other)
    first.snapshot()
    second.snapshot()
    with first.store.lock():
        assert not second.store.held_by_this_thread
    model.weight, model.bias = other.weight, other.bias
    first.snapshot()
    with second.store.lock():
        assert first.store.held_by_this_thread


def warnings_of_a_round(given, caplog):
    bound = Bound(given)
    for _ in range(2):
        area = bound.snapshot()
        bound.store.apply(area, area)
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


MODEL = torch.nn.Linear(3, 2)
MODEL(torch.ones(1, 3)).sum().backward()
ARRAY = np.zeros(3, np.float32)
KEPT = [torch.zeros(3)]


@pytest.mark.parametrize(
    "function",
    [
        lambda: [parameter.clone() for parameter in MODEL.parameters()],
        lambda: {name: one.double() for name, one in MODEL.named_parameters()},
        lambda: [torch.nn.utils.parameters_to_vector(MODEL.parameters())],
    ],
    ids=["clone", "double", "vector"],
)
def test_a_function_that_returns_copies_is_a_warning_once(function, caplog):
    (line,) = warnings_of_a_round(function, caplog)
    assert "averages reach nothing: copies" in line


@pytest.mark.parametrize(
    "function",
    [
        MODEL.parameters,
        MODEL.state_dict,
        lambda: [parameter.grad for parameter in MODEL.parameters()],
        lambda: [parameter.grad.detach() for parameter in MODEL.parameters()],
        lambda: [parameter.detach()[:1] for parameter in MODEL.parameters()],
        lambda: [torch.from_numpy(ARRAY)],
        lambda: [torch.nn.Parameter(parameter.detach()) for parameter in MODEL.parameters()],
        lambda: KEPT,
        lambda: [*KEPT, torch.zeros(2)],
    ],
    ids=["parameters", "state_dict", "grad", "views of grad", "parts", "numpy", "new", "list", "some"],
)
def test_a_function_that_returns_what_is_used_is_no_warning(function, caplog):
    assert not warnings_of_a_round(function, caplog)
