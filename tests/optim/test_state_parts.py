"""The parts of a training state: packing, an optimizer's first state, integers that are carried along."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.errors import InvalidValueError
from shoal.optim.state.carried import MAX_INTEGERS, Carried
from shoal.optim.state.holder import initialize_state
from shoal.optim.state.packing import pack, unpack
from shoal.utils.serializer import MSGPackSerializer


def test_a_state_dict_comes_back_through_the_wire():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([param], lr=0.1)
    param.grad = torch.ones(2)
    optimizer.step()
    tensors: list[torch.Tensor] = []
    packed = MSGPackSerializer.loads(MSGPackSerializer.dumps(pack(optimizer.state_dict(), tensors)))
    again = unpack(packed, tensors)
    assert again == optimizer.state_dict()
    assert isinstance(again["param_groups"][0]["betas"], tuple)


def test_what_is_no_plain_value_stays_at_home():
    state = {"groups": [{"rule": len, "lr": 0.1}]}
    assert unpack(pack(state, []), [], {"groups": [{"rule": max}]}) == {"groups": [{"rule": max, "lr": 0.1}]}


@pytest.mark.parametrize(
    "packed",
    [None, [], ["tensor", 1], ["dict", [[1]]], ["value", []], ["list", 3], ["dict", [[[], ["absent"]]]]],
)
def test_what_no_peer_packs_is_an_error(packed: Any):
    with pytest.raises(ValueError, match="no "):
        unpack(packed, [torch.zeros(1)])


def test_nesting_is_bounded():
    packed: list[Any] = ["absent"]
    for _ in range(100):
        packed = ["list", [packed]]
    with pytest.raises(ValueError, match="no packed value"):
        unpack(packed, [])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    ],
)
def test_the_first_step_after_initialising_is_that_of_a_fresh_optimizer(make: Any):
    params = [torch.nn.Parameter(torch.arange(3.0)) for _ in range(2)]
    fresh, initialised = (make([param]) for param in params)
    initialize_state(initialised)
    assert torch.equal(params[1], torch.arange(3.0))
    assert initialised.param_groups[0]["params"][0] is params[1]
    assert initialised.param_groups[0]["weight_decay"] == fresh.param_groups[0]["weight_decay"]
    assert set(initialised.state) == {params[1]}
    for _ in range(3):
        for optimizer, param in zip((fresh, initialised), params, strict=True):
            param.grad = torch.tensor([1.0, -2.0, 3.0])
            optimizer.step()
    assert torch.equal(*params)


def test_an_optimizer_that_needs_a_closure_is_named():
    optimizer = torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(InvalidValueError, match="without a closure to make its state, got LBFGS"):
        initialize_state(optimizer)


def test_integers_become_the_largest_and_never_go_back():
    counter, mean = torch.tensor(5), torch.tensor([0.5])
    carried = Carried([mean, counter])
    assert carried.floating == (mean,)
    carried.note([[3], [9], "hostile", [1, 2], [2**70], None])
    counter.add_(1)
    carried.apply()
    assert counter.item() == 9
    carried.note([[3]])
    carried.apply()
    assert counter.item() == 9


def test_too_many_integers_stay_out_of_rounds():
    assert Carried([torch.zeros(MAX_INTEGERS + 1, dtype=torch.int64)]).integers() == []
