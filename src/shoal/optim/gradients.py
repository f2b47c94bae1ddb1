"""Gradients that are accumulated by one peer and averaged between all: :class:`GradientAverager`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, Protocol

import torch

from shoal.averaging.trainer.averager import DecentralizedAverager
from shoal.averaging.trainer.control import StepControl
from shoal.averaging.trainer.shared_buffers import SharedBuffers
from shoal.dht.dht import DHT
from shoal.errors import InvalidStateError, InvalidValueError, ShoalError
from shoal.optim.parameters import are_finite, trained_parameters
from shoal.p2p.identity import PeerID
from shoal.utils.checks import check_flag, check_number
from shoal.utils.logging import get_logger

logger = get_logger(__name__)

Gathered = dict[PeerID, Any]


class GradientAveragerFactory(Protocol):
    """What ``Optimizer(grad_averager_factory=...)`` takes: makes a gradient averager of these arguments."""

    def __call__(
        self, parameters: Iterable[torch.nn.Parameter], *, dht: DHT, prefix: str, **options: Any
    ) -> GradientAverager: ...


class GradientAverager(DecentralizedAverager):
    """Accumulates gradients of several batches, and averages them with other peers, weighted by samples.

    A gradient is in up to three places: in ``param.grad``, where ``backward()`` leaves it; in the accumulators, which
    are sums over all batches of this peer; and in the averaged gradients on the CPU, which a round averages::

        averager = GradientAverager(model.parameters(), dht=dht, prefix="run_grad_averager", start=True)
        for batch in batches:
            loss(model(batch)).backward()
            averager.accumulate_grads_(batch_size=len(batch))
            model.zero_grad()
        averager.step()
        with averager.use_averaged_gradients():
            optimizer.step()

    A round that fails leaves this peer's own mean in the averaged gradients. ``use_averaged_gradients()`` is of use
    then, too, and ``step(again=True)`` tries once more.

    Gradients in float16 or bfloat16 are accumulated and averaged in float32. Parameters that do not require grad when
    the averager is made are left out, and tied ones count once.

    :param parameters: the parameters of the model; the same, in the same order, at all peers
    :param reuse_grad_buffers: accumulate in ``param.grad`` itself, which saves memory. Nobody may call ``zero_grad()``,
      or clip gradients, between steps. Batches count the same then, whatever their sizes.
    :param accumulate_grads_on: the accumulators' device; None: that of each parameter
    :param warn: warn of averages that were not used, and of accumulators that were not cleared, once a round
    :param averaged_grads: tensors of the parameters' shapes, or ``SharedBuffers``, to average in place of own buffers
    :param averager: as of :class:`~shoal.DecentralizedAverager`. By default others can't download the gradients.
    :raises InvalidValueError: nothing to average, or ``averaged_grads`` of other shapes
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        dht: DHT,
        prefix: str,
        reuse_grad_buffers: bool = False,
        accumulate_grads_on: torch.device | str | None = None,
        client_mode: bool | None = None,
        warn: bool = True,
        averaged_grads: Sequence[torch.Tensor] | SharedBuffers = (),
        **averager: Any,
    ) -> None:
        self.parameters = trained_parameters(parameters)
        self.reuse_grad_buffers = check_flag("reuse_grad_buffers", reuse_grad_buffers)
        if self.reuse_grad_buffers and accumulate_grads_on is not None:
            raise InvalidValueError(
                "accumulate_grads_on must be None with reuse_grad_buffers, "
                f"where param.grad has the sums, got {accumulate_grads_on!r}"
            )
        self.warn = check_flag("warn", warn)
        self.local_samples_accumulated = 0
        self.local_times_accumulated = 0
        self.loss_scale = 1.0
        """By which the sums in ``param.grad`` are to be divided, with ``reuse_grad_buffers``."""
        self._taken_samples = 0.0
        self._last_step: StepControl | None = None  # None: its outcome was used
        self._accumulators_used_in_step = False
        self._own_accumulators: tuple[torch.Tensor, ...] = ()
        self._accumulators_follow = accumulate_grads_on is None
        if self.reuse_grad_buffers:
            self._reused_grads()
        else:
            self._own_accumulators = tuple(
                torch.zeros(p.shape, dtype=wide_dtype(p.dtype), device=accumulate_grads_on or p.device)
                for p in self.parameters
            )
        self._buffers = self._check_averaged(averaged_grads)
        averager.setdefault("allow_state_sharing", False)
        super().__init__(self._buffers, dht, prefix=prefix, client_mode=client_mode, **averager)

    # accumulation

    @torch.no_grad()
    def accumulate_grads_(self, batch_size: int) -> bool:
        """Add the gradients that are in ``param.grad``, means over ``batch_size`` samples, to the accumulators.

        :returns: whether they were added. Gradients with NaN or infinity are not, with a warning; with
          ``reuse_grad_buffers`` they have spoiled the sums, and these are cleared.
        """
        batch_size = int(check_number("batch_size", batch_size, minimum=1))
        if self._accumulators_used_in_step and self.warn:
            logger.warning(
                "%s: the accumulators were averaged and not cleared: call reset_accumulated_grads_(), "
                "or step() with reset_accumulators=True",
                self.prefix,
            )
            self._accumulators_used_in_step = False
        if not self._check_finite(batch_size):
            return False
        if not self.reuse_grad_buffers:
            self._follow_parameters()
            for total, parameter in zip(self._own_accumulators, self.parameters, strict=True):
                if parameter.grad is not None:
                    total.add_(parameter.grad.detach().to(total.device, total.dtype), alpha=batch_size)
        self.local_samples_accumulated += batch_size
        self.local_times_accumulated += 1
        return True

    @torch.no_grad()
    def reset_accumulated_grads_(self) -> None:
        """Clear the accumulators and their counts."""
        self._accumulators_used_in_step = False
        self.local_samples_accumulated = self.local_times_accumulated = 0
        for total in self._accumulators():
            total.zero_()

    @torch.no_grad()
    def load_accumulators_into_averager_(self) -> None:
        """Write the mean over all accumulated samples into the averaged gradients; zeros if there are none.

        An average of an earlier step that comes late is dropped: it would be applied to other gradients.
        """
        self._let_go_of_late_average()
        count: float = self.local_samples_accumulated
        if self.reuse_grad_buffers:
            count = self.local_times_accumulated * self.loss_scale
        with self.get_tensors() as averaged:
            for target, total in zip(averaged, self._accumulators(), strict=True):
                target.copy_(total)
                target.div_(count or 1)
        self._taken_samples = float(self.local_samples_accumulated)

    # rounds

    def schedule_step(self, scheduled_time: float | None = None, **options: Any) -> StepControl:
        """Begin to look for a group for a later :meth:`step`, to which the control is given.

        :param scheduled_time: when that step is expected, in :func:`~shoal.get_dht_time` seconds
        :param options: as of :meth:`DecentralizedAverager.step`; the weight is settled by :meth:`step`
        """
        for name in ("weight", "require_trigger", "wait"):
            if name in options:
                raise InvalidValueError(
                    f"{name} must not be given to schedule_step(), got {options[name]!r}: step() decides it"
                )
        control = super().step(scheduled_time=scheduled_time, wait=False, require_trigger=True, **options)
        assert isinstance(control, StepControl)
        return control

    def step(  # type: ignore[override] # its first parameter is the weight, as in hivemind
        self,
        weight: float | None = None,
        reset_accumulators: bool = True,
        control: StepControl | None = None,
        timeout: float | None = None,
        wait: bool = True,
        *,
        again: bool = False,
        **options: Any,
    ) -> Gathered | StepControl | None:
        """Average the accumulated gradients with a group.

        :param weight: None: the number of samples
        :param reset_accumulators: clear the accumulators. What they had is in the averaged gradients from now on, also
          if the round fails.
        :param control: of :meth:`schedule_step`; it serves once, and ``options`` are then an error
        :param timeout: of the search for a group; with ``wait``, of the whole step
        :param wait: wait for the outcome; otherwise return the control at once
        :param again: average once more what the last step took, after that has failed. The accumulators stay as they
          are, with what came since.
        :returns: what each member gathered; None if the round failed, was in doubt, or was not done in time
        """
        wait, again = check_flag("wait", wait), check_flag("again", again)
        if control is not None and options:
            raise InvalidValueError(f"options must not be given together with control, got {sorted(options)}")
        if control is not None and (control.triggered or control.done()):
            raise InvalidStateError(f"control must be one that no step has used, got {control}")
        self._finish_last_step(again)
        if control is None:
            control = self.schedule_step(timeout=timeout, **options)
        if again:
            self._let_go_of_late_average()
        else:
            self.load_accumulators_into_averager_()
        control.weight = self._taken_samples if weight is None else weight
        control.allow_allreduce()
        self._last_step = control
        if not again:
            self._accumulators_used_in_step = True
            if reset_accumulators:
                self.reset_accumulated_grads_()
        return self._wait_for(control, timeout) if wait else control

    def _wait_for(self, control: StepControl, timeout: float | None) -> Gathered | None:
        try:
            result: Gathered = control.result(timeout)
        except TimeoutError:
            if control.cancel():
                logger.warning("%s: no average of gradients within %s s", self.prefix, timeout)
                return None
            return self._wait_for(control, None)  # it has given its word: the outcome is about to follow
        except (ShoalError, CancelledError):
            return None  # the averager has said why
        except BaseException:
            control.cancel()
            raise
        return result

    def _finish_last_step(self, again: bool) -> None:
        last, self._last_step = self._last_step, None
        if last is None:
            return
        if not last.done():
            self._last_step = last
            raise InvalidStateError(f"a step must have ended before the next one begins, got {last}")
        if self.warn and not again and not last.cancelled() and last.exception() is None:
            logger.warning("%s: the averages of the last round were not used", self.prefix)

    # use

    def notify_used_averaged_gradients(self) -> None:
        """Say that the averages were used, for one who takes them out of the averager's tensors."""
        self._last_step = None

    @contextlib.contextmanager
    def use_averaged_gradients(self) -> Iterator[list[torch.Tensor]]:
        """Within this block, ``param.grad`` are the averaged gradients, on the parameters' devices and of their dtypes.

        After a failed round they are this peer's own mean. Parameters that were frozen since the averager was made have
        none, so that an optimizer leaves them alone.
        """
        self._last_step = None
        before = [parameter.grad for parameter in self.parameters]
        with self.get_tensors() as averaged:
            grads = [g.to(p.device, p.dtype) for g, p in zip(averaged, self.parameters, strict=True)]
            try:
                for parameter, grad in zip(self.parameters, grads, strict=True):
                    parameter.grad = grad if parameter.requires_grad else None
                yield grads
            finally:
                for parameter, grad_before in zip(self.parameters, before, strict=True):
                    parameter.grad = grad_before

    # the buffers

    def _accumulators(self) -> Sequence[torch.Tensor]:
        return self._reused_grads() if self.reuse_grad_buffers else self._own_accumulators

    def _follow_parameters(self) -> None:
        """The model may have been moved since."""
        if self._accumulators_follow:
            self._own_accumulators = tuple(
                total if total.device == p.device else total.to(p.device)
                for total, p in zip(self._own_accumulators, self.parameters, strict=True)
            )

    def _reused_grads(self) -> list[torch.Tensor]:
        """``param.grad`` of all; zeros where somebody has set it to None."""
        grads = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        return grads

    def _check_finite(self, batch_size: int) -> bool:
        if are_finite(p.grad for p in self.parameters if p.grad is not None):
            return True
        lost = batch_size
        if self.reuse_grad_buffers:
            lost += self.local_samples_accumulated
            self.reset_accumulated_grads_()
        logger.warning(
            "%s: gradients have NaN or infinity: %d samples are left out of the average", self.prefix, lost
        )
        return False

    def _let_go_of_late_average(self) -> None:
        self.drop_late_average()
        if isinstance(self._buffers, SharedBuffers):
            self._buffers.wait_until_free()

    def _check_averaged(
        self, given: Sequence[torch.Tensor] | SharedBuffers
    ) -> Sequence[torch.Tensor] | SharedBuffers:
        if not isinstance(given, SharedBuffers) and len(given) == 0:
            return SharedBuffers([(p.shape, wide_dtype(p.dtype)) for p in self.parameters])
        shapes = [tuple(t.shape) for t in (given.tensors if isinstance(given, SharedBuffers) else given)]
        wanted = [tuple(p.shape) for p in self.parameters]
        if shapes != wanted:
            raise InvalidValueError(f"averaged_grads must have the parameters' shapes {wanted}, got {shapes}")
        return given


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which values of ``dtype`` are summed: float32 at least."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
