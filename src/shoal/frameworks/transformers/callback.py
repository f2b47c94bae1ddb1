"""The callback that makes a Trainer a peer of a swarm: :class:`ShoalCallback`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from shoal.errors import InvalidStateError
from shoal.frameworks.transformers import checks
from shoal.frameworks.transformers.backup import Backup, is_finite
from shoal.frameworks.transformers.figures import PREFIX, EpochFigures
from shoal.frameworks.transformers.samples import SampleCounter
from shoal.optim.optimizer import Optimizer
from shoal.optim.report import EpochReport
from shoal.utils.checks import check_flag, check_number
from shoal.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass
class _Training:
    """One call of ``train()``."""

    optimizer: Optimizer
    samples: SampleCounter
    last: EpochReport | None
    counted: int = 0
    """Samples of the epoch before the step that is under way."""
    figures: EpochFigures = field(default_factory=EpochFigures)
    backup: Backup | None = None


class ShoalCallback(TrainerCallback):  # type: ignore[misc] # transformers has types of its own, which mypy skips
    """Makes a ``transformers.Trainer`` with a :class:`shoal.Optimizer` a peer of the swarm.

    >>> opt = shoal.Optimizer(dht=dht, run_id="my_run", target_batch_size=4096, optimizer=..., scheduler=...)
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[ShoalCallback()],
    ...                   optimizers=(opt, SwarmScheduler(opt)))
    >>> trainer.train()

    It loads the state of the swarm when training begins, counts the samples of each step, adds figures of the swarm to
    the Trainer's logs, and shuts the optimizer down at the end. See docs/frameworks/transformers.md.

    :param load_state: load the state of another peer when training begins, also after ``resume_from_checkpoint``. A
      state that is older than the checkpoint is not taken.
    :param stop_at_epoch: end training when this peer has reached this epoch of the swarm; None: as the Trainer's own
      arguments say
    :param backup_every: keep a copy of parameters and statistics on the CPU, made anew after so many epochs. It is
      what a model with NaN or infinity goes back to, if no peer has a better one. None: keep none
    :param shutdown: shut the optimizer down when training ends; False if it is to train again
    :raises InvalidValueError: arguments are out of range
    """

    def __init__(
        self,
        *,
        load_state: bool = True,
        stop_at_epoch: int | None = None,
        backup_every: int | None = None,
        shutdown: bool = True,
    ) -> None:
        self.load_state = check_flag("load_state", load_state)
        self.stop_at_epoch = _count("stop_at_epoch", stop_at_epoch)
        self.backup_every = _count("backup_every", backup_every)
        self.shutdown = check_flag("shutdown", shutdown)
        self._training: _Training | None = None

    # what the Trainer calls

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Say what is wrong before anything trains, as far as the optimizer is there."""
        checks.check_arguments(args)
        if given.get("optimizer") is not None:
            optimizer = checks.find_optimizer(given["optimizer"])
            checks.check_optimizer(optimizer, args, _step_size(args, args.train_batch_size))
            checks.check_scheduler(optimizer, given.get("lr_scheduler"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take part in the swarm."""
        optimizer = checks.find_optimizer(given.get("optimizer"))
        planned = _step_size(args, state.train_batch_size or args.train_batch_size)
        checks.check_optimizer(optimizer, args, planned)
        checks.check_scheduler(optimizer, given.get("lr_scheduler"))
        for line in checks.advice(optimizer, given.get("lr_scheduler"), args):
            logger.warning("%s: %s", optimizer.run_id, line)
        if state.global_step and not optimizer.local_epoch:
            logger.warning(
                "%s: the checkpoint has parameters and no epoch, as save_only_model makes it: this peer is at epoch 0, "
                "with a new optimizer",
                optimizer.run_id,
            )
        if self.load_state:
            optimizer.load_state_from_peers()
        self._end_counting()
        countable = not getattr(args, "torch_compile", False) and args.n_gpu <= 1
        samples = SampleCounter(optimizer, given["model"], planned, countable)
        self._training = _Training(optimizer, samples, optimizer.report)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count the samples of the step that begins."""
        training = self._training
        if training is not None:
            training.samples.begin_step()
            if args.process_index == 0:
                training.counted = training.optimizer.local_progress.samples_accumulated

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count those of its next batch."""
        if self._training is not None:
            self._training.samples.begin_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See whether the swarm has ended an epoch, and get ready for what the Trainer does now."""
        training = self._training
        if training is None:
            return
        optimizer, report = training.optimizer, training.optimizer.report
        if report is not None and report is not training.last:
            training.last = report
            training.figures.note(report)
            self._keep_finite(training)
        elif optimizer.at_rank_zero(
            "the end of a step", lambda: optimizer.local_progress.samples_accumulated == training.counted
        ):
            self._keep_finite(training)  # the gradients were left out: those of a diverged model have NaN
        if self.stop_at_epoch is not None and training.optimizer.local_epoch >= self.stop_at_epoch:
            control.should_training_stop = True
        self._settle(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Get ready for what the Trainer does at the end of a pass over its data."""
        self._settle(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Add the swarm's figures to the Trainer's; those of an evaluation get the epoch alone."""
        training = self._training
        if training is None or logs is None or args.process_index > 0:
            return
        optimizer = training.optimizer
        figures = training.figures.figures(optimizer.local_epoch, optimizer.tracker.global_progress.num_peers)
        if "loss" not in logs:
            figures = {f"{PREFIX}epoch": optimizer.local_epoch}
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)  # the Trainer has copied the logs before

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Leave the swarm."""
        if self._training is not None:
            self._leave(self._training)
            self._end_counting()
            self._training = None

    # what follows

    def _settle(self, control: Any) -> None:
        """End delayed work before the Trainer saves, evaluates or ends: the model is of one moment then."""
        training = self._training
        if training is None:
            return
        if control.should_training_stop:
            # Others need not wait while this peer evaluates, saves and loads its best model.
            self._leave(training)
        elif control.should_save or control.should_evaluate:
            _finish_delayed(training.optimizer)

    def _leave(self, training: _Training) -> None:
        optimizer = training.optimizer
        if optimizer.is_alive() and (optimizer.ranks > 1 or not self.shutdown):
            _finish_delayed(optimizer)  # that of a shutdown reaches the model of rank 0 alone
        if self.shutdown:
            optimizer.shutdown()

    def _end_counting(self) -> None:
        if self._training is not None:
            self._training.samples.end()

    def _keep_finite(self, training: _Training) -> None:
        optimizer = training.optimizer
        if not _is_finite(optimizer):
            self._recover(training)
        elif self._backup_is_due(training):
            _finish_delayed(optimizer)
            training.backup = Backup(optimizer)

    def _backup_is_due(self, training: _Training) -> bool:
        epoch = training.optimizer.local_epoch
        if self.backup_every is None or epoch % self.backup_every:
            return False
        return training.backup is None or training.backup.epoch != epoch

    def _recover(self, training: _Training) -> None:
        """Take the state of a peer; if that has diverged, too, go back to the backup."""
        optimizer, backup = training.optimizer, training.backup
        logger.warning(
            "%s: the parameters have NaN or infinity after epoch %d: the state of a peer is loaded",
            optimizer.run_id, optimizer.local_epoch,
        )  # fmt: skip
        optimizer.load_state_from_peers()
        if _is_finite(optimizer):
            return
        if backup is None:
            raise InvalidStateError(
                "the parameters have NaN or infinity, no peer has better ones, and there is no backup: give "
                "ShoalCallback(backup_every=...), or go on from a checkpoint with a smaller learning rate"
            )
        backup.restore(optimizer)
        logger.warning("%s: parameters and statistics are those of epoch %d", optimizer.run_id, backup.epoch)


def _is_finite(optimizer: Optimizer) -> bool:
    """Of rank 0, whose model is that of all: ranks that judged for themselves might part."""
    return optimizer.at_rank_zero("a look for NaN", lambda: is_finite(optimizer))


def _finish_delayed(optimizer: Optimizer) -> None:
    optimizer.at_rank_zero("the end of delayed work", optimizer.state_averager.finish_delayed)


def _step_size(args: Any, batch_size: int) -> int:
    """Samples of one step of a Trainer."""
    return batch_size * int(args.gradient_accumulation_steps)


def _count(name: str, value: Any) -> int | None:
    return None if value is None else int(check_number(name, value, minimum=1))
