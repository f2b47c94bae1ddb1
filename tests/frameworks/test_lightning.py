"""A real Trainer of Lightning with a small module, as a peer that is alone, or beside a plain loop."""

from __future__ import annotations

import importlib
import itertools
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LRScheduler, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import shoal
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError, ShoalError
from shoal.frameworks.lightning import ShoalStrategy
from shoal.frameworks.pytorch_lightning import ShoalStrategy as OtherStrategy
from shoal.frameworks.strategy.options import find_initial_peers
from shoal.frameworks.strategy.samples import size_of

pytestmark = [
    pytest.mark.xdist_group("lightning"),
    # what Lightning says of small modules and loaders, and calls of torch that it should not use any more
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*in `fast_dev_run` mode"),
]

ROWS, SIZE, RATE = 16, 4, 0.1
names = itertools.count()


def parts(package: Any) -> type[Any]:
    """The module for one of the two packages."""

    class Linear(package.LightningModule):
        """Learns sums; ``configure`` makes what it trains with."""

        def __init__(self, configure: Any = None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(3, 1)
            self.configure = configure or (
                lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.5)
            )

        def training_step(self, batch: Any, _: int) -> Any:
            return (self.linear(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val", (self.linear(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            return self.configure(self.parameters())

        @property
        def weights(self) -> torch.Tensor:
            return torch.cat([p.detach().reshape(-1) for p in self.linear.parameters()])

    return Linear


Linear = parts(lightning)


def rows(size: int = SIZE) -> DataLoader[Any]:
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=size)


@pytest.fixture(scope="module")
def dht() -> Iterator[shoal.DHT]:
    with shoal.DHT(start=True) as made:
        yield made


@pytest.fixture
def strategy(dht: shoal.DHT) -> Any:
    def make(**options: Any) -> ShoalStrategy:
        settings: dict[str, Any] = {
            "target_batch_size": ROWS,
            "run_id": f"lightning{next(names)}",
            "dht": dht,
        }
        return ShoalStrategy(**{**settings, "matchmaking_time": 1.0, "averaging_timeout": 5.0, **options})

    return make


def fit(strategy: Any, module: Any, epochs: int = 3, **options: Any) -> lightning.Trainer:
    load = {name: options.pop(name) for name in ("ckpt_path", "val_dataloaders") if name in options}
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        **{**settings, "enable_model_summary": False, "max_epochs": epochs, "strategy": strategy, **options}
    )
    trainer.fit(module, rows(), **load)
    return trainer


def after(updates: int, configure: Any = None) -> torch.Tensor:
    """The weights after so many updates by all rows, without a swarm; a scheduler moves at each."""
    module = Linear(configure)
    made = module.configure_optimizers()
    [optimizer], schedulers = made if isinstance(made, tuple) else ([made], [])
    [(x, y)] = rows(ROWS)
    for _ in range(updates):
        optimizer.zero_grad()
        module.training_step((x, y), 0).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return module.weights


def with_schedulers(parameters: Any) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=0.5)
    return [optimizer], [
        {"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"},
        ChainedScheduler([ExponentialLR(optimizer, 0.9)]),
    ]


def with_schedulers_alone(parameters: Any) -> Any:
    optimizer, configs = with_schedulers(parameters)
    return optimizer, [config["scheduler"] if isinstance(config, dict) else config for config in configs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"offload_optimizer": True},
        {"delay_optimizer_step": True},
        {"reuse_grad_buffers": True},
        {"batch_size": SIZE},
    ],
)
def test_alone_a_swarm_epoch_is_an_update_by_all_rows(strategy: Any, options: dict[str, Any]):
    """Four batches make an update, and the module's schedulers move with each; validation comes in between."""
    module = Linear(with_schedulers)
    swarm = strategy(**options)
    fit(swarm, module, val_check_interval=2, num_sanity_val_steps=1, val_dataloaders=rows())
    assert swarm.local_epoch == 3
    assert torch.allclose(module.weights, after(3, with_schedulers_alone), atol=1e-6)


@pytest.mark.parametrize(
    "form", [lambda o: o, lambda o: [o], lambda o: {"optimizer": o}, lambda o: ([o], [])]
)
def test_every_form_of_configure_optimizers_is_taken(strategy: Any, form: Any):
    module = Linear(lambda parameters: form(torch.optim.SGD(parameters, lr=RATE, momentum=0.5)))
    fit(strategy(), module, epochs=1)
    assert torch.allclose(module.weights, after(1), atol=1e-6)


def test_scheduler_fn_makes_a_scheduler_that_lightning_knows(strategy: Any):
    trainer = fit(strategy(scheduler_fn=lambda optimizer: StepLR(optimizer, 1, 0.5)), Linear(), epochs=2)
    [config] = trainer.lr_scheduler_configs
    assert config.scheduler.last_epoch == 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(RATE / 4)


def test_batches_that_are_accumulated_count_with_all_their_samples(strategy: Any):
    module, swarm = Linear(), strategy()
    trainer = fit(swarm, module, accumulate_grad_batches=2)
    assert (trainer.global_step, swarm.local_epoch) == (6, 3)
    assert torch.allclose(module.weights, after(3), atol=1e-6)


def test_gradients_are_clipped_by_step_and_the_mean_on_request(strategy: Any):
    """A limit far below any gradient: each update has that length, whichever of the two it is."""
    plain = {"configure": lambda parameters: torch.optim.SGD(parameters, lr=1.0)}
    for swarm, options in ((strategy(max_grad_norm=1e-3), {}), (strategy(), {"gradient_clip_val": 1e-3})):
        module = Linear(**plain)
        before = module.weights
        fit(swarm, module, epochs=1, **options)
        length = float((module.weights - before).norm())
        assert 5e-4 < length < 1.001e-3
        assert (length == pytest.approx(1e-3, rel=1e-3)) == (not options)


def test_manual_optimization_works_with_several_steps_a_batch(strategy: Any):
    class Manual(Linear):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, index))
                optimizer.step()

    swarm = strategy(target_batch_size=2 * ROWS)
    fit(swarm, Manual(), epochs=2)
    assert swarm.local_epoch == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(strategy: Any, precision: Any):
    """The scaler of "16-mixed" is used on the CPU, too: Lightning takes it only as a plugin there."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if precision == "16-mixed" else None
    module, swarm = Linear(), strategy()
    fit(swarm, module, plugins=[MixedPrecision(precision, "cpu", scaler)])
    assert swarm.local_epoch == 3
    assert torch.allclose(module.weights, after(3), atol=0.05)
    assert not torch.equal(module.weights, after(0))


# with others


def plain_peer(dht: shoal.DHT, run_id: str, **options: Any) -> tuple[Any, shoal.Optimizer]:
    module = Linear(with_schedulers_alone)
    [optimizer], [scheduler, _] = module.configure_optimizers()
    return module, shoal.Optimizer(
        dht=dht, run_id=run_id, target_batch_size=2 * ROWS, batch_size_per_step=ROWS, optimizer=optimizer,
        scheduler=scheduler, matchmaking_time=1.0, averaging_timeout=20.0, **options,
    )  # fmt: skip


def test_a_trainer_and_a_plain_loop_are_peers(dht: shoal.DHT, strategy: Any):
    """They average their gradients, and have the same weights in the end."""
    with shoal.DHT(initial_peers=dht.get_visible_maddrs(), start=True) as other:
        run_id = f"lightning{next(names)}"
        plain, optimizer = plain_peer(other, run_id, delay_state_averaging=False, after_failed_round="wait")
        [(x, y)] = rows(ROWS)
        ended = threading.Event()

        def train() -> None:
            while not ended.is_set():
                if optimizer.local_epoch < 3:
                    optimizer.zero_grad()
                    plain.training_step((x, y), 0).backward()
                optimizer.step()
                ended.wait(0.05)

        reports = []

        class Stop(lightning.Callback):
            def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
                report = swarm.optimizer.report
                if report is not None and report not in reports:
                    reports.append(report)
                trainer.should_stop = swarm.local_epoch >= 3
                ended.wait(0.02)

        swarm = strategy(
            run_id=run_id, target_batch_size=2 * ROWS, averaging_timeout=20.0, after_failed_round="wait"
        )
        module = Linear(lambda parameters: with_schedulers_alone(parameters)[0][0])
        thread = threading.Thread(target=train)
        thread.start()
        try:
            fit(swarm, module, epochs=200, callbacks=[Stop()])
        finally:
            ended.set()
            thread.join()
            optimizer.shutdown()
    assert "averaged" in {report.gradients for report in reports}
    assert max(report.peers for report in reports) == 2


@pytest.mark.sweep
def test_a_late_trainer_begins_where_the_others_are(dht: shoal.DHT, strategy: Any):
    """Weights, momentum, epoch and learning rate: it fell by one half at epoch 2, and once only."""
    with shoal.DHT(initial_peers=dht.get_visible_maddrs(), start=True) as other:
        run_id = f"lightning{next(names)}"
        plain, optimizer = plain_peer(other, run_id)
        [(x, y)] = rows(ROWS)
        while optimizer.local_epoch < 3:
            optimizer.zero_grad()
            plain.training_step((x, y), 0).backward()
            optimizer.step()
        seen: dict[str, Any] = {}

        class Look(lightning.Callback):
            def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
                seen.update(weights=module.weights, epoch=swarm.local_epoch, peers=swarm.num_peers)
                seen["rate"] = trainer.optimizers[0].param_groups[0]["lr"]
                trainer.should_stop = True

        def configure(parameters: Any) -> Any:
            made = torch.optim.SGD(parameters, lr=RATE, momentum=0.5)
            return [made], [StepLR(made, 2, 0.5)]

        swarm = strategy(run_id=run_id, target_batch_size=2 * ROWS)
        fit(swarm, Linear(configure), epochs=1, limit_train_batches=1, callbacks=[Look()])
        optimizer.shutdown()
    assert seen["epoch"] == 3
    assert seen["peers"] == 2
    assert torch.equal(seen["weights"], plain.weights)
    assert seen["rate"] == pytest.approx(RATE / 2)


# what a run leaves behind


def test_a_checkpoint_has_the_swarms_epoch_and_goes_on(strategy: Any, tmp_path: Path):
    """Momentum and schedulers, too: as if there had been no break."""
    module, path = Linear(with_schedulers), tmp_path / "saved.ckpt"
    fit(strategy(), module, epochs=2).save_checkpoint(path)
    again, swarm = Linear(with_schedulers), strategy()
    fit(swarm, again, epochs=4, ckpt_path=path)
    assert swarm.local_epoch == 4
    assert torch.allclose(again.weights, after(4, with_schedulers_alone), atol=1e-6)


def test_a_checkpoint_of_a_run_without_a_swarm_is_taken(strategy: Any, tmp_path: Path, caplog: Any):
    module, path = Linear(), tmp_path / "saved.ckpt"
    fit("auto", module, epochs=2).save_checkpoint(path)
    before = module.weights
    swarm = strategy()
    fit(swarm, module, epochs=3, ckpt_path=path)
    assert swarm.local_epoch == 1
    assert not torch.equal(module.weights, before)
    assert "its optimizer begins at epoch 0" in caplog.text


class Kept(Logger):
    name, version = "kept", "0"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(dict(metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_the_trainers_loggers_get_what_the_swarm_does(strategy: Any):
    kept = Kept()
    fit(strategy(), Linear(), logger=[kept], log_every_n_steps=1)
    assert [m["swarm/epoch"] for m in kept.metrics if "swarm/epoch" in m][-4:] == [2.0] * 4
    assert kept.metrics[-1]["swarm/peers"] == 1
    assert kept.metrics[-1]["swarm/last/samples"] == ROWS
    assert kept.metrics[-1]["swarm/last/loss"] > 0


def own(**options: Any) -> ShoalStrategy:
    """With a DHT of its own."""
    return ShoalStrategy(ROWS, f"lightning{next(names)}", host_maddrs="/ip4/127.0.0.1/tcp/0", **options)


class Raise(lightning.Callback):
    """Notes the DHT, and ends training as it is told."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.found: list[shoal.DHT] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.found.append(trainer.strategy.dht)
        if self.error is not None:
            raise self.error


@pytest.mark.sweep
def test_one_strategy_fits_again_each_time_with_a_dht_that_ends():
    swarm, look = own(), Raise(None)
    fit(swarm, Linear(), epochs=1, callbacks=[look])
    fit(swarm, Linear(), callbacks=[look], fast_dev_run=True)
    trainer = fit(swarm, Linear(), epochs=1, callbacks=[look], overfit_batches=2)
    assert len(set(look.found)) == 3
    assert not any(dht.is_alive() for dht in look.found)
    assert trainer.validate(Linear(), rows(), verbose=False)
    with pytest.raises(InvalidStateError, match="dht must be used while"):
        _ = swarm.dht


@pytest.mark.sweep
def test_it_joins_whom_the_environment_names_and_ctrl_c_leaves_nothing_running(
    dht: shoal.DHT, monkeypatch: pytest.MonkeyPatch
):
    """An option of libp2p's is warned of as by the DHT."""
    monkeypatch.setenv("SHOAL_INITIAL_PEERS", ",".join(map(str, dht.get_visible_maddrs())))
    monkeypatch.setenv("PL_INITIAL_PEERS", "/ip4/127.0.0.1/tcp/1")
    swarm, stop = own(use_relay=True), Raise(KeyboardInterrupt())
    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="DHT option 'use_relay' is ignored"), pytest.raises(SystemExit):
        fit(swarm, Linear(), callbacks=[stop])
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert stop.found[0].initial_peers == tuple(dht.get_visible_maddrs())
    assert not stop.found[0].is_alive()
    assert not swarm.optimizer.is_alive()


def test_an_error_in_training_takes_the_peer_out_of_the_swarm(strategy: Any, dht: shoal.DHT):
    """A DHT that was given stays."""
    swarm = strategy()
    with pytest.raises(ValueError, match="broken"):
        fit(swarm, Linear(), callbacks=[Raise(ValueError("broken"))])
    assert not swarm.optimizer.is_alive()
    assert dht.is_alive()


@pytest.mark.parametrize(
    ("given", "environment", "found"),
    [
        (None, {}, None),
        (None, {"PL_INITIAL_PEERS": "/a,/b"}, "/a,/b"),
        (None, {"SHOAL_INITIAL_PEERS": "/a", "PL_INITIAL_PEERS": "/b"}, "/a"),
        (None, {"SHOAL_INITIAL_PEERS": " ", "PL_INITIAL_PEERS": "/b"}, "/b"),
        (["/c"], {"SHOAL_INITIAL_PEERS": "/a"}, ["/c"]),
        ([], {"SHOAL_INITIAL_PEERS": "/a"}, []),
    ],
)
def test_what_is_given_counts_before_the_environment(given: Any, environment: dict[str, str], found: Any):
    assert find_initial_peers(given, environment) == found


@pytest.mark.parametrize("batch", [None, "text", [], torch.tensor(1.0), torch.zeros(0, 2)])
def test_a_batch_whose_size_cannot_be_seen_asks_for_batch_size(batch: Any):
    with pytest.raises(InvalidValueError, match="batch_size must be given to ShoalStrategy"):
        size_of(batch)


def test_without_training_there_is_no_swarm():
    swarm = ShoalStrategy(ROWS)
    trainer = lightning.Trainer(strategy=swarm, logger=False, enable_progress_bar=False)
    assert trainer.validate(Linear(), rows(), verbose=False)
    assert (swarm.num_peers, swarm.local_epoch) == (1, 0)
    with pytest.raises(InvalidStateError, match="optimizer must be used after"):
        _ = swarm.optimizer


def test_the_other_package_works_alike(dht: shoal.DHT):
    module = parts(pytorch_lightning)()
    swarm = OtherStrategy(ROWS, f"lightning{next(names)}", dht=dht)
    trainer = pytorch_lightning.Trainer(
        strategy=swarm, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, rows())
    assert swarm.local_epoch == 2
    assert torch.allclose(module.weights, after(2), atol=1e-6)


# what is refused


def plateau(parameters: Any) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    return {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer), "monitor": "val"}


class OwnSteps(Linear):  # type: ignore[valid-type, misc]
    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        scheduler.step()


def manual(module: Any) -> Any:
    module.automatic_optimization = False
    return module


@pytest.mark.parametrize(
    ("module", "options", "trainer", "message"),
    [
        (lambda: Linear(plateau), {}, {}, "got ReduceLROnPlateau"),
        (OwnSteps, {}, {}, "lr_scheduler_step must not be overridden"),
        (lambda: manual(Linear(lambda p: [torch.optim.SGD(p, lr=1), torch.optim.SGD([torch.zeros(1)], lr=1)])), {}, {},
         "must return one optimizer, got 2"),
        (lambda: manual(Linear(with_schedulers)), {}, {}, "must return no scheduler with manual optimization"),
        (lambda: Linear(with_schedulers), {"scheduler_fn": lambda o: StepLR(o, 1)}, {}, "scheduler_fn must be None"),
        (Linear, {"reuse_grad_buffers": True}, {"gradient_clip_val": 1.0}, "gradient_clip_val must be None"),
        (Linear, {"reuse_grad_buffers": True},
         {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
         "reuse_grad_buffers must be False"),
        (Linear, {"use_local_updates": True, "delay_grad_averaging": True}, {}, "must be False with use_local_updates"),
        (Linear, {}, {"accelerator": "cpu", "devices": 2}, "devices must be 1 with ShoalStrategy, got 2"),
        (Linear, {}, {"num_nodes": 2}, "num_nodes must be 1 with ShoalStrategy, got 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_swarm_is_refused_by_name(
    strategy: Any, module: Any, options: dict[str, Any], trainer: dict[str, Any], message: str
):
    with pytest.raises(ShoalError, match=message):
        fit(strategy(**options), module(), **trainer)


@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
def test_a_module_without_an_optimizer_is_refused(strategy: Any):
    module = Linear()
    module.configure = lambda _: None
    with pytest.raises(InvalidValueError, match="must return one optimizer, got 0"):
        fit(strategy(), module)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_batch_size": 0}, InvalidValueError, "target_batch_size must be"),
        ({"batch_size": 0}, InvalidValueError, "batch_size must be"),
        ({"max_grad_nrom": 1.0}, InvalidTypeError, "unknown option 'max_grad_nrom'; did you mean 'max_grad_norm'"),
        ({"batch_size_per_step": 4}, InvalidTypeError, "does not take 'batch_size_per_step': it is called batch_size"),
        ({"dht": 5}, InvalidTypeError, "dht must be a shoal.DHT, got 5"),
        ({"initial_peers": "/ip4/127.0.0.1/tcp/1"}, InvalidValueError, "initial_peers must not be given with dht"),
    ],
)  # fmt: skip
def test_wrong_options_are_named_at_once(strategy: Any, options: dict[str, Any], error: Any, message: str):
    with pytest.raises(error, match=message):
        strategy(**options)


@pytest.mark.sweep
@pytest.mark.timeout(240)
def test_the_program_of_the_page_runs(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "frameworks" / "lightning.md").read_text()
    [program] = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    script = tmp_path / "train.py"
    script.write_text(program)
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=230, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert "epoch 19: 1 peers, 256 samples" in ended.stdout
    assert "export SHOAL_INITIAL_PEERS=/ip4/" in ended.stderr


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"shoal.frameworks.{package}")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        importlib.import_module(f"shoal.frameworks.{package}")
