"""What the user's process makes of a background process that does not answer: warnings, and the error of late calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from shoal.errors import PeerProcessUnresponsive
from shoal.runtime.liveness import BEAT, STOPPED_SECONDS, SUSPICIOUS_SECONDS, Liveness, Silence
from shoal.runtime.processes import is_stopped

WARN_SECONDS = 10.0
"""A process that is silent, and not stopped, is worth a warning after so long, if calls wait for it."""
WARN_AGAIN = 4.0
"""After this many times as long a silence, the warning comes again."""

logger = logging.getLogger(__name__)


class Attendance:
    """Of one background process. All but :meth:`unresponsive` run on the thread that receives from it.

    :param tell: runs a log call on a thread that may block
    """

    def __init__(self, name: str, pid: int, tell: Callable[[Callable[[], None]], None]) -> None:
        self._name = name
        self._pid = pid
        self._tell = tell
        self._liveness = Liveness(pid, time.monotonic())
        self._looked_at = time.monotonic()
        self._warn_at = 0.0

    def hear(self) -> None:
        """The process has sent something."""
        self._liveness.hear(time.monotonic())
        if self._warn_at:
            self._warn_at = 0.0
            text = "the background process %r (pid %d) answers again"
            self._tell(lambda: logger.warning(text, self._name, self._pid))

    def look(self, waiting: int) -> PeerProcessUnresponsive | None:
        """What calls that are late get, if the process is silent; ``waiting``: calls that wait for it."""
        now = time.monotonic()
        if now - self._looked_at < BEAT:
            return None
        self._looked_at = now
        if self._liveness.look(now) < SUSPICIOUS_SECONDS or not waiting:
            return None
        silence = self._silence()
        limit = STOPPED_SECONDS if silence.is_stopped else WARN_SECONDS
        error = self._error(silence)
        if silence.seconds >= limit and silence.seconds >= self._warn_at:
            self._warn_at = WARN_AGAIN * silence.seconds
            self._tell(lambda: logger.warning("%s. Calls that wait for it: %d", error, waiting))
        return error

    def unresponsive(self) -> PeerProcessUnresponsive | None:
        """The error of a call that is late now; None: the process lives, and the call takes its time."""
        silence = self._silence()
        # Where this process gets little of the processor, its looks are late, and the silence counts as short.
        if not silence.is_stopped and silence.seconds < SUSPICIOUS_SECONDS:
            return None
        return self._error(silence)

    def _silence(self) -> Silence:
        stopped = is_stopped(self._pid)
        return self._liveness.silence(time.monotonic(), is_stopped=stopped)

    def _error(self, silence: Silence) -> PeerProcessUnresponsive:
        what = silence.describe("by SIGSTOP or a debugger")
        return PeerProcessUnresponsive(f"the background process {self._name!r} (pid {self._pid}) {what}")
