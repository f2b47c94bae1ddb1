"""A committed round is applied, whatever becomes of the rest: an attempt of a step, without a process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast
from unittest.mock import Mock

import pytest
from step_surroundings import make_resources, make_step, run_attempt

from shoal.averaging.allreduce.deadlines import Deadlines
from shoal.averaging.allreduce.events import RoundTimeouts
from shoal.averaging.allreduce.lateness import Waits
from shoal.averaging.allreduce.messages import FromLeader, Outcome
from shoal.averaging.allreduce.round import Round
from shoal.averaging.background import step_runner
from shoal.averaging.background.arena import SharedArena
from shoal.averaging.background.resources import Resources
from shoal.averaging.background.service import AveragerService
from shoal.averaging.background.step import Step, StepFailed
from shoal.averaging.background.step_runner import StepRunner
from shoal.averaging.commands import (
    ApplyAverage,
    AverageWritten,
    BoundByWord,
    DoubtSettled,
    TakeSnapshot,
)
from shoal.averaging.group import GroupInfo
from shoal.averaging.report import DoubtOutcome
from shoal.errors import AllreduceException, InDoubt, MatchmakingException
from shoal.p2p.identity import PeerID
from shoal.runtime.presence import Presence
from shoal.testing.clock import run
from shoal.testing.rounds import SimulatedGroup
from shoal.utils.timed import steady_time


class UserProcess:
    """The process of the user: it hears what is applied."""

    is_closing = False

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

    def hear_of(self, group: GroupInfo, excluded: list[PeerID]) -> None:
        self.story.append(f"a group of {len(group.members)}")
        raise IndexError("of matchmaking")


def resources_of(group: SimulatedGroup, process: UserProcess) -> Resources:
    """Matchmaking raises an error of its own when it hears of the round."""
    matchmaker = Mock(**{"round_committed.side_effect": process.hear_of})
    return make_resources(process, group=group, matchmaker=matchmaker)


@pytest.mark.parametrize("fails", [False, True], ids=["applied", "a device is gone"])
def test_a_committed_round_is_applied_before_matchmaking_hears_of_it(fails: bool):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            process = UserProcess(fails=fails)
            step = Step(make_step())
            other = asyncio.ensure_future(group.run(1))
            with pytest.raises(IndexError):
                await run_attempt(resources_of(group, process), group, step)
            assert process.story == ["applied", "a group of 2"]
            assert (await other).failure is None

    run(main)


class SlowUser(UserProcess):
    """Takes 2 s to copy the tensors, and 3 s to write the average."""

    async def call_user(self, command: object) -> object:
        seconds = {TakeSnapshot: 2.0, ApplyAverage: 3.0}.get(type(command), 0.0)
        await asyncio.sleep(seconds)
        return await super().call_user(command)


def test_a_report_tells_the_phases_of_a_round_apart():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            step = Step(make_step(needs_trigger=True))
            asyncio.get_running_loop().call_later(5.0, step.triggered.set)
            other = asyncio.ensure_future(group.run(1))
            with pytest.raises(IndexError):
                await run_attempt(resources_of(group, SlowUser(fails=False)), group, step)
            await other
            phases = step.report.phases
            assert (phases.trigger, phases.snapshot, phases.apply) == pytest.approx((5.0, 2.0, 3.0))
            assert 0 < phases.allreduce < 1
            assert step.report.parts == len(group.partition().parts) > 2

    run(main)


def test_a_round_has_the_deadlines_of_its_peer_and_teaches_them():
    asked: list[int] = []
    learnt: list[tuple[Waits, int]] = []

    class Watched(Deadlines):
        def timeouts(self, nbytes: int) -> RoundTimeouts:
            asked.append(nbytes)
            return super().timeouts(nbytes)

        def learn(self, waits: Waits, nbytes: int) -> None:
            learnt.append((waits, nbytes))

    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            deadlines = Watched(RoundTimeouts())
            resources = replace(resources_of(group, UserProcess(fails=False)), deadlines=deadlines)
            other = asyncio.ensure_future(group.run(1))
            with pytest.raises(IndexError):
                await run_attempt(resources, group, Step(make_step()))
            await other
            ((waits, nbytes),) = learnt
            assert asked == [nbytes] == [max(part.nbytes for part in group.partition().parts)]
            assert len(waits.offsets) == 2

    run(main)


def test_a_wait_for_the_trigger_that_was_in_vain_is_no_copying():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            step = Step(make_step(needs_trigger=True))
            leader = group.round(1)
            asyncio.get_running_loop().call_later(5.0, leader.withdraw, "its user cancelled the step")
            other = asyncio.ensure_future(group.run_round(1, leader))
            with pytest.raises(AllreduceException):
                await run_attempt(resources_of(group, SlowUser(fails=False)), group, step)
            await other
            assert step.report.phases.trigger == pytest.approx(5.0, abs=0.5)
            assert step.report.phases.snapshot == pytest.approx(0.0, abs=0.5)

    run(main)


@pytest.mark.parametrize("is_closing", [True, False], ids=["shut down", "cancelled by its user"])
def test_a_founder_that_is_shut_down_hands_on_its_casting_vote(is_closing: bool):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=4) as group:
            process = UserProcess(fails=False)
            process.is_closing = is_closing
            step = Step(make_step(needs_trigger=True))
            others = [group.round(member) for member in range(1, 4)]
            tasks = [asyncio.ensure_future(group.run_round(1 + n, one)) for n, one in enumerate(others)]
            stepping = asyncio.ensure_future(run_attempt(resources_of(group, process), group, step))
            await asyncio.sleep(1.0)
            stepping.cancel()
            results = await asyncio.gather(*tasks)
            assert [one.failure for one in results] == [None] * 3
            assert [one.core.election.voter.casts for one in others] == [is_closing, False, False]

    run(main)


def test_an_average_that_cannot_be_written_is_this_peer_s_own_failure():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            process = UserProcess(fails=True)
            step = Step(make_step())
            other = asyncio.ensure_future(group.run(1))
            resources = resources_of(group, process)
            resources.matchmaker.round_committed.side_effect = None
            with pytest.raises(
                StepFailed, match="could not be written to this peer's tensors: a device is gone"
            ):
                await run_attempt(resources, group, step)
            assert (await other).failure is None

    run(main)


@pytest.mark.parametrize("crosses", [False, True], ids=["in time", "crossed by a cancellation"])
def test_the_user_process_hears_that_the_step_is_bound_before_the_average_is_written(crosses: bool):
    class UserThatIsTold(UserProcess):
        async def call_user(self, command: object) -> object:
            if isinstance(command, BoundByWord):
                self.story.append("bound")
                if crosses:  # cancel() had said True when this came
                    stepping.cancel()
            return await super().call_user(command)

    async def main() -> None:
        nonlocal stepping
        async with SimulatedGroup(seed=1, size=2) as group:
            process = UserThatIsTold(fails=False)
            resources = resources_of(group, process)
            resources.matchmaker.round_committed.side_effect = None
            other = asyncio.ensure_future(group.run(1))
            step = Step(make_step())
            stepping = asyncio.ensure_future(run_attempt(resources, group, step))
            await asyncio.wait([stepping])
            assert stepping.cancelled() == crosses
            assert process.story == (["bound"] if crosses else ["bound", "applied"])
            assert (await other).failure is None

    stepping: asyncio.Future[None]
    run(main)


def cut_off_as_the_leader_decides(group: SimulatedGroup, leader: Round, member: int) -> None:
    """The others commit, and ``member`` does not hear of it until the network is healed."""
    announce = leader._commitment.announce

    def cut(message: FromLeader) -> None:
        if isinstance(message, Outcome):
            others = [group.name(one) for one in range(group.size) if one != member]
            group.network.partition([group.name(member)], others)
        announce(message)

    vars(leader._commitment)["announce"] = cut


def test_a_step_in_doubt_is_looked_into_when_it_has_ended():
    class UserThatIsTold(UserProcess):
        async def call_user(self, command: object) -> object:
            if isinstance(command, DoubtSettled):
                told.set_result(command)
            return await super().call_user(command)

    async def main() -> None:
        nonlocal told
        told = asyncio.get_running_loop().create_future()
        async with SimulatedGroup(seed=1, size=3) as group:
            leader = group.round(0)
            cut_off_as_the_leader_decides(group, leader, 2)
            others = [asyncio.ensure_future(group.run_round(0, leader)), asyncio.ensure_future(group.run(1))]
            user = UserThatIsTold(fails=False)
            resources = make_resources(user, group=group, member=2, timeouts=RoundTimeouts(doubt=5.0))
            step = Step(make_step(7))
            with pytest.raises(InDoubt):
                await run_attempt(resources, group, step)
            assert step.report.in_doubt
            assert [result.failure for result in await asyncio.gather(*others)] == [None, None]
            group.network.heal()
            assert await told == DoubtSettled(7, DoubtOutcome.COMMITTED)
            assert user.story == []  # nothing is written before the user says so
            await resources.doubts.close()

    told: asyncio.Future[DoubtSettled]
    run(main)


def test_a_failed_step_that_is_cancelled_in_its_last_moment_is_cancelled():
    """It is not tried again, however late its user said so: here while a notice has not been taken."""

    class UserThatTakesItsTime(UserProcess):
        async def call_user(self, command: object) -> object:
            if isinstance(command, BoundByWord):
                await asyncio.sleep(60.0)
            return await super().call_user(command)

    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3) as group:
            leader = group.round(0)
            cut_off_as_the_leader_decides(group, leader, 2)
            others = [asyncio.ensure_future(group.run_round(0, leader)), asyncio.ensure_future(group.run(1))]
            user = UserThatTakesItsTime(fails=False)
            resources = make_resources(user, group=group, member=2, timeouts=RoundTimeouts(doubt=5.0))
            step = Step(make_step(7))
            attempt = asyncio.ensure_future(run_attempt(resources, group, step))
            await asyncio.gather(*others)
            await asyncio.sleep(30.0)
            assert step.report.in_doubt
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            await resources.doubts.close()

    run(main)


def test_a_step_that_was_given_up_after_its_vote_is_told_of_later():
    """The user's side gives up, in doubt, when its time is up and this process does not answer."""

    class UserThatGivesUp(UserProcess):
        async def call_user(self, command: object) -> object:
            if isinstance(command, BoundByWord):
                stepping.cancel()
            elif isinstance(command, DoubtSettled):
                told.set_result(command)
            return await super().call_user(command)

    async def main() -> None:
        nonlocal stepping, told
        told = asyncio.get_running_loop().create_future()
        async with SimulatedGroup(seed=1, size=2) as group:
            user = UserThatGivesUp(fails=False)
            resources = make_resources(user, group=group)
            resources.matchmaker.round_committed.side_effect = None
            other = asyncio.ensure_future(group.run(1))
            stepping = asyncio.ensure_future(run_attempt(resources, group, Step(make_step(7))))
            await asyncio.wait([stepping])
            assert (await other).failure is None
            assert await told == DoubtSettled(7, DoubtOutcome.COMMITTED)
            assert user.story == []
            await resources.doubts.close()

    stepping: asyncio.Future[None]
    told: asyncio.Future[DoubtSettled]
    run(main)


class PatientUser(UserProcess):
    """Leaves it to the user to say when the average is written."""

    async def call_user(self, command: object) -> object:
        answer = await super().call_user(command)
        return False if isinstance(command, ApplyAverage) else answer


@pytest.mark.parametrize("is_triggered", [True, False], ids=["not copied", "not triggered"])
def test_a_snapshot_that_never_comes_costs_its_member_the_step(is_triggered: bool):
    """Also if all others wait for it without any limit. Another group would wait as long: it is not tried again."""

    class UserThatHangs(UserProcess):
        async def call_user(self, command: object) -> object:
            if isinstance(command, TakeSnapshot):
                await asyncio.Event().wait()
            return await super().call_user(command)

    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3) as group:
            resources = make_resources(UserThatHangs(fails=False), group=group)
            others = [asyncio.ensure_future(group.run(member)) for member in (1, 2)]
            what = "the tensors were not copied" if is_triggered else "nobody triggered it"
            with pytest.raises(StepFailed, match=f"withdrew from the round: {what} within 600 s"):
                await run_attempt(resources, group, Step(make_step(needs_trigger=not is_triggered)))
            assert [result.failure for result in await asyncio.gather(*others)] == [None, None]

    run(main)


def test_a_step_in_doubt_is_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    attempts = []

    class EndsInDoubt:
        def __init__(self, resources: Resources, step: Step, group: GroupInfo) -> None:
            attempts.append(step.number)

        async def run(self) -> None:
            raise InDoubt("others may have decided")

    class Search:
        async def find(self, step: Step) -> GroupInfo:
            return cast("GroupInfo", Mock())

    async def main() -> None:
        monkeypatch.setattr(step_runner, "Attempt", EndsInDoubt)
        runner = StepRunner(make_resources(UserProcess(fails=False)))
        vars(runner)["_search"] = Search()
        outcome = await runner.run(make_step(3, allow_retries=True))
        assert outcome.report.failure == "others may have decided"
        assert attempts == [3]

    run(main)


@pytest.mark.parametrize("member", [0, 1], ids=["leader", "follower"])
def test_matchmaking_hears_whom_a_round_went_on_without(member: int):
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=3, clients=1) as group:
            resources = make_resources(UserProcess(fails=False), group=group, member=member)
            others = [asyncio.ensure_future(group.run(1 - member))]  # the third one never comes
            await run_attempt(resources, group, Step(make_step()))
            await asyncio.gather(*others)
            absent = [group.hosts[2].peer_id]
            matchmaker = cast("Mock", resources.matchmaker)
            matchmaker.hear_of_exclusions.assert_called_once_with(group.group.leader, absent)
            matchmaker.round_committed.assert_called_once_with(group.group, set(absent))

    run(main)


class NothingFound:
    """A search that finds no group."""

    def __init__(self) -> None:
        self.has_begun = False

    async def find(self, step: Step) -> GroupInfo:
        self.has_begun = True
        raise MatchmakingException("found no group: nobody is there")


def runner_with(resources: Resources) -> tuple[StepRunner, NothingFound]:
    runner, search = StepRunner(resources), NothingFound()
    vars(runner)["_search"] = search
    return runner, search


def test_no_step_looks_for_a_group_while_an_average_waits_for_its_call():
    """Its members would wait for the user, too."""

    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            resources = make_resources(PatientUser(fails=False), group=group)
            other = asyncio.ensure_future(group.run(1))
            await run_attempt(resources, group, Step(make_step()))
            assert (await other).failure is None
            runner, search = runner_with(resources)
            following = asyncio.ensure_future(runner.run(make_step(1)))
            await asyncio.sleep(600)
            assert not search.has_begun
            resources.arena.is_free.set()
            assert "nobody is there" in (await following).report.failure

    run(main)


def test_a_step_whose_time_is_up_before_the_call_says_what_to_do():
    async def main() -> None:
        resources = make_resources(PatientUser(fails=False))
        resources.arena.is_free.clear()
        runner, search = runner_with(resources)
        outcome = await runner.run(make_step(1, deadline=steady_time() + 5))
        assert not search.has_begun
        assert "was not applied; call apply_average()" in outcome.report.failure
        assert not outcome.found_group
        resources.arena.is_free.set()
        assert "nobody is there" in (await runner.run(make_step(2))).report.failure  # it has its turn

    run(main)


def test_a_call_that_overtakes_the_answer_leaves_the_arena_free():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:

            class Overtaken(PatientUser):
                async def call_user(self, command: object) -> object:
                    answer = await super().call_user(command)
                    if isinstance(command, ApplyAverage):
                        resources.arena.is_free.set()
                    return answer

            resources = make_resources(Overtaken(fails=False), group=group)
            other = asyncio.ensure_future(group.run(1))
            await run_attempt(resources, group, Step(make_step()))
            await other
            assert resources.arena.is_free.is_set()

    run(main)


def test_an_average_that_cannot_be_written_leaves_the_arena_free():
    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            resources = make_resources(PatientUser(fails=True), group=group)
            other = asyncio.ensure_future(group.run(1))
            with pytest.raises(StepFailed):
                await run_attempt(resources, group, Step(make_step()))
            await other
            assert resources.arena.is_free.is_set()

    run(main)


def test_the_user_process_says_that_the_arena_is_free():
    async def main() -> None:
        service = cast("AveragerService", object.__new__(AveragerService))
        arena = SharedArena(Mock())
        arena.is_free.clear()
        vars(service).update(_arena=arena)
        await service.carry_out(AverageWritten(), [])
        assert arena.is_free.is_set()

    run(main)


# the memory of a round


class CopiesForever(UserProcess):
    """Never answers that the tensors are there."""

    def __init__(self) -> None:
        super().__init__(fails=False)
        self.copies = asyncio.Event()

    async def call_user(self, command: object) -> object:
        if isinstance(command, TakeSnapshot):
            self.copies.set()
            await asyncio.Event().wait()
        return await super().call_user(command)


class Found:
    """A search that finds a group at once."""

    def __init__(self, group: GroupInfo) -> None:
        self._group = group

    async def find(self, step: Step) -> GroupInfo:
        return self._group


def test_a_cancelled_step_has_ended_when_its_round_has():
    """Until then it may read tensors of the user's, who asks by AwaitEnd when they may be written."""

    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            user = CopiesForever()
            runner = StepRunner(make_resources(user, group=group))
            vars(runner)["_search"] = Found(group.group)
            await runner.ended(0)  # it has not come yet: nothing reads
            running = asyncio.ensure_future(runner.run(make_step()))
            await user.copies.wait()
            ended = asyncio.ensure_future(runner.ended(0))
            await asyncio.sleep(1.0)
            assert not ended.done()
            running.cancel()
            await asyncio.wait({running})
            await ended
            assert running.cancelled()

    run(main)


@pytest.mark.parametrize("is_large", [False, True])
def test_freed_memory_is_given_back_after_a_large_round(is_large: bool, monkeypatch: pytest.MonkeyPatch):
    story: list[str] = []

    async def main() -> None:
        async with SimulatedGroup(seed=1, size=2) as group:
            nbytes = group.layout.data_nbytes
            monkeypatch.setattr(step_runner, "LARGE_ROUND", nbytes if is_large else 2 * nbytes)
            monkeypatch.setattr(step_runner, "trim", lambda: story.append("trimmed"))
            runner = StepRunner(make_resources(UserProcess(fails=False), group=group))
            vars(runner)["_search"] = Found(group.group)
            other = asyncio.ensure_future(group.run(1))
            assert (await runner.run(make_step())).report.failure is None
            assert not story  # the answer goes first
            await other

    run(main)
    assert story == ["trimmed"] * is_large
