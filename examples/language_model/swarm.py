"""A whole swarm on this machine: peers are started, one is killed, and another one joins.

    python swarm.py --folder runs/shoal
    python swarm.py --folder runs/hivemind --library hivemind --python /path/to/venv/bin/python
    python swarm.py --folder runs/alone --alone         # the same peers, but nobody averages

The peer with the last part of the text is killed (``kill -9``, its background process with it) when the first
one has done ``--kill-at`` of its steps. A newcomer with the same part joins at ``--join-at``, and begins with
the state of another peer.

``--wrap`` runs each peer through a command of yours, for hosts of an emulated network such as
``--wrap "ip netns exec host{peer}" --host "10.0.0.{peer}"``; ``{peer}`` is its number, from 1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import read_log, write_summary
from training import Settings

HERE = Path(__file__).resolve().parent
POLL_SECONDS = 0.1
START_TIMEOUT = 60.0
GRACE_SECONDS = 10.0


class Process:
    """One peer: a process in a session of its own, with whatever it starts."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True)
        self.name = name
        self.folder = folder
        with (folder / "output.txt").open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        return self._process.poll()

    @property
    def step(self) -> int:
        """The last step that its log speaks of."""
        return max((event.get("step", 0) for event in read_log(self.folder)), default=0)

    def addresses(self) -> list[str]:
        """Where others reach it; empty as long as it has not started."""
        ready = [event["addresses"] for event in read_log(self.folder) if event["event"] == "ready"]
        return ready[0] if ready else []

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the peer and all that it has started."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return
        if number == signal.SIGKILL:
            self._process.wait()

    def last_lines(self) -> str:
        return "\n".join((self.folder / "output.txt").read_text(errors="replace").splitlines()[-15:])


class Swarm:
    """Starts processes and, in the end, ends all that still run."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        self._options = options
        self._settings = settings
        self._started = time.time()
        self._environment = {**os.environ, "LIBRARY": options.library}
        self.events: list[dict[str, Any]] = []
        self.processes: list[Process] = []

    def run(self) -> None:
        """:raises SystemExit: a peer has failed, or did not end in time"""
        try:
            if self._options.alone:
                for part in range(self._settings.peers):
                    self._start_alone(part)
            else:
                self._run_peers()
            self._wait_until(lambda: not any(process.running for process in self.processes))
        finally:
            self._end_all()
            self._write_summary()
        failed = [process for process in self.processes if process.status not in (0, -signal.SIGKILL)]
        for process in failed:
            print(
                f"{process.name} failed with status {process.status}:\n{process.last_lines()}",
                file=sys.stderr,
            )
        if failed:
            raise SystemExit(1)

    def _run_peers(self) -> None:
        first = self._start_peer(0)
        self._wait_until(first.addresses, START_TIMEOUT)
        for part in range(1, self._settings.peers):
            self._start_peer(part, first.addresses())
        if self._options.no_faults:
            return
        last = self.processes[-1]
        self._wait_for_step(first, self._options.kill_at)
        last.kill()
        self._tell("killed", last)
        self._wait_for_step(first, self._options.join_at)
        newcomer = self._start_peer(self._settings.peers - 1, first.addresses(), join=True)
        self._tell("started", newcomer)

    def _start_peer(self, part: int, addresses: list[str] | None = None, *, join: bool = False) -> Process:
        number = str(len(self.processes) + 1)
        command = [
            *shlex.split(self._options.wrap.replace("{peer}", number)),
            self._options.python,
            str(HERE / "train.py"),
            f"--part={part}",
            f"--host={self._options.host.replace('{peer}', number)}",
            f"--save-every={0 if self.processes else self._options.save_every}",
        ]
        if addresses:
            command += ["--initial-peers", *addresses]
        if join:
            command.append("--join")
        return self._start(command)

    def _start_alone(self, part: int) -> Process:
        every = self._options.save_every * self._settings.local_steps
        command = [
            self._options.python,
            str(HERE / "reference.py"),
            f"--parts={part}",
            f"--save-every={every}",
        ]
        return self._start(command)

    def _start(self, command: list[str]) -> Process:
        name = f"peer-{len(self.processes)}"
        folder = self._options.folder / name
        command += [f"--folder={folder}", f"--started={self._started}", *self._settings.to_arguments()]
        process = Process(name, command, folder, self._environment)
        self.processes.append(process)
        return process

    def _wait_for_step(self, process: Process, fraction: float) -> None:
        self._wait_until(lambda: process.step >= fraction * self._settings.steps)

    def _wait_until(self, condition: Callable[[], object], limit: float | None = None) -> None:
        deadline = time.time() + limit if limit else self._started + self._options.limit
        while not condition():
            for process in self.processes:
                if process.status not in (None, 0, -signal.SIGKILL):
                    raise SystemExit(f"{process.name} failed:\n{process.last_lines()}")
            if time.time() > deadline:
                running = [process for process in self.processes if process.running]
                lines = [
                    f"{process.name} is at step {process.step}:\n{process.last_lines()}"
                    for process in running
                ]
                raise SystemExit("the swarm does not get on:\n" + "\n".join(lines))
            time.sleep(POLL_SECONDS)

    def _end_all(self) -> None:
        running = [process for process in self.processes if process.running]
        for process in running:
            process.kill(signal.SIGTERM)
        deadline = time.time() + GRACE_SECONDS
        while any(process.running for process in running) and time.time() < deadline:
            time.sleep(POLL_SECONDS)
        for process in self.processes:
            process.kill()  # with all that it may have left behind

    def _tell(self, event: str, process: Process) -> None:
        seconds = round(time.time() - self._started, 1)
        step = self.processes[0].step
        self.events.append({"event": event, "peer": process.name, "seconds": seconds, "step": step})
        print(
            f"{seconds:6.1f} s: {event} {process.name}; {self.processes[0].name} is at step {step}",
            flush=True,
        )

    def _write_summary(self) -> None:
        write_summary(
            self._options.folder,
            self._settings,
            library="none" if self._options.alone else self._options.library,
            wrap=self._options.wrap,
            seconds=round(time.time() - self._started, 1),
            status={process.name: process.status for process in self.processes},
            events=self.events,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where to keep the record; must not exist yet"
    )
    parser.add_argument("--library", choices=["shoal", "hivemind"], default="shoal")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers")
    parser.add_argument("--alone", action="store_true", help="nobody averages")
    parser.add_argument("--no-faults", action="store_true", help="nobody is killed, nobody joins")
    parser.add_argument("--kill-at", type=float, default=0.35, help="fraction of the steps; %(default)s")
    parser.add_argument("--join-at", type=float, default=0.5, help="fraction of the steps; %(default)s")
    parser.add_argument("--save-every", type=int, default=2, help="rounds between copies of the model")
    parser.add_argument("--limit", type=float, default=1200, help="seconds after which everything is ended")
    parser.add_argument(
        "--wrap", default="", help="command that runs the command of a peer; {peer}: its number"
    )
    parser.add_argument("--host", default="127.0.0.1", help="IP address of each peer; {peer}: its number")
    Settings.add_options(parser)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.folder.exists():
        raise SystemExit(f"--folder {options.folder} exists already")
    settings = Settings.from_options(options)
    swarm = Swarm(options, settings)
    swarm.run()
    print(f"done in {time.time() - swarm._started:.0f} s; evaluate with: python evaluate.py {options.folder}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
