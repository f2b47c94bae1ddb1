"""How far the swarm is in its epoch, as one line of a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from shoal.optim.progress.values import GlobalTrainingProgress
from shoal.optim.report import EpochReport
from shoal.utils import figures
from shoal.utils.timed import steady_time

REFRESH_PERIOD = 0.1
"""Seconds between two pictures at least."""


class ProgressBar:
    """Drawn on the standard error by calls alone: no thread, and nothing if that is no terminal."""

    def __init__(self, run_id: str, target: int, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn(
                "{task.completed:.0f}/{task.total:.0f} samples, {task.fields[peers]}{task.fields[last]}"
            ),
            console=console or Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._run_id = run_id
        self._task = self._progress.add_task(self._title(0), total=target, peers="1 peer", last="")
        self._drawn_at = float("-inf")
        self._progress.start()

    def show(self, progress: GlobalTrainingProgress) -> None:
        """Show what is known now."""
        now = steady_time()
        if now < self._drawn_at + REFRESH_PERIOD:
            return
        self._drawn_at = now
        count = progress.num_peers
        self._progress.update(
            self._task,
            description=self._title(progress.epoch),
            completed=min(progress.samples_accumulated, progress.target_batch_size),
            peers=f"{count} peer{'' if count == 1 else 's'}",
        )
        self._progress.refresh()

    def note(self, report: EpochReport) -> None:
        """An epoch has ended: show how long it took and, if there is one, its loss."""
        loss = "" if report.loss is None else f", loss {report.loss:.4g}"
        took = figures.duration(report.seconds["epoch"]) if "epoch" in report.seconds else ""
        self._progress.update(self._task, last=f"; last epoch {took}{loss}" if took or loss else "")
        self._drawn_at = float("-inf")

    def close(self) -> None:
        """Take it away. Idempotent."""
        self._progress.stop()

    def _title(self, epoch: int) -> str:
        return f"{self._run_id}: epoch {epoch}"
