"""A model that changes under its optimizer: an error names the parameter, unless the model keeps all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed.tensor
from torch import nn
from torch.nn.utils import prune as pruning

from shoal.errors import InvalidStateError, InvalidTypeError
from shoal.optim.model_watch import ModelWatch
from shoal.optim.parameters import trained_parameters
from shoal.optim.state.holder import move_state


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def watch(model: nn.Module, *, casts: bool = False) -> ModelWatch:
    return ModelWatch({**dict(model.named_parameters()), **dict(model.named_buffers())}, casts)


def backward(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    model(torch.ones(3, 2, dtype=dtype)).sum().backward()


def set_data(model: nn.Module) -> None:
    model[0].weight.data = torch.zeros(2, 2)


def copy_in(model: nn.Module) -> None:
    model.load_state_dict(make().state_dict())


def assign(model: nn.Module) -> None:
    model.load_state_dict(make().state_dict(), assign=True)


def replace_one(model: nn.Module) -> None:
    model[2] = nn.Linear(2, 1)


def normalize(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


def prune(model: nn.Module) -> None:
    pruning.l1_unstructured(model[0], "weight", 1)


def share(model: nn.Module) -> None:
    model.share_memory()


def compile_(model: nn.Module) -> None:
    torch.compile(model, backend="eager")


def wrap(model: nn.Module) -> None:
    """What a framework does that builds its own modules around parameters."""
    held = nn.Module()
    held.register_parameter("inner", model[0]._parameters.pop("weight"))
    model[0].weight = held.inner.data
    model[0].keeper = held


@pytest.mark.parametrize("change", [set_data, copy_in, share, compile_, prune, wrap])
def test_a_model_that_keeps_its_parameters_is_the_same(change: Callable[[nn.Module], None]):
    model = make()
    watched = watch(model)
    change(model)
    backward(model)
    watched.check(after_backward=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nn.Module.double, r"0\.weight was float32 \[2, 2\] .*, and is float64 \[2, 2\] now: cast a model before"),
        (assign, r"0\.weight was the parameter 'weight' of a Linear, which has another one now, and 8 more"),
        (replace_one, r"2\.weight was the parameter 'weight' of a Linear, which is gone, and 1 more"),
        (normalize, r"0\.weight was the parameter 'weight' of a Linear, which has another one now: what"),
    ],
)  # fmt: skip
def test_a_model_with_others_in_their_places_is_an_error_each_time(
    change: Callable[[nn.Module], None], said: str
):
    model = make()
    watched = watch(model)
    change(model)
    backward(model)
    for _ in range(2):
        with pytest.raises(InvalidStateError, match=said):
            watched.check(after_backward=True)


def test_dtypes_may_change_where_the_optimizer_has_copies_and_shapes_never():
    model = nn.Linear(2, 2)
    watched = watch(model, casts=True)
    model.half()
    watched.check()
    model.weight.data = torch.zeros(3, 2)
    with pytest.raises(
        InvalidStateError, match=r"weight was float32 \[2, 2\] .*, and is float32 \[3, 2\] now"
    ):
        watched.check()


def test_buffers_that_a_cast_replaces_are_named():
    """BatchNorm's statistics as extra tensors: the model has other ones then, and these would be averaged."""
    model = nn.BatchNorm1d(2, affine=False)
    watched = ModelWatch({"extra_tensors[0]": model.running_mean}, casts=True)
    model.double()
    with pytest.raises(
        InvalidStateError, match=r"extra_tensors\[0\] was the buffer 'running_mean' of a BatchNorm1d"
    ):
        watched.check()


def test_a_module_that_is_gone_is_no_error_while_its_parameters_have_gradients():
    """A functional program keeps the parameters alone."""
    parameters = dict(make().named_parameters())
    watched = ModelWatch(parameters, casts=False)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    watched.check(after_backward=True)


def test_a_sharded_model_is_refused_by_name():
    """A DTensor over a mesh of one process, in a process group of its own."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = torch.distributed.tensor.distribute_tensor(torch.zeros(4, 2), mesh)
        with pytest.raises(InvalidTypeError, match=r"must be whole, got a DTensor of shape \[4, 2\]: FSDP2"):
            trained_parameters([nn.Parameter(sharded)])
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_of_the_model_is_not_the_model():
    model = make()
    watched = watch(model)
    copy.deepcopy(model)
    watched.check()


def test_what_an_optimizer_keeps_follows_its_parameters_to_another_device():
    """The only other device of every machine is the one without memory. Counters stay, as torch has them."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    backward(model)
    optimizer.step()
    model.to("meta")
    moved = torch.optim.Adam(model.parameters())
    for parameter, state in zip(model.parameters(), list(optimizer.state.values()), strict=True):
        moved.state[parameter] = state
    move_state(moved)
    for state in moved.state.values():
        assert state["exp_avg"].device.type == "meta"
        assert state["step"].device.type == "cpu"


def test_a_parameter_that_is_trained_and_not_averaged_is_named():
    """It was frozen when the optimizer was made, which leaves such parameters out of all rounds."""
    model = make()
    model[0].weight.requires_grad_(False)
    watched = ModelWatch(dict(model.named_parameters()), False, frozen=[model[0].weight])
    backward(model)
    watched.check(after_backward=True)
    model[0].weight.requires_grad_(True)
    with pytest.raises(InvalidStateError, match=r"1 parameters were frozen .* the first of shape \[2, 2\]"):
        watched.check()
