"""Faults happen at their phase, in their role, once among the processes that share a record, and say so."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shoal.averaging import commands
from shoal.averaging.allreduce import effects, events
from shoal.averaging.allreduce.messages import Outcome
from shoal.averaging.matchmaking import events as matchmaking
from shoal.errors import InvalidValueError
from shoal.sansio import trace
from shoal.testing import PHASES, faults, plant, run

LEADS = matchmaking.BeginGroup(())
FOLLOWS = matchmaking.FinishWithGroup(None)
DECIDES = effects.AnnounceOutcome(Outcome(None))


@pytest.fixture(autouse=True)
def _nothing_stays_planted() -> Iterator[None]:
    before = list(trace._watchers)
    yield
    trace._watchers[:] = before


def take_turn(core: str, event: object, *asked: object, then: Any = None) -> None:
    """Show a turn as a driver does, and carry out ``then`` as its effects."""
    after = trace.publish(trace.Turn(core, "", 0.0, event, asked))
    if then is not None:
        then()
    for later in after:
        later()


def planted(happened: list[str], name: str = "fault", **options: Any) -> Any:
    return plant(None, None, action=partial(happened.append, name), **options)


def test_a_fault_happens_once_when_its_phase_has_come_so_often():
    happened: list[str] = []

    async def main() -> None:
        await planted(happened, phase="gathering", count=2)
        received = events.AverageReceived(None, 0)
        for expected in ([], ["fault"], ["fault"]):
            take_turn("allreduce", received)
            assert happened == expected
            take_turn("allreduce", events.PartSent(None, 0))
            take_turn("another core", received)

    run(main)


@pytest.mark.parametrize(("role", "enters"), [("leader", LEADS), ("follower", FOLLOWS)])
def test_a_fault_waits_until_the_peer_has_its_role(role: str, enters: object):
    happened: list[str] = []
    other = FOLLOWS if enters is LEADS else LEADS

    async def main() -> None:
        await planted(happened, phase="voting", role=role)
        asked = events.AcceptanceAsked(0, 0, Outcome(None))
        for entered, expected in ((other, []), (enters, ["fault"])):
            take_turn("matchmaking", None, entered)
            take_turn("allreduce", asked)
            assert happened == expected

    run(main)


def test_a_fault_happens_before_or_after_the_effects():
    happened: list[str] = []

    async def main() -> None:
        await planted(happened, "before", phase="deciding")
        await planted(happened, "after", phase="deciding", after=True)
        take_turn("allreduce", None, DECIDES, then=partial(happened.append, "effects"))
        await asyncio.sleep(1.0)

    run(main)
    assert happened == ["before", "effects", "after"]


def test_calls_of_the_user_process_are_phases():
    happened: list[str] = []

    async def main() -> None:
        await planted(happened, "waits", phase="waiting")
        await planted(happened, "writes", phase="applying")
        take_turn("user", commands.ReachStage(0, commands.AveragingStage.LOOKING_FOR_GROUP))
        take_turn("user", commands.ReachStage(0, commands.AveragingStage.AWAITING_TRIGGER))
        take_turn("user", commands.ApplyAverage(0))

    run(main)
    assert happened == ["waits", "writes"]


def test_of_faults_with_one_record_only_the_first_happens(tmp_path: Path):
    happened: list[str] = []
    record = tmp_path / "record"

    async def main() -> None:
        await planted(happened, "late", phase="applying", record=str(record))
        await planted(happened, "early", phase="deciding", record=str(record))
        take_turn("matchmaking", None, LEADS)
        take_turn("allreduce", None, DECIDES)
        take_turn("user", commands.ApplyAverage(0))

    run(main)
    assert happened == ["early"]
    told = json.loads(record.read_text())
    assert (told["phase"], told["role"]) == ("deciding", "leader")
    assert (told["background"], told["user"]) == (os.getpid(), os.getppid())
    assert list(tmp_path.iterdir()) == [record]


def test_closed_connections_end_and_listeners_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener, open(tmp_path / "file", "w") as file:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
        with one, other:
            descriptors = [str(opened.fileno()) for opened in (listener, file, one)]
            monkeypatch.setattr(faults.os, "listdir", lambda path: descriptors)
            faults.close_connections()
            assert other.recv(1) == b""
        socket.create_connection(listener.getsockname()).close()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"phase": "lunch"}, f"phase must be one of {', '.join(PHASES)}, got 'lunch'"),
        ({"action": "hug"}, "action must be 'kill' or 'term' or 'stop' or 'close', got 'hug'"),
        ({"whom": "me"}, "whom must be 'background' or 'user' or 'both', got 'me'"),
        ({"role": "owner"}, "role must be 'leader' or 'follower', got 'owner'"),
    ],
)
def test_what_cannot_be_planted_is_said(wrong: dict[str, Any], text: str):
    options: dict[str, Any] = {"phase": "ready", "action": "kill", **wrong}
    with pytest.raises(InvalidValueError) as raised:
        run(lambda: plant(None, None, **options))
    assert str(raised.value) == text
