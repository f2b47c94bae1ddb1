"""The parts of an optimizer, and what each is told of its arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, cast

import torch

from shoal.dht.dht import DHT
from shoal.optim.face import TorchFace
from shoal.optim.gradients import GradientAverager
from shoal.optim.progress.tracker import ProgressTracker
from shoal.optim.state.averager import TrainingStateAverager


class Assembly(TorchFace):
    """Makes averagers and tracker. Subclasses of :class:`~shoal.Optimizer` may override each ``_make`` method."""

    dht: DHT
    target_batch_size: int
    use_local_updates: bool
    client_mode: bool
    status_loglevel: int

    def _make_parts(self, given: Mapping[str, Any], made: contextlib.ExitStack) -> None:
        """Averagers and tracker; ``made`` ends them if a later one cannot be made."""
        self.client_mode = self.dht.client_mode if given["client_mode"] is None else given["client_mode"]
        self.state_averager = self._make_state_averager(given)
        made.callback(self.state_averager.shutdown)
        self.grad_averager = None if self.use_local_updates else self._make_gradient_averager(given)
        if self.grad_averager is not None:
            made.callback(self.grad_averager.shutdown)
        self.tracker = tracker = self._make_progress_tracker(given)
        self.state_averager.others_are_gone = lambda: tracker.others_are_gone

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

    def _tensors_of_model(self) -> dict[str, torch.Tensor]:
        state = self.state_averager
        named = {f"parameter.{i}": parameter for i, parameter in enumerate(state.main_parameters)}
        return named | {f"extra_tensors[{i}]": tensor for i, tensor in enumerate(state.extra_tensors)}

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
