"""One gradient round an epoch: prepared ahead of its end, run, and judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import torch

from shoal.averaging.commands import AveragingStage
from shoal.averaging.report import StepReport
from shoal.averaging.trainer.control import StepControl
from shoal.errors import InDoubt, InvalidStateError, ShoalError
from shoal.optim.epoch import ended_epoch, group_bits, mixed_epochs, parameters_agree
from shoal.optim.gradients import GradientAverager
from shoal.optim.waiting import cancelled_in_vain
from shoal.utils.timed import steady_time


@dataclass(frozen=True)
class Outcome:
    """How a gradient round ended.

    :param failure: why the averaged gradients are this peer's own mean; None: they are the group's
    :param agree: whether all members of the group had the same parameters before the update
    :param ended: the epoch that the round has ended; None: that of this peer
    """

    failure: str | None
    agree: bool = False
    report: StepReport | None = None
    ended: int | None = None


class GradientRounds:
    """Rounds of a :class:`~shoal.optim.GradientAverager`, each of one epoch.

    Whatever happens, the averager's tensors hold the group's mean or the own one when a round has ended.
    """

    def __init__(self, averager: GradientAverager, timeout: float, auxiliary: bool) -> None:
        self.averager = averager
        self.scheduled: StepControl | None = None
        self._timeout, self._auxiliary = timeout, auxiliary
        self._limit = timeout
        """Seconds until the round that was begun is given up."""
        self._own_mean: list[torch.Tensor] = []
        self._begun: StepControl | None = None

    def prepare(self, scheduled_time: float, epoch: int, digest: bytes | None) -> None:
        """Begin to look for a group, unless one is looked for already, or a round of the last epoch still goes on."""
        if self._begun is not None and not self._begun.done():
            return
        if self.scheduled is None or self.scheduled.done():
            self._look_among_peers_of(epoch)
            self.scheduled = self.averager.schedule_step(
                scheduled_time, timeout=self._timeout, gather={"epoch": epoch, "digest": digest}
            )

    def _look_among_peers_of(self, epoch: int) -> None:
        """Peers of other epochs look under other bits: their gradients are of other parameters."""
        self.averager.set_group_bits(group_bits(epoch))

    def has_group(self) -> bool:
        """Whether the prepared round has found members, so that they are waited for, and wait."""
        control = self.scheduled
        return control is not None and not control.done() and control.stage is AveragingStage.AWAITING_TRIGGER

    def begin(
        self, epoch: int, digest: Callable[[], bytes | None], timeout: float | None = None
    ) -> StepControl:
        """Let the prepared round average what is accumulated, weighted by samples; or a new one.

        The accumulators stay: without a group, :meth:`end` takes the own mean from there.

        :param timeout: seconds until :meth:`end` gives it up; None: those of all rounds
        """
        control, self.scheduled = self.scheduled, None
        self._limit = self._timeout if timeout is None else timeout
        options: dict[str, Any] = {"wait": False, "reset_accumulators": False}
        if self._auxiliary:
            options["weight"] = 0.0
        if control is None or not self._serves(control, **options):
            self._look_among_peers_of(epoch)
            told = {"epoch": epoch, "digest": digest()}
            begun = self.averager.step(timeout=self._timeout, gather=told, **options)
            assert isinstance(begun, StepControl)
            control = begun
        self._begun = control
        return control

    def keep_own_mean(self) -> None:
        """Clear the accumulators before :meth:`end`; the own mean is kept aside until then."""
        with self.averager.get_tensors() as tensors:
            self._own_mean = [tensor.clone() for tensor in tensors]
        self.averager.reset_accumulated_grads_()

    def end(self, control: StepControl, epoch: int, left_alone: Callable[[], bool] | None = None) -> Outcome:
        """Wait for a round that was begun, and say what is in the averager's tensors.

        :param left_alone: whether no other peer is in this epoch any more. A group is not looked for any longer then;
          otherwise two peers an epoch apart would each wait in vain, in all epochs. None: it is not asked
        """
        try:
            failure, gathered = self._wait(control, left_alone)
            report = control.report
            if failure is None:
                weights = {} if report is None else dict(zip(report.members, report.weights, strict=False))
                by_name = {str(member): told for member, told in gathered.items()}
                strangers = mixed_epochs(by_name, weights, epoch)
                if strangers:
                    failure = f"members of another epoch were in its group: {', '.join(strangers)}"
            if failure is not None:
                self._restore_own_mean()
                return Outcome(failure, report=report, ended=ended_epoch(list(gathered.values()), epoch))
            return Outcome(None, parameters_agree(list(gathered.values())), report)
        finally:
            self.averager.notify_used_averaged_gradients()
            self._own_mean = []

    def alone(self) -> None:
        """There is nobody to average with: the averager's tensors become the own mean."""
        self.drop(others=False)
        self.averager.load_accumulators_into_averager_()

    def drop(self, others: bool) -> None:
        """Let go of a prepared round. With ``others``, its group keeps this peer, with weight 0."""
        control, self.scheduled = self.scheduled, None
        if control is None or control.done():
            return
        if not others:
            control.cancel()
        elif self._serves(control, weight=0.0, reset_accumulators=False, wait=False):
            self._begun = control
            self.averager.notify_used_averaged_gradients()

    def _serves(self, control: StepControl, **options: Any) -> bool:
        """Begin a prepared round, unless it has ended. Its search may end at any time, also while tensors are copied
        for it.
        """
        if control.done():
            return False
        try:
            self.averager.step(control=control, **options)
        except InvalidStateError:
            if not control.done():
                raise
            return False
        return True

    def _wait(
        self, control: StepControl, left_alone: Callable[[], bool] | None
    ) -> tuple[str | None, Mapping[Any, Any]]:
        """Why it failed, or None; and what was gathered. A result in doubt counts as failed: see ``end``."""
        deadline = steady_time() + self._limit
        try:
            if left_alone is not None and cancelled_in_vain(control, deadline, left_alone):
                return "no other peer is in this epoch any more", {}
            try:
                return None, control.result(max(0.0, deadline - steady_time()))
            except TimeoutError as e:
                if isinstance(e, ShoalError):
                    raise
                if control.cancel():
                    return f"no average within {self._limit:g} s", {}
                return None, control.result()  # it has given its word: the outcome is about to follow
        except InDoubt as e:
            return f"in doubt: {e}", {}
        except (ShoalError, CancelledError) as e:
            return str(e) or type(e).__name__, {}
        except BaseException:
            control.cancel()
            raise

    def _restore_own_mean(self) -> None:
        if not self._own_mean:
            self.averager.load_accumulators_into_averager_()
            return
        self.averager.drop_late_average()
        with self.averager.get_tensors() as tensors, torch.no_grad():
            for target, own in zip(tensors, self._own_mean, strict=True):
                target.copy_(own)


def digest_of(tensors: Sequence[torch.Tensor]) -> bytes:
    """Equal for equal values, shapes and dtypes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        sha.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.digest()[:16]
