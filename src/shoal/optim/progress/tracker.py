"""What an optimizer holds: it takes reports, and knows when the swarm's epoch is over.

A thread of the trainer's process sleeps until the agenda has something. The work is done in the DHT's background
process (:mod:`.records`), from which a few numbers come back. Reports only change fields: they never wait for the DHT.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from shoal.dht.dht import DHT
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError, ShoalError
from shoal.optim.performance_ema import PerformanceEMA
from shoal.optim.progress.calls import Exchange, Withdraw
from shoal.optim.progress.forecast import Forecast, Periods
from shoal.optim.progress.ledger import Ledger
from shoal.optim.progress.values import (
    MAX_AGE,
    MAX_EPOCH,
    MAX_RATE,
    MAX_SAMPLES,
    GlobalTrainingProgress,
    LocalTrainingProgress,
    ProgressRecord,
)
from shoal.runtime.futures import MPFuture
from shoal.utils.checks import Count, Text, check_flag, check_number
from shoal.utils.timed import get_dht_time, steady_time

logger = logging.getLogger(__name__)

CALL_TIMEOUT = 30.0
"""Seconds after which a call to the DHT's process counts as failed."""
END_TIMEOUT = 5.0
"""Seconds that the shutdown of a tracker takes at most."""
MAX_SLEEP = 1.0
"""Seconds after which the thread sees whether its tracker is still there."""


class ProgressTracker:
    """This peer's progress, told to the swarm, and the swarm's progress, read from the DHT.

    >>> tracker = ProgressTracker(dht, prefix="my_run", target_batch_size=4096, start=True)
    >>> tracker.report_local_progress(tracker.local_progress.epoch, samples_accumulated=32)
    >>> if tracker.ready_to_update_epoch:
    ...     with tracker.pause_updates():
    ...         tracker.update_epoch()

    An epoch is over when the samples that peers have reported reach ``target_batch_size``, or when other peers are
    ahead. The estimated time of its end is for preparations only. Peers that have reported no samples in this epoch and
    the one before, such as auxiliaries, are not counted. All times of a public attribute are DHT time, in seconds.

    :param dht: a running DHT, in whose process the records of progress are stored and read
    :param prefix: name of the run: peers with the same one train together
    :param target_batch_size: samples of one epoch, of all peers together
    :param client_mode: whether this peer accepts no connections: its epoch alone moves nobody. None: as the DHT
    :param min_refresh_period: seconds between two looks at others' progress at least
    :param max_refresh_period: seconds between two looks at most
    :param default_refresh_period: seconds between two looks as long as no speed is known
    :param expected_drift_peers: so many peers may join before an epoch ends, for which it looks earlier
    :param expected_drift_rate: the same as a share of the peers; the larger number counts
    :param performance_ema_alpha: smoothing of the own speed, see :class:`~shoal.optim.PerformanceEMA`
    :param metadata_expiration: seconds after which the record of a peer that has died is forgotten
    :param status_loglevel: at which level each look is logged
    :param private_key: of no effect: records are signed by the DHT's identity
    :param daemon: whether the interpreter ends although this is not shut down
    :param start: begin at once, otherwise by :meth:`run_in_background`
    :raises InvalidTypeError: (a TypeError) a value is of the wrong type
    :raises InvalidValueError: (a ValueError) a value is out of range
    """

    def __init__(
        self,
        dht: DHT,
        prefix: str,
        target_batch_size: int,
        *,
        client_mode: bool | None = None,
        min_refresh_period: float = 0.1,
        max_refresh_period: float = 10,
        default_refresh_period: float = 3,
        expected_drift_peers: float = 3,
        expected_drift_rate: float = 0.2,
        performance_ema_alpha: float = 0.1,
        metadata_expiration: float = 60.0,
        status_loglevel: int = logging.DEBUG,
        private_key: Any = None,
        daemon: bool = True,
        start: bool,
    ) -> None:
        if not isinstance(dht, DHT):
            raise InvalidTypeError(f"dht must be a shoal.DHT, got {dht!r}")
        self.dht, self.prefix = (
            dht,
            Text("a text that is not empty", _check_not_empty).check("prefix", prefix),
        )
        self.target_batch_size: int = Count(1, MAX_SAMPLES).check("target_batch_size", target_batch_size)
        self._client_mode = None if client_mode is None else check_flag("client_mode", client_mode)
        minimum = check_number("min_refresh_period", min_refresh_period, above=0)
        maximum = check_number("max_refresh_period", max_refresh_period, minimum=minimum)
        self._periods = Periods(
            minimum=minimum,
            maximum=maximum,
            default=check_number("default_refresh_period", default_refresh_period, above=0),
            drift_peers=check_number("expected_drift_peers", expected_drift_peers, minimum=0),
            drift_rate=check_number("expected_drift_rate", expected_drift_rate, minimum=0),
        )
        self._lifetime = check_number("metadata_expiration", metadata_expiration, above=0, maximum=MAX_AGE)
        self.status_loglevel = status_loglevel
        self.performance_ema = PerformanceEMA(alpha=performance_ema_alpha)
        self.fetched_global_progress_this_epoch = threading.Event()
        """Set when others' progress was read after this epoch began."""
        self._name = secrets.token_hex(8)
        self._state = threading.Condition()
        self._ledger = Ledger(self.target_batch_size, self._periods, steady_time())
        self._pauses = self._failures = 0
        self._left_alone = False
        self._found_in_pause: tuple[Forecast, float] | None = None
        """What the last look in a pause has found in this epoch, and when."""
        self._deserted: Forecast | None = None
        """The last look, if it has found that all others are gone: that does not wait for the end of a pause."""
        self._ended = False
        self._thread: threading.Thread | None = None
        self._daemon = check_flag("daemon", daemon)
        if check_flag("start", start):
            self.run_in_background()

    # Life

    def run_in_background(self) -> None:
        """Begin; for a tracker made with ``start=False``. Waits for nothing.

        :raises InvalidStateError: it was started before
        """
        with self._state:
            if self._thread is not None or self._ended:
                raise InvalidStateError("a tracker can be started once: make another one")
            self._thread = threading.Thread(
                target=_run,
                args=(
                    weakref.ref(self),
                    self._state,
                    weakref.ref(self.dht),
                    Withdraw(self.prefix, self._name),
                ),
                name="shoal-progress",
                daemon=self._daemon,
            )
            self._thread.start()

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._thread is not None and self._thread.is_alive() and not self._ended

    def shutdown(self, timeout: float | None = None) -> None:
        """End, and withdraw this peer's record. Idempotent; the DHT runs on.

        :param timeout: seconds to wait at most; None: 5. What is open then expires by itself
        """
        limit = END_TIMEOUT if timeout is None else check_number("timeout", timeout, minimum=0)
        deadline = steady_time() + limit
        with self._state:
            thread = None if self._ended else self._thread
            self._ended = True
            self._state.notify_all()
        if thread is None:
            return
        thread.join(limit)  # an exchange under way would bring the record back
        try:
            future = _withdraw(self.dht, Withdraw(self.prefix, self._name))
            if future is not None:
                future.result(max(0.0, deadline - steady_time()))
        except (ShoalError, TimeoutError, CancelledError) as error:
            logger.debug("the progress of %s was not withdrawn, and will expire: %s", self.prefix, error)

    # What is known

    @property
    def client_mode(self) -> bool:
        """As given, or as the DHT is now."""
        return self.dht.client_mode if self._client_mode is None else self._client_mode

    @property
    def local_progress(self) -> LocalTrainingProgress:
        """What this peer has reported."""
        with self._state:
            time = get_dht_time() - (steady_time() - self._ledger.reported_at)
            values = (self._ledger.epoch, self._ledger.samples, self._ledger.rate, time)
        return LocalTrainingProgress(self.dht.peer_id.to_bytes(), *values, client_mode=self.client_mode)

    @property
    def global_progress(self) -> GlobalTrainingProgress:
        """What all peers have reported, as far as it is known here. Before the first look: the own progress."""
        with self._state:
            now, ledger, forecast = get_dht_time() - steady_time(), self._ledger, self._ledger.forecast
            present = self._deserted or forecast
            return GlobalTrainingProgress(
                epoch=forecast.epoch,
                samples_accumulated=forecast.samples(ledger.epoch, ledger.samples),
                target_batch_size=self.target_batch_size,
                num_peers=present.num_peers,
                num_clients=present.num_clients,
                eta_next_epoch=now + ledger.forecast_at + forecast.eta,
                next_fetch_time=now + max(ledger.agenda.next_look, ledger.forecast_at),
            )

    @property
    def global_epoch(self) -> int:
        """The epoch of the swarm."""
        return self.global_progress.epoch

    @property
    def ready_to_update_epoch(self) -> bool:
        """Whether this peer is to end its epoch now: its samples are complete, or others are ahead."""
        with self._state:
            return self._ledger.is_over()

    @property
    def left_alone(self) -> bool:
        """Whether the last look, also in a pause, has found that no other peer is in this epoch any more: the swarm is
        ahead, and all others are in other epochs, or they have ended.

        A peer that waits for a group of its epoch waits in vain then.
        """
        with self._state:
            return self._left_alone

    @property
    def others_are_gone(self) -> bool:
        """Whether the last look, also in a pause, has found that all other peers have ended."""
        with self._state:
            return self._deserted is not None

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to average with, as far as is known."""
        return self.global_progress.num_peers <= 1

    @property
    def estimated_next_update_time(self) -> float:
        """DHT time at which the epoch will be over: now if it is; infinite as long as no speed is known."""
        if self.ready_to_update_epoch:
            return get_dht_time()
        return self.global_progress.eta_next_epoch

    # What is reported

    def report_local_progress(
        self, local_epoch: int, samples_accumulated: int, update_global_samples: bool = True
    ) -> None:
        """Take this peer's progress; returns at once.

        :param samples_accumulated: samples in this epoch in total; fewer than before after a reset
        :param update_global_samples: of no effect: own samples always count at once
        """
        epoch = Count(0, MAX_EPOCH).check("local_epoch", local_epoch)
        samples = Count(0, MAX_SAMPLES).check("samples_accumulated", samples_accumulated)
        with self._state:
            if epoch != self._ledger.epoch:
                self._begin(epoch)
            extra, rate = samples - self._ledger.samples, self._ledger.rate
            if extra > 0 and not self.performance_ema.paused:
                rate = min(self.performance_ema.update(extra), MAX_RATE)
            elif extra < 0 and not self.performance_ema.paused:
                self.performance_ema.reset_timer()
            self._ledger.report(samples, rate, steady_time())
            self._state.notify_all()

    @contextmanager
    def pause_updates(self) -> Iterator[None]:
        """While an epoch ends: the swarm's progress stands still, and time counts for nothing.

        Looks go on, for :attr:`left_alone`. If no epoch has begun, what the last one has found counts from the end on.
        """
        with self._state:
            self._pauses += 1
        try:
            with self.performance_ema.pause():
                yield
        finally:
            with self._state:
                self._pauses -= 1
                if not self._pauses and self._found_in_pause is not None:
                    found, at = self._found_in_pause
                    self._take(found, self._ledger.epochs_begun, at)
                self._state.notify_all()

    def update_epoch(self, new_epoch: int | None = None, *, others: int = 0) -> int:
        """Begin an epoch with no samples; returns it. Only inside :meth:`pause_updates`.

        :param new_epoch: None: the next one
        :param others: other peers that exist for certain, such as one that has sent its state; a newcomer may have
            it before its first look
        :raises InvalidStateError: it is not paused
        """
        with self._state:
            if not self._pauses:
                raise InvalidStateError("update_epoch() must be called inside `with tracker.pause_updates()`")
            epoch = self._ledger.epoch + 1 if new_epoch is None else new_epoch
            self._begin(Count(0, MAX_EPOCH).check("new_epoch", epoch), others)
            return self._ledger.epoch

    # Inside; with the lock

    def _begin(self, epoch: int, others: int = 0) -> None:
        known = self._found_in_pause and self._found_in_pause[0]
        self._ledger.begin(epoch, steady_time(), known, others)
        self._left_alone = False
        self._found_in_pause = None
        self.fetched_global_progress_this_epoch.clear()

    def _take(self, found: Forecast, begun: int, at: float) -> bool:
        """What a look at ``at`` has found counts, unless its epoch is gone."""
        self._found_in_pause = None
        if not self._ledger.found(found, begun, at):
            return False
        self._failures = 0
        self.fetched_global_progress_this_epoch.set()
        return True

    def _next_call(self) -> tuple[Callable[[], None] | None, float | None]:
        """What the thread does next outside of the lock, or for how many seconds it sleeps."""
        now, ledger, agenda = steady_time(), self._ledger, self._ledger.agenda
        wakes_at = agenda.wakes_at()
        if wakes_at > now:
            return None, None if math.isinf(wakes_at) else wakes_at - now
        tell, look = agenda.tells_at() <= now, agenda.next_look <= now
        if tell:
            agenda.told(now)
        own = ledger.record(client_mode=False, age=0.0)
        begun, reported_at = ledger.epochs_begun, ledger.reported_at
        return (lambda: self._exchange(own, reported_at, begun, tell=tell, look=look)), None

    # Inside; on the thread, without the lock

    def _exchange(
        self, own: ProgressRecord, reported_at: float, begun: int, *, tell: bool, look: bool
    ) -> None:
        try:
            own = replace(own, client_mode=self.client_mode)
            exchange = Exchange(
                self.prefix, self._name, own, reported_at, self.target_batch_size, self._lifetime,
                self._periods, tell, look,
            )  # fmt: skip
            found = self.dht.run_coroutine(exchange, return_future=True).result(CALL_TIMEOUT)
        except (ShoalError, TimeoutError, CancelledError) as error:
            self._failed(error, tell=tell)
            return
        if found is not None:
            self._found(found, begun)

    def _found(self, found: Forecast, begun: int) -> None:
        with self._state:
            if begun == self._ledger.epochs_begun:
                is_behind = found.epoch > self._ledger.epoch and not found.companions
                self._left_alone = is_behind or found.others_are_gone
            self._deserted = found if found.others_are_gone else None
            now = steady_time()
            if self._pauses and begun == self._ledger.epochs_begun:
                self._ledger.agenda.looked(now, found)
                self._found_in_pause = found, now
                return
            if not self._take(found, begun, now):
                return
            self._state.notify_all()
        logger.log(self.status_loglevel, "%s: %s", self.prefix, found)

    def _failed(self, error: Exception, *, tell: bool) -> None:
        with self._state:
            self._ledger.agenda.failed(steady_time(), self._periods.default)
            self._found_in_pause = None
            if tell:
                self._ledger.agenda.report(urgent=False)
            self._ended = self._ended or not self.dht.is_alive()
            self._failures += 1
            ending = isinstance(error, InvalidStateError | CancelledError)  # of the DHT, as after Ctrl+C
            is_news = self._failures == 1 and not (self._ended or ending)
        logger.log(
            logging.WARNING if is_news else logging.DEBUG,
            "the progress of %s could not be exchanged, it is tried again: %s: %s",
            self.prefix, type(error).__name__, error,
        )  # fmt: skip


def _run(
    owner: weakref.ref[ProgressTracker],
    state: threading.Condition,
    dht: weakref.ref[DHT],
    withdraw: Withdraw,
) -> None:
    """The thread: holds no reference to the tracker while it sleeps, so that one that is dropped ends."""
    while True:
        with state:
            tracker = owner()
            if tracker is None:
                break
            if tracker._ended:
                return
            call, pause = tracker._next_call()
            if call is None:
                del tracker
                state.wait(MAX_SLEEP if pause is None else min(pause, MAX_SLEEP))
                continue
        call()
        del call, tracker
    node = dht()
    if node is not None:
        with contextlib.suppress(ShoalError):
            _withdraw(node, withdraw)


def _withdraw(dht: DHT, withdraw: Withdraw) -> MPFuture[None] | None:
    """Returns at once; None if the DHT has ended, and the record with it."""
    return dht.run_coroutine(withdraw, return_future=True) if dht.is_alive() else None


def _check_not_empty(name: str, value: str) -> None:
    if not value:
        raise InvalidValueError(f"{name} must be a text that is not empty, got {value!r}")
