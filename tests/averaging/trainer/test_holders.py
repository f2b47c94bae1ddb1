"""Averaged tensors that are no longer used are a warning, and tensors that are used are none."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from torch.nn.utils import parametrize, prune

from shoal.averaging.trainer import holders
from shoal.averaging.trainer.holders import UsageWatch
from shoal.averaging.trainer.sources import HeldTensors


@pytest.fixture
def lines(caplog):
    """Calls the watch and returns the warnings of that call."""

    def check(watch):
        caplog.clear()
        watch.check()
        return [record.message for record in caplog.records if record.levelno >= logging.WARNING]

    return check


def watch_of(tensors):
    held = HeldTensors(tensors)
    return UsageWatch(held, [f"tensors[{index}]" for index in range(len(held))], "run")


def model_with_gradients():
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    return model


def assign(model):
    model.load_state_dict(
        {name: torch.zeros_like(one) for name, one in model.state_dict().items()}, assign=True
    )


@pytest.mark.parametrize(
    "tensors_of",
    [
        lambda model: list(model.parameters()),
        lambda model: [parameter.data for parameter in model.parameters()],
        lambda model: [parameter.detach() for parameter in model.parameters()],
        lambda model: list(model.state_dict().values()),
    ],
    ids=["parameters", "data", "detached", "state_dict"],
)
def test_parameters_that_were_replaced_are_a_warning_once(tensors_of, lines):
    model = torch.nn.Linear(3, 2)
    tensors = tensors_of(model)
    watch = watch_of(tensors)
    assert not lines(watch)
    assign(model)
    (line,) = lines(watch)
    assert line.startswith("run: 2 of the 2 averaged tensors are no longer used")
    assert "tensors[0] was the parameter 'weight' of a Linear, which is another tensor now" in line
    assert not lines(watch)


def test_only_what_was_replaced_is_named(lines):
    model = torch.nn.Linear(3, 2)
    watch = watch_of(list(model.parameters()))
    model.bias = torch.nn.Parameter(torch.zeros(2))
    (line,) = lines(watch)
    assert "1 of the 2" in line
    assert "tensors[1] was the parameter 'bias'" in line
    assert "tensors[0]" not in line


def test_detached_parameters_whose_memory_was_replaced_are_a_warning(lines):
    model = torch.nn.Linear(3, 2)
    watch = watch_of([parameter.detach() for parameter in model.parameters()])
    model.double()
    assert len(lines(watch)) == 1


@pytest.mark.parametrize("user_keeps_the_list", [True, False])
def test_gradients_that_zero_grad_dropped_are_a_warning(user_keeps_the_list, lines):
    model = model_with_gradients()
    gradients = [parameter.grad for parameter in model.parameters()]
    watch = watch_of(gradients)
    assert not lines(watch)
    if not user_keeps_the_list:
        del gradients
    model.zero_grad()
    (line,) = lines(watch)
    assert (
        "tensors[0] was the gradient of a parameter of shape [2, 3], which has another one or none now"
        in line
    )
    assert "zero_grad(set_to_none=False)" in line


def test_gradients_that_stay_the_same_tensors_are_fine(lines):
    model = model_with_gradients()
    watch = watch_of([parameter.grad for parameter in model.parameters()])
    model.zero_grad(set_to_none=False)
    model(torch.ones(1, 3)).sum().backward()
    assert not lines(watch)


def test_gradients_that_stay_may_be_accumulated_and_clipped(lines):
    model = model_with_gradients()
    watch = watch_of([parameter.grad for parameter in model.parameters()])
    model(torch.ones(1, 3)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert not lines(watch)


def test_detached_parameters_whose_module_was_swapped_are_a_warning(lines):
    model = torch.nn.Linear(3, 2)
    watch = watch_of([parameter.detach() for parameter in model.parameters()])
    torch.utils.swap_tensors(model.weight, torch.nn.Parameter(torch.zeros(2, 3)))
    (line,) = lines(watch)
    assert "1 of the 2" in line


def test_an_optimizers_state_that_was_loaded_anew_is_a_warning(lines):
    model = model_with_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    watch = watch_of([state["momentum_buffer"] for state in optimizer.state.values()])
    optimizer.step()
    assert not lines(watch)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (line,) = lines(watch)
    assert "'momentum_buffer' in the state of an optimizer (SGD), which holds another tensor now" in line


def test_a_model_that_is_gone_is_a_warning(lines):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = watch_of(list(model.parameters()))
    model = torch.nn.Linear(3, 2)  # a cell of a notebook that was run again
    gc.collect()
    (line,) = lines(watch)
    assert "tensors[0] was the parameter 'weight' of a Linear, which is gone" in line
    assert len(optimizer.param_groups) == 1


class WrappingOptimizer(torch.optim.Optimizer):
    """As many are made: its own attributes are those of the optimizer in it, or odd, or not there."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@pytest.mark.parametrize("attributes", [{}, {"state": [], "param_groups": None}, {"param_groups": [{}]}])
def test_optimizers_without_the_usual_attributes_are_passed_over(attributes, lines):
    model = torch.nn.Linear(3, 2)
    odd = WrappingOptimizer(**attributes)
    watch = watch_of(list(model.parameters()))
    del model
    gc.collect()
    (line,) = lines(watch)
    assert "which is gone" in line
    assert isinstance(odd, torch.optim.Optimizer)


def test_what_a_wrapper_has_in_common_with_its_optimizer_counts_once(lines):
    model = torch.nn.Linear(3, 2)
    used = list(model.parameters())
    optimizer = torch.optim.SGD(used, lr=0.1)
    wrapper = WrappingOptimizer(state=optimizer.state, param_groups=optimizer.param_groups)
    watch = watch_of(used)
    del model
    gc.collect()
    assert not lines(watch)
    assert wrapper.param_groups is optimizer.param_groups
    assert len(used) == 2


def test_tensors_of_a_model_that_is_gone_may_be_used_by_the_user(lines):
    model = torch.nn.Linear(3, 2)
    tensors = list(model.parameters())
    watch = watch_of(tensors)
    del model
    gc.collect()
    assert not lines(watch)
    assert len(tensors) == 2


def in_training(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


USES = {
    "training": in_training,
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "double": lambda model: model.double(),
    "freezing": lambda model: model.requires_grad_(False),
    "data": lambda model: setattr(model.weight, "data", torch.zeros(2, 3)),
    "wrapping": lambda model: torch.nn.Sequential(torch.nn.DataParallel(model)),
    "parametrization": lambda model: parametrize.register_parametrization(
        model, "weight", torch.nn.Identity()
    ),
    "pruning": lambda model: prune.random_unstructured(model, "weight", 0.5),
    "another name": lambda model: (setattr(model, "w", model.weight), delattr(model, "weight")),
    "parameter of the same memory": lambda model: setattr(
        model, "weight", torch.nn.Parameter(model.weight.data)
    ),
    "swapping": lambda model: torch.utils.swap_tensors(model.weight, torch.nn.Parameter(torch.zeros(2, 3))),
    "compiling": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("use", USES)
def test_parameters_that_are_used_are_no_warning(use, lines):
    model = torch.nn.Linear(3, 2)
    watch = watch_of(list(model.parameters()))
    kept = USES[use](model)
    assert not lines(watch)
    assert not lines(watch)
    del kept


def test_tensors_that_move_to_another_module_are_followed(lines):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    watch = watch_of(list(model.parameters()))
    other.weight, other.bias = model.weight, model.bias
    del model
    gc.collect()
    assert not lines(watch)
    assign(other)
    assert len(lines(watch)) == 1


def test_tensors_that_only_the_averager_ever_held_are_left_alone(lines, monkeypatch):
    monkeypatch.setattr(holders, "find_slots", lambda _: pytest.fail("nothing is to be searched for them"))
    tensors = [torch.zeros(3), torch.zeros(2)]
    watch = UsageWatch(HeldTensors(tensors), ["a", "b"], "run")
    del tensors
    assert not lines(watch)


def test_views_of_a_tensor_of_the_users_are_left_alone(lines):
    flat = torch.zeros(10)
    watch = watch_of([flat[:5], flat[5:]])
    del flat
    assert not lines(watch)


def test_the_watch_keeps_nothing_alive():
    model = torch.nn.Linear(3, 2)
    watch = watch_of([parameter.detach() for parameter in model.parameters()])
    before = [id(one) for one in gc.get_objects() if type(one) is torch.nn.Linear]
    del model
    after = [id(one) for one in gc.get_objects() if type(one) is torch.nn.Linear]
    assert len(after) == len(before) - 1
    watch.check()
