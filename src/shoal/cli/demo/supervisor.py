"""Runs a terminal's part of the demo: its worker processes, the table, the models to compare with.

All on one event loop; the tasks of a demo live in one TaskGroup, which ends them, and with them all workers, whatever
happens: the end of the demo, an error, Ctrl+C.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from shoal.cli.demo import protocol
from shoal.cli.demo.board import Board
from shoal.cli.demo.history import History, Outcome
from shoal.cli.demo.process import WorkerProcess
from shoal.cli.demo.protocol import Assignment, Part, State, Status
from shoal.cli.demo.settings import Settings
from shoal.cli.demo.table import View
from shoal.errors import ProtocolViolation, ShoalError

if TYPE_CHECKING:
    from shoal.cli.demo.training import References

REDRAW_SECONDS = 0.25
BOARD_SECONDS = 1.0
REFERENCE_SECONDS = 0.2
STALL_SECONDS = 120.0
KILL_AFTER = 0.35
"""One peer is killed when this part of the rounds is done."""


class DemoFailed(ShoalError):
    """The demo cannot go on."""


@dataclass
class Member:
    """A worker of this terminal, and what is known of it."""

    assignment: Assignment
    status: Status
    process: WorkerProcess | None = None
    loaded: bool = False
    """It has its images; a newcomer waits then."""
    ready: bool = False
    accuracy: float | None = None
    """At the end, once it has done all rounds."""
    dismissed: bool = False
    """It was told to leave; its end is no failure."""

    @property
    def name(self) -> str:
        return self.assignment.name


class Supervisor:
    """Starts workers, kills one of them if asked to, and waits until all others have done their rounds.

    :param assignments: the workers to start; those that are no newcomers begin together
    :param replacement: takes the place of the last one of them, which is killed; None: nobody is killed
    """

    def __init__(
        self,
        settings: Settings,
        board: Board,
        view: View,
        assignments: Sequence[Assignment],
        replacement: Assignment | None = None,
        *,
        start_worker: Callable[[Assignment], Awaitable[WorkerProcess]] = WorkerProcess.start,
    ) -> None:
        self._settings = settings
        self._board = board
        self._start_worker = start_worker
        self._view = view
        self._founding = [_make_member(assignment) for assignment in assignments]
        self._members = list(self._founding)
        self._spare = _make_member(replacement) if replacement is not None else None
        self._victim = self._founding[-1] if replacement is not None else None
        self._held = False
        self._guests: list[Status] = []
        self._known_guests: set[str] = set()
        self._last_progress = time.monotonic()
        self._begun = asyncio.Event()
        self.history = History()

    async def run(self) -> Outcome:
        """The whole demo.

        :raises ShoalError: it could not go on
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                references = tasks.create_task(self._train_references())
                watching = [tasks.create_task(self._redraw()), tasks.create_task(self._watch_board())]
                workers = [*self._founding, *([self._spare] if self._spare is not None else [])]
                self._tell(f"starting {_count(workers)}; loading torch takes each some seconds")
                async with asyncio.TaskGroup() as self._workers:
                    for member in workers:
                        self._workers.create_task(self._run_worker(member))
                for task in watching:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise _first_error(group) from None
        self._show()
        alone, central = references.result()
        return Outcome(alone, self._final_accuracies(), central, self._failed())

    # Workers

    async def _run_worker(self, member: Member) -> None:
        process = member.process = await self._start_worker(member.assignment)
        try:
            async for report in process.reports():
                self._receive(member, report)
            exit_status = await process.wait()
            self._judge_end(member, exit_status, process.log_tail())
        except ProtocolViolation as error:
            self._fail(member, str(error), process.log_tail())
        finally:
            if member is self._victim:
                self._dismiss_spare()
            await process.close(in_order=member.ready)

    def _receive(self, member: Member, report: protocol.Report) -> None:
        match report:
            case protocol.Loaded():
                self._receive_loaded(member, report)
            case protocol.Ready(status):
                self._update(member, status)
                self._receive_ready(member)
            case Status():
                self._update(member, report)
                self._choose_moment_to_kill(member)
            case protocol.Holding():
                self._kill(member, report)
            case protocol.Finished(accuracy):
                member.accuracy = accuracy

    def _receive_loaded(self, member: Member, report: protocol.Loaded) -> None:
        member.loaded = True
        member.status = msgspec.structs.replace(member.status, classes=report.classes, state=State.READY)
        if member is self._spare:
            self._begin_if_ready()
            return  # it waits for its turn
        digits = " ".join(str(label) for label in report.classes)
        self._tell(
            f"{member.name} (process {_pid(member)}) has {report.samples} images of the digits {digits}"
        )
        if member.assignment.newcomer:
            _send(member, protocol.Begin())

    def _receive_ready(self, member: Member) -> None:
        member.ready = True
        self._begin_if_ready()

    def _begin_if_ready(self) -> None:
        """The spare peer is waited for, too: importing torch beside the others would slow their rounds down."""
        is_spare_ready = self._spare is None or self._spare.loaded
        if self._begun.is_set() or not (is_spare_ready and all(founder.ready for founder in self._founding)):
            return
        self._begun.set()
        self._last_progress = time.monotonic()
        self.history.begin_training()
        for founder in self._founding:
            _send(founder, protocol.Begin())

    def _update(self, member: Member, status: Status) -> None:
        before, member.status = member.status, status
        if status.round > before.round:
            self._last_progress = time.monotonic()
            if before.state is State.CATCHING_UP:
                self._mark(f"{member.name} has caught up at round {status.round}")
        if status.accuracy is not None:
            self.history.add_swarm(member.name, status.accuracy)

    def _judge_end(self, member: Member, exit_status: int, log_tail: str) -> None:
        if member.status.state is State.KILLED or member.accuracy is not None or member.dismissed:
            return
        reason = f"exit status {exit_status}" if exit_status >= 0 else f"signal {-exit_status}"
        self._fail(member, reason, log_tail)

    def _fail(self, member: Member, reason: str, log_tail: str) -> None:
        member.status = msgspec.structs.replace(member.status, state=State.FAILED)
        log = f"; the end of its log:\n{log_tail}" if log_tail else ", and its log is empty"
        self._tell(f"{member.name} failed ({reason}){log}")
        if not self._begun.is_set():
            raise DemoFailed(f"{member.name} could not be started")

    # The kill

    def _choose_moment_to_kill(self, member: Member) -> None:
        if member is not self._victim or self._spare is None or self._held:
            return
        if member.status.round / self._settings.rounds >= KILL_AFTER:
            self._held = True
            _send(member, protocol.Hold())

    def _kill(self, member: Member, holding: protocol.Holding) -> None:
        if member is not self._victim or member.process is None or self._spare is None:
            return
        member.process.kill()
        member.status = msgspec.structs.replace(member.status, state=State.KILLED)
        self._tell(f"kill -9 {member.process.pid}: {member.name}, in the middle of round {holding.round + 1}")
        self.history.add_event(f"{member.name} killed")
        replacement, self._spare, self._victim = self._spare, None, None
        self._members.append(replacement)
        self._tell(f"{replacement.name} (process {_pid(replacement)}) takes its place and downloads a state")
        _send(replacement, protocol.Begin())

    def _dismiss_spare(self) -> None:
        """There will be nobody to replace: the peer that was to be killed has ended by itself."""
        if self._spare is not None:
            self._spare.dismissed = True
            _send(self._spare, protocol.Stop())

    # What is shown

    async def _redraw(self) -> None:
        while True:
            self._show()
            if time.monotonic() - self._last_progress > STALL_SECONDS:
                raise DemoFailed(f"no peer has finished a round for {STALL_SECONDS:.0f} s")
            await asyncio.sleep(REDRAW_SECONDS)

    async def _watch_board(self) -> None:
        """Follow the peers that other terminals have started."""
        while True:
            statuses = await self._board.watch_statuses(self._settings.prefix)
            own = {member.status.peer_id for member in self._members}
            self._update_guests([status for status in statuses if status.peer_id not in own])
            await asyncio.sleep(BOARD_SECONDS)

    def _update_guests(self, statuses: list[Status]) -> None:
        for status in statuses:
            if status.peer_id not in self._known_guests:
                self._known_guests.add(status.peer_id)
                self._mark(f"{status.name} is here, from another terminal")
            if status.accuracy is not None:
                self.history.add_swarm(status.name, status.accuracy)
        self._guests = statuses

    def _show(self) -> None:
        statuses = [*(member.status for member in self._members), *self._guests]
        self._view.show(statuses, self._settings.rounds, self.history.seconds())

    def _mark(self, text: str) -> None:
        self.history.add_event(text)
        self._tell(text)

    def _tell(self, text: str) -> None:
        self._view.tell(f"{self.history.seconds():5.1f} s  {text}")

    # What it is compared with

    async def _train_references(self) -> tuple[dict[str, float], float]:
        """Train what the swarm is compared with, round by round beside it, so that all share one axis of time."""
        parts = [member.assignment.part for member in self._founding]
        references = await asyncio.to_thread(_load_references, self._settings, parts)
        await self._begun.wait()
        while True:
            done = all(member.status.state.is_final for member in self._members)
            target = self._settings.rounds if done else max(m.status.round for m in self._members)
            if references.rounds < target or not self.history.central:
                await asyncio.to_thread(references.advance, target)
                alone, central = references.alone(), references.central()
                self.history.add_references(alone, central)
            if done:
                return alone, central
            await asyncio.sleep(REFERENCE_SECONDS)

    # Helpers

    def _final_accuracies(self) -> dict[str, float]:
        return {member.name: member.accuracy for member in self._members if member.accuracy is not None}

    def _failed(self) -> tuple[str, ...]:
        return tuple(member.name for member in self._members if member.status.state is State.FAILED)


def _make_member(assignment: Assignment) -> Member:
    status = Status(assignment.name, "", assignment.part, (), State.STARTING)
    return Member(assignment, status)


def _load_references(settings: Settings, parts: list[Part]) -> References:
    from shoal.cli.demo.training import load_references  # imports torch: seconds, so not on the event loop

    return load_references(settings, parts)


def _count(members: Sequence[Member]) -> str:
    return "one process" if len(members) == 1 else f"{len(members)} processes"


def _send(member: Member, command: protocol.Command) -> None:
    if member.process is not None:
        member.process.send(command)


def _pid(member: Member) -> int:
    return 0 if member.process is None else member.process.pid


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
