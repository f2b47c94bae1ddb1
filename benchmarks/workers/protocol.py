"""What a worker and the runner say to each other: one JSON object a line, on the worker's standard input and output.

1. The worker of host 0 says its ``address``; the others are told it (``join``). Each says ``ready`` when it stands.
2. ``prepare`` is answered by ``prepared``: what comes before the trigger is done.
3. ``go`` is the trigger, answered by ``done`` with the moments and figures of the round.
4. At the end of its input the worker stops, whatever it is doing. So none outlives a runner that was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import psutil

CPUCLOCK_SCHED = 2
"""The kind of clock that clock_getcpuclockid() of the C library asks for, which Python lacks."""
STOPS_AFTER = 10.0
"""Seconds that a worker has to stop once its input has ended."""


class Task(Protocol):
    """The work of one worker."""

    def prepare(self) -> None:
        """Do what comes before the trigger."""

    def go(self) -> dict[str, Any]:
        """Do the work; the fields of an answer that :func:`serve` does not know itself."""

    def close(self) -> None:
        """Give everything back."""


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def hear() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def address_from_first(spec: dict[str, Any], mine: Callable[[], list[str]]) -> list[str]:
    """The address of the worker of host 0; that one says its own and gets an empty list."""
    if spec["host"] == 0:
        say(event="address", address=mine())
        return []
    order = next(hear())
    return list(order["join"])


def cpu_seconds() -> float:
    """Of this process and all below it."""
    seconds = 0.0
    for process in processes():
        with contextlib.suppress(psutil.Error, OSError):
            seconds += cpu_seconds_of(process)
    return seconds


def cpu_seconds_of(process: psutil.Process) -> float:
    """All that a process has used. On Linux by its CPU clock: other figures are in hundredths of a second."""
    if platform.system() == "Linux":
        return time.clock_gettime((~process.pid << 3) | CPUCLOCK_SCHED)
    times = process.cpu_times()
    return float(times.user + times.system)


def memory_mb() -> float:
    """Proportional memory of this process and all below it. To read it costs this process much CPU time."""
    nbytes = 0
    for process in processes():
        with contextlib.suppress(psutil.Error):
            nbytes += process.memory_full_info().pss
    return nbytes / 1e6


def processes() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def serve(task: Task, **facts: Any) -> None:
    """Answer orders until there are no more. ``facts`` are figures that hold for every round."""
    say(event="ready", extra=facts)
    cpu_before = prepared_s = 0.0
    for order in hear():
        if order["do"] == "prepare":
            cpu_before = cpu_seconds()
            began = time.monotonic()
            task.prepare()
            prepared_s = time.monotonic() - began
            say(event="prepared")
        else:
            answer = {"began": time.monotonic()} | task.go()
            answer.setdefault("ended", time.monotonic())
            cpu_s = cpu_seconds() - cpu_before
            say(event="done", cpu_s=cpu_s, pss_mb=memory_mb(), prepared_s=prepared_s, **answer)
    task.close()


def end_with_runner() -> None:
    """Wait for the end of the input, and end everything by force if the worker does not stop in time."""
    poll = select.poll()
    poll.register(sys.stdin, 0)  # a pipe tells of its other end without being asked
    poll.poll()
    time.sleep(STOPS_AFTER)
    end(1)


def end(status: int) -> NoReturn:
    """End with everything that this process has started: hivemind's processes outlive it otherwise."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    sys.stderr.flush()
    os._exit(status)


def main(run: Callable[[dict[str, Any]], None]) -> None:
    """Run a worker with the specification in its first argument, and end with everything that it started."""
    threading.Thread(target=end_with_runner, daemon=True).start()
    status = 1
    try:
        run(json.loads(sys.argv[1]))
        status = 0
    except KeyboardInterrupt:
        pass
    except Exception:  # noqa: BLE001 - the outer edge: the runner shows what stands on the standard error
        traceback.print_exc()
    finally:
        end(status)
