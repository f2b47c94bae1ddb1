"""One peer of the demo: it trains a round, averages, and goes on, until all rounds are done.

Knows nothing of processes and pipes; :mod:`worker` runs it.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct

from shoal.averaging.commands import AveragingStage
from shoal.averaging.trainer.averager import DecentralizedAverager
from shoal.averaging.trainer.control import StepControl
from shoal.cli.demo import settings as limits
from shoal.cli.demo.board import Board, statuses_in
from shoal.cli.demo.data import Samples
from shoal.cli.demo.protocol import Assignment, Finished, Holding, Report, State, Status
from shoal.cli.demo.settings import Settings
from shoal.cli.demo.training import FOUNDERS_SEED, Trainer
from shoal.dht.dht import DHT
from shoal.dht.types import ValueWithExpiration
from shoal.errors import AllreduceException, ShoalError
from shoal.runtime.futures import MPFuture

POLL_SECONDS = 0.05
COUNT_INTERVAL = 0.5
PUBLISH_INTERVAL = 0.5
MAX_TRIES = 20
"""A round fails if a groupmate dies or no group is found: it is tried again, this many times in all."""


class Progress(Struct, frozen=True):
    """What a peer sends along with its tensors in every round, and with its state to a newcomer."""

    round: Annotated[int, Meta(ge=0, le=limits.MAX_ROUNDS)]


class Stopped(Exception):
    """The peer was told to leave."""


@dataclass
class Orders:
    """What the peer was told from outside; set on any thread."""

    stop: threading.Event
    hold: threading.Event


class SharingAverager(DecentralizedAverager):
    """An averager whose state is what the last round has left, with the number of rounds done."""

    def __init__(self, tensors: Sequence[torch.Tensor], dht: DHT, **options: Any) -> None:
        self.latest: tuple[int, list[torch.Tensor]] | None = None
        super().__init__(tensors, dht, **options)

    def get_current_state(self) -> tuple[Any, Sequence[torch.Tensor]]:
        if self.latest is None:
            raise ShoalError("this peer has not averaged yet")
        round_, tensors = self.latest
        return msgspec.to_builtins(Progress(round_)), tensors


class Peer:
    """Trains and averages; reports every change of its status.

    :param report: called with each report, on the thread that runs the peer
    """

    def __init__(
        self,
        assignment: Assignment,
        samples: Samples,
        held_out: Samples,
        dht: DHT,
        orders: Orders,
        report: Callable[[Report], None],
    ) -> None:
        self._settings: Settings = assignment.settings
        self._orders = orders
        self._report = report
        self._board = Board(dht)
        self._held_out = held_out
        self._samples = samples
        self._trainer = Trainer(
            samples,
            assignment.settings,
            model_seed=assignment.seed if assignment.newcomer else FOUNDERS_SEED,
            data_seed=assignment.seed,
        )
        self._dht = dht
        self._headcount = Headcount(self._board, assignment.settings)
        self._group_size = assignment.settings.peers
        self._latest = (0, self._trainer.copy_tensors())
        self._catching_up = assignment.newcomer
        self._averager = self._make_averager()
        self._rounds_averaged = 0
        self._next_publication = 0.0
        self.status = Status(assignment.name, str(dht.peer_id), assignment.part, samples.classes, State.READY)

    def _make_averager(self) -> SharingAverager:
        averager = SharingAverager(
            self._trainer.tensors,
            self._dht,
            start=True,
            prefix=self._settings.prefix,
            target_group_size=self._group_size,
            min_matchmaking_time=self._settings.matchmaking_time,
            request_timeout=self._settings.request_timeout,
            allow_state_sharing=not self._catching_up,
        )
        averager.latest = self._latest
        return averager

    def _fit_group_size(self) -> None:
        """A group should be full, and so begin at once, when all peers of the swarm are in it: no more, no fewer."""
        size = self._headcount.latest()
        if size != self._group_size:
            self._group_size = size
            self._averager.shutdown()
            self._averager = self._make_averager()

    def close(self) -> None:
        self._averager.shutdown()

    def run(self) -> Finished:
        """All rounds.

        :raises Stopped: told to leave before the end
        :raises ShoalError: something is wrong with the swarm or this peer
        """
        if self._catching_up:
            self._show(state=State.CATCHING_UP, accuracy=self._trainer.accuracy(self._held_out))
            self._catch_up()
        else:
            self._show(accuracy=self._trainer.accuracy(self._held_out))
        while self.status.round < self._settings.rounds and self._run_round():
            pass
        self._show(state=State.FINISHED)
        accuracy = self._trainer.accuracy(self._held_out)
        return Finished(accuracy, self._rounds_averaged)

    def _catch_up(self) -> None:
        """Take over the state of a peer that trains.

        :raises ShoalError: no peer gave one
        """
        for _ in range(MAX_TRIES):
            loading = self._averager.load_state_from_peers(wait=False, timeout=self._settings.round_timeout)
            assert isinstance(loading, MPFuture), "wait=False gives a future"
            while not self._is_done(loading):
                pass
            state = loading.result()
            if state is not None:
                try:
                    progress = msgspec.convert(state[0], Progress)
                except msgspec.ValidationError as error:
                    raise ShoalError(f"a peer gave a state that is not of this demo: {error}") from error
                self._trainer.restore_tensors(state[1])
                self._catching_up = False
                self._keep(progress.round)
                self._averager.allow_state_sharing = True
                self._show(
                    state=State.TRAINING,
                    round=progress.round,
                    accuracy=self._trainer.accuracy(self._held_out),
                )
                return
            if self._demo_is_over():
                break
        raise ShoalError("no peer gave its state to this one, or the others had done all their rounds")

    def _keep(self, round_: int) -> None:
        """What a newcomer gets, and what a round that nobody averages goes back to."""
        self._latest = self._averager.latest = (round_, self._trainer.copy_tensors())

    def _run_round(self) -> bool:
        """Train and average.

        :returns: False if the others have done all rounds without this peer, so that nobody is left to average with
        """
        self._fit_group_size()
        round_ = self.status.round
        self._show(state=State.TRAINING)
        loss = self._trainer.train(round_, self._settings.local_steps)
        began = time.monotonic()
        for _ in range(MAX_TRIES):
            control = self._average(round_)
            error = control.exception()
            if error is None:
                self._finish_round(control, loss, time.monotonic() - began)
                return True
            if not isinstance(error, AllreduceException):
                raise error
            if self._demo_is_over():
                # What was learnt since the last average is biased to the peer's own images.
                self._trainer.restore_tensors(self._latest[1])
                return False
        raise ShoalError(f"round {round_ + 1} failed {MAX_TRIES} times; the last time: {error}") from error

    def _finish_round(self, control: StepControl, loss: float, seconds: float) -> None:
        report = control.report
        assert report is not None, "a step that succeeded has a report"
        done = latest_round(control.result(), self._settings.rounds, self.status.round) + 1
        self._rounds_averaged += 1
        self._keep(done)
        self._show(
            round=done,
            group=len(report.members),
            loss=loss,
            accuracy=self._trainer.accuracy(self._held_out),
            nbytes=self.status.nbytes + report.bytes_sent + report.bytes_received,
            seconds=seconds,
        )

    def _average(self, round_: int) -> StepControl:
        """One step of averaging, done when it returns; its tensors are unchanged if it failed."""
        control = self._averager.step(
            gather=msgspec.to_builtins(Progress(round_)),
            weight=float(len(self._samples)),
            timeout=self._settings.round_timeout,
            allow_retries=False,  # the next try is a step of its own, with a start time of its own
            wait=False,
        )
        assert isinstance(control, StepControl), "wait=False gives a StepControl"
        if self._orders.hold.is_set():
            self._hold(control, round_)
        while not self._is_done(control):
            self._show_stage(control.stage)
        return control

    def _hold(self, control: StepControl, round_: int) -> None:
        """Hold the tensors, so that the round cannot go on; returns only if the round fails or the peer is stopped."""
        with self._averager.get_tensors():
            while not self._is_done(control):
                if control.stage is AveragingStage.RUNNING_ALLREDUCE and self._orders.hold.is_set():
                    self._orders.hold.clear()
                    self._show_stage(control.stage)
                    self._report(Holding(round_, self.status.group))

    def _is_done(self, future: concurrent.futures.Future[Any]) -> bool:
        if self._orders.stop.is_set():
            future.cancel()
            raise Stopped
        concurrent.futures.wait([future], timeout=POLL_SECONDS)
        self._publish()
        return future.done()

    def _demo_is_over(self) -> bool:
        statuses = self._board.read_statuses(self._settings.prefix)
        return any(status.state is State.FINISHED for status in statuses)

    def _show_stage(self, stage: AveragingStage) -> None:
        state = State.AVERAGING if stage is AveragingStage.RUNNING_ALLREDUCE else State.SEARCHING
        if state is not self.status.state:
            self._show(state=state)

    def _show(self, **changes: Any) -> None:
        self.status = msgspec.structs.replace(self.status, **changes)
        self._report(self.status)
        self._publish()

    def _publish(self) -> None:
        """Put the status on the board, now and then."""
        now = time.monotonic()
        if now >= self._next_publication or self.status.state.is_final:
            self._next_publication = now + PUBLISH_INTERVAL
            published = self._board.publish_status(self._settings.prefix, self.status)
            if self.status.state.is_final:
                published.result()


class Headcount:
    """How many peers the swarm has, by the board; asked for now and then, and never waited for."""

    def __init__(self, board: Board, settings: Settings) -> None:
        self._board = board
        self._settings = settings
        self._count = settings.peers
        self._asked_at = time.monotonic()
        self._answer: concurrent.futures.Future[ValueWithExpiration | None] | None = None

    def latest(self) -> int:
        """The last count; at least 2, as many as an average takes.

        :raises ShoalError: the DHT does not work any more
        """
        if self._answer is not None and self._answer.done():
            statuses = statuses_in(self._answer.result())
            self._count = max(limits.MIN_PEERS, sum(status.state.averages for status in statuses))
            self._answer = None
        if self._answer is None and time.monotonic() - self._asked_at > COUNT_INTERVAL:
            self._asked_at = time.monotonic()
            self._answer = self._board.request_statuses(self._settings.prefix)
        return self._count


def latest_round(gathered: dict[Any, Any], rounds: int, own: int) -> int:
    """The round that a group has done, by the most advanced of its members; at least this peer's own.

    What members gather is theirs to choose: values that make no sense are passed over.
    """
    latest = own
    for value in gathered.values():
        try:
            round_ = msgspec.convert(value, Progress).round
        except msgspec.ValidationError:
            continue
        if round_ < rounds:
            latest = max(latest, round_)
    return latest
