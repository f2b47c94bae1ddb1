"""The bar that shows how far a download is, for the user who asked for one."""

from __future__ import annotations

import sys
import threading
import time
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from shoal.utils import figures

REDRAW_SECONDS = 0.2
BAR_WIDTH = 30


class _Bar(Protocol):
    def start(self) -> None: ...
    def show(self, text: str, received: int, total: int) -> None: ...
    def stop(self) -> None: ...


class ProgressBar:
    """One bar on stderr, from the first :meth:`update` until :meth:`complete` or :meth:`stop`. Methods may be
    called on any thread.
    """

    def __init__(self, prefix: str) -> None:
        console = Console(stderr=True)
        # A bar of rich needs ipywidgets there, and shows nothing without.
        self._bar: _Bar = _NotebookBar() if console.is_jupyter else _TerminalBar(console, prefix)
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
            self._bar.start()
        self._bar.show(f"state from {donor[-8:]}", received, total)

    def _end(self) -> None:
        if self._is_shown and not self._has_ended:
            self._bar.stop()
        self._has_ended = True


class _TerminalBar:
    """A bar of rich; where stderr is a file, its last state."""

    def __init__(self, console: Console, prefix: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(f"state of {prefix}", total=None)

    def start(self) -> None:
        self._progress.start()

    def show(self, text: str, received: int, total: int) -> None:
        self._progress.update(self._task, completed=received, total=total, description=text)

    def stop(self) -> None:
        self._progress.stop()


class _NotebookBar:
    """One line of text that overwrites itself: notebooks do that for a carriage return."""

    def __init__(self) -> None:
        self._began = self._drawn = 0.0
        self._width = 0

    def start(self) -> None:
        self._began = time.monotonic()

    def show(self, text: str, received: int, total: int) -> None:
        now = time.monotonic()
        if received < total and now - self._drawn < REDRAW_SECONDS:
            return
        self._drawn = now
        line = draw(text, received, total, now - self._began)
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def stop(self) -> None:
        sys.stderr.write("\n")
        sys.stderr.flush()


def draw(text: str, received: int, total: int, seconds: float) -> str:
    """The bar as text, after ``seconds``."""
    share = received / total if total else 1.0
    filled = int(share * BAR_WIDTH)
    bar = "#" * filled + "." * (BAR_WIDTH - filled)
    rate = f", {figures.size(received / seconds)}/s" if seconds > 0 and received else ""
    return f"{text} [{bar}] {figures.size(received)} of {figures.size(total)}{rate}"
