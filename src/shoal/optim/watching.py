"""What is told of each epoch: a record, a progress bar, and what the user gave."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeAlias

from shoal.optim.progress.values import GlobalTrainingProgress
from shoal.optim.progress_bar import ProgressBar
from shoal.optim.record import RunRecord
from shoal.optim.report import EpochReport

OnEpoch: TypeAlias = Callable[[EpochReport], object]


class Watchers:
    """What looks at the epochs of one optimizer.

    :param record: the file of a :class:`~shoal.optim.record.RunRecord`; None: there is none
    :param bar: None: there is none
    :param on_epoch: called with each report, on the thread that calls ``step()``; its errors are the step's
    """

    def __init__(
        self, record: str | os.PathLike[str] | None, bar: ProgressBar | None, on_epoch: OnEpoch | None
    ) -> None:
        self._bar = bar
        self._on_epoch = [
            one for one in (None if record is None else RunRecord(record), on_epoch) if one is not None
        ]

    def step(self, progress: Callable[[], GlobalTrainingProgress]) -> None:
        """A step has been taken; ``progress`` is asked only if somebody looks."""
        if self._bar is not None:
            self._bar.show(progress())

    def epoch(self, report: EpochReport) -> None:
        """An epoch has ended."""
        if self._bar is not None:
            self._bar.note(report)
        for call in self._on_epoch:
            call(report)

    def close(self) -> None:
        """Idempotent."""
        if self._bar is not None:
            self._bar.close()
