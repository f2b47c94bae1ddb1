"""The supervisor and real processes, in which a fake worker speaks the protocol and nothing is trained."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.cli.demo import supervisor as supervisor_module
from shoal.cli.demo.process import WorkerProcess
from shoal.cli.demo.protocol import Assignment, Part, State, Status
from shoal.cli.demo.settings import Settings
from shoal.cli.demo.supervisor import DemoFailed, Supervisor

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
WELL, CRASHES_AT_ONCE, CRASHES_LATER, BABBLES, STANDS_STILL, DOES_NOT_STOP = range(6)  # as there

start_fake = partial(WorkerProcess.start, command=(sys.executable, str(FAKE_WORKER)))


class FakeBoard:
    """Holds ``statuses`` once the peers have begun, as they publish nothing before."""

    def __init__(self, *statuses: Status) -> None:
        self.statuses = list(statuses)
        self.begun = asyncio.Event()

    async def watch_statuses(self, prefix: str) -> list[Status]:
        await self.begun.wait()
        return self.statuses


class FakeView:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.shown: list[Status] = []

    def tell(self, text: str) -> None:
        self.told.append(text)

    def show(self, statuses: Any, rounds: int, seconds: float) -> None:
        self.shown = list(statuses)

    def find(self, text: str) -> str:
        return next(line for line in self.told if text in line)


def make_supervisor(
    *behaviours: int, spare: int | None = None, board: FakeBoard | None = None
) -> tuple[Supervisor, FakeView]:
    settings = Settings("test", peers=len(behaviours), rounds=40)
    view = FakeView()

    def assign(number: int, behaviour: int, newcomer: bool = False) -> Assignment:
        part = Part(min(number, len(behaviours) - 1))
        return Assignment(f"peer {number + 1}", settings, part, (), "127.0.0.1", behaviour, newcomer)

    assignments = [assign(number, behaviour) for number, behaviour in enumerate(behaviours)]
    replacement = None if spare is None else assign(len(behaviours), spare, newcomer=True)
    board = board or FakeBoard()
    made = Supervisor(settings, board, view, assignments, replacement, start_worker=start_fake)
    made._begun = board.begun
    return made, view


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = set(psutil.Process().children(recursive=True))
    descriptors = set(os.listdir("/dev/fd"))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before
    assert len(os.listdir("/dev/fd")) <= len(descriptors)


def test_one_is_killed_and_another_takes_its_place() -> None:
    supervisor, view = make_supervisor(WELL, WELL, WELL, spare=WELL)
    outcome = asyncio.run(supervisor.run())
    assert outcome.swarm == {"peer 1": 1.0, "peer 2": 1.0, "peer 4": 1.0}
    assert outcome.failed == ()
    assert outcome.explain_failure() is None
    assert len(outcome.alone) == 3
    assert outcome.central > 0.9
    assert [status.state for status in view.shown] == [
        State.FINISHED, State.FINISHED, State.KILLED, State.FINISHED
    ]  # fmt: skip
    killed = view.shown[2]
    assert 0.3 * 40 <= killed.round < 40
    assert f"peer 3, in the middle of round {killed.round + 1}" in view.find("kill -9")
    assert "peer 4 has caught up" in view.find("caught up")
    assert {"peer 1", "peer 4"} <= supervisor.history.swarm.keys()
    assert supervisor.history.central[-1][1] == outcome.central


def test_peers_of_other_terminals_are_shown() -> None:
    guest = Status(
        "guest 1", "another id", Part(0, reserve=True), (3,), State.TRAINING, 7, 4, 0.1, 0.5, 10, 0.1
    )
    own = Status("peer 1", "id of peer 1", Part(0), (1, 2), State.TRAINING)
    supervisor, view = make_supervisor(WELL, WELL, board=FakeBoard(guest, own))
    asyncio.run(supervisor.run())
    assert [status.name for status in view.shown] == ["peer 1", "peer 2", "guest 1"]
    assert "guest 1 is here" in view.find("another terminal")
    assert supervisor.history.swarm["guest 1"][0][1] == 0.5


def test_crash_shows_the_log_and_fails_the_demo() -> None:
    supervisor, view = make_supervisor(WELL, CRASHES_LATER, WELL)
    outcome = asyncio.run(supervisor.run())
    assert outcome.failed == ("peer 2",)
    assert "failed: peer 2" in (outcome.explain_failure() or "")
    assert "exit status 1" in view.find("peer 2 failed")
    assert "the worker crashed later" in view.find("peer 2 failed")
    assert outcome.swarm.keys() == {"peer 1", "peer 3"}


def test_crash_of_the_one_that_was_to_be_killed_dismisses_the_spare() -> None:
    supervisor, _ = make_supervisor(WELL, CRASHES_LATER, spare=WELL)
    outcome = asyncio.run(supervisor.run())
    assert outcome.failed == ("peer 2",)
    assert outcome.swarm.keys() == {"peer 1"}


def test_replacement_that_crashes_fails_the_demo() -> None:
    supervisor, _ = make_supervisor(WELL, WELL, spare=CRASHES_LATER)
    outcome = asyncio.run(supervisor.run())
    assert outcome.failed == ("peer 3",)


def test_replacement_that_cannot_start_ends_the_demo() -> None:
    supervisor, _ = make_supervisor(WELL, WELL, spare=CRASHES_AT_ONCE)
    with pytest.raises(DemoFailed, match="peer 3 could not be started"):
        asyncio.run(supervisor.run())


def test_crash_before_the_start_ends_the_demo() -> None:
    supervisor, view = make_supervisor(WELL, CRASHES_AT_ONCE, STANDS_STILL)
    with pytest.raises(DemoFailed, match="peer 2 could not be started"):
        asyncio.run(supervisor.run())
    assert "the worker crashed at once" in view.find("peer 2 failed")


def test_worker_that_writes_something_else() -> None:
    supervisor, view = make_supervisor(WELL, BABBLES)
    outcome = asyncio.run(supervisor.run())
    assert outcome.failed == ("peer 2",)
    assert "not a report" in view.find("peer 2 failed")


def test_swarm_that_stands_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "STALL_SECONDS", 1.0)
    supervisor, _ = make_supervisor(STANDS_STILL, STANDS_STILL)
    with pytest.raises(DemoFailed, match="no peer has finished a round for 1 s"):
        asyncio.run(supervisor.run())


@pytest.mark.parametrize("behaviour", [STANDS_STILL, DOES_NOT_STOP])
def test_cancelling_ends_all_workers(behaviour: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl+C cancels the supervisor's task; what is left behind is checked after each test."""
    monkeypatch.setattr("shoal.cli.demo.process.SECONDS_TO_STOP", 0.5)
    supervisor, view = make_supervisor(behaviour, behaviour, spare=WELL)

    async def cancel_when_begun() -> None:
        running = asyncio.ensure_future(supervisor.run())
        await supervisor._begun.wait()
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel_when_begun())
    assert not [line for line in view.told if "failed" in line]


def test_signal_that_kills_a_worker_is_named() -> None:
    supervisor, view = make_supervisor(WELL, STANDS_STILL)

    async def kill_one() -> Any:
        running = asyncio.ensure_future(supervisor.run())
        await supervisor._begun.wait()
        os.kill(supervisor._members[1].process.pid, signal.SIGKILL)
        return await running

    outcome = asyncio.run(kill_one())
    assert outcome.failed == ("peer 2",)
    assert "signal 9" in view.find("peer 2 failed")
