"""An optimizer whose update is that of a swarm: :class:`Optimizer`."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

from shoal.averaging.trainer.control import StepControl
from shoal.compression import CompressionBase, NoCompression
from shoal.dht.dht import DHT
from shoal.errors import InvalidStateError
from shoal.optim import epoch as rules
from shoal.optim.assembly import Assembly
from shoal.optim.epoch import AfterFailedRound
from shoal.optim.epoch_end import EpochEnd
from shoal.optim.grad_scaler import scale_of_sums, unscale_once
from shoal.optim.gradient_rounds import GradientRounds
from shoal.optim.gradients import GradientAveragerFactory
from shoal.optim.model_watch import ModelWatch
from shoal.optim.options import checked, checked_step
from shoal.optim.parameters import are_finite
from shoal.optim.progress.values import LocalTrainingProgress
from shoal.optim.ranks.messages import Batch, Outcome
from shoal.optim.ranks.parts import facts, listening_parts
from shoal.optim.ranks.roles import join
from shoal.optim.report import EpochReport
from shoal.optim.state.holder import OptimizerFactory, Params, as_groups
from shoal.optim.state.rates import Scheduler, SchedulerFactory
from shoal.optim.watching import OnEpoch
from shoal.utils.logging import get_logger
from shoal.utils.timed import get_dht_time

logger = get_logger(__name__)

Result = TypeVar("Result")


class Optimizer(Assembly):
    """Trains one model with all peers of a run: together they process ``target_batch_size`` samples, then all update.

    >>> opt = shoal.Optimizer(dht=dht, run_id="my_run", target_batch_size=4096, batch_size_per_step=32,
    ...                       optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    >>> for batch in batches:
    ...     opt.zero_grad()
    ...     loss(model(batch)).backward()
    ...     opt.step()

    An *epoch* is the time in which the swarm processes so many samples, and ends with one update. Learning rate and
    schedulers are those of the whole batch. The parameters are explained in docs/optimizer.md.

    :param dht: a running DHT; None at ranks other than 0
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
    :param process_group: ranks of ``torch.distributed`` that are one peer, whose rank 0 talks to the swarm; None: all.
      Not in hivemind, where each rank is a peer. All ranks of the group make the optimizer, and call its methods alike.
    :param on_epoch: called with each :attr:`report`, at rank 0, on the thread that calls :meth:`step`
    :param record: a file to which each epoch adds a line of JSON; ``shoal plot`` draws it
    :param progress_bar: show on the standard error, if it is a terminal, how far the epoch is
    :raises InvalidValueError: arguments are out of range, or do not go together
    """

    def __init__(
        self,
        *,
        dht: DHT | None,
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
        process_group: torch.distributed.ProcessGroup | None = None,
        on_epoch: OnEpoch | None = None,
        record: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
    ) -> None:
        given = locals().copy()
        self._ranks = join(process_group, averaging_timeout, load_state_timeout)
        try:
            self._ranks.make(lambda: self._make(given))
        except BaseException:
            if self._made:  # this rank's part stands, and another one failed
                self.shutdown()
            raise

    # making

    def _make(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what must be the same at all ranks."""
        if given["params"] is not None:
            given = {**given, "params": as_groups(given["params"])}  # an iterator serves once
        self.options = options = checked(given, self._ranks.rank, self._ranks.size)
        self._owner_pid = os.getpid()
        self._stepping = threading.RLock()  # on_epoch may call what it likes
        self._closed = False
        self._made = False
        self.dht: DHT = given["dht"]
        self.run_id = options.run_id
        self.target_batch_size = options.target_batch_size
        self.batch_size_per_step = options.batch_size_per_step
        self.auxiliary, self.use_local_updates = options.auxiliary, options.use_local_updates
        self.client_mode = bool(given["client_mode"])
        self.status_loglevel = logging.INFO if options.verbose else logging.DEBUG
        self.scheduled_state: StepControl | None = None
        self.report: EpochReport | None = None
        """What happened in the last epoch; None before its end."""
        self._watchers = options.watchers(self._ranks.rank)
        with contextlib.ExitStack() as made:
            made.callback(self._watchers.close)
            if self._ranks.rank == 0:
                self._make_parts(given, made)
            else:
                self.state_averager, self.tracker = cast(
                    "Any", listening_parts(given, options, self._ranks.rank)
                )
                self.grad_averager = None
            made.pop_all()
        self._rounds = (
            None
            if self.grad_averager is None
            else GradientRounds(self.grad_averager, options.averaging_timeout, options.auxiliary)
        )
        super().__init__(self.state_averager.param_groups, copy.copy(self.state_averager.optimizer.defaults))
        self._model = ModelWatch(
            self._tensors_of_model(),
            casts=options.offload_optimizer,
            frozen=[p for g in self.param_groups for p in g["params"] if not p.requires_grad],
        )
        self._made = True
        self._end = EpochEnd(self, self._rounds)
        self._samples = 0
        self._compare_exactly = True
        self._ranks.share(self.state_averager, options.use_local_updates)
        return facts(options, self.state_averager)

    # the step

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        batch_size: int | None = None,
        grad_scaler: Any = None,
        *,
        loss: float | torch.Tensor | None = None,
    ) -> Any:
        """Take the gradients of one batch; end the epoch if the swarm has enough samples.

        Among several ranks, this is a call of all, after a ``backward()`` in which DistributedDataParallel has averaged
        the gradients. Their batches are one.

        :param closure: computes the loss and the gradients
        :param batch_size: samples of this step, of this rank; None: ``batch_size_per_step``
        :param grad_scaler: of torch; gradients that are not unscaled yet are unscaled by it
        :param loss: mean of the batch, for the report; it needs no closure. Not in hivemind
        :returns: what the closure returns
        :raises InvalidStateError: another thread is in it, the optimizer was shut down, or the model is another one
        """
        with self._alone_in_step():
            return self._step(closure, batch_size, grad_scaler, loss)

    def _step(
        self,
        closure: Callable[[], Any] | None,
        batch_size: int | None,
        grad_scaler: Any,
        loss: float | torch.Tensor | None,
    ) -> Any:
        self._check_open()
        self._model.check()
        samples = checked_step(
            self.auxiliary, self.batch_size_per_step, closure, batch_size, grad_scaler, loss
        )
        with self._ended_if_ranks_part():
            result = None
            if closure is not None:
                self._ranks.lead("step() with a closure", self._write_background_work)
                with torch.enable_grad():
                    loss = result = closure()
            if grad_scaler is not None:
                self._unscale(grad_scaler)
            outcome = self._ranks.step(samples, loss, self.state_averager.main_parameters, self._advance)
        self._watchers.step(lambda: self.tracker.global_progress)
        if outcome.report is not None:
            self.report = outcome.report
            self._watchers.epoch(outcome.report)
        return result

    def _advance(self, batch: Batch) -> Outcome:
        """What a step does beyond the gradients of a batch: at rank 0, for all ranks."""
        self._write_background_work()
        counts, ended = False, False
        if not self.auxiliary and self._must_reload():
            logger.log(self.status_loglevel, "%s: behind the swarm, the state is loaded", self.run_id)
            self._load_state(None)
            return self._outcome(counts, ended)
        if self._take_batch(batch.samples):
            counts = True
            self._end.note_loss(batch.loss, batch.samples)
        while self.tracker.ready_to_update_epoch:
            before = self.local_epoch
            try:
                ended = self._end.run()
            finally:
                if self.local_epoch > before:  # also if it was interrupted after the update
                    self._begin_epoch()
            if ended:
                break
            if self.tracker.global_epoch > self.local_epoch:
                self._load_state(None)
                break
            self._ranks.hold()
        else:
            self._prepare_rounds()
        return self._outcome(counts, ended)

    def _outcome(self, counts: bool, ended: bool) -> Outcome:
        grads = self.grad_averager
        return Outcome(
            updated=counts and grads is None,
            cleared=grads is not None and grads.local_times_accumulated == 0,
            report=self._end.report if ended else None,
        )

    def _write_background_work(self) -> None:
        if not self.state_averager.averaging_in_progress:
            self.state_averager.step()

    def _take_batch(self, batch_size: int) -> bool:
        """Whether the batch counts."""
        if self.auxiliary:
            return False
        lacks_gradient = [parameter.grad is None for parameter in self.state_averager.main_parameters]
        if any(lacks_gradient):
            self._model.check(after_backward=True)
        if all(lacks_gradient):
            logger.warning(
                "%s: no parameter has a gradient: this step counts for nothing. Was backward() called?",
                self.run_id,
            )
            return False
        if self.grad_averager is not None:
            counts = self.grad_averager.accumulate_grads_(batch_size)
            self._samples = self.grad_averager.local_samples_accumulated
        else:
            counts = self._gradients_are_finite()
            if counts:
                self.state_averager.step(optimizer_step=True)
                self._samples += batch_size  # not before: it raises what the inner optimizer raises
        self.tracker.report_local_progress(self.local_epoch, self._samples)
        return counts

    def _unscale(self, grad_scaler: torch.amp.GradScaler) -> None:
        if not self.options.reuse_grad_buffers:
            unscale_once(self, grad_scaler)
            return
        scale = scale_of_sums(grad_scaler)
        if self.grad_averager is not None:  # at rank 0
            self.grad_averager.loss_scale = scale

    def _gradients_are_finite(self) -> bool:
        if are_finite(p.grad for p in self.state_averager.main_parameters if p.grad is not None):
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
        self._model.check()
        limit = self.options.load_state_timeout if timeout is None else timeout
        self._ranks.check_timeout(limit, self.options.load_state_timeout)
        with self._ended_if_ranks_part():
            return self._ranks.lead("load_state_from_peers()", lambda: self._load_state(limit, **options))

    def _load_state(self, timeout: float | None, **options: Any) -> bool:
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
                self.state_averager.step()  # the scheduler follows, before other ranks take the state over
            if loaded:
                self._begin_anew(others=1)
        logger.log(
            self.status_loglevel,  # the averager has said why not
            "%s: %s at epoch %d",
            self.run_id, "loaded the state" if loaded else "no state was loaded", self.local_epoch,
        )  # fmt: skip
        return loaded

    def at_rank_zero(self, call: str, work: Callable[[], Result]) -> Result:
        """Do some work at rank 0, such as to look at the tracker or to end delayed work. Not in hivemind.

        Among several ranks, this is a call of all: they get its result, or its error, and its changes of the model.

        :param call: what this is, for the error of a rank that makes another call
        """
        self._check_open()
        with self._ended_if_ranks_part():
            return self._ranks.lead(call, work)

    @contextlib.contextmanager
    def _alone_in_step(self) -> Iterator[None]:
        if not self._stepping.acquire(blocking=False):
            raise InvalidStateError("step() must be called by one thread at a time, and another one is in it")
        try:
            yield
        finally:
            self._stepping.release()

    @contextlib.contextmanager
    def _ended_if_ranks_part(self) -> Iterator[None]:
        """Without its other ranks this peer leaves the swarm."""
        try:
            yield
        finally:
            if self._ranks.parted:
                self.shutdown()

    def _is_alone(self) -> bool:
        return self.tracker.is_alone

    # others

    @property
    def opt(self) -> torch.optim.Optimizer:
        """The inner optimizer."""
        return self.state_averager.optimizer

    @property
    def ranks(self) -> int:
        """How many processes are this peer."""
        return self._ranks.size

    @property
    def local_progress(self) -> LocalTrainingProgress:
        """What this peer has reported."""
        return self.tracker.local_progress

    @property
    def use_gradient_averaging(self) -> bool:
        """Whether gradients are averaged."""
        return not self.use_local_updates

    @property
    def scheduled_grads(self) -> StepControl | None:
        """The gradient round that is prepared."""
        return None if self._rounds is None else self._rounds.scheduled

    def is_alive(self) -> bool:
        """Whether it can be used."""
        return not self._closed and self.state_averager.is_alive()

    def shutdown(self) -> None:
        """Withdraw this peer's progress, finish delayed work, and end the averagers; the DHT goes on. Idempotent.

        Call it at all ranks. It does not wait for the others, whose later calls fail.
        """
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as parts:  # in reverse order, and all of them, even if one fails
            parts.callback(self._ranks.leave)
            parts.callback(self._watchers.close)
            parts.callback(self.state_averager.shutdown)
            if self.grad_averager is not None:
                parts.callback(self.grad_averager.shutdown)
            if self._rounds is not None and self.grad_averager is not None and self.grad_averager.is_alive():
                parts.callback(self._rounds.drop, others=False)
            if self.scheduled_state is not None:
                parts.callback(self.scheduled_state.cancel)
            if self.state_averager.is_alive():
                parts.callback(self._finish_delayed)
            parts.callback(self.tracker.shutdown, self.options.shutdown_timeout)

    def _finish_delayed(self) -> None:
        try:
            self.state_averager.finish_delayed()
        except InvalidStateError as e:  # the model has been cast, for instance, and cannot take it
            logger.warning("%s: delayed work was not written: %s", self.run_id, e)

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
