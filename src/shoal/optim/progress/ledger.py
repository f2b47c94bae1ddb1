"""What one peer knows of its epoch, and what follows from reports and looks. Pure: times are arguments.

The tracker holds one under its lock, and so does each peer of the simulator.
"""

from __future__ import annotations

import math

from shoal.optim.progress.agenda import Agenda
from shoal.optim.progress.forecast import Forecast, Periods
from shoal.optim.progress.values import ProgressRecord


class Ledger:
    """Times are those of one steady clock, in seconds."""

    def __init__(self, target: int, periods: Periods, now: float) -> None:
        self.target = target
        self.agenda = Agenda(periods.minimum)
        self.forecast = Forecast(0, 0, 1, 0, math.inf, periods.default, periods.minimum)
        self.forecast_at = self.reported_at = now
        self.epoch = self.samples = self.samples_before = 0
        self.rate = 0.0
        """Samples per second."""
        self.epochs_begun = 0

    def is_over(self) -> bool:
        """Whether the own epoch is to end now."""
        return self.forecast.is_over(self.epoch, self.samples, self.target)

    def report(self, samples: int, rate: float, now: float) -> None:
        """This peer has processed so many samples of its epoch in total."""
        was_over = self.is_over()
        if rate and not self.rate and math.isinf(self.forecast.eta):
            self.agenda.look_soon()  # the first speed that is known
        self.samples, self.rate, self.reported_at = samples, rate, now
        self.agenda.report(urgent=self.is_over() and not was_over)

    def begin(self, epoch: int, now: float, known: Forecast | None = None, others: int = 0) -> None:
        """Begin an epoch without samples. If it is the next one, those of the last one are told once more.

        :param known: what a look has found that did not count yet; its peers are those of the new epoch, too
        :param others: other peers that exist for certain, whatever looks have found
        """
        self.samples_before = self.samples if epoch == self.epoch + 1 else 0
        self.epoch, self.samples, self.reported_at = epoch, 0, now
        self.epochs_begun += 1
        if epoch > self.forecast.epoch:
            known = known or self.forecast
            eta = self.target / self.rate if self.rate else math.inf
            self.forecast = Forecast(
                epoch, 0, max(known.num_peers, others + 1), known.num_clients, eta, known.pace, known.pace
            )
            self.forecast_at = now
        self.agenda.report(urgent=True)
        self.agenda.look_soon()

    def found(self, forecast: Forecast, begun: int, now: float) -> bool:
        """Take what a look gave that began when :attr:`epochs_begun` was ``begun``; false if that epoch is gone."""
        if begun != self.epochs_begun:
            return False  # the next look is due already
        was_over = self.is_over()
        self.forecast, self.forecast_at = forecast, now
        self.agenda.looked(now, forecast)
        if self.is_over() and not was_over:
            self.agenda.report(urgent=True)
        return True

    def record(self, *, client_mode: bool, age: float) -> ProgressRecord:
        """What others are told; ``age``: seconds since the report."""
        return ProgressRecord(
            self.epoch, self.samples, self.samples_before, self.rate, age, client_mode=client_mode
        )
