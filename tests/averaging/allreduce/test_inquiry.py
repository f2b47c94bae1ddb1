"""A member in doubt learns later how its round has ended, on the simulated network."""

from __future__ import annotations

import asyncio

import pytest
import torch

from shoal.averaging.allreduce.events import Phase, RoundTimeouts
from shoal.averaging.allreduce.inquiry import INQUIRY_TIMEOUT, Inquiry, nobody_can_commit
from shoal.averaging.allreduce.messages import Answer, FromLeader, Knows, NotKnown, Outcome, Undecided
from shoal.averaging.allreduce.round import Round, RoundResult
from shoal.averaging.allreduce.rounds import Rounds
from shoal.averaging.router import Router
from shoal.testing.clock import run
from shoal.testing.rounds import PREFIX, SimulatedGroup

TIMEOUTS = RoundTimeouts(doubt=5.0)


async def cut_off_one_as_the_leader_decides(group: SimulatedGroup, one: int) -> tuple[Round, RoundResult]:
    """The others commit without hearing whether it does. Its round and result; the network is still cut."""
    rounds = [group.round(member, timeouts=TIMEOUTS) for member in range(group.size)]
    commitment = rounds[0]._commitment
    announce = commitment.announce

    def cut(message: FromLeader) -> None:
        if isinstance(message, Outcome):
            others = [group.name(member) for member in range(group.size) if member != one]
            group.network.partition([group.name(one)], others)
        announce(message)

    vars(commitment)["announce"] = cut
    results = await asyncio.gather(*(group.run_round(*item) for item in enumerate(rounds)))
    assert [result.failure is None for result in results] == [member != one for member in range(group.size)]
    assert results[one].in_doubt
    return rounds[one], results[one]


def inquiry_of(group: SimulatedGroup, member: int, current: Round) -> Inquiry:
    return Inquiry(group.hosts[member], PREFIX, group.group, current.core)


def test_a_member_in_doubt_learns_that_the_others_have_committed():
    """And the average that it holds is theirs, bit for bit."""

    async def main() -> None:
        async with SimulatedGroup(seed=3, size=3) as group:
            current, _ = await cut_off_one_as_the_leader_decides(group, 2)
            inquiry = asyncio.ensure_future(inquiry_of(group, 2, current).run())
            await asyncio.sleep(100)
            assert not inquiry.done()
            group.network.heal()
            assert await asyncio.wait_for(inquiry, 30) is True
            assert current.core.phase is Phase.COMMITTED
            assert current.core.outcome is not None
            assert current.core.outcome.weights == (1.0, 1.0, 1.0)
            for mine, theirs in zip(group.results(2), group.results(0), strict=True):
                assert torch.equal(mine, theirs)

    run(main)


def test_members_that_have_forgotten_the_round_are_asked_for_ten_minutes():
    async def main() -> None:
        async with SimulatedGroup(seed=3, size=3) as group:
            current, _ = await cut_off_one_as_the_leader_decides(group, 2)
            for member in (0, 1):
                group.rounds[member].close()
                Rounds(Router.of(group.hosts[member]), PREFIX)  # as in a new process
            group.network.heal()
            loop = asyncio.get_running_loop()
            began = loop.time()
            assert await inquiry_of(group, 2, current).run() is None
            assert INQUIRY_TIMEOUT <= loop.time() - began <= INQUIRY_TIMEOUT + 20
            assert current.core.phase is Phase.IN_DOUBT

    run(main)


ENDED = [Undecided("FAILED", False), Undecided("IN_DOUBT", False)]


@pytest.mark.parametrize(
    ("answers", "so"),
    [
        (ENDED, True),
        ([*ENDED, None], False),
        ([*ENDED, NotKnown()], False),
        ([*ENDED, Undecided("READY", False)], False),
        ([*ENDED, Knows(Outcome("a reason"))], False),
    ],
    ids=["all have ended", "one is not reached", "one is new", "one still votes", "one knows"],
)
def test_only_when_all_others_have_ended_can_nobody_commit(answers: list[Answer | None], so: bool):
    assert nobody_can_commit(answers) is so


def test_a_member_in_doubt_learns_that_nobody_has_committed():
    """All others were in doubt themselves."""

    async def main() -> None:
        async with SimulatedGroup(seed=3, size=3) as group:
            rounds = [group.round(member, timeouts=TIMEOUTS) for member in range(3)]
            for current in rounds:
                vars(current._commitment)["announce"] = lambda _: None
            asking = rounds[0]._commitment

            def cut(*_: object) -> object:
                group.network.partition(*([group.name(member)] for member in range(3)))
                return asyncio.sleep(0)

            vars(asking)["ask_for_acceptance"] = cut
            results = await asyncio.gather(*(group.run_round(*item) for item in enumerate(rounds)))
            assert all(result.failure for result in results)
            group.network.heal()
            assert results[1].in_doubt
            inquiry = inquiry_of(group, 1, rounds[1])
            assert await inquiry.run() is False
            assert "no member has committed" in inquiry.failure

    run(main)
