"""A peer whose user's process is stopped: its group goes on without it, and it comes back when that continues."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from step_surroundings import make_resources, make_step, run_attempt

from shoal.averaging.background.group_search import GroupSearch
from shoal.averaging.background.state_sharing import StateService
from shoal.averaging.background.step import Step, StepFailed
from shoal.averaging.commands import ApplyAverage, ReachStage, TakeSnapshot
from shoal.averaging.group import GroupInfo
from shoal.averaging.state.donor import CopyUnavailable
from shoal.errors import AllreduceException, MatchmakingException
from shoal.runtime.presence import Presence
from shoal.testing.clock import run
from shoal.testing.rounds import SimulatedGroup
from shoal.utils.timed import steady_time

STOPPED = "user's process (pid 7) is stopped (by Ctrl+Z)"


class UserProcess:
    """The user's process. While it is stopped it answers nothing; it is stopped as it is asked for ``stops_at``."""

    is_closing = False

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


@pytest.mark.parametrize("member", [0, 1], ids=["leader", "follower"])
@pytest.mark.parametrize("phase", ["before the trigger", "during the snapshot"])
def test_the_others_average_without_a_member_whose_user_is_stopped(member: int, phase: str):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3) as group:
            others = [one for one in range(3) if one != member]
            process = UserProcess(TakeSnapshot if phase == "during the snapshot" else None)
            step = Step(make_step(allow_retries=True, needs_trigger=process.stops_at is None))
            running = asyncio.gather(*(group.run(one) for one in others))
            if process.stops_at is None:
                asyncio.get_running_loop().call_later(4.0, process.stop)
            with pytest.raises(AllreduceException, match=r"pid 7\) is stopped") as caught:
                await run_attempt(make_resources(process, group=group, member=member), group, step)
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
            process = UserProcess(ApplyAverage)
            resources = make_resources(process, group=group, member=member)
            step = Step(make_step(allow_retries=True))
            mine = asyncio.ensure_future(run_attempt(resources, group, step))
            results = await asyncio.gather(*(group.run(one) for one in range(3) if one != member))
            assert [result.failure for result in results] == [None, None]
            assert asyncio.get_running_loop().time() < 3.0
            assert not mine.done()
            await asyncio.sleep(60.0)
            process.user.update(None)
            await mine
            assert process.applied == 1

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


def search_of(process: UserProcess, searches: Searches) -> GroupSearch:
    return GroupSearch(make_resources(process, matchmaker=searches))


@pytest.mark.parametrize("phase", ["before", "as it begins", "within"])
def test_a_peer_whose_user_is_stopped_is_in_no_search(phase: str):
    async def main() -> None:
        process = UserProcess(ReachStage if phase == "as it begins" else None)
        searches = Searches()
        loop = asyncio.get_running_loop()
        if phase == "before":
            process.stop()
        elif phase == "within":
            loop.call_later(2.0, process.stop)

        def go_on() -> None:
            process.stops_at = None
            process.user.update(None)

        loop.call_later(50.0, go_on)
        step = Step(make_step(allow_retries=True))
        assert await search_of(process, searches).find(step) == "a group"
        assert searches.story == [
            *(["searching at 0", "left at 2"] if phase == "within" else []),
            "searching at 50",
        ]
        assert step.start_time > steady_time(), "a group that is not full waits for others from now on"

    run(main)


def test_a_search_ends_at_its_deadline_though_its_user_is_stopped():
    async def main() -> None:
        process = UserProcess()
        process.stop()
        step = Step(make_step(deadline=steady_time() + 8.0, allow_retries=True))
        with pytest.raises(MatchmakingException, match="until the deadline the user's process"):
            await search_of(process, Searches()).find(step)
        assert asyncio.get_running_loop().time() == pytest.approx(8.0, abs=0.5)

    run(main)


def test_a_donor_whose_user_is_stopped_refuses_at_once():
    class Busy(UserProcess):
        async def call_user(self, command: object) -> object:
            return await asyncio.get_running_loop().create_future()

    async def main() -> None:
        process = Busy()
        service = cast("StateService", object.__new__(StateService))
        vars(service).update(_context=process)
        asyncio.get_running_loop().call_later(3.0, process.stop)
        with pytest.raises(CopyUnavailable, match="the donor's user's process"):
            await service._capture()
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)

    run(main)
