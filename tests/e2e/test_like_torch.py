"""One peer alone is plain PyTorch with large batches, in every mode: two groups, a schedule, nine optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from real_swarm import Swarm
from torch import nn, optim

import shoal

pytestmark = pytest.mark.xdist_group("averaging")

EPOCHS, BATCHES, ROWS = 6, 4, 4
"""Epochs, their batches, and the rows of each batch."""
Make = Callable[[Any], optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(optim.Adam, lr=0.05),
    "amsgrad": partial(optim.Adam, lr=0.05, amsgrad=True),
    "adamw": partial(optim.AdamW, lr=0.05, weight_decay=0.1),
    "adamax": partial(optim.Adamax, lr=0.05),
    "adagrad": partial(optim.Adagrad, lr=0.05),
    "nadam": partial(optim.NAdam, lr=0.01),
    "radam": partial(optim.RAdam, lr=0.05),
    "rmsprop": partial(optim.RMSprop, lr=0.01),
}
OF_AN_INSTANCE: dict[str, dict[str, Any]] = {
    "plain": {},
    "local": {"use_local_updates": True},
    "reused": {"reuse_grad_buffers": True},
    "clipped": {"max_grad_norm": 0.3},
}
OF_A_CALLABLE: dict[str, dict[str, Any]] = {
    "offloaded": {},
    "not offloaded": {"offload_optimizer": False},
    "delayed": {"delay_optimizer_step": True},
    "offloaded, local": {"use_local_updates": True, "offload_optimizer": True},
    "offloaded, reused": {"reuse_grad_buffers": True},
    "offloaded, clipped": {"max_grad_norm": 0.3},
}
IN_MAKE_TEST = (("adamw", "plain"), ("adamw", "delayed"))
CASES = [
    pytest.param(name, mode, marks=() if (name, mode) in IN_MAKE_TEST else pytest.mark.sweep)
    for name in OPTIMIZERS
    for mode in (*OF_AN_INSTANCE, *OF_A_CALLABLE)
]


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def groups_of(net: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "lr": 0.02}]


def schedule(optimizer: optim.Optimizer) -> optim.lr_scheduler.StepLR:
    return optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def data() -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, 4, generator=draws) for _ in range(EPOCHS * BATCHES)]


def backward(net: nn.Sequential, x: torch.Tensor) -> None:
    (net(x) - x.sum(1, keepdim=True)).square().mean().backward()


def by_torch(
    make: Make, *, use_local_updates: bool = False, max_grad_norm: float | None = None, **_: Any
) -> nn.Module:
    net = model()
    optimizer = make(groups_of(net))
    scheduler = schedule(optimizer)
    batches = data()
    for epoch in range(EPOCHS):
        own = batches[BATCHES * epoch : BATCHES * (epoch + 1)]
        for x in own if use_local_updates else [torch.cat(own)]:
            optimizer.zero_grad()
            backward(net, x)
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), max_grad_norm)
            optimizer.step()
        scheduler.step()
    return net


@pytest.fixture
def finished(swarm: Swarm) -> Iterator[list[shoal.Optimizer]]:
    made: list[shoal.Optimizer] = []
    yield made
    for one in made:
        one.shutdown()


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_one_peer_is_as_torch(swarm: Swarm, finished: list[shoal.Optimizer], name: str, mode: str):
    make, net = OPTIMIZERS[name], model()
    given: dict[str, Any] = OF_AN_INSTANCE.get(mode, {})
    if mode in OF_A_CALLABLE:
        given = {"optimizer": make, "params": groups_of(net), "scheduler": schedule, **OF_A_CALLABLE[mode]}
    else:
        inner = make(groups_of(net))
        given = {"optimizer": inner, "scheduler": schedule(inner), **given}
    opt = shoal.Optimizer(
        dht=swarm.dht(),
        run_id=f"torch_{name}_{mode}".replace(", ", "_").replace(" ", "_"),
        target_batch_size=ROWS * BATCHES,
        batch_size_per_step=ROWS,
        matchmaking_time=1.0,
        averaging_timeout=3.0,
        averager_opts={"request_timeout": 0.5},
        **given,
    )
    finished.append(opt)
    for x in data():
        if not opt.options.reuse_grad_buffers:
            opt.zero_grad()
        backward(net, x)
        opt.step()
        opt.state_averager.finish_delayed()  # so that no gradient is of an older model
    assert opt.local_epoch == EPOCHS
    for own, right in zip(net.parameters(), by_torch(make, **given).parameters(), strict=True):
        assert torch.allclose(own, right, atol=2e-5)
