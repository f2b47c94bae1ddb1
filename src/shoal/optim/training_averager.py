"""A trainer's tensors, averaged whenever it likes: :class:`TrainingAverager`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch

from shoal.averaging.trainer.averager import DecentralizedAverager
from shoal.averaging.trainer.control import StepControl
from shoal.dht.dht import DHT
from shoal.errors import InvalidTypeError, InvalidValueError, ShoalError
from shoal.optim.state.holder import OptimizerHolder
from shoal.optim.state.packing import pack
from shoal.p2p.identity import PeerID
from shoal.utils.checks import check_flag
from shoal.utils.logging import get_logger

logger = get_logger(__name__)


class TrainingAverager(DecentralizedAverager):
    """Averages an optimizer's parameters, gradients or statistics with other peers, in place.

    What training adds to them while a round runs is kept.

    :param opt: a torch optimizer
    :param average_parameters: average the parameters that require grad
    :param average_gradients: average their gradients; zeros where there is none
    :param average_opt_statistics: names of statistics to average, such as "exp_avg_sq"
    :param extra_tensors: averaged, and shared with the state
    :param parameter_names: of the parameters that require grad, in order; for errors
    :param initialize_optimizer: make the optimizer's state, without a step, if it has no tensor yet
    :param averager: as of :class:`~shoal.DecentralizedAverager`
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        *,
        dht: DHT,
        average_parameters: bool,
        average_gradients: bool,
        average_opt_statistics: Sequence[str] = (),
        extra_tensors: Sequence[torch.Tensor] = (),
        parameter_names: Sequence[str] | None = None,
        initialize_optimizer: bool = True,
        **averager: Any,
    ) -> None:
        if not isinstance(opt, torch.optim.Optimizer):
            raise InvalidTypeError(f"opt must be a torch optimizer, got {type(opt).__name__}")
        initialize = None if check_flag("initialize_optimizer", initialize_optimizer) else False
        self.holder = OptimizerHolder(opt, None, False, initialize)
        self.average_parameters = check_flag("average_parameters", average_parameters)
        self.average_gradients = check_flag("average_gradients", average_gradients)
        self.average_opt_statistics = tuple(average_opt_statistics)
        self.extra_tensors = tuple(extra_tensors)
        count = len(self.holder.parameters)
        self.parameter_names = tuple(parameter_names or (f"parameter.{i}" for i in range(count)))
        if len(set(self.parameter_names)) != count:
            raise InvalidValueError(
                f"parameter_names must have one name for each of {count} parameters, got {self.parameter_names}"
            )
        self.local_step = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="shoal-training-averager")
        super().__init__(self._averaged, dht, apply_when="called", **averager)

    @property
    def opt(self) -> torch.optim.Optimizer:
        """As given."""
        return self.holder.optimizer

    def step(  # type: ignore[override] # its first parameter is the lock, as in hivemind
        self,
        data_lock: AbstractContextManager[Any] | None = None,
        wait: bool = True,
        **options: Any,
    ) -> dict[PeerID, Any] | Future[dict[PeerID, Any] | None] | None:
        """Average once.

        :param data_lock: held while the average is written; use it around the trainer's updates
        :param wait: wait for the end; otherwise return a future. It needs a ``data_lock``, since the average is written
          by another thread.
        :param options: as of :meth:`DecentralizedAverager.step`
        :returns: what the members gathered; None if the round failed
        """
        if check_flag("wait", wait):
            return self._average(data_lock, options)
        if data_lock is None:
            raise InvalidValueError("data_lock must be given with wait=False, got None")
        return self._worker.submit(self._average, data_lock, options)

    def _average(
        self, data_lock: AbstractContextManager[Any] | None, options: dict[str, Any]
    ) -> dict[PeerID, Any] | None:
        control = super().step(wait=False, **options)
        assert isinstance(control, StepControl)
        try:
            gathered: dict[PeerID, Any] = control.result()
        except (ShoalError, CancelledError):
            return None  # the averager has said why
        except BaseException:
            control.cancel()
            raise
        with data_lock or contextlib.nullcontext():
            self.apply_average()
        self.local_step += 1
        return gathered

    def get_current_state(self) -> tuple[Any, Sequence[torch.Tensor]]:
        """The step; parameters, extra tensors and the optimizer's state."""
        with self.get_tensors():
            of_optimizer: list[torch.Tensor] = []
            packed = pack(self.opt.state_dict(), of_optimizer)
            metadata = {"step": self.local_step, "optimizer_metadata": packed}
            return metadata, [*self.holder.parameters, *self.extra_tensors, *of_optimizer]

    def load_state_from_peers(  # type: ignore[override] # it also writes the state
        self, wait: bool = True, timeout: float | None = None, *, progress: bool = False
    ) -> tuple[Any, Sequence[torch.Tensor]] | None:
        """Load parameters, extra tensors and optimizer of a peer; the larger of both steps counts.

        :param wait: must be True
        :param timeout: seconds for the download
        :returns: what was loaded; None, after a warning that says why, if nothing was
        """
        if not wait:
            raise InvalidValueError(
                "wait must be True: the state is written by the calling thread, got False"
            )
        loaded = super().load_state_from_peers(timeout=timeout, progress=progress)
        if loaded is None:
            return None
        metadata, tensors = loaded[0], loaded[1]
        try:
            if not isinstance(metadata, Mapping) or not isinstance(metadata.get("step"), int):
                raise InvalidValueError("it has no step")
            with self.get_tensors():
                self.holder.load_shared(metadata.get("optimizer_metadata"), tensors, self.extra_tensors)
        except InvalidValueError as e:
            logger.warning("%s: the state of a peer was not loaded: %s", self.prefix, e)
            return None
        self.drop_late_average()
        self.local_step = max(self.local_step, metadata["step"])
        return metadata, tensors

    def shutdown(self) -> None:
        """As of the averager; a round that is under way fails."""
        super().shutdown()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _averaged(self) -> dict[str, torch.Tensor]:
        parameters = self.holder.parameters if self.average_parameters else ()
        named: dict[str, torch.Tensor] = dict(zip(self.parameter_names, parameters, strict=False))
        if self.average_gradients:
            for name, parameter in zip(self.parameter_names, self.holder.parameters, strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                named[f"{name}.grad"] = parameter.grad
        named.update(self.holder.statistics(self.average_opt_statistics))
        named.update((f"extra.{i}", tensor) for i, tensor in enumerate(self.extra_tensors))
        return named
