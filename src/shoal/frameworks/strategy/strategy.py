"""The strategy itself: :class:`SwarmStrategy`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from shoal.dht.dht import DHT
from shoal.errors import InvalidStateError, InvalidValueError
from shoal.frameworks.strategy import options as checks
from shoal.frameworks.strategy.optimizers import StrategyOptimizer, check_scheduler, join
from shoal.frameworks.strategy.samples import SampleCount
from shoal.optim.state.rates import SchedulerFactory
from shoal.utils.checks import check_number
from shoal.utils.logging import get_logger

if TYPE_CHECKING:
    from lightning.pytorch.strategies import SingleDeviceStrategy as Base
else:
    Base = object

logger = get_logger(__name__)

NEVER = sys.maxsize
"""Lightning moves a scheduler each time that a count of batches or epochs is divisible by its frequency."""
_ALL_INTERFACES = ("/ip4/0.0.0.0/tcp/0",)
_OF_THE_OPTIMIZER = ("load_state_dict", "load_state_from_peers", "shutdown")
"""Methods that change the optimizer: Lightning's wrapper would run them on itself."""


class SwarmStrategy(Base):
    """Trains a module with all peers of a run, on one device of this machine: ``Trainer(strategy=ShoalStrategy(...))``.

    It has the parameters of lightning-Hivemind's strategy; docs/frameworks/lightning.md explains them.

    :param target_batch_size: samples of one epoch of the swarm, of all peers together
    :param run_id: name of the run, the same at all peers
    :param batch_size: samples of each batch; None: the first dimension of the first tensor in it
    :param delay_state_averaging: average parameters in the background
    :param delay_optimizer_step: let the optimizer work in the background; None: as ``delay_grad_averaging``
    :param delay_grad_averaging: average gradients in the background
    :param offload_optimizer: let the optimizer work on copies in float32 on the CPU; None: if anything is delayed
    :param reuse_grad_buffers: accumulate in ``param.grad``
    :param scheduler_fn: makes a scheduler for the optimizer that it is given; instead of schedulers of the module
    :param matchmaking_time: seconds before the expected end of an epoch at which a group is looked for
    :param averaging_timeout: seconds for one round, search included
    :param verbose: log a line for each epoch of the swarm
    :param averager_opts: more arguments of the averagers
    :param host_maddrs: where to listen; None: all interfaces
    :param initial_peers: addresses of peers, as a list or as one text with commas; None: those of the environment
      variable SHOAL_INITIAL_PEERS or else PL_INITIAL_PEERS; without any, a new swarm begins
    :param use_ipfs: of no effect, with a warning, as in :class:`~shoal.DHT`; so are use_relay and use_auto_relay
    :param wait_timeout: seconds for one call to a peer; None: that of :class:`~shoal.DHT`
    :param bootstrap_timeout: for how many seconds the initial peers are retried
    :param identity_path: file with the key of this peer
    :param dht: a running DHT instead of the last eight parameters; it stays when training ends
    :param stop_at_epoch: end training when this peer has reached that epoch of the swarm
    :param accelerator: as of Lightning's strategies, like the next two
    :param optimizer_kwargs: more arguments of :class:`~shoal.Optimizer`, such as ``max_grad_norm``
    :raises InvalidTypeError: an argument is unknown; :raises InvalidValueError: one is out of range
    """

    strategy_name = "shoal"
    _module_class: ClassVar[Any]
    _scheduler_config: ClassVar[Any]

    def __init__(
        self,
        target_batch_size: int,
        run_id: str = "lightning_run",
        batch_size: int | None = None,
        delay_state_averaging: bool = False,
        delay_optimizer_step: bool | None = None,
        delay_grad_averaging: bool = False,
        offload_optimizer: bool | None = None,
        reuse_grad_buffers: bool = False,
        scheduler_fn: SchedulerFactory | None = None,
        matchmaking_time: float = 5.0,
        averaging_timeout: float = 30.0,
        verbose: bool = False,
        averager_opts: Mapping[str, Any] | None = None,
        host_maddrs: Sequence[Any] | str | None = None,
        initial_peers: Sequence[Any] | str | None = None,
        use_ipfs: bool | None = None,
        wait_timeout: float | None = None,
        bootstrap_timeout: float | None = None,
        use_relay: bool | None = None,
        use_auto_relay: bool | None = None,
        identity_path: str | os.PathLike[str] | None = None,
        *,
        dht: DHT | None = None,
        stop_at_epoch: int | None = None,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        **optimizer_kwargs: Any,
    ) -> None:
        super().__init__("cpu", accelerator, checkpoint_io, precision_plugin)
        counts = {
            "target_batch_size": target_batch_size, "batch_size": batch_size, "stop_at_epoch": stop_at_epoch,
        }  # fmt: skip
        for name, count in counts.items():
            if count is not None:
                check_number(name, count, minimum=1)
        checks.check_optimizer_options(optimizer_kwargs)
        self._dht_options: dict[str, Any] = {
            "host_maddrs": host_maddrs,
            "initial_peers": initial_peers,
            "use_ipfs": use_ipfs,
            "wait_timeout": wait_timeout,
            "bootstrap_timeout": bootstrap_timeout,
            "use_relay": use_relay,
            "use_auto_relay": use_auto_relay,
            "identity_path": identity_path,
        }
        checks.check_dht(dht, self._dht_options)
        delayed = delay_grad_averaging or bool(delay_optimizer_step)
        self._optimizer_options: dict[str, Any] = {
            "target_batch_size": target_batch_size,
            "run_id": run_id,
            "delay_state_averaging": delay_state_averaging,
            "delay_optimizer_step": delay_optimizer_step,
            "delay_grad_averaging": delay_grad_averaging,
            "offload_optimizer": delayed if offload_optimizer is None else offload_optimizer,
            "reuse_grad_buffers": reuse_grad_buffers,
            "matchmaking_time": matchmaking_time,
            "averaging_timeout": averaging_timeout,
            "verbose": verbose,
            "averager_opts": averager_opts,
            **optimizer_kwargs,
        }
        self._scheduler_fn = scheduler_fn
        self._stop_at_epoch = stop_at_epoch
        self._given_dht = dht
        self._made_dht: DHT | None = None
        self._swarm: StrategyOptimizer | None = None
        self._trainer: Any = None
        self._count = SampleCount(batch_size)
        self._leaving = contextlib.ExitStack()

    # what it holds

    @property
    def optimizer(self) -> StrategyOptimizer:
        """The swarm's optimizer, from the setup of a fit on; after the fit it is shut down.

        :raises InvalidStateError: nothing was fitted
        """
        if self._swarm is None:
            raise InvalidStateError("optimizer must be used after the setup of Trainer.fit(), which makes it")
        return self._swarm

    @property
    def dht(self) -> DHT:
        """The DHT of this peer, while a fit runs.

        :raises InvalidStateError: there is none
        """
        dht = self._given_dht or self._made_dht
        if dht is None:
            raise InvalidStateError("dht must be used while Trainer.fit() runs, which makes it")
        return dht

    @property
    def num_peers(self) -> int:
        """Peers of the swarm, this one included, as far as is known; 1 before a fit."""
        return 1 if self._swarm is None else max(1, self._swarm.tracker.global_progress.num_peers)

    @property
    def local_epoch(self) -> int:
        """The swarm's epoch that this peer is in: the count of its updates."""
        return 0 if self._swarm is None else self._swarm.local_epoch

    # devices: Lightning sets those that it has chosen

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Always empty: another Trainer chooses anew."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise InvalidValueError(
                f"devices must be 1 with ShoalStrategy, got {len(devices)}: start a program for each device, "
                "and each is a peer"
            )
        self._root_device = torch.device(devices[0])

    @property
    def num_nodes(self) -> int:
        """Machines of one Trainer."""
        return 1

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        if count != 1:
            raise InvalidValueError(
                f"num_nodes must be 1 with ShoalStrategy, got {count}: start the program on each machine, "
                "and each is a peer"
            )

    # joining and leaving

    def setup_optimizers(self, trainer: Any) -> None:
        """Ask the module for its optimizer and schedulers.

        :raises InvalidValueError: they, or options of the Trainer, do not fit a swarm
        """
        super().setup_optimizers(trainer)
        module = self.lightning_module
        assert module is not None
        count = sum(
            bool(optimizer.state_dict()) for optimizer in self.optimizers
        )  # Lightning's for None has none
        if count != 1:
            raise InvalidValueError(f"configure_optimizers must return one optimizer, got {count}")
        for config in self.lr_scheduler_configs:
            check_scheduler(config.scheduler)
        if type(module).lr_scheduler_step is not self._module_class.lr_scheduler_step:
            raise InvalidValueError(
                "lr_scheduler_step must not be overridden: schedulers move by themselves, with the swarm's epoch"
            )
        if self.lr_scheduler_configs and self._scheduler_fn is not None:
            raise InvalidValueError("scheduler_fn must be None if configure_optimizers returns schedulers")
        if self.lr_scheduler_configs and not module.automatic_optimization:
            raise InvalidValueError(
                "configure_optimizers must return no scheduler with manual optimization: it moves by itself, with "
                "the swarm's epoch, so give it as scheduler_fn"
            )
        if self._optimizer_options["reuse_grad_buffers"]:
            self._check_reuse(trainer)

    def _check_reuse(self, trainer: Any) -> None:
        if trainer.gradient_clip_val:
            raise InvalidValueError(
                "gradient_clip_val must be None with reuse_grad_buffers, which sums in param.grad: give max_grad_norm "
                "to ShoalStrategy"
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise InvalidValueError(
                "reuse_grad_buffers must be False with precision='16-mixed', which scales gradients; or use "
                "'bf16-mixed'"
            )

    def setup(self, trainer: Any) -> None:
        """Set up the model and, to fit it, become a peer."""
        super().setup(trainer)
        if trainer.state.fn.value == "fit":
            self._join(trainer)

    def _join(self, trainer: Any) -> None:
        [configured] = self.optimizers
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        self._trainer = trainer
        self._swarm = None
        self._make_dht()
        self._swarm = swarm = join(
            self.dht, configured, schedulers, self._scheduler_fn, self._optimizer_options
        )
        self._leaving.callback(swarm.shutdown)
        if swarm.options.reuse_grad_buffers:
            self._keep_gradients()
        self.optimizers = [swarm]
        [wrapper] = self._lightning_optimizers
        for name in _OF_THE_OPTIMIZER:
            setattr(wrapper, name, getattr(swarm, name))
        if self._scheduler_fn is not None:
            self.lr_scheduler_configs = [self._scheduler_config(swarm.state_averager.scheduler)]
        self.lr_scheduler_configs = [
            dataclasses.replace(config, frequency=NEVER) for config in self.lr_scheduler_configs
        ]

    def _make_dht(self) -> None:
        if self._given_dht is not None:
            return
        given = {name: value for name, value in self._dht_options.items() if value is not None}
        given.setdefault("host_maddrs", _ALL_INTERFACES)
        given["initial_peers"] = checks.find_initial_peers(given.get("initial_peers"), os.environ)
        self._made_dht = made = DHT(start=True, **given)

        def end() -> None:
            self._made_dht = None
            made.shutdown()

        self._leaving.callback(end)
        addresses = ",".join(str(address) for address in made.get_visible_maddrs())
        if addresses:
            logger.info("others join this run with\n  export SHOAL_INITIAL_PEERS=%s", addresses)
        else:
            logger.info("this peer is a client: others join this run by the addresses of its other peers")

    def _keep_gradients(self) -> None:
        """Validation clears the gradients of the module, which are sums over the epoch."""
        module = self.lightning_module
        assert module is not None
        module.on_validation_model_zero_grad = lambda: None  # type: ignore[method-assign]
        self._leaving.callback(delattr, module, "on_validation_model_zero_grad")

    def on_train_start(self) -> None:
        """Begin where the others are."""
        super().on_train_start()
        if self.dht.initial_peers or self._given_dht is not None:
            self.optimizer.load_state_from_peers()

    def on_exception(self, exception: BaseException) -> None:
        """Leave the swarm: what follows may fail."""
        super().on_exception(exception)
        self._leaving.close()

    def teardown(self) -> None:
        """Leave the swarm, and end all that was started."""
        try:
            self._leaving.close()
        finally:
            super().teardown()

    # training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count the samples."""
        module, trainer = self.lightning_module, self._trainer
        assert module is not None
        anew = module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0
        self._count.begin_batch(batch, anew)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's, and log what the swarm does."""
        output = super().training_step(*args, **kwargs)
        if not self._trainer.barebones:
            self._log_swarm()
        return output

    def _log_swarm(self) -> None:
        progress, report = self.optimizer.tracker.global_progress, self.optimizer.report
        values: dict[str, Any] = {
            "swarm/epoch": self.optimizer.local_epoch,
            "swarm/peers": self.num_peers,
            "swarm/samples": progress.samples_accumulated,
        }
        if report is not None:
            values |= {
                f"swarm/last/{name}": value
                for name, value in report.to_dict().items()
                if isinstance(value, int | float)
            }
        assert self.lightning_module is not None
        self.lightning_module.log_dict(
            {name: float(value) for name, value in values.items()}, on_step=True, on_epoch=False
        )

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Take the gradients of the batches since the last step into the swarm's epoch.

        :param kwargs: of ``shoal.Optimizer.step``; ``batch_size`` counts if it is given
        """
        kwargs.setdefault("batch_size", self._count.take())
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._stop_at_epoch is not None and self.local_epoch >= self._stop_at_epoch:
            self._trainer.should_stop = True
        return result

    # checkpoints

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load epoch and optimizer; of a run without a swarm, the optimizer alone."""
        [saved] = checkpoint["optimizer_states"]
        state: Mapping[str, Any] = saved["state"]
        if "local_epoch" not in state:
            logger.warning("the checkpoint is of a run without a swarm: its optimizer begins at epoch 0")
            saved = {**saved, "state": {**state, "local_epoch": 0}}
        self.optimizer.load_state_dict(saved)
