"""An optimizer whose update is that of a swarm: :class:`Optimizer`."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from shoal.averaging.trainer.control import StepControl
from shoal.compression import CompressionBase, NoCompression
from shoal.dht.dht import DHT
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.optim import epoch as rules
from shoal.optim.epoch import AfterFailedRound
from shoal.optim.epoch_end import EpochEnd
from shoal.optim.face import TorchFace
from shoal.optim.gradient_rounds import GradientRounds
from shoal.optim.gradients import GradientAverager, GradientAveragerFactory
from shoal.optim.options import checked
from shoal.optim.progress.tracker import ProgressTracker
from shoal.optim.progress.values import LocalTrainingProgress
from shoal.optim.report import EpochReport
from shoal.optim.state.averager import Scheduler, SchedulerFactory, TrainingStateAverager
from shoal.optim.state.holder import OptimizerFactory, Params, as_groups
from shoal.utils.checks import check_number
from shoal.utils.logging import get_logger
from shoal.utils.timed import get_dht_time

logger = get_logger(__name__)


class Optimizer(TorchFace):
    """Trains one model with all peers of a run: together they process ``target_batch_size`` samples, then all update.

    >>> opt = shoal.Optimizer(dht=dht, run_id="my_run", target_batch_size=4096, batch_size_per_step=32,
    ...                       optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    >>> for batch in batches:
    ...     opt.zero_grad()
    ...     loss(model(batch)).backward()
    ...     opt.step()

    An *epoch* is the time in which the swarm processes so many samples, and ends with one update. Learning rate and
    schedulers are those of the whole batch. The parameters are explained in docs/optimizer.md.

    :param dht: a running DHT
    :param run_id: name of the run; the same at all peers, as are the model, ``target_batch_size`` and the modes
    :param target_batch_size: samples of one epoch, of all peers together
    :param batch_size_per_step: samples of each :meth:`step`, unless that is told
    :param optimizer: an instance, or a callable that takes parameter groups
    :param params: parameters or groups of the model; needed with a callable
    :param scheduler: an instance, or a callable that takes the inner optimizer; it takes one step an epoch
    :param matchmaking_time: seconds before the expected end of an epoch at which a group is looked for
    :param averaging_timeout: seconds for one round, search included
    :param load_state_timeout: seconds for one download of the state
    :param reuse_grad_buffers: accumulate in ``param.grad``; nobody may clear or clip gradients then
    :param offload_optimizer: let the optimizer work on copies in float32 on the CPU
    :param delay_optimizer_step: let it work in the background
    :param delay_grad_averaging: average gradients in the background, too
    :param delay_state_averaging: average parameters in the background
    :param average_state_every: epochs between two rounds of parameters. One is left out if all members of the own
      gradient round had the same parameters.
    :param use_local_updates: update at each step by the own gradients, and average parameters alone
    :param auxiliary: process no batches, and help the others to average
    :param after_failed_round: "local": update by the own mean gradient; "skip": do not; "wait": try until a group has
      averaged. Not in hivemind, which updates by zeros.
    :param max_grad_norm: to which the norm of the averaged gradient is clipped; not in hivemind
    :raises InvalidValueError: arguments are out of range, or do not go together
    """

    def __init__(
        self,
        *,
        dht: DHT,
        run_id: str,
        target_batch_size: int,
        batch_size_per_step: int | None = None,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        params: Params | None = None,
        scheduler: Scheduler | SchedulerFactory | None = None,
        matchmaking_time: float = 15.0,
        averaging_timeout: float = 60.0,
        allreduce_timeout: float | None = None,
        next_chunk_timeout: float | None = None,
        load_state_timeout: float = 600.0,
        reuse_grad_buffers: bool = False,
        offload_optimizer: bool | None = None,
        delay_optimizer_step: bool | None = None,
        delay_grad_averaging: bool = False,
        delay_state_averaging: bool = True,
        average_state_every: int = 1,
        use_local_updates: bool = False,
        client_mode: bool | None = None,
        auxiliary: bool = False,
        grad_compression: CompressionBase = NoCompression(),
        grad_averager_factory: GradientAveragerFactory | None = None,
        state_averaging_compression: CompressionBase = NoCompression(),
        load_state_compression: CompressionBase = NoCompression(),
        average_opt_statistics: Sequence[str] = (),
        extra_tensors: Sequence[torch.Tensor] = (),
        averager_opts: Mapping[str, Any] | None = None,
        tracker_opts: Mapping[str, Any] | None = None,
        performance_ema_alpha: float = 0.1,
        shutdown_timeout: float = 5,
        verbose: bool = False,
        after_failed_round: AfterFailedRound = "local",
        max_grad_norm: float | None = None,
    ) -> None:
        params = None if params is None else as_groups(params)  # an iterator serves once
        given = locals().copy()
        self.options = options = checked(given)
        self._owner_pid = os.getpid()
        self._closed = False
        self._made = False
        self.dht, self.run_id = dht, run_id
        self.target_batch_size = options.target_batch_size
        self.batch_size_per_step = options.batch_size_per_step
        self.auxiliary, self.use_local_updates = options.auxiliary, options.use_local_updates
        self.client_mode = dht.client_mode if client_mode is None else client_mode
        self.status_loglevel = logging.INFO if verbose else logging.DEBUG
        self.scheduled_state: StepControl | None = None
        self.report: EpochReport | None = None
        """What happened in the last epoch; None before its end."""
        with contextlib.ExitStack() as made:
            self.state_averager = self._make_state_averager(given)
            made.callback(self.state_averager.shutdown)
            self.grad_averager = None if options.use_local_updates else self._make_gradient_averager(given)
            if self.grad_averager is not None:
                made.callback(self.grad_averager.shutdown)
            self.tracker = self._make_progress_tracker(given)
            made.pop_all()
        self._rounds = (
            None
            if self.grad_averager is None
            else GradientRounds(self.grad_averager, options.averaging_timeout, options.auxiliary)
        )
        super().__init__(self.state_averager.param_groups, copy.copy(self.state_averager.optimizer.defaults))
        self._made = True
        self._end = EpochEnd(self, self._rounds)
        self._samples = 0
        self._compare_exactly = True

    # making

    def _averager_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What both averagers get; ``averager_opts`` may set the times that follow from others."""
        return {
            "min_matchmaking_time": self.options.matchmaking_time,
            "allreduce_timeout": self.options.allreduce_timeout,
            "next_chunk_timeout": self.options.next_chunk_timeout,
            "shutdown_timeout": self.options.shutdown_timeout,
            "client_mode": self.client_mode,
            "auxiliary": self.auxiliary,
            "start": True,
            **(given["averager_opts"] or {}),
        }

    def _make_state_averager(self, given: Mapping[str, Any]) -> TrainingStateAverager:
        options = self._averager_options(given)
        if self.auxiliary:
            options.setdefault("allow_state_sharing", False)  # its parameters are not those of the swarm
        return TrainingStateAverager(
            dht=self.dht,
            prefix=f"{self.options.prefix}_state_averager",
            optimizer=given["optimizer"],
            params=given["params"],
            scheduler=given["scheduler"],
            offload_optimizer=self.options.offload_optimizer,
            custom_gradients=self.options.offload_optimizer and not self.use_local_updates,
            delta_rule_averaging=self.use_local_updates and self.options.delay_state_averaging,
            average_opt_statistics=given["average_opt_statistics"],
            extra_tensors=given["extra_tensors"],
            compression=given["state_averaging_compression"],
            state_compression=given["load_state_compression"],
            status_loglevel=self.status_loglevel,
            **options,
        )

    def _make_gradient_averager(self, given: Mapping[str, Any]) -> GradientAverager:
        factory = given["grad_averager_factory"] or GradientAverager
        made: GradientAverager = factory(
            cast("tuple[torch.nn.Parameter, ...]", self.state_averager.main_parameters),
            dht=self.dht,
            prefix=f"{self.options.prefix}_grad_averager",
            reuse_grad_buffers=self.options.reuse_grad_buffers,
            compression=given["grad_compression"],
            **self._averager_options(given),
        )
        return made

    def _make_progress_tracker(self, given: Mapping[str, Any]) -> ProgressTracker:
        return ProgressTracker(
            self.dht,
            f"{self.options.prefix}_progress",
            self.target_batch_size,
            client_mode=self.client_mode,
            performance_ema_alpha=given["performance_ema_alpha"],
            **{"status_loglevel": self.status_loglevel, "start": True, **(given["tracker_opts"] or {})},
        )

    # the step

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        batch_size: int | None = None,
        grad_scaler: Any = None,
    ) -> Any:
        """Take the gradients of one batch; end the epoch if the swarm has enough samples.

        :param closure: computes the loss and the gradients
        :param batch_size: samples of this step; None: ``batch_size_per_step``
        :param grad_scaler: of torch; gradients that are not unscaled yet are unscaled by it
        :returns: what the closure returns
        """
        self._check_open()
        batch_size = self._check_step(closure, batch_size, grad_scaler)
        if not self.state_averager.averaging_in_progress:
            self.state_averager.step()  # writes what was done in the background
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.auxiliary and self._must_reload():
            logger.log(self.status_loglevel, "%s: behind the swarm, the state is loaded", self.run_id)
            self.load_state_from_peers()
            return loss
        if self._take_batch(batch_size, grad_scaler):
            self._end.note_loss(loss, batch_size)
        while self.tracker.ready_to_update_epoch:
            if self._end.run():
                self._begin_epoch()
                break
            if self.tracker.global_epoch > self.local_epoch:
                self.load_state_from_peers()
                break
        else:
            self._prepare_rounds()
        return loss

    def _take_batch(self, batch_size: int, grad_scaler: Any) -> bool:
        """Whether the batch counts."""
        if self.auxiliary:
            return False
        if all(parameter.grad is None for parameter in self.state_averager.main_parameters):
            logger.warning(
                "%s: no parameter has a gradient: this step counts for nothing. Was backward() called? Were the "
                "model's parameters replaced, as load_state_dict(assign=True) does, after this optimizer was made?",
                self.run_id,
            )
            return False
        if grad_scaler is not None:
            self._unscale(grad_scaler)
        if self.grad_averager is not None:
            counts = self.grad_averager.accumulate_grads_(batch_size)
            self._samples = self.grad_averager.local_samples_accumulated
        else:
            counts = self._gradients_are_finite()
            if counts:
                self._samples += batch_size
                self.state_averager.step(optimizer_step=True)
        self.tracker.report_local_progress(self.local_epoch, self._samples)
        return counts

    def _unscale(self, grad_scaler: Any) -> None:
        try:
            grad_scaler.unscale_(self)
        except RuntimeError as e:
            if "already been called" not in str(
                e
            ):  # torch's scaler tells no other way that its user has done so
                raise

    def _gradients_are_finite(self) -> bool:
        grads = [p.grad for p in self.state_averager.main_parameters if p.grad is not None]
        if all(bool(torch.isfinite(grad).all()) for grad in grads):
            return True
        logger.warning("%s: gradients have NaN or infinity: this step makes no update", self.run_id)
        return False

    def _prepare_rounds(self) -> None:
        """Look for groups shortly before the end of the epoch; each round waits for it then."""
        end = self.tracker.estimated_next_update_time
        if self._is_alone() or not rules.is_near(end, get_dht_time(), self.options.matchmaking_time):
            return
        if self._rounds is not None:
            control = self._rounds.scheduled
            if control is None or control.done():
                self._rounds.prepare(end, self.local_epoch, self._end.digest())
        elif (self.scheduled_state is None or self.scheduled_state.done()) and self._end.state_round_due(
            rules.next_epoch(self.local_epoch, self.tracker.global_epoch)
        ):
            self.scheduled_state = self.state_averager.schedule_step(
                end, epoch=self.local_epoch + 1, timeout=self.options.averaging_timeout
            )

    def _begin_epoch(self) -> None:
        self.report = self._end.report
        self._samples = 0
        self._compare_exactly = True
        self._set_priority()

    # staying together

    def is_synchronized_with_peers(self) -> bool:
        """Whether the own epoch is that of the swarm, or the one before."""
        return not rules.lags(self.local_epoch, self.tracker.global_epoch, exact=False)

    def _must_reload(self) -> bool:
        exact = self._compare_exactly and self.tracker.fetched_global_progress_this_epoch.is_set()
        if exact:
            self._compare_exactly = False
        return rules.lags(self.local_epoch, self.tracker.global_epoch, exact)

    def load_state_from_peers(self, *, timeout: float | None = None, **options: Any) -> bool:
        """Load epoch, parameters and optimizer from another peer; samples of the own epoch are dropped.

        :param timeout: seconds; None: ``load_state_timeout``
        :returns: whether a state was loaded. A warning says why not; with no other peer there is nothing to load.
        """
        self._check_open()
        if self._rounds is not None:
            self._rounds.drop(others=not self._is_alone())
        if self.scheduled_state is not None:
            self.scheduled_state.cancel()
            self.scheduled_state = None
        limit = self.options.load_state_timeout if timeout is None else timeout
        with self.tracker.pause_updates():
            loaded = self.state_averager.load_state_from_peers(timeout=limit, **options) is not None
            global_epoch = self.tracker.global_epoch
            if loaded and self.local_epoch == global_epoch - 1:
                self.state_averager.local_epoch = global_epoch
            self._begin_anew()
        logger.log(
            self.status_loglevel,  # the averager has said why not
            "%s: %s at epoch %d",
            self.run_id, "loaded the state" if loaded else "no state was loaded", self.local_epoch,
        )  # fmt: skip
        return loaded

    def _is_alone(self) -> bool:
        return self.tracker.global_progress.num_peers <= 1

    # others

    @property
    def opt(self) -> torch.optim.Optimizer:
        """The inner optimizer."""
        return self.state_averager.optimizer

    @property
    def local_progress(self) -> LocalTrainingProgress:
        """What this peer has reported."""
        return self.tracker.local_progress

    @property
    def use_gradient_averaging(self) -> bool:
        """Whether gradients are averaged."""
        return self.grad_averager is not None

    @property
    def scheduled_grads(self) -> StepControl | None:
        """The gradient round that is prepared."""
        return None if self._rounds is None else self._rounds.scheduled

    def is_alive(self) -> bool:
        """Whether it can be used."""
        return not self._closed and self.state_averager.is_alive()

    def shutdown(self) -> None:
        """Withdraw this peer's progress, finish delayed work, and end the averagers; the DHT goes on. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as parts:  # in reverse order, and all of them, even if one fails
            parts.callback(self.state_averager.shutdown)
            if self.grad_averager is not None:
                parts.callback(self.grad_averager.shutdown)
            if self._rounds is not None and self.grad_averager is not None and self.grad_averager.is_alive():
                parts.callback(self._rounds.drop, others=False)
            if self.scheduled_state is not None:
                parts.callback(self.scheduled_state.cancel)
            if self.state_averager.is_alive():
                parts.callback(self.state_averager.step, wait_for_delayed_updates=True)
            parts.callback(self.tracker.shutdown, self.options.shutdown_timeout)

    def __del__(self) -> None:
        if getattr(self, "_made", False) and os.getpid() == self._owner_pid:
            with contextlib.suppress(Exception):
                self.shutdown()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(run_id={self.run_id!r}, local_epoch={self.local_epoch}, opt={self.opt!r})"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidStateError("the optimizer was shut down: make another one")

    def _check_step(self, closure: Any, batch_size: int | None, grad_scaler: Any) -> int:
        if self.auxiliary:
            if closure is not None or batch_size is not None or grad_scaler is not None:
                raise InvalidValueError(
                    "step() must have no arguments with auxiliary: it processes no batches"
                )
            return 0
        if closure is not None and not callable(closure):
            raise InvalidTypeError(f"closure must be callable or None, got {closure!r}")
        if grad_scaler is not None and not hasattr(grad_scaler, "unscale_"):
            raise InvalidTypeError(f"grad_scaler must be a torch.amp.GradScaler, got {grad_scaler!r}")
        if batch_size is None:
            batch_size = self.batch_size_per_step
        if batch_size is None:
            raise InvalidValueError(
                "batch_size must be given to step(), or batch_size_per_step to the optimizer"
            )
        return int(check_number("batch_size", batch_size, minimum=1))
