"""accelerate with a swarm's optimizer, and parameters averaged every so many steps."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

import shoal
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.frameworks.accelerate import LocalSGD

pytestmark = pytest.mark.xdist_group("accelerate")

ROWS, BATCH, RATE = 16, 4, 0.1
names = itertools.count()


@pytest.fixture(scope="module")
def dhts() -> Iterator[tuple[shoal.DHT, shoal.DHT]]:
    with shoal.DHT(start=True) as first, shoal.DHT(first.get_visible_maddrs(), start=True) as second:
        yield first, second


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    """As if each test had a process of its own: accelerate keeps one state in each."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def made() -> Iterator[list[shoal.Optimizer]]:
    optimizers: list[shoal.Optimizer] = []
    yield optimizers
    for optimizer in optimizers:
        optimizer.shutdown()


def data() -> torch.utils.data.TensorDataset:
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Linear(3, 1)


def make(
    made: list[shoal.Optimizer], dht: shoal.DHT, net: torch.nn.Module, batch_size: int = BATCH, **options: Any
) -> shoal.Optimizer:
    settings: dict[str, Any] = {
        "run_id": f"accelerate_{next(names)}",
        "target_batch_size": ROWS,
        "batch_size_per_step": batch_size,
        "optimizer": torch.optim.AdamW(net.parameters(), lr=RATE),
        **options,
    }
    made.append(shoal.Optimizer(dht=dht, **settings))
    return made[-1]


def loss_of(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (net(x) - y).square().mean()


def after(updates: int) -> torch.Tensor:
    """The weights after so many updates by all rows."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    for _ in range(updates):
        optimizer.zero_grad()
        loss_of(net, *data().tensors).backward()
        optimizer.step()
    return net.weight.detach()


def train(accelerator: Accelerator, net: Any, optimizer: Any, loader: Any, epochs: int) -> None:
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(net):
                accelerator.backward(loss_of(net, x, y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1e6)
                optimizer.step()
                optimizer.zero_grad()


# ---- a prepared optimizer


@pytest.mark.parametrize(("precision", "accumulation"), [("no", 1), ("no", 2), ("bf16", 1)])
def test_a_prepared_optimizer_trains_as_by_all_rows(
    made: list[Any], dhts: tuple[shoal.DHT, shoal.DHT], precision: str, accumulation: int
):
    net = model()
    opt = make(made, dhts[0], net, BATCH * accumulation)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    loader = torch.utils.data.DataLoader(data(), BATCH)
    prepared, optimizer, loader = accelerator.prepare(net, opt, loader)
    train(accelerator, prepared, optimizer, loader, 3)
    assert opt.local_epoch == 3
    assert torch.allclose(net.weight, after(3), atol=1e-6 if precision == "no" else 0.02)


@pytest.mark.parametrize("offload", [True, False])
def test_a_saved_state_goes_on_at_its_epoch(
    made: list[Any], dhts: tuple[shoal.DHT, shoal.DHT], tmp_path: Path, offload: bool
):
    accelerators = []
    for _ in range(2):
        net = model()
        options: dict[str, Any] = {}
        if offload:
            options = {"params": net.parameters(), "optimizer": lambda p: torch.optim.AdamW(p, lr=RATE)}
        opt = make(made, dhts[0], net, **options)
        accelerator = Accelerator(cpu=True)
        accelerators.append(
            (accelerator, *accelerator.prepare(net, opt, torch.utils.data.DataLoader(data(), BATCH)))
        )
    train(*accelerators[0], 2)
    accelerators[0][0].save_state(tmp_path)
    accelerators[1][0].load_state(tmp_path)
    assert made[1].local_epoch == 2
    train(*accelerators[1], 2)
    assert made[1].local_epoch == 4
    assert torch.allclose(accelerators[1][1].weight, after(4), atol=1e-6)


def test_a_step_with_overflow_counts_for_nothing(made: list[Any], dhts: tuple[shoal.DHT, shoal.DHT]):
    """With the scaler that float16 has on a GPU; accelerate gives none to a CPU."""
    net = model()
    opt = make(
        made, dhts[0], net, target_batch_size=2 * BATCH, optimizer=torch.optim.SGD(net.parameters(), lr=RATE)
    )
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(opt, device_placement=True, scaler=scaler)
    before = net.weight.detach().clone()
    for value, skipped in ((float("inf"), True), (1.0, False), (3.0, False)):
        scaler.scale(value * net.weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped is skipped
    assert opt.local_epoch == 1
    assert torch.allclose(net.weight, before - RATE * 2.0, atol=1e-6)


# ---- local steps


def local(
    accelerator: Accelerator, net: torch.nn.Module, dht: shoal.DHT | None, run: str, **options: Any
) -> LocalSGD:
    settings: dict[str, Any] = {
        "local_sgd_steps": 2,
        "averaging_timeout": 20.0,
        "averager_opts": {"target_group_size": 2, "min_matchmaking_time": 2.0, "request_timeout": 1.0},
        **options,
    }
    return LocalSGD(accelerator=accelerator, model=net, dht=dht, run_id=run, **settings)


def test_peers_take_local_steps_and_average(dhts: tuple[shoal.DHT, shoal.DHT]):
    """The second begins with the parameters of the first; both average after two steps, and when the block ends."""
    accelerator, run = Accelerator(cpu=True), f"local_{next(names)}"
    nets = [torch.nn.Linear(1, 1, bias=False) for _ in dhts]
    with torch.no_grad():
        nets[0].weight.fill_(10.0)
    seen: list[list[float]] = [[], []]
    first_is_there, second_is_there = threading.Event(), threading.Event()

    def peer(index: int) -> None:
        if index == 1:
            first_is_there.wait(60)
        with local(accelerator, nets[index], dhts[index], run) as local_sgd:
            (second_is_there if index else first_is_there).set()
            second_is_there.wait(60)
            for _ in range(3):
                with torch.no_grad():
                    nets[index].weight += 1.0 + index
                local_sgd.step()
                seen[index].append(nets[index].weight.item())
        assert local_sgd.last_report is not None
        assert local_sgd.last_report.succeeded
        seen[index].append(nets[index].weight.item())

    threads = [threading.Thread(target=peer, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert seen == [[11.0, 13.0, 14.0, 14.5], [12.0, 13.0, 15.0, 14.5]]


def test_an_error_in_the_block_ends_it_without_a_round(dhts: tuple[shoal.DHT, shoal.DHT]):
    net = model()
    local_sgd = local(Accelerator(cpu=True), net, dhts[0], "broken")

    def run() -> None:
        with local_sgd:
            local_sgd.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert local_sgd.last_report is None
    with pytest.raises(InvalidStateError, match=r"step\(\) must be called inside"):
        local_sgd.step()


def test_peers_of_another_model_are_named(dhts: tuple[shoal.DHT, shoal.DHT]):
    accelerator = Accelerator(cpu=True)
    message = r"model must have parameters of the shapes .*\(1, 3\).*, got .*\(1, 5\)"
    with local(accelerator, model(), dhts[0], "shapes", averaging_timeout=0.5):
        other = local(accelerator, torch.nn.Linear(5, 1), dhts[1], "shapes")
        with pytest.raises(InvalidValueError, match=message):
            other.__enter__()


def test_nothing_happens_if_it_is_disabled():
    with LocalSGD(Accelerator(cpu=True), model(), 1, enabled=False) as local_sgd:
        local_sgd.step()
    assert local_sgd.num_steps == 1
    assert local_sgd.last_report is None


def test_wrong_arguments_are_named(dhts: tuple[shoal.DHT, shoal.DHT]):
    accelerator = Accelerator(cpu=True)
    for options, kind, message in (
        ({"local_sgd_steps": 0}, InvalidValueError, "local_sgd_steps must be"),
        ({"run": ""}, InvalidTypeError, "run_id must be a text"),
        ({"dht": None}, InvalidTypeError, "dht must be a shoal.DHT, got None"),
        ({"averager_opts": {"prefix": "x"}}, InvalidValueError, "averager_opts must not have 'prefix'"),
        ({"accelerator": 3}, InvalidTypeError, "accelerator must be an accelerate.Accelerator, got 3"),
    ):
        with pytest.raises(kind, match=message):
            local(**{"accelerator": accelerator, "net": model(), "dht": dhts[0], "run": "wrong", **options})


def test_an_accelerator_of_several_processes_is_refused(
    dhts: tuple[shoal.DHT, shoal.DHT], monkeypatch: pytest.MonkeyPatch
):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", "MULTI_GPU")
    with pytest.raises(InvalidValueError, match=r"of one process that is not sharded, got MULTI_GPU"):
        local(accelerator, model(), dhts[0], "several")
