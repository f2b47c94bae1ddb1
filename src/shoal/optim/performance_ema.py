"""How fast a peer works: a moving average of the seconds that one sample takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.errors import InvalidStateError
from shoal.utils.checks import check_flag, check_number
from shoal.utils.timed import steady_time


class PerformanceEMA:
    """An exponential moving average of seconds per sample, free of the bias of its first values.

    >>> speed = PerformanceEMA(alpha=0.1)
    >>> speed.update(32)  # 32 samples since the last update, or since it was made

    :param alpha: weight of the newest value, above 0 and at most 1
    :param eps: seconds per sample below which a value counts as this much, so that no speed is infinite
    :param paused: begin paused: time counts from the first :meth:`reset_timer`, or from the end of a :meth:`pause`
    :param clock: seconds of a clock that never jumps
    :raises InvalidTypeError: (a TypeError) a value is no number
    :raises InvalidValueError: (a ValueError) a value is out of range
    """

    def __init__(
        self,
        alpha: float = 0.1,
        eps: float = 1e-20,
        paused: bool = False,
        *,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self.alpha = check_number("alpha", alpha, above=0, maximum=1)
        self.eps = check_number("eps", eps, above=0)
        self.num_updates = 0
        """How many values the average holds."""
        self.ema_seconds_per_sample = 0.0
        """The average; 0 before the first update."""
        self.samples_per_second = 0.0
        """Its reciprocal; 0 before the first update."""
        self.paused = check_flag("paused", paused)
        """Whether time that passes counts for nothing."""
        self._clock = clock
        self._began = clock()
        self._sum = 0.0
        self._lock = threading.Lock()

    def update(self, task_size: float, interval: float | None = None) -> float:
        """Count ``task_size`` samples; returns the average number of samples per second.

        :param task_size: samples, above 0
        :param interval: seconds that they took; None: since the last update
        :raises InvalidStateError: it is paused, and no ``interval`` was given
        """
        task_size = check_number("task_size", task_size, above=0)
        if interval is None:
            if self.paused:
                raise InvalidStateError(
                    "update() needs an interval while time is paused: give one, or end the pause first"
                )
            now = self._clock()
            interval, self._began = now - self._began, now
        else:
            interval = check_number("interval", interval, minimum=0)
            self._began = self._clock()
        value = max(interval / task_size, self.eps)
        self._sum = self.alpha * value + (1 - self.alpha) * self._sum
        self.num_updates += 1
        self.ema_seconds_per_sample = self._sum / (1 - (1 - self.alpha) ** self.num_updates)
        self.samples_per_second = 1 / self.ema_seconds_per_sample
        return self.samples_per_second

    def reset_timer(self) -> None:
        """Time counts from now on: what passed since the last update is left out."""
        self._began = self._clock()
        self.paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, time counts for nothing; what had passed since the last update is kept."""
        was_paused, elapsed = self.paused, self._clock() - self._began
        self.paused = True
        try:
            yield
        finally:
            self.paused = was_paused
            self._began = self._clock() - elapsed

    @contextmanager
    def update_threadsafe(self, task_size: float) -> Iterator[None]:
        """Count ``task_size`` samples that the block inside processes, also while other threads do the same.

        Only one thread's block runs at a time. A block that fails counts for nothing.
        """
        with self._lock:
            began = self._clock()
            yield
            self.update(task_size, interval=self._clock() - began)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(samples_per_second={self.samples_per_second:.6g}, "
            f"num_updates={self.num_updates})"
        )
