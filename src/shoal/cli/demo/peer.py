"""One peer of the demo: it trains a round, averages, and goes on, until all rounds are done.

Knows nothing of processes and pipes; :mod:`worker` runs it.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from shoal.averaging.averager import DecentralizedAverager
from shoal.averaging.control import AveragingStage, StepControl
from shoal.cli.demo import settings as limits
from shoal.cli.demo.board import Board, statuses_in
from shoal.cli.demo.data import Samples
from shoal.cli.demo.protocol import Assignment, Finished, Holding, Report, State, Status
from shoal.cli.demo.settings import Settings
from shoal.cli.demo.training import FOUNDERS_SEED, Trainer
from shoal.dht.dht import DHT
from shoal.dht.types import ValueWithExpiration
from shoal.errors import AllreduceException, ShoalError

POLL_SECONDS = 0.05
COUNT_INTERVAL = 1.0
NEWCOMER_WEIGHT = 1e-6
"""What a newcomer's image counts in its first average, relative to the others': it takes over the swarm's average and
leaves it as it is. (Downloading the state of another peer would do the same without a round; Shoal can't do it yet.)"""
PUBLISH_INTERVAL = 0.5
MAX_TRIES = 20
"""A round fails if a groupmate dies or no group is found: it is tried again, this many times in all."""


class Contribution(Struct, frozen=True):
    """What a peer sends along with its tensors in every round."""

    round: Annotated[int, Meta(ge=0)]
    newcomer: bool


class Stopped(Exception):
    """The peer was told to leave."""


@dataclass
class Orders:
    """What the peer was told from outside; set on any thread."""

    stop: threading.Event
    hold: threading.Event


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
        self._averager = self._make_averager()
        self._newcomer = assignment.newcomer
        self._rounds_averaged = 0
        self._next_publication = 0.0
        self.status = Status(assignment.name, str(dht.peer_id), assignment.part, samples.classes, State.READY)

    def _make_averager(self) -> DecentralizedAverager:
        return DecentralizedAverager(
            self._trainer.tensors,
            self._dht,
            start=True,
            prefix=self._settings.prefix,
            target_group_size=self._group_size,
            min_matchmaking_time=self._settings.matchmaking_time,
            request_timeout=self._settings.request_timeout,
        )

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
        self._show(accuracy=self._trainer.accuracy(self._held_out))
        while self.status.round < self._settings.rounds and self._run_round():
            pass
        if self._newcomer:
            raise ShoalError("the others did all their rounds before this peer could average with them")
        self._show(state=State.FINISHED)
        accuracy = self._trainer.accuracy(self._held_out)
        return Finished(accuracy, self._rounds_averaged)

    def _run_round(self) -> bool:
        """Train and average.

        :returns: False if the others have done all rounds without this peer, so that nobody is left to average with
        """
        self._fit_group_size()
        round_ = self.status.round
        # What was learnt since the last average is biased to the peer's own images: given up if nobody averages it.
        averaged = self._trainer.copy_tensors()
        loss = None
        if self._newcomer:
            self._show(state=State.CATCHING_UP)
        else:
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
                self._trainer.restore_tensors(averaged)
                return False
        raise ShoalError(f"round {round_ + 1} failed {MAX_TRIES} times; the last time: {error}") from error

    def _finish_round(self, control: StepControl, loss: float | None, seconds: float) -> None:
        report = control.report
        assert report is not None, "a step that succeeded has a report"
        round_ = latest_round(control.result(), self._settings.rounds)
        if round_ is not None:  # else all members are newcomers, and none has anything to take over
            self._newcomer = False
            self._rounds_averaged += 1
        self._show(
            round=self.status.round if round_ is None else round_ + 1,
            group=len(report.members),
            loss=loss,
            accuracy=self._trainer.accuracy(self._held_out),
            nbytes=self.status.nbytes + report.bytes_sent + report.bytes_received,
            seconds=seconds,
        )

    def _average(self, round_: int) -> StepControl:
        """One step of averaging, done when it returns; its tensors are unchanged if it failed."""
        weight = float(len(self._samples))
        control = self._averager.step(
            gather=msgspec.to_builtins(Contribution(round_, self._newcomer)),
            weight=weight * NEWCOMER_WEIGHT if self._newcomer else weight,
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

    def _is_done(self, control: StepControl) -> bool:
        if self._orders.stop.is_set():
            control.cancel()
            raise Stopped
        concurrent.futures.wait([control], timeout=POLL_SECONDS)
        self._publish()
        return control.done()

    def _demo_is_over(self) -> bool:
        statuses = self._board.read_statuses(self._settings.prefix)
        return any(status.state is State.FINISHED for status in statuses)

    def _show_stage(self, stage: AveragingStage) -> None:
        if self._newcomer:
            return
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
            self._count = max(limits.MIN_PEERS, sum(not status.state.is_final for status in statuses))
            self._answer = None
        if self._answer is None and time.monotonic() - self._asked_at > COUNT_INTERVAL:
            self._asked_at = time.monotonic()
            self._answer = self._board.request_statuses(self._settings.prefix)
        return self._count


def latest_round(gathered: dict[Any, Any], rounds: int) -> int | None:
    """The round that a group has done, by the most advanced of its members that train; None: all are newcomers.

    What members gather is theirs to choose: values that make no sense are passed over.
    """
    found = []
    for value in gathered.values():
        try:
            contribution = msgspec.convert(value, Contribution)
        except msgspec.ValidationError:
            continue
        if not contribution.newcomer and contribution.round < rounds:
            found.append(contribution.round)
    return max(found, default=None)
