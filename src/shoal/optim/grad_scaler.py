"""A scaler of losses for gradients that are accumulated in ``param.grad``: :class:`GradScaler`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from shoal.errors import InvalidTypeError
from shoal.optim.parameters import are_finite
from shoal.utils.logging import get_logger

logger = get_logger(__name__)


class GradScaler(torch.amp.GradScaler):
    """torch's scaler for an optimizer with ``reuse_grad_buffers``, whose gradients stay scaled until the epoch ends.

    Elsewhere torch's own serves as well. Outside of a global step :meth:`unscale_` only looks for NaN and infinity, and
    :meth:`update` changes nothing unless there was one. During a global step both are real, and the scale grows by
    global steps alone. Gradients in float16 are allowed.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._global = False
        self._finite: dict[int, bool] = {}
        self._steps_without_overflow = 0
        self._steering = threading.RLock()  # a delayed step runs on another thread

    @contextlib.contextmanager
    def running_global_step(self) -> Iterator[None]:
        """Within this block gradients are unscaled and the optimizer steps."""
        with self._steering:
            before, self._global = self._global, True
            try:
                yield
            finally:
                self._global = before

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale in a global step; elsewhere see whether they are finite."""
        if not self.is_enabled():
            return
        with self._steering:
            if self.are_grads_finite(optimizer) and self._global:
                scale = self.get_scale()
                for grad in _gradients(optimizer):
                    grad.div_(scale)

    def step(self, optimizer: torch.optim.Optimizer, *arguments: Any, **options: Any) -> Any:
        """Step if all gradients are finite. Outside of a global step the optimizer gets the scaler, and decides.

        In a global step call :meth:`unscale_` before.
        """
        with self._steering:
            if not self._global:
                return optimizer.step(*arguments, **{"grad_scaler": self, **options})
            if not self.is_enabled() or self.are_grads_finite(optimizer, use_cached=True):
                return optimizer.step(*arguments, **options)
            logger.warning("no step: gradients have NaN or infinity at a loss scale of %g", self.get_scale())
            return None

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Set ``new_scale``; or shrink the scale after an overflow, and let it grow after enough global steps."""
        with self._steering:
            if not self.is_enabled():
                return
            overflow = not all(self._finite.values())
            counts = self._global and bool(self._finite)
            self._finite.clear()
            if new_scale is None and overflow:
                new_scale = self.get_scale() * self.get_backoff_factor()
            elif new_scale is None and counts:
                self._steps_without_overflow += 1
                if self._steps_without_overflow >= self.get_growth_interval():
                    new_scale = self.get_scale() * self.get_growth_factor()
            if new_scale is not None:
                self._steps_without_overflow = 0
                super().update(new_scale)

    def are_grads_finite(self, optimizer: torch.optim.Optimizer, use_cached: bool = False) -> bool:
        """Whether the optimizer's gradients have neither NaN nor infinity.

        :param use_cached: what was found since the last :meth:`update`, if it was looked for
        """
        with self._steering:
            if not use_cached or id(optimizer) not in self._finite:
                self._finite[id(optimizer)] = are_finite(_gradients(optimizer))
            return self._finite[id(optimizer)]


def unscale_once(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Unscale the gradients of one batch, unless the user has done so, as before clipping."""
    for_real = scaler.running_global_step() if isinstance(scaler, GradScaler) else contextlib.nullcontext()
    try:
        with for_real:
            scaler.unscale_(optimizer)
    except RuntimeError as e:
        if "already been called" not in str(e):  # torch's scaler says it in no other way
            raise


def scale_of_sums(scaler: torch.amp.GradScaler) -> float:
    """By which sums over an epoch in ``param.grad`` are scaled.

    :raises InvalidTypeError: another scaler than ours, which would divide the sums at each step
    """
    if not isinstance(scaler, GradScaler):
        raise InvalidTypeError(
            "grad_scaler must be a shoal.GradScaler with reuse_grad_buffers, whose sums stay scaled until the "
            f"epoch ends, got {type(scaler).__name__}"
        )
    return scaler.get_scale()


def _gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
