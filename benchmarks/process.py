"""One worker's process, and what is said to it and by it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import psutil

ROOT = Path(__file__).parents[1]
STOPS_AFTER = 20.0
"""Seconds that a worker has to stop by itself."""
ENDED_AFTER = 5.0
"""Seconds until a process that was killed is gone."""
PR_SET_CHILD_SUBREAPER = 36
MARK = "BENCHMARKS_WORKER"
"""A variable of the environment."""

Start: TypeAlias = Callable[..., "subprocess.Popen[str]"]
"""Starts a program, with the options of :class:`subprocess.Popen`, and speaks text with it."""


class WorkerFailed(Exception):
    """A worker ended, or took too long; the message says what it wrote last."""


class Worker:
    """A worker that runs."""

    def __init__(self, name: str, arguments: Sequence[str], start: Start | None = None) -> None:
        self._name = name
        self._mark = uuid.uuid4().hex
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        start = start or partial(subprocess.Popen, text=True)
        self._process = start(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env=os.environ | {MARK: self._mark},
            start_new_session=True,  # Ctrl+C is for the runner
        )
        self._listener = threading.Thread(target=self._listen, daemon=True, name=f"hear {name}")
        self._listener.start()

    @property
    def processes(self) -> list[int]:
        """The worker, and all below it."""
        with contextlib.suppress(psutil.Error):
            me = psutil.Process(self._process.pid)
            return [me.pid, *(child.pid for child in me.children(recursive=True))]
        return []

    def order(self, **fields: Any) -> None:
        """Say something to the worker."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(fields) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._story("ended")) from None

    def expect(self, event: str, timeout: float) -> dict[str, Any]:
        """The next thing that the worker says, which is to be this event.

        :raises WorkerFailed: it ended, or said nothing for ``timeout`` seconds
        """
        try:
            said = self._said.get(timeout=timeout)
        except queue.Empty:
            raise WorkerFailed(self._story(f"was not {event} after {timeout:.0f} s")) from None
        if said is None:
            raise WorkerFailed(self._story(f"ended before it was {event}"))
        assert said["event"] == event, said
        return said

    def stop(self) -> None:
        """Have it stop by itself, if it does."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOPS_AFTER)

    def close(self) -> None:
        """End it by force, and all that it started, also what has lost its parent."""
        assert self._process.stdin is not None
        marked = [one for one in psutil.Process().children(recursive=True) if self._started(one)]
        self._process.kill()
        for one in marked:
            with contextlib.suppress(psutil.Error):
                one.kill()
        self._process.wait()
        for one in marked:
            with contextlib.suppress(psutil.Error):
                one.wait(ENDED_AFTER)
        self._errors.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._listener.join(ENDED_AFTER)

    def _started(self, process: psutil.Process) -> bool:
        """Whether a process has this worker's mark, which goes from parents to children."""
        with contextlib.suppress(psutil.Error):
            return bool(process.environ().get(MARK) == self._mark)
        return False

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as said:
            for line in said:
                if line.startswith('{"event"'):
                    self._said.put(json.loads(line))
        self._said.put(None)

    def _story(self, what: str) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"{self._name} {what}" + (f"; its last line: {lines[-1][:300]}" if lines else "")


def adopt_orphans() -> None:
    """Have processes whose parents die become children of this one, so that :meth:`Worker.close` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
