"""What the system says about another process of this machine."""

from __future__ import annotations

import subprocess
import sys

_PS_TIMEOUT = 2.0


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal or a debugger; False where the system does not say."""
    state = _linux_state(pid) if sys.platform == "linux" else _ps_state(pid)
    return state[:1] in ("T", "t")


def _linux_state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name, in parentheses, may hold blanks and parentheses of its own.
            return file.read().rpartition(")")[2].strip()
    except OSError:  # it has ended, or /proc is hidden
        return ""


def _ps_state(pid: int) -> str:
    try:
        found = subprocess.run(  # noqa: S603 - a number is all that comes from outside
            ["/bin/ps", "-o", "state=", "-p", str(pid)],
            capture_output=True,
            text=True,
            timeout=_PS_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
