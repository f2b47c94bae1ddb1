"""One model and its optimizer among many: :class:`TrainingStateAverager`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from shoal.averaging.trainer.averager import DecentralizedAverager
from shoal.averaging.trainer.control import StepControl
from shoal.compression import CompressionInfo, TensorRole
from shoal.dht.dht import DHT
from shoal.errors import InvalidValueError, ShoalError
from shoal.optim.grad_scaler import GradScaler
from shoal.optim.state.carried import Carried
from shoal.optim.state.holder import OptimizerFactory, OptimizerHolder, Params
from shoal.optim.state.packing import pack
from shoal.optim.state.rates import Rates, Scheduler, SchedulerFactory
from shoal.optim.waiting import cancelled_in_vain
from shoal.utils.checks import check_flag
from shoal.utils.logging import get_logger
from shoal.utils.timed import steady_time

logger = get_logger(__name__)


class TrainingStateAverager(DecentralizedAverager):
    """Holds an optimizer and a scheduler, averages what they work on, and shares it with peers that join.

    A round averages the parameters that require grad, then the statistics of the optimizer that
    ``average_opt_statistics`` names, then the floating ``extra_tensors``. Integers among these (BatchNorm's counters)
    become the largest of all members in a round. What training adds to tensors while a round runs is kept.

    Averages and delayed steps are written by :meth:`step`, on its caller's thread, and never in between.

    :param optimizer: an instance, or a callable that takes parameter groups
    :param params: parameters or groups of the model; needed with a callable
    :param scheduler: an instance, or a callable that takes the inner optimizer; it follows :attr:`local_epoch`
    :param initialize_optimizer: make the optimizer's state, without a step; None: if it has no tensor yet
    :param offload_optimizer: let the optimizer work on copies in float32 on the CPU, which are averaged; needs a
      callable
    :param custom_gradients: the caller fills :attr:`offloaded_gradients`; needs ``offload_optimizer``
    :param reuse_tensors: the optimizer's own tensors are always the averaged ones; False is an error
    :param delta_rule_averaging: let optimizer steps run beside a round; otherwise they wait for its end
    :param sync_epoch_when_averaging: after a round the own epoch is at least the highest of the group
    :param parameter_names: keys of the parameters, by which codecs choose; the parameters that require grad, in order
    :param average_opt_statistics: names of statistics to average, such as "exp_avg_sq"
    :param extra_tensors: averaged and shared with the state
    :param status_loglevel: level of the lines that say what goes well
    :param averager: as of :class:`~shoal.DecentralizedAverager`
    """

    def __init__(
        self,
        *,
        dht: DHT,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        params: Params | None = None,
        scheduler: Scheduler | SchedulerFactory | None = None,
        initialize_optimizer: bool | None = None,
        offload_optimizer: bool = False,
        custom_gradients: bool = False,
        reuse_tensors: bool | None = None,
        delta_rule_averaging: bool = False,
        sync_epoch_when_averaging: bool = False,
        parameter_names: Sequence[str] | None = None,
        average_opt_statistics: Sequence[str] = (),
        extra_tensors: Sequence[torch.Tensor] = (),
        status_loglevel: int = logging.DEBUG,
        **averager: Any,
    ) -> None:
        self.offload_optimizer = check_flag("offload_optimizer", offload_optimizer)
        self.custom_gradients = check_flag("custom_gradients", custom_gradients)
        self.delta_rule_averaging = check_flag("delta_rule_averaging", delta_rule_averaging)
        self.sync_epoch_when_averaging = check_flag("sync_epoch_when_averaging", sync_epoch_when_averaging)
        self.status_loglevel = status_loglevel
        if self.custom_gradients and not self.offload_optimizer:
            raise InvalidValueError("custom_gradients must be False without offload_optimizer, got True")
        if reuse_tensors is False:
            raise InvalidValueError(
                "reuse_tensors must be None or True, got False: a round copies what it needs by itself"
            )
        self.holder = OptimizerHolder(optimizer, params, self.offload_optimizer, initialize_optimizer)
        self._rates = Rates(self.holder, scheduler)
        self.average_opt_statistics = tuple(average_opt_statistics)
        self.carried = Carried(extra_tensors)
        self.parameter_names = _check_names(parameter_names, len(self.holder.parameters))
        self.local_epoch = 0
        self.rewritten = 0
        """How often something else than a step of the optimizer on the caller's thread has changed the tensors."""
        self.others_are_gone: Callable[[], bool] = lambda: False
        """Whether nobody can come to a round any more: then no group is looked for any longer."""
        self._pending: Future[None] | None = None
        self._round_is_to_be_applied = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="shoal-training-state")
        averager.setdefault("tensor_infos", self._infos())
        super().__init__(self._averaged, dht, apply_when="called", **averager)

    # what it holds

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The inner optimizer."""
        return self.holder.optimizer

    @property
    def scheduler(self) -> Scheduler | None:
        """It follows :attr:`local_epoch`."""
        return self._rates.scheduler

    @property
    def main_parameters(self) -> tuple[torch.Tensor, ...]:
        """The model's parameters that are averaged."""
        return self.holder.model_parameters

    @property
    def offloaded_gradients(self) -> tuple[torch.Tensor, ...]:
        """The gradients of the offloaded parameters, for ``custom_gradients``; the same tensors for life."""
        return self.holder.gradients

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with the model's parameters. Hyperparameters that are set in them count in the next step."""
        return self.holder.param_groups

    @property
    def extra_tensors(self) -> tuple[torch.Tensor, ...]:
        """As given."""
        return self.carried.tensors

    @property
    def averaging_in_progress(self) -> bool:
        """Whether delayed work is under way."""
        return self._pending is not None and not self._pending.done()

    # steps

    def step(  # type: ignore[override] # hivemind's parameters
        self,
        wait_for_delayed_updates: bool | None = None,
        apply_delayed_updates: bool = True,
        increment_epoch: bool = False,
        optimizer_step: bool = False,
        zero_grad: bool = False,
        delay_optimizer_step: bool = False,
        averaging_round: bool = False,
        delay_averaging: bool | None = None,
        averaging_control: StepControl | None = None,
        wait_for_trigger: Callable[[], Any] | None = None,
        grad_scaler: Any = None,
        set_to_none: bool = True,
        averaging_opts: Mapping[str, Any] | None = None,
    ) -> None:
        """Do what is asked for, in the order of the parameters.

        :param wait_for_delayed_updates: wait for delayed work of earlier calls; None: if the new work needs it
        :param apply_delayed_updates: write finished delayed work into the model
        :param delay_optimizer_step: run the optimizer in the background; needs ``offload_optimizer``
        :param delay_averaging: run the round in the background; None: as ``delay_optimizer_step``
        :param averaging_control: of :meth:`schedule_step`
        :param wait_for_trigger: called before the optimizer's step. If it raises, neither step nor round takes place,
          with a warning; the epoch counts.
        :param grad_scaler: calls the optimizer's step; not with ``delay_optimizer_step``
        :param averaging_opts: more arguments of the round, such as ``timeout`` and ``weight``
        :raises Exception: whatever an earlier delayed optimizer step has raised
        """
        delay_averaging = delay_optimizer_step if delay_averaging is None else delay_averaging
        self._check_step(
            optimizer_step,
            delay_optimizer_step,
            averaging_round,
            averaging_control,
            averaging_opts,
            grad_scaler,
        )
        needs_idle = (
            averaging_round or delay_optimizer_step or (optimizer_step and not self.delta_rule_averaging)
        )
        if needs_idle if wait_for_delayed_updates is None else wait_for_delayed_updates:
            self._wait_for_pending()
        if not self.averaging_in_progress:
            self._take_over(apply_delayed_updates)
        self.local_epoch += bool(increment_epoch)
        if optimizer_step:
            self.holder.hyperparameters_from_model()

        def update() -> bool:
            if not self._triggered(wait_for_trigger, averaging_control):
                return False
            self._update(optimizer_step, zero_grad, set_to_none, grad_scaler)
            return True

        def average() -> None:
            if averaging_round:
                self._average(averaging_control, dict(averaging_opts or {}))

        if delay_optimizer_step:
            self._pending = self._worker.submit(lambda: average() if update() else None)
        elif update():
            self._rates.publish()
            if optimizer_step:
                self.holder.parameters_to_model()
            if delay_averaging and averaging_round:
                self._pending = self._worker.submit(average)
            else:
                average()
                self._apply_round()

    def schedule_step(
        self, scheduled_time: float | None = None, *, epoch: int | None = None, **options: Any
    ) -> StepControl:
        """Begin to look for a group for a later round, to whose :meth:`step` the control is given.

        :param epoch: that in which the round will take place, which the members tell each other; None: the own one now
        """
        told = {"epoch": self.local_epoch if epoch is None else epoch, "integers": self.carried.integers()}
        control = super().step(
            scheduled_time=scheduled_time, wait=False, require_trigger=True, gather=told, **options
        )
        assert isinstance(control, StepControl)
        return control

    def _update(self, optimizer_step: bool, zero_grad: bool, set_to_none: bool, grad_scaler: Any) -> None:
        with self.get_tensors():  # a peer that downloads the state finds all of it before or after the step
            if optimizer_step:
                self.holder.follow_parameters()
                self.holder.load_gradients(self.custom_gradients)
                scaled = (
                    grad_scaler.running_global_step if isinstance(grad_scaler, GradScaler) else nullcontext
                )
                with scaled():
                    self.optimizer.step() if grad_scaler is None else grad_scaler.step(self.optimizer)
            if zero_grad:
                self.optimizer.zero_grad(set_to_none=set_to_none)
            self._rates.follow(self.local_epoch)

    def _triggered(self, wait_for_trigger: Callable[[], Any] | None, control: StepControl | None) -> bool:
        try:
            if wait_for_trigger is not None:
                wait_for_trigger()
        except Exception as e:  # noqa: BLE001 - the trigger is the caller's, and may fail for any reason
            logger.warning(
                "%s: no step and no round in this epoch: %s", self.prefix, str(e) or type(e).__name__
            )
            if control is not None:
                control.cancel()
            return False
        return True

    def _average(self, control: StepControl | None, options: dict[str, Any]) -> None:
        """One round, until its average waits to be written; a failure is said by the averager."""
        timeout = options.get("timeout")
        if control is None:
            control = self.schedule_step(**options)
        elif "weight" in options:
            control.weight = options["weight"]
        control.allow_allreduce()
        deadline = math.inf if timeout is None else steady_time() + timeout
        try:
            if cancelled_in_vain(control, deadline, self.others_are_gone):
                logger.log(
                    self.status_loglevel, "%s: no average of the state: all others are gone", self.prefix
                )
                return
            gathered = control.result(None if timeout is None else max(0.0, deadline - steady_time()))
        except TimeoutError:
            if control.cancel():
                logger.warning("%s: no average of the state within %s s", self.prefix, timeout)
                return
            gathered = self._bound_result(control)
        except (ShoalError, CancelledError):
            return
        except BaseException:
            control.cancel()
            raise
        if gathered is not None:
            self._note(gathered)

    @staticmethod
    def _bound_result(control: StepControl) -> Any:
        """That of a step which could not be cancelled: its outcome is about to follow."""
        try:
            return control.result()
        except (ShoalError, CancelledError):
            return None

    def _note(self, gathered: Mapping[Any, Any]) -> None:
        told = [entry for entry in gathered.values() if isinstance(entry, Mapping)]
        self.carried.note([entry.get("integers") for entry in told])
        self._round_is_to_be_applied = True
        epochs = [entry["epoch"] for entry in told if isinstance(entry.get("epoch"), int)]
        if self.sync_epoch_when_averaging and epochs:
            self.local_epoch = max(self.local_epoch, *epochs)
            self._rates.follow(self.local_epoch)
        logger.log(self.status_loglevel, "%s: averaged the state with %d peers", self.prefix, len(gathered))

    # delayed work

    def finish_delayed(self) -> None:
        """Wait for delayed work, and write it into the model.

        :raises Exception: whatever a delayed optimizer step has raised
        """
        self._wait_for_pending()
        self._apply_pending()

    def _wait_for_pending(self) -> None:
        if self._pending is not None:
            self._pending.exception()

    def _take_over(self, apply_delayed_updates: bool) -> None:
        """Delayed work has ended: its rates hold in any case."""
        if apply_delayed_updates:
            self._apply_pending()
        self._rates.publish()

    def _apply_pending(self) -> None:
        pending, self._pending = self._pending, None
        self._apply_round()
        if pending is not None:
            self.holder.parameters_to_model()
            self.rewritten += 1
            pending.result()  # raises what went wrong

    def _apply_round(self) -> None:
        if self.is_alive() and self.apply_late_average():  # of a round in doubt, which others have committed
            self.holder.parameters_to_model()
            self.rewritten += 1
        if self._round_is_to_be_applied:
            self._round_is_to_be_applied = False
            self.apply_average()
            self.carried.apply()
            self.holder.parameters_to_model()
            self.rewritten += 1
        self._rates.publish()

    # the shared state

    def get_current_state(self) -> tuple[Any, Sequence[torch.Tensor]]:
        """Epoch, group bits and the optimizer's values; parameters, extra tensors and the optimizer's tensors."""
        with self.get_tensors():
            own = [*self.holder.parameters, *self.extra_tensors]
            of_optimizer: list[torch.Tensor] = []
            metadata = {
                "epoch": self.local_epoch,
                "group_bits": self.get_group_bits() if self.is_alive() else "",
                "optimizer_metadata": pack(self.optimizer.state_dict(), of_optimizer),
            }
            return metadata, [*own, *of_optimizer]

    def load_state_from_peers(  # type: ignore[override] # it also writes the state
        self, wait: bool = True, timeout: float | None = None, *, progress: bool = False
    ) -> tuple[Any, Sequence[torch.Tensor]] | None:
        """Load the epoch, parameters, extra tensors and optimizer of a peer, once delayed work has ended.

        :param wait: must be True
        :param timeout: seconds for the download
        :returns: what was loaded; None, after a warning that says why, if nothing was
        """
        if not wait:
            raise InvalidValueError(
                "wait must be True: the state is written by the calling thread, got False"
            )
        self.finish_delayed()
        loaded = super().load_state_from_peers(timeout=timeout, progress=progress)
        if loaded is None:
            return None
        reason = self._load(loaded[0], loaded[1])
        if reason is not None:
            logger.warning("%s: the state of a peer was not loaded: %s", self.prefix, reason)
            return None
        return loaded[0], loaded[1]

    def _load(self, metadata: Any, tensors: Sequence[torch.Tensor]) -> str | None:
        """Why it can't be loaded; None: it was."""
        epoch = metadata.get("epoch") if isinstance(metadata, Mapping) else None
        if not isinstance(epoch, int):
            return "it has no epoch"
        if epoch < self.local_epoch:
            return f"its epoch is {epoch}, which is below the own {self.local_epoch}"
        try:
            with self.get_tensors():
                self.holder.load_shared(metadata.get("optimizer_metadata"), tensors, self.extra_tensors)
        except InvalidValueError as e:
            return str(e)
        self.drop_late_average()
        self.local_epoch = epoch
        self._rates.count_to(epoch)
        self.holder.parameters_to_model()
        self.rewritten += 1
        return None

    def shutdown(self) -> None:
        """As of the averager. A round that is under way fails; what a delayed step has raised is said."""
        super().shutdown()
        self._worker.shutdown(wait=False, cancel_futures=True)
        pending, self._pending = self._pending, None
        if (
            pending is not None
            and pending.done()
            and not pending.cancelled()
            and pending.exception() is not None
        ):
            logger.error("%s: a delayed step has failed", self.prefix, exc_info=pending.exception())

    # making

    def _averaged(self) -> dict[str, torch.Tensor]:
        named = dict(zip(self.parameter_names, self.holder.parameters, strict=True))
        named.update(self.holder.statistics(self.average_opt_statistics))
        named.update((f"extra.{i}", tensor) for i, tensor in enumerate(self.carried.floating))
        return named

    def _infos(self) -> list[CompressionInfo]:
        count = len(self.parameter_names)
        roles = dict.fromkeys(range(count), TensorRole.PARAMETER)
        return [
            CompressionInfo.from_tensor(tensor, name, roles.get(index, TensorRole.OPTIMIZER))
            for index, (name, tensor) in enumerate(self._averaged().items())
        ]

    def _check_step(
        self,
        optimizer_step: bool,
        delay_optimizer_step: bool,
        averaging_round: bool,
        control: StepControl | None,
        options: Mapping[str, Any] | None,
        grad_scaler: Any,
    ) -> None:
        if delay_optimizer_step and not (self.offload_optimizer and optimizer_step):
            raise InvalidValueError(
                "delay_optimizer_step must be False without optimizer_step and offload_optimizer, got True"
            )
        if grad_scaler is not None and delay_optimizer_step:
            raise InvalidValueError(
                f"grad_scaler must be None with delay_optimizer_step, got {grad_scaler!r}"
            )
        if not averaging_round and (control is not None or options is not None):
            raise InvalidValueError(
                f"averaging_control and averaging_opts must be None without averaging_round, got {control or options}"
            )


def _check_names(names: Iterable[str] | None, count: int) -> tuple[str, ...]:
    given = tuple(f"parameter.{i}" for i in range(count)) if names is None else tuple(names)
    if len(set(given)) != count:
        raise InvalidValueError(
            f"parameter_names must have one name for each of {count} parameters that require grad, got {given}"
        )
    return given
