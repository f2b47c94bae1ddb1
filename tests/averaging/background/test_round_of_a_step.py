"""A committed round is applied, whatever becomes of the rest: the service's part of a round, without a process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest

from shoal.averaging.allreduce.round import RoundTimeouts
from shoal.averaging.background.service import AveragerService, Step, StepFailed
from shoal.averaging.background.slow_peers import SlowPeers
from shoal.averaging.commands import ApplyAverage, AverageWritten, BoundByWord, RunStep, TakeSnapshot
from shoal.averaging.group import GroupInfo
from shoal.errors import AllreduceException, MatchmakingException
from shoal.runtime.presence import Presence
from shoal.testing.clock import run
from shoal.testing.rounds import PART_BYTES, PREFIX, SimulatedGroup
from shoal.utils.timed import steady_time


class Host:
    """The process of the user: it hears what is applied."""

    def __init__(self, *, fails: bool) -> None:
        self.story: list[str] = []
        self.fails = fails
        self.user = Presence()

    async def call_user(self, command: object) -> object:
        if isinstance(command, ApplyAverage):
            self.story.append("applied")
            if self.fails:
                raise RuntimeError("a device is gone")
            return True
        return 1.0 if isinstance(command, TakeSnapshot) else None

    def watch_members(self, when_gone: object) -> None:
        """All of them stay."""

    def hear_of(self, group: GroupInfo) -> None:
        self.story.append(f"a group of {len(group.members)}")
        raise IndexError("of matchmaking")


def service_of(group: SimulatedGroup, host: Host) -> AveragerService:
    service = cast("AveragerService", object.__new__(AveragerService))
    populated: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    populated.set_result(None)
    vars(service).update(
        _arena=group.arenas[0],
        _populating=populated,
        _layout=group.layout,
        _min_span_nbytes=0,
        _config=SimpleNamespace(prefix=PREFIX, part_size_bytes=PART_BYTES),
        _timeouts=RoundTimeouts(),
        _host=group.hosts[0],
        _rounds=group.rounds[0],
        _context=host,
        _matchmaker=Mock(**{"round_committed.side_effect": host.hear_of}),
        _steps={},
        _turn=asyncio.Lock(),
        _arena_is_free=asyncio.Event(),
        _slow_peers=SlowPeers(PREFIX),
    )
    service._arena_is_free.set()
    return service


@pytest.mark.parametrize("fails", [False, True], ids=["applied", "a device is gone"])
def test_a_committed_round_is_applied_before_matchmaking_hears_of_it(fails: bool):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            host = Host(fails=fails)
            step = Step(RunStep(0, 1.0, b"", 0.0, None, False, False))
            other = asyncio.ensure_future(group.run(1))
            with pytest.raises(IndexError):
                await service_of(group, host)._run_round(step, group.group)
            assert host.story == ["applied", "a group of 2"]
            assert (await other).failure is None

    run(main)


class SlowHost(Host):
    """Takes 2 s to copy the tensors, and 3 s to write the average."""

    async def call_user(self, command: object) -> object:
        seconds = {TakeSnapshot: 2.0, ApplyAverage: 3.0}.get(type(command), 0.0)
        await asyncio.sleep(seconds)
        return await super().call_user(command)


def test_a_report_tells_the_phases_of_a_round_apart():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            step = Step(RunStep(0, 1.0, b"", 0.0, None, False, True))
            asyncio.get_running_loop().call_later(5.0, step.triggered.set)
            other = asyncio.ensure_future(group.run(1))
            with pytest.raises(IndexError):
                await service_of(group, SlowHost(fails=False))._run_round(step, group.group)
            await other
            phases = step.report.phases
            assert (phases.trigger, phases.snapshot, phases.apply) == pytest.approx((5.0, 2.0, 3.0))
            assert 0 < phases.allreduce < 1
            assert step.report.parts == len(group.partition().parts) > 2

    run(main)


def test_a_wait_for_the_trigger_that_was_in_vain_is_no_copying():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            step = Step(RunStep(0, 1.0, b"", 0.0, None, False, True))
            leader = group.round(1)
            asyncio.get_running_loop().call_later(5.0, leader.withdraw, "its user cancelled the step")
            other = asyncio.ensure_future(group.run_round(1, leader))
            with pytest.raises(AllreduceException):
                await service_of(group, SlowHost(fails=False))._run_round(step, group.group)
            await other
            assert step.report.phases.trigger == pytest.approx(5.0, abs=0.5)
            assert step.report.phases.snapshot == pytest.approx(0.0, abs=0.5)

    run(main)


def test_an_average_that_cannot_be_written_is_this_peer_s_own_failure():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            host = Host(fails=True)
            step = Step(RunStep(0, 1.0, b"", 0.0, None, False, False))
            other = asyncio.ensure_future(group.run(1))
            service = service_of(group, host)
            service._matchmaker.round_committed.side_effect = None
            with pytest.raises(
                StepFailed, match="could not be written to this peer's tensors: a device is gone"
            ):
                await service._run_round(step, group.group)
            assert (await other).failure is None

    run(main)


@pytest.mark.parametrize("crosses", [False, True], ids=["in time", "crossed by a cancellation"])
def test_the_host_hears_that_the_step_is_bound_before_the_average_is_written(crosses: bool):
    class HostThatIsTold(Host):
        async def call_user(self, command: object) -> object:
            if isinstance(command, BoundByWord):
                self.story.append("bound")
                if crosses:  # cancel() had said True when this came
                    stepping.cancel()
            return await super().call_user(command)

    async def main() -> None:
        nonlocal stepping
        async with SimulatedGroup(seed=1, size=2) as group:
            host = HostThatIsTold(fails=False)
            service = service_of(group, host)
            service._matchmaker.round_committed.side_effect = None
            other = asyncio.ensure_future(group.run(1))
            step = Step(RunStep(0, 1.0, b"", 0.0, None, False, False))
            stepping = asyncio.ensure_future(service._run_round(step, group.group))
            await asyncio.wait([stepping])
            assert stepping.cancelled() == crosses
            assert host.story == (["bound"] if crosses else ["bound", "applied"])
            assert (await other).failure is None

    stepping: asyncio.Future[None]
    run(main)


class HostOfAPatientUser(Host):
    """Leaves it to the user to say when the average is written."""

    async def call_user(self, command: object) -> object:
        answer = await super().call_user(command)
        return False if isinstance(command, ApplyAverage) else answer


def service_with_an_average(group: SimulatedGroup) -> AveragerService:
    """It finds no group; an average of an earlier round waits for the user's call."""
    service = service_of(group, HostOfAPatientUser(fails=False))
    service._matchmaker.round_committed.side_effect = None
    vars(service)["_find_group"] = Mock(side_effect=MatchmakingException("found no group: nobody is there"))
    return service


def step_until(deadline: float | None) -> RunStep:
    return RunStep(1, 1.0, b"", 0.0, deadline, False, False)


def test_no_step_looks_for_a_group_while_an_average_waits_for_its_call():
    """Its members would wait for the user, too."""

    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            service = service_with_an_average(group)
            other = asyncio.ensure_future(group.run(1))
            await service._run_round(Step(RunStep(0, 1.0, b"", 0.0, None, False, False)), group.group)
            assert (await other).failure is None
            following = asyncio.ensure_future(service._run_step(step_until(None)))
            await asyncio.sleep(600)
            assert not service._find_group.called
            await service.handle(AverageWritten(), [])
            assert "nobody is there" in (await following).report.failure

    run(main)


def test_a_step_whose_time_is_up_before_the_call_says_what_to_do():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            service = service_with_an_average(group)
            service._arena_is_free.clear()
            outcome = await service._run_step(step_until(steady_time() + 5))
            assert not service._find_group.called
            assert "was not applied; call apply_average()" in outcome.report.failure
            assert not outcome.found_group
            assert not service._turn.locked()

    run(main)


def test_a_call_that_overtakes_the_answer_frees_the_arena():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            service = service_with_an_average(group)

            class Overtaken(HostOfAPatientUser):
                async def call_user(self, command: object) -> object:
                    answer = await super().call_user(command)
                    if isinstance(command, ApplyAverage):
                        await service.handle(AverageWritten(), [])
                    return answer

            vars(service)["_context"] = Overtaken(fails=False)
            other = asyncio.ensure_future(group.run(1))
            await service._run_round(Step(RunStep(0, 1.0, b"", 0.0, None, False, False)), group.group)
            await other
            assert "nobody is there" in (await service._run_step(step_until(None))).report.failure

    run(main)


def test_an_average_that_cannot_be_written_frees_the_arena():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            service = service_with_an_average(group)
            vars(service)["_context"] = HostOfAPatientUser(fails=True)
            other = asyncio.ensure_future(group.run(1))
            with pytest.raises(StepFailed):
                await service._run_round(Step(RunStep(0, 1.0, b"", 0.0, None, False, False)), group.group)
            await other
            assert "nobody is there" in (await service._run_step(step_until(None))).report.failure

    run(main)
