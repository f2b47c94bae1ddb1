"""The bar that shows how far a download is, for whoever asked for one."""

from __future__ import annotations

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
    """One bar on stderr, from the first :meth:`update` until :meth:`stop`."""

    def __init__(self, prefix: str, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._task = self._progress.add_task(f"state of {prefix}", total=None)
        self._is_shown = False

    def update(self, donor: str, received: int, total: int) -> None:
        """``received`` of ``total`` bytes have come from ``donor``."""
        if not self._is_shown:
            self._is_shown = True
            self._progress.start()
        self._progress.update(
            self._task, completed=received, total=total, description=f"state from {donor[-8:]}"
        )

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._is_shown:
            self._progress.stop()
