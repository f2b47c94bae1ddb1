"""The bar that shows how far a download is, for whoever asked for one."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ProgressBar:
    """One bar on stderr, from the first :meth:`update` until :meth:`complete` or :meth:`stop`. Methods may be
    called on any thread.
    """

    def __init__(self, prefix: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(f"state of {prefix}", total=None)
        self._lock = threading.Lock()
        self._is_shown = self._has_ended = False

    def update(self, donor: str, received: int, total: int) -> None:
        """``received`` of ``total`` bytes have come from ``donor``; ignored once the bar has ended."""
        with self._lock:
            self._show(donor, received, total)

    def complete(self, donor: str, total: int) -> None:
        """Everything has come from ``donor``: the bar ends."""
        with self._lock:
            self._show(donor, total, total)
            self._end()

    def stop(self) -> None:
        """The bar ends as it is. Idempotent."""
        with self._lock:
            self._end()

    def _show(self, donor: str, received: int, total: int) -> None:
        if self._has_ended:  # by a thread that was faster
            return
        if not self._is_shown:
            self._is_shown = True
            self._progress.start()
        self._progress.update(
            self._task, completed=received, total=total, description=f"state from {donor[-8:]}"
        )

    def _end(self) -> None:
        if self._is_shown and not self._has_ended:
            self._progress.stop()
        self._has_ended = True
