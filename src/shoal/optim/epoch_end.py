"""The end of an epoch: gradients are averaged, all update, and parameters are averaged where that is due."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.averaging.report import StepReport
from shoal.errors import AllreduceException, InvalidStateError
from shoal.optim import epoch as rules
from shoal.optim.gradient_rounds import GradientRounds, Outcome, digest_of
from shoal.optim.late_work import LateWork
from shoal.optim.report import EpochReport
from shoal.utils.logging import get_logger
from shoal.utils.timed import steady_time

if TYPE_CHECKING:
    from shoal.optim.optimizer import Optimizer

logger = get_logger(__name__)

Gradients = Literal["averaged", "own", "skipped", "delayed", "none"]


@dataclass
class _Gradients:
    """Which gradients the update uses; ``before_step`` is called where it runs, if they are not there yet."""

    kind: Gradients = "none"
    failure: str | None = None
    agree: bool = False
    report: StepReport | None = None
    before_step: Callable[[], None] | None = None
    ended: int | None = None


class EpochEnd:
    """What an optimizer does when the swarm has enough samples.

    :param optimizer: whose epochs it ends
    :param rounds: of its gradients; None with local updates
    """

    def __init__(self, optimizer: Optimizer, rounds: GradientRounds | None) -> None:
        self._optimizer, self._rounds = optimizer, rounds
        self._options = optimizer.options
        self._began = steady_time()
        self._losses = self._loss_samples = 0.0
        self._late = LateWork()
        self.report: EpochReport | None = None

    def note_loss(self, loss: float | None, samples: int) -> None:
        """Take the loss of one batch into the epoch's mean, if there is one."""
        if loss is not None:
            self._losses += loss * samples
            self._loss_samples += samples

    def digest(self) -> bytes | None:
        """Of all that a round of parameters averages; None if it is not what the others have or may still change."""
        if self._optimizer.auxiliary or self._options.delay_optimizer_step:
            return None
        state = self._optimizer.state_averager
        statistics = [value for _, value in state.holder.statistics(state.average_opt_statistics)]
        return digest_of([*state.holder.parameters, *statistics, *state.extra_tensors])

    def state_round_due(self, new_epoch: int) -> bool:
        """Whether parameters are averaged when ``new_epoch`` begins, unless all members turn out to have the same."""
        optimizer = self._optimizer
        return rules.state_round_due(
            new_epoch,
            self._options.average_state_every,
            optimizer.tracker.is_alone,
            optimizer.state_averager.averaging_in_progress and not self._options.delay_optimizer_step,
        )

    def run(self) -> bool:
        """End the epoch; False: its gradients were not averaged, and must be before it ends."""
        optimizer = self._optimizer
        with optimizer.tracker.pause_updates():
            if self._options.delay_optimizer_step:  # that of the last epoch uses the same buffers
                optimizer.state_averager.finish_delayed()
            self._late.look_at_state(optimizer.state_averager)
            began, epoch = steady_time(), optimizer.local_epoch
            progress, local = optimizer.tracker.global_progress, optimizer.local_progress.samples_accumulated
            gradients = self._average_gradients(epoch, progress.epoch)
            if gradients is None:
                return False
            averaged = steady_time()
            try:
                state, state_report = self._update(epoch, progress.epoch, gradients)
            finally:
                # Also if it was interrupted: no sample counts in two updates.
                if optimizer.local_epoch > epoch:
                    if self._rounds is not None and gradients.kind != "delayed":
                        self._rounds.averager.reset_accumulated_grads_()
                    optimizer.tracker.update_epoch(optimizer.local_epoch)
        now = steady_time()
        late, late_rounds = self._late.take()
        reports = [one for one in (gradients.report, state_report, *late_rounds) if one is not None]
        self.report = EpochReport(
            epoch=epoch,
            peers=progress.num_peers,
            samples=progress.samples_accumulated,
            local_samples=local,
            loss=self._losses / self._loss_samples if self._loss_samples else None,
            gradients=gradients.kind,
            failure=gradients.failure,
            state=state,
            bytes_sent=sum(report.bytes_sent for report in reports),
            bytes_received=sum(report.bytes_received for report in reports),
            seconds={"epoch": now - self._began, "gradients": averaged - began, "update": now - averaged},
            late=late,
        )
        self._began, self._losses, self._loss_samples = now, 0.0, 0.0
        logger.log(optimizer.status_loglevel, "%s: %s", optimizer.run_id, self.report)
        return True

    # gradients

    def _average_gradients(self, epoch: int, global_epoch: int) -> _Gradients | None:
        """None: they were not averaged, and the epoch must not end without."""
        rounds, wait = self._rounds, self._options.after_failed_round == "wait"
        if rounds is None:
            return _Gradients()
        if not rounds.averager.is_alive():
            raise InvalidStateError("the averager of gradients has ended: make another optimizer")
        if self._optimizer.tracker.is_alone and not wait:
            rounds.alone()
            return self._used(Outcome(None), "own")
        is_late = global_epoch > epoch and not rounds.has_group()
        delayed = self._options.delay_grad_averaging
        if is_late and not delayed:
            rounds.alone()
            outcome = Outcome("the others have ended the epoch without this peer")
            return None if wait else self._judge_and_load(outcome, epoch)
        limit = rules.round_timeout(self._options.averaging_timeout, self._options.matchmaking_time, is_late)
        control = rounds.begin(epoch, self.digest, limit)
        if delayed:
            rounds.keep_own_mean()

            def finish() -> None:
                outcome = rounds.end(control, epoch, lambda: self._optimizer.tracker.others_are_gone)
                gradients = self._judge(outcome, epoch)
                self._late.gradients(gradients.kind, gradients.report)
                if gradients.kind == "skipped":
                    raise AllreduceException(f"gradients were not averaged: {gradients.failure}")
                self._load_offloaded()

            return _Gradients("delayed", before_step=finish)
        tracker = self._optimizer.tracker
        # One that waits looks on for newcomers, if all others have ended.
        outcome = rounds.end(
            control, epoch, lambda: tracker.left_alone and not (wait and tracker.others_are_gone)
        )
        if outcome.failure is not None and wait:
            logger.warning(
                "%s: the gradients of epoch %d were not averaged, it is tried again: %s",
                self._optimizer.run_id, epoch, outcome.failure,
            )  # fmt: skip
            return None
        return self._judge_and_load(outcome, epoch)

    def _judge_and_load(self, outcome: Outcome, epoch: int) -> _Gradients:
        gradients = self._judge(outcome, epoch)
        if gradients.kind != "skipped":
            self._load_offloaded()
        return gradients

    def _used(self, outcome: Outcome, kind: Gradients) -> _Gradients:
        self._load_offloaded()
        return _Gradients(kind, outcome.failure, outcome.agree, outcome.report)

    def _judge(self, outcome: Outcome, epoch: int) -> _Gradients:
        kind: Gradients = "averaged"
        if outcome.failure is not None:
            skip = self._options.after_failed_round == "skip"
            kind = "none" if self._optimizer.auxiliary else "skipped" if skip else "own"
            logger.log(
                logging.DEBUG if self._optimizer.auxiliary else logging.WARNING,
                "%s: the gradients of epoch %d were not averaged, %s: %s",
                self._optimizer.run_id, epoch,
                "this peer makes no update" if skip else "this peer uses its own", outcome.failure,
            )  # fmt: skip
        return _Gradients(kind, outcome.failure, outcome.agree, outcome.report, ended=outcome.ended)

    @torch.no_grad()
    def _load_offloaded(self) -> None:
        """Give the offloaded optimizer what the averager of gradients has."""
        assert self._rounds is not None
        if not self._options.offload_optimizer:
            return
        offloaded = self._optimizer.state_averager.offloaded_gradients
        with self._rounds.averager.get_tensors() as averaged:
            for target, source in zip(offloaded, averaged, strict=True):
                target.copy_(source)
        self._clip(offloaded)

    def _clip(self, gradients: Any) -> None:
        limit = self._options.max_grad_norm
        if limit is None:
            return
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g.float()).cpu() for g in gradients])
        )
        if norm > limit:
            for gradient in gradients:
                gradient.mul_(float(limit / norm))

    # update

    def _update(
        self, epoch: int, global_epoch: int, gradients: _Gradients
    ) -> tuple[Literal["averaged", "failed", "delayed", "equal", "none"], StepReport | None]:
        state, options = self._optimizer.state_averager, self._options
        ended = epoch if gradients.ended is None else gradients.ended
        new_epoch = rules.next_epoch(ended, global_epoch)
        due = self.state_round_due(new_epoch)
        equal = due and gradients.agree
        state.local_epoch = new_epoch - 1
        steps = gradients.kind in ("averaged", "own", "delayed") and not self._optimizer.auxiliary
        delayed_step = steps and options.delay_optimizer_step
        update: dict[str, Any] = {
            "increment_epoch": True,
            "optimizer_step": steps,
            "delay_optimizer_step": delayed_step,
            "wait_for_trigger": gradients.before_step,
        }
        round_: dict[str, Any] = {}
        if due and not equal:
            control, self._optimizer.scheduled_state = self._optimizer.scheduled_state, None
            if control is not None and control.done():
                control = None
            round_ = {
                "averaging_round": True,
                "delay_averaging": options.delay_state_averaging or delayed_step,
                "averaging_control": control,
                "averaging_opts": {
                    "timeout": rules.round_timeout(
                        options.averaging_timeout, options.matchmaking_time, gradients.failure is not None
                    )
                },
            }
        before = state.last_report
        if steps and self._rounds is not None and not options.offload_optimizer:
            with self._rounds.averager.use_averaged_gradients() as averaged:
                self._clip(averaged)
                state.step(**update)
            if round_:
                state.step(**round_)
        else:
            state.step(**update, **round_)
        if not round_:
            return ("equal" if equal else "none"), None
        if round_["delay_averaging"]:
            self._late.state_begun(before)
            return "delayed", None
        report = state.last_report
        succeeded = report is not None and report is not before and report.succeeded
        return ("averaged" if succeeded else "failed"), report if report is not before else None
