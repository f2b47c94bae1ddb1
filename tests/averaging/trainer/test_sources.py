"""What users may give as averaged tensors, what errors call them, and what they say to pass."""

from __future__ import annotations

import copy
import logging
import re

import numpy as np
import pytest
import torch

from shoal.averaging.trainer.sources import ModuleSource, take_tensors, warn_of_frozen
from shoal.averaging.trainer.tensor_checks import check_tensors
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError, UsageError


def model_of(*, tied=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    if tied:
        model[2].weight = model[0].weight
    return model


def take_and_check(given):
    named, _ = take_tensors(given)
    check_tensors(named.tensors, named.labels)


def labels_of(given):
    return list(take_tensors(given)[0].labels)


def names(*given):
    return [f"averaged_tensors[{name!r}]" for name in given]


def test_the_tensors_of_any_iterable_are_the_very_objects():
    tensors = [torch.zeros(3), torch.zeros(2)]
    for given in (tensors, tuple(tensors), (one for one in tensors), dict(enumerate(tensors)).values()):
        named, source = take_tensors(given)
        assert source is None
        assert [id(one) for one in named.tensors] == [id(one) for one in tensors]
        assert list(named.labels) == names(0, 1)


def test_a_module_gives_its_trainable_parameters_by_name():
    model = model_of(tied=True)
    model[1].requires_grad_(False)
    assert labels_of(model) == names("0.weight", "0.bias", "2.bias")


def test_a_module_finds_its_parameters_anew():
    model = model_of()
    _, source = take_tensors(model)
    model.load_state_dict({name: one.clone() for name, one in model.state_dict().items()}, assign=True)
    assert [id(one) for one in source.find().tensors] == [id(one) for one in model.parameters()]


def test_a_frozen_parameter_stays_averaged():
    """Peers agree on shapes when they are made: who freezes one later must not drop out."""
    model = model_of()
    named, source = take_tensors(model)
    model[0].requires_grad_(False)
    assert source.find() == named


@pytest.mark.parametrize("change", ["unfrozen", "untied", "new"])
def test_a_parameter_that_is_trained_and_not_averaged_is_a_warning(change, caplog):
    model = model_of(tied=True)
    model[1].weight.requires_grad_(False)
    _, source = take_tensors(model)
    source.find()
    assert not caplog.records
    if change == "unfrozen":
        model[1].weight.requires_grad_(True)
    elif change == "untied":
        model[2].weight = torch.nn.Parameter(torch.zeros(3, 3))
    else:
        model.append(torch.nn.Linear(3, 3, bias=False))
    source.find()
    source.find()
    name = {"unfrozen": "1.weight", "untied": "2.weight", "new": "3.weight"}[change]
    assert [f"averaged_tensors['{name}'] requires grad" in record.message for record in caplog.records] == [
        True
    ]


def test_tied_parameters_that_share_memory_as_other_objects_are_averaged_once(caplog):
    """What load_state_dict(assign=True) makes of a state whose tensors are tied."""
    model = model_of(tied=True)
    _, source = take_tensors(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert model[0].weight is not model[2].weight
    source.find()
    assert not caplog.records


def test_parameters_without_a_shape_yet_are_named():
    with pytest.raises(
        InvalidTypeError, match=r"\['weight'\] is UninitializedParameter and has no shape yet"
    ):
        take_and_check(torch.nn.LazyLinear(3).named_parameters())


def test_a_parameter_that_is_no_longer_there_is_named():
    model = model_of()
    _, source = take_tensors(model)
    del model[2]
    with pytest.raises(InvalidStateError, match=r"averaged_tensors\['2.weight'\] is no longer a parameter"):
        source.find()


def test_a_module_without_trainable_parameters_says_what_to_pass():
    with pytest.raises(InvalidValueError, match=r"no parameter requires grad.*list\(module.parameters\(\)\)"):
        ModuleSource(model_of().requires_grad_(False))


@pytest.mark.parametrize("kind", ["state_dict", "named_parameters", "pairs"])
def test_tensors_by_name_are_called_so(kind):
    model = torch.nn.Linear(3, 2)
    given = {
        "state_dict": model.state_dict(),
        "named_parameters": model.named_parameters(),
        "pairs": list(model.named_parameters()),
    }[kind]
    assert labels_of(given) == names("weight", "bias")


def test_tied_weights_of_a_state_dict_count_once():
    model = model_of(tied=True)
    given = {name: one for name, one in model.state_dict().items() if one.is_floating_point()}
    named, _ = take_tensors(given)
    assert "averaged_tensors['2.weight']" not in named.labels
    check_tensors(named.tensors, named.labels)
    named, _ = take_tensors(model.named_parameters(remove_duplicate=False))
    assert "averaged_tensors['2.weight']" not in named.labels


def test_names_of_overlapping_tensors_are_in_the_error():
    base = torch.zeros(10)
    named, _ = take_tensors({"head": base[:6], "tail": base[5:]})
    with pytest.raises(InvalidValueError, match=r"\['tail'\] shares memory with averaged_tensors\['head'\]"):
        check_tensors(named.tensors, named.labels)


def test_integer_buffers_of_a_state_dict_are_named_with_what_to_do():
    named, _ = take_tensors(model_of().state_dict())
    with pytest.raises(
        InvalidTypeError, match=r"\['1.num_batches_tracked'\].* got int64: .*is_floating_point"
    ):
        check_tensors(named.tensors, named.labels)


def test_a_quantized_parameter_is_named_with_what_to_pass():
    frozen = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InvalidTypeError, match=r"got uint8: pass .*requires_grad"):
        check_tensors([frozen], ["base"])


ADAM = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "got NoneType"),
        (3, "got int"),
        ("weights", "got str"),
        (torch.zeros(3), "pass [tensor]"),
        (torch.nn.Linear, "got the class Linear: pass an object of it"),
        (ADAM, "got an optimizer (Adam): pass its parameters, [p for group in optimizer.param_groups"),
        (
            ADAM.param_groups,
            "[0] must be a dense torch.Tensor of float16, bfloat16, float32, float64, got dict: pass [p",
        ),
        ({"model": {"weight": torch.zeros(2)}}, "['model'] must be"),
        ([[torch.zeros(2)], [torch.zeros(3)]], "got list: pass one flat list"),
        ([np.zeros(3)], "got ndarray: pass torch.from_numpy(array)"),
        (
            [torch.zeros(2), None],
            "[1] must be a dense torch.Tensor of float16, bfloat16, float32, float64, got NoneType",
        ),
        ({torch.zeros(2), torch.ones(2)}, "got a set, whose order differs from peer to peer"),
        (frozenset([torch.zeros(2)]), "got a frozenset, whose order"),
        ([], "averaged_tensors must hold at least one tensor, got none"),
        ({}, "averaged_tensors must hold at least one tensor, got none"),
        ((one for one in []), "got none: a generator can be used once"),
        (
            [("a", torch.zeros(1)), ("a", torch.zeros(1))],
            "averaged_tensors must have each name once, got 'a' twice",
        ),
        (lambda model: model.parameters(), "callable without arguments"),
        (lambda: None, "got NoneType"),
        (lambda: lambda: [torch.zeros(2)], "got function"),
    ],
)
def test_what_holds_no_tensors_is_an_error_that_says_what_to_pass(given, words):
    with pytest.raises(UsageError) as caught:
        take_and_check(given)
    assert "averaged_tensors" in str(caught.value)
    assert words in str(caught.value)


def test_the_advice_for_floats_of_8_bits_leaves_them_out():
    with pytest.raises(InvalidTypeError, match=r"got float8_e4m3fn: leave it out$"):
        take_and_check([torch.zeros(2, dtype=torch.float8_e4m3fn)])


def test_a_wrapper_without_memory_of_its_own_is_named():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (3,))

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    with pytest.raises(InvalidTypeError, match="got Wrapper, which has no memory of its own"):
        check_tensors([Wrapper()], ["one"])


def test_a_function_is_asked_in_each_round():
    tensors = [torch.zeros(3)]
    _, source = take_tensors(lambda: tensors)
    tensors[0] = torch.ones(3)
    assert source.find().tensors[0] is tensors[0]


def test_parts_of_leaves_that_a_function_makes_are_no_results_of_autograd():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    named, _ = take_tensors(lambda: {"head": weight[:2]})
    check_tensors(named.tensors, named.labels)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([1, 2], [1], r"averaged_tensors\[1\] is missing now"),
        ([1], [1, 2], r"averaged_tensors\[1\] is new"),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, r"averaged_tensors\['b'\] is missing now"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, r"averaged_tensors\['b'\] is at another place now"),
    ],
)
def test_a_function_returns_the_same_tensors_each_time(before, now, words):
    def tensors_of(plan):
        if isinstance(plan, dict):
            return {name: torch.zeros(size) for name, size in plan.items()}
        return [torch.zeros(size) for size in plan]

    plans = [before, now]
    _, source = take_tensors(lambda: tensors_of(plans.pop(0)))
    with pytest.raises(InvalidStateError, match=words):
        source.find()


def test_what_a_function_raises_is_its_authors_at_first_and_named_in_a_round():
    state = {"tensors": [torch.zeros(2)]}
    _, source = take_tensors(lambda: state["tensors"])
    state.clear()
    with pytest.raises(InvalidStateError, match="the function, raised KeyError: 'tensors'"):
        source.find()
    with pytest.raises(KeyError):
        take_tensors(lambda: state["tensors"])


def warnings_of(tensors, caplog):
    caplog.clear()
    warn_of_frozen(take_tensors(tensors)[0], "run")
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_frozen_parameters_beside_trained_ones_are_a_warning_with_their_share(caplog):
    frozen = torch.nn.Parameter(torch.zeros(99_900), requires_grad=False)
    (line,) = warnings_of({"base": frozen, "adapter": torch.nn.Parameter(torch.zeros(100))}, caplog)
    assert re.search(r"^run: 99\.9 % of the bytes .*requires_grad=False.*averaged_tensors\['base'\]", line)


def test_nothing_is_said_of_what_only_looks_frozen(caplog):
    model = model_of()
    momenta = [torch.zeros_like(parameter) for parameter in model.parameters()]
    assert not warnings_of([*model.parameters(), *momenta, *momenta], caplog)
    assert not warnings_of([parameter.detach() for parameter in model.parameters()], caplog)
    assert not warnings_of(list(model.requires_grad_(False).parameters()), caplog)
