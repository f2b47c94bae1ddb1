"""A peer whose user's process is stopped: its group goes on without it, and it comes back when that continues."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest

from shoal.averaging.allreduce.round import RoundTimeouts
from shoal.averaging.background.service import AveragerService, Step, StepFailed
from shoal.averaging.background.slow_peers import SlowPeers
from shoal.averaging.background.state_sharing import StateService
from shoal.averaging.commands import ApplyAverage, ReachStage, RunStep, TakeSnapshot
from shoal.averaging.group import GroupInfo
from shoal.averaging.matchmaking_config import matchmaking_config
from shoal.averaging.state.donor import CopyUnavailable
from shoal.errors import AllreduceException, MatchmakingException
from shoal.runtime.presence import Presence
from shoal.testing.clock import run
from shoal.testing.rounds import PART_BYTES, PREFIX, SimulatedGroup
from shoal.utils.timed import steady_time

STOPPED = "user's process (pid 7) is stopped (by Ctrl+Z)"


class Host:
    """The user's process. While it is stopped it answers nothing; it is stopped as it is asked for ``stops_at``."""

    def __init__(self, stops_at: type | None = None) -> None:
        self.stops_at = stops_at
        self.user = Presence()
        self.applied = 0

    async def call_user(self, command: object) -> object:
        if type(command) is self.stops_at:
            self.stop()
        await self.user.present()
        self.applied += isinstance(command, ApplyAverage)
        return 1.0 if isinstance(command, TakeSnapshot) else None

    def stop(self) -> None:
        self.user.update(STOPPED)


def service_of(group: SimulatedGroup, host: Host, member: int) -> AveragerService:
    service = cast("AveragerService", object.__new__(AveragerService))
    populated: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    populated.set_result(None)
    vars(service).update(
        _arena=group.arenas[member],
        _populating=populated,
        _layout=group.layout,
        _min_span_nbytes=0,
        _config=SimpleNamespace(prefix=PREFIX, part_size_bytes=PART_BYTES),
        _timeouts=RoundTimeouts(),
        _host=group.hosts[member],
        _rounds=group.rounds[member],
        _context=host,
        _matchmaker=Mock(),
        _arena_is_free=asyncio.Event(),
        _slow_peers=SlowPeers(PREFIX),
    )
    return service


@pytest.mark.parametrize("member", [0, 1], ids=["leader", "follower"])
@pytest.mark.parametrize("phase", ["before the trigger", "during the snapshot"])
def test_the_others_average_without_a_member_whose_user_is_stopped(member: int, phase: str):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3) as group:
            others = [one for one in range(3) if one != member]
            host = Host(TakeSnapshot if phase == "during the snapshot" else None)
            step = Step(RunStep(0, 1.0, b"", 0.0, None, True, needs_trigger=host.stops_at is None))
            running = asyncio.gather(*(group.run(one) for one in others))
            if host.stops_at is None:
                asyncio.get_running_loop().call_later(4.0, host.stop)
            with pytest.raises(AllreduceException, match=r"pid 7\) is stopped") as caught:
                await service_of(group, host, member)._run_round(step, group.group)
            assert not isinstance(caught.value, StepFailed), "it tries again when its user is back"
            for result in await running:
                assert result.failure is None
                (exclusion,) = result.exclusions
                assert exclusion.member == group.peer(member)
                assert "pid 7) is stopped" in exclusion.reason
            weights = [0.0 if one == member else 1.0 for one in range(3)]
            group.check_average(others, weights)
            assert asyncio.get_running_loop().time() < 6.0

    run(main)


@pytest.mark.parametrize("member", [0, 1], ids=["leader", "follower"])
def test_the_others_do_not_wait_for_a_stopped_user_to_write_the_average(member: int):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3) as group:
            host = Host(ApplyAverage)
            service = service_of(group, host, member)
            step = Step(RunStep(0, 1.0, b"", 0.0, None, True, False))
            mine = asyncio.ensure_future(service._run_round(step, group.group))
            results = await asyncio.gather(*(group.run(one) for one in range(3) if one != member))
            assert [result.failure for result in results] == [None, None]
            assert asyncio.get_running_loop().time() < 3.0
            assert not mine.done()
            await asyncio.sleep(60.0)
            host.user.update(None)
            await mine
            assert host.applied == 1

    run(main)


class Searches:
    """A matchmaker that finds a group after 5 s."""

    def __init__(self) -> None:
        self.story: list[str] = []
        self._left: asyncio.Future[GroupInfo] | None = None

    async def find_group(self, **_: object) -> GroupInfo:
        loop = asyncio.get_running_loop()
        self.story.append(f"searching at {loop.time():.0f}")
        self._left = loop.create_future()
        timer = loop.call_later(5.0, self._left.set_result, "a group")
        try:
            return await self._left
        finally:
            timer.cancel()

    def leave_search(self) -> None:
        assert self._left is not None
        self.story.append(f"left at {asyncio.get_running_loop().time():.0f}")
        self._left.set_exception(MatchmakingException("left"))


def searching_service(host: Host, searches: Searches) -> AveragerService:
    service = cast("AveragerService", object.__new__(AveragerService))
    vars(service).update(
        _config=SimpleNamespace(
            prefix=PREFIX, auxiliary=False, matchmaking=matchmaking_config(None, 2, 5.0, 3.0)
        ),
        _context=host,
        _matchmaker=searches,
    )
    return service


@pytest.mark.parametrize("phase", ["before", "as it begins", "within"])
def test_a_peer_whose_user_is_stopped_is_in_no_search(phase: str):
    async def main() -> None:
        host = Host(ReachStage if phase == "as it begins" else None)
        searches = Searches()
        loop = asyncio.get_running_loop()
        if phase == "before":
            host.stop()
        elif phase == "within":
            loop.call_later(2.0, host.stop)

        def go_on() -> None:
            host.stops_at = None
            host.user.update(None)

        loop.call_later(50.0, go_on)
        step = Step(RunStep(0, 1.0, b"", 0.0, None, True, False))
        assert await searching_service(host, searches)._find_group(step) == "a group"
        assert searches.story == [
            *(["searching at 0", "left at 2"] if phase == "within" else []),
            "searching at 50",
        ]
        assert step.start_time > steady_time(), "a group that is not full waits for others from now on"

    run(main)


def test_a_search_ends_at_its_deadline_though_its_user_is_stopped():
    async def main() -> None:
        host = Host()
        host.stop()
        step = Step(RunStep(0, 1.0, b"", 0.0, steady_time() + 8.0, True, False))
        with pytest.raises(MatchmakingException, match="until the deadline the user's process"):
            await searching_service(host, Searches())._find_group(step)
        assert asyncio.get_running_loop().time() == pytest.approx(8.0, abs=0.5)

    run(main)


def test_a_donor_whose_user_is_stopped_refuses_at_once():
    async def main() -> None:
        host = Host()
        service = cast("StateService", object.__new__(StateService))
        vars(service).update(_context=host, _captures={}, _last_capture=0)
        asyncio.get_running_loop().call_later(3.0, host.stop)
        with pytest.raises(CopyUnavailable, match="the donor's user's process"):
            await service._capture()
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)

    run(main)
