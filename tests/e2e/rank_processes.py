"""The processes of one peer with several ranks, as torchrun would start them, and orders to them."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("rank_worker.py")
ANSWERED_WITHIN = 100.0
"""Seconds for one call. A thread that waits for an answer without an end would keep a test that has failed."""


class RankProcesses:
    """``size`` processes that run ``rank_worker.py``; calls go to all of them, and wait for all answers."""

    def __init__(self, size: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = log
        self.processes = []
        for rank in range(size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            with log.open("a") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        stderr=errors, env=environment, text=True,
                    )
                )  # fmt: skip

    def begin(self, call: str, ranks: list[int] | None = None, **options: Any) -> None:
        for process in self._of(ranks):
            assert process.stdin is not None
            process.stdin.write(json.dumps({"call": call, "options": options}) + "\n")
            process.stdin.flush()

    def end(self, ranks: list[int] | None = None) -> list[Any]:
        """The answers of a call that was begun."""
        return [self._answer(process) for process in self._of(ranks)]

    def call(self, call: str, **options: Any) -> list[Any]:
        self.begin(call, **options)
        return self.end()

    def _answer(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        is_there, _, _ = select.select([process.stdout], [], [], ANSWERED_WITHIN)
        assert is_there, f"a rank gives no answer:\n{self.log.read_text()[-3000:]}"
        line = process.stdout.readline()
        assert line, f"a rank has ended:\n{self.log.read_text()[-3000:]}"
        said = json.loads(line)
        assert "answer" in said, said["error"]
        return said["answer"]

    def _of(self, ranks: list[int] | None) -> list[subprocess.Popen[str]]:
        return self.processes if ranks is None else [self.processes[rank] for rank in ranks]

    def are_alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self, rank: int) -> None:
        self.processes[rank].send_signal(signal.SIGKILL)
        self.processes[rank].wait()

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
