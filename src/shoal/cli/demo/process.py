"""The terminal's end of a worker process: start it, send it commands, read its reports, end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from typing import IO

from shoal.cli.demo import protocol
from shoal.errors import ProtocolViolation

WORKER_COMMAND = (sys.executable, "-P", "-m", "shoal.cli.demo.worker")
LOG_LINES = 12
MAX_LOG_BYTES = 1 << 16
SECONDS_TO_STOP = 4.0
SECONDS_TO_TERMINATE = 1.0


class WorkerProcess:
    """One worker. Made by :meth:`start`; its maker calls :meth:`close` in the end.

    The worker is in a process group of its own, so that Ctrl+C in the terminal reaches the supervisor alone, which then
    ends the workers in order. Its log goes to a file without a name, which vanishes with it.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(
        cls, assignment: protocol.Assignment, command: Sequence[str] = WORKER_COMMAND
    ) -> WorkerProcess:
        """Start ``command`` and send it the assignment."""
        log = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=protocol.MAX_LINE_BYTES,
                process_group=0,
                # A pool of threads for each of the many small processes would only get in the way.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except BaseException:
            log.close()
            raise
        worker = cls(process, log)
        worker._send(assignment)
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: protocol.Command) -> None:
        """Send a command; one to a worker that has ended is lost."""
        self._send(command)

    def _send(self, message: protocol.Assignment | protocol.Command) -> None:
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(protocol.encode(message))

    def kill(self) -> None:
        """SIGKILL, as ``kill -9`` sends it. The worker can't do anything about it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    async def reports(self) -> AsyncIterator[protocol.Report]:
        """The worker's reports until it ends.

        :raises ProtocolViolation: it wrote something else
        """
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                yield protocol.decode_report(line)
        except ValueError as error:
            raise ProtocolViolation(f"a report of more than {protocol.MAX_LINE_BYTES} bytes") from error

    async def wait(self) -> int:
        """Wait for the end of the process; its exit status, negative for a signal."""
        return await self._process.wait()

    def log_tail(self) -> str:
        """The last lines that the worker, or its background process, wrote to the standard error."""
        size = os.fstat(self._log.fileno()).st_size
        start = max(0, size - MAX_LOG_BYTES)
        text = os.pread(self._log.fileno(), size - start, start).decode(errors="replace")
        return "\n".join(text.splitlines()[-LOG_LINES:])

    async def close(self, *, in_order: bool = True) -> None:
        """End the process, if it still runs: in order, then by SIGTERM, then by SIGKILL.

        :param in_order: false for a worker that has not joined the swarm yet, and may be in the middle of an import
        """
        try:
            self._send(protocol.Stop())
            if not in_order or not await self._ended_within(SECONDS_TO_STOP):
                self._signal(signal.SIGTERM)
                if not await self._ended_within(SECONDS_TO_TERMINATE):
                    self.kill()
                    await self._process.wait()
        finally:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _ended_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return False
        return True
