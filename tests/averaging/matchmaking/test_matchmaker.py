"""The shell of matchmaking: whole peers, and hand-made ones that break the rules, on a simulated network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shoal.averaging.group import (
    MAX_GATHER_BYTES,
    SCHEMA_HASH_BYTES,
    GroupInfo,
    MemberInfo,
    PeerMode,
    SignedMemberInfo,
    group_key,
    sign_member,
)
from shoal.averaging.matchmaking.asking import AVOID_AFTER_LOSS
from shoal.averaging.matchmaking.declarations import DECLARATION_LIFETIME, SEARCHES
from shoal.averaging.matchmaking.events import FinishWithGroup, FinishWithout
from shoal.averaging.matchmaking.matchmaker import Matchmaker
from shoal.averaging.matchmaking.messages import (
    JOIN,
    Accepted,
    Begin,
    Declaration,
    DeclaredState,
    Dismissed,
    DismissReason,
    GroupMember,
    JoinRequest,
    Redirect,
    Rejected,
    RejectReason,
)
from shoal.averaging.matchmaking.search import Search
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.router import Router
from shoal.dht.declarations import Declarations
from shoal.dht.node import DHTNode
from shoal.errors import InvalidStateError, InvalidValueError, MatchmakingException, RemoteError
from shoal.p2p.rpc import Stream
from shoal.testing.clock import run
from shoal.testing.matchmaking import SCHEMA, SimulatedMatchmaking
from shoal.utils.tasks import TaskSet

Story = Callable[[SimulatedMatchmaking], Awaitable[None]]
KEY = group_key("swarm")


def tell(
    story: Story,
    *,
    peers: int,
    target: int | None = None,
    minimum: int = 2,
    wait: float = 5.0,
    request_timeout: float = 3.0,
) -> None:
    """Run a story with peers 0, 1, ... on a network of 5 ms."""

    async def main() -> None:
        config = MatchmakingConfig(target, minimum, wait, request_timeout)
        sim = SimulatedMatchmaking(0, config, latency=(0.005, 0.005))
        try:
            await sim.start([PeerMode.FULL] * peers)
            await story(sim)
        finally:
            await sim.close()

    run(main)


def peer_id(sim: SimulatedMatchmaking, number: int):
    return sim.dht.identity(number).peer_id


async def settle(seconds: float = 1.0) -> None:
    """Let what goes on become quiet; virtual time."""
    await asyncio.sleep(seconds)


def signed_info(sim: SimulatedMatchmaking, number: int, leader: int, **changes: object) -> SignedMemberInfo:
    values = {
        "peer_id": peer_id(sim, number).to_bytes(),
        "leader": peer_id(sim, leader).to_bytes(),
        "key": KEY,
        "schema_hash": SCHEMA,
        "mode": PeerMode.FULL,
        "bandwidth": None,
        "addresses": (),
        "gather": b"",
        "start_time": sim.now() + 100,
        "signed_at": sim.now(),
        "nonce": bytes(16),
    }
    return sign_member(sim.dht.identity(number), MemberInfo(**{**values, **changes}))


async def ask(node: DHTNode, sim: SimulatedMatchmaking, leader: int, member: SignedMemberInfo) -> object:
    """The first answer to a hand-made request."""
    async with node.host.open_stream(peer_id(sim, leader), JOIN, timeout=20) as stream:
        await stream.send(JoinRequest("swarm", member))
        return await stream.receive()


# ---- groups


def test_a_full_group_begins_at_once_and_all_agree():
    async def story(sim: SimulatedMatchmaking) -> None:
        began = sim.now()
        searches = [sim.search(number, gather=f"data {number}".encode()) for number in range(4)]
        groups = [await search for search in searches]
        assert sim.now() - began < 1.0
        assert groups == [groups[0]] * 4
        assert len(groups[0]) == 4
        gathered = {member.peer_id: member.gather for member in groups[0].members}
        assert gathered == {peer_id(sim, n).to_bytes(): f"data {n}".encode() for n in range(4)}

    tell(story, peers=4, target=4)


def test_without_a_target_size_a_group_begins_at_its_start_time():
    async def story(sim: SimulatedMatchmaking) -> None:
        began = sim.now()
        groups = [await search for search in [sim.search(number) for number in range(5)]]
        assert 5.0 <= sim.now() - began < 5.5
        assert groups == [groups[0]] * 5

    tell(story, peers=5)


def test_group_bits_keep_peers_apart():
    async def story(sim: SimulatedMatchmaking) -> None:
        searches = [sim.search(number, bits=str(number % 2)) for number in range(4)]
        groups = [await search for search in searches]
        assert groups[0] == groups[2] != groups[1] == groups[3]
        assert groups[0].key == "swarm.0b0"

    tell(story, peers=4, target=2)


def test_bits_that_change_during_a_search_take_effect_at_once():
    async def story(sim: SimulatedMatchmaking) -> None:
        began = sim.now()
        searches = [sim.search(0, bits="0"), sim.search(1, bits="0"), sim.search(2, bits="1")]
        await asyncio.sleep(1.0)
        assert not any(search.done() for search in searches)  # each of the groups lacks members
        for number in (0, 1):
            sim.matchmakers[number].set_bits("1")
        groups = [await search for search in searches]
        assert groups == [groups[0]] * 3
        assert groups[0].key == "swarm.0b1"
        assert sim.now() - began < 2.0

    tell(story, peers=3, target=3)


def test_no_bits_go_back_to_the_key_of_all():
    async def story(sim: SimulatedMatchmaking) -> None:
        sim.matchmakers[0].set_bits("01")
        assert sim.matchmakers[0].bits == "01"
        search = sim.search(0)
        await settle()
        sim.matchmakers[0].set_bits("")
        assert sim.matchmakers[0].bits == ""
        groups = [await task for task in (sim.search(1), search)]
        assert groups[0] == groups[1]
        assert groups[0].key == "swarm.0b"

    tell(story, peers=2, target=2)


def test_a_leader_that_is_rescheduled_begins_at_its_new_time_and_frees_its_follower():
    async def story(sim: SimulatedMatchmaking) -> None:
        began = sim.now()
        leader, follower = sim.search(0, starts_in=3.0), sim.search(1, starts_in=6.0)
        await asyncio.sleep(1.0)
        sim.matchmakers[0].reschedule(began + 8.0)
        group = await follower
        assert group == await leader
        assert group.leader == peer_id(sim, 1)  # it starts first now
        assert 6.0 <= sim.now() - began < 6.5

    tell(story, peers=2)


def test_a_search_that_is_rescheduled_to_an_earlier_time_begins_then():
    async def story(sim: SimulatedMatchmaking) -> None:
        began = sim.now()
        searches = [sim.search(number, starts_in=50.0) for number in range(2)]
        await asyncio.sleep(1.0)
        for matchmaker in sim.matchmakers.values():
            matchmaker.reschedule(began + 3.0)
        groups = [await search for search in searches]
        assert groups[0] == groups[1]
        assert 3.0 <= sim.now() - began < 3.5
        sim.matchmakers[0].reschedule(began)  # nothing is to be rescheduled: harmless
        with pytest.raises(InvalidValueError, match="start_time must be a finite number, got inf"):
            sim.matchmakers[0].reschedule(float("inf"))

    tell(story, peers=2)


def test_a_peer_finds_groups_again_and_again_even_after_one_that_was_scheduled_far_ahead():
    async def story(sim: SimulatedMatchmaking) -> None:
        for starts_in in (500.0, 5.0, 5.0):
            began = sim.now()
            groups = [await search for search in [sim.search(n, starts_in=starts_in) for n in range(3)]]
            assert groups == [groups[0]] * 3
            assert sim.now() - began < 1.0

    tell(story, peers=3, target=3)


def test_a_search_that_was_scheduled_far_ahead_does_not_put_its_peer_last_in_later_ones():
    async def story(sim: SimulatedMatchmaking) -> None:
        far = sim.search(0, starts_in=3600.0, timeout=None)
        await settle()
        far.cancel()
        await settle()
        watching = [sim.search(number, starts_in=100.0 + number) for number in (1, 2)]
        await settle()  # they see that it has left
        began = sim.now()
        found = sim.search(0, starts_in=5.0)
        groups = [await search for search in (found, *watching)]
        assert groups == [groups[0]] * 3
        assert groups[0].leader == peer_id(sim, 0)
        assert sim.now() - began < 1.0

    tell(story, peers=3, target=3, minimum=3)


def test_after_a_group_that_was_scheduled_far_ahead_who_was_too_late_for_it_plans_with_its_members_again():
    async def story(sim: SimulatedMatchmaking) -> None:
        searches = [sim.search(number, starts_in=3600.0, timeout=None) for number in range(4)]
        await settle()
        (late,) = (number for number, search in enumerate(searches) if not search.done())
        again = [number for number in range(4) if number != late][:2]
        assert await sim.matchmakers[late]._scout._census._population(KEY, sim.now()) == 3
        began = sim.now()
        groups = [await search for search in (*(sim.search(number) for number in again), searches[late])]
        assert groups == [groups[0]] * 3
        assert sim.now() - began < AVOID_AFTER_LOSS + 1.0

    tell(story, peers=4, target=3, minimum=3)


def test_searches_of_one_matchmaker_wait_for_each_other():
    async def story(sim: SimulatedMatchmaking) -> None:
        first = [sim.search(number) for number in range(2)]
        second = [sim.search(number) for number in range(2)]
        one, two = [await search for search in first], [await search for search in second]
        assert one[0] == one[1]
        assert two[0] == two[1]
        assert one[0].group_id != two[0].group_id

    tell(story, peers=2, target=2)


# ---- leaders that answer otherwise


def test_who_asks_a_follower_is_redirected_to_its_leader():
    async def story(sim: SimulatedMatchmaking) -> None:
        stranger = await sim.dht.start(9, [sim.dht.address(0)])
        sim.search(0, starts_in=5.0)
        sim.search(1, starts_in=6.0)
        await settle()
        answer = await ask(stranger, sim, 1, signed_info(sim, 9, 1))
        assert isinstance(answer, Redirect)
        assert answer.leader == peer_id(sim, 0).to_bytes()
        assert answer.addresses == (str(sim.dht.address(0, with_peer_id=False)),)

    tell(story, peers=2, target=4)


def test_a_leader_that_joins_an_earlier_one_sends_its_followers_there():
    async def story(sim: SimulatedMatchmaking) -> None:
        follower = await sim.dht.start(9, [sim.dht.address(0)])
        sim.search(1, starts_in=6.0)
        await settle()
        async with follower.host.open_stream(peer_id(sim, 1), JOIN, timeout=20) as stream:
            await stream.send(JoinRequest("swarm", signed_info(sim, 9, 1)))
            assert isinstance(await stream.receive(), Accepted)
            sim.search(0, starts_in=4.0)
            dismissed = await stream.receive()
        assert isinstance(dismissed, Dismissed)
        assert dismissed.reason is DismissReason.JOINED_ANOTHER
        assert dismissed.leader == peer_id(sim, 0).to_bytes()

    tell(story, peers=2, target=4)


def test_why_a_request_is_rejected():
    async def story(sim: SimulatedMatchmaking) -> None:
        stranger = await sim.dht.start(9, [sim.dht.address(0)])

        async def reason(**changes: object) -> RejectReason:
            answer = await ask(stranger, sim, 0, signed_info(sim, 9, 0, **changes))
            assert isinstance(answer, Rejected)
            return answer.reason

        assert await reason() is RejectReason.NOT_LOOKING
        search = sim.search(0, starts_in=2.0)
        await settle(0.5)
        assert await reason(schema_hash=b"t" * SCHEMA_HASH_BYTES) is RejectReason.OTHER_SCHEMA
        assert await reason(key="swarm.0b1") is RejectReason.OTHER_KEY
        assert await reason(start_time=sim.now() - 50) is RejectReason.WRONG_ORDER
        sim.search(1, starts_in=3.0)
        assert isinstance(await search, GroupInfo)
        assert await reason() is RejectReason.BEGUN

    tell(story, peers=2, target=2)


def test_nobody_can_join_as_somebody_else():
    async def story(sim: SimulatedMatchmaking) -> None:
        stranger = await sim.dht.start(9, [sim.dht.address(0)])
        sim.search(0)
        await settle(0.5)
        forged = [
            (signed_info(sim, 1, 0), "as another peer"),
            (signed_info(sim, 9, 1), "for another leader"),
            (SignedMemberInfo(signed_info(sim, 9, 0).info, bytes(64)), "wrong signature"),
        ]
        for member, reason in forged:
            with pytest.raises(RemoteError, match=reason):
                await ask(stranger, sim, 0, member)

    tell(story, peers=2)


class FakeLeader:
    """Declares itself like a peer that looks for a group, and answers requests as it is told."""

    def __init__(
        self, sim: SimulatedMatchmaking, answer: Callable[[Stream, JoinRequest], Awaitable[None]]
    ) -> None:
        self.sim = sim
        self.answer = answer
        self.requests = 0
        self.tasks = TaskSet()

    async def start(self) -> None:
        node = await self.sim.dht.start(9, [self.sim.dht.address(0)])
        Router.of(node.host).register(JOIN, "swarm", self.serve)
        address = str(self.sim.dht.address(9, with_peer_id=False))
        declared: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        Declarations(node, SEARCHES, self.tasks, self.sim.now, lifetime=DECLARATION_LIFETIME).declare(
            KEY,
            Declaration(self.sim.now(), DeclaredState.LOOKING, SCHEMA, PeerMode.FULL, (address,)),
            lambda seconds, failure: declared.set_result(failure),
        )
        assert await declared is None

    async def serve(self, stream: Stream, request: JoinRequest) -> None:
        self.requests += 1
        await self.answer(stream, request)


def fails_with(
    answer: Callable[[SimulatedMatchmaking, Stream, JoinRequest], Awaitable[None]], text: str
) -> None:
    """A peer that finds only this leader does not get a group from it, asks it a few times at most, and says why."""

    async def story(sim: SimulatedMatchmaking) -> None:
        leader = FakeLeader(sim, lambda stream, request: answer(sim, stream, request))
        await leader.start()
        result = await sim.search(0, timeout=8.0)
        assert isinstance(result, MatchmakingException)
        assert text in str(result)
        assert str(peer_id(sim, 9)) in str(result)
        assert 1 <= leader.requests <= 40
        await leader.tasks.close()

    tell(story, peers=1, target=2)


def test_a_leader_that_leaves_out_its_follower():
    async def answer(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.send(Accepted(1.0))
        await stream.send(Begin(b"g" * 16, 1))
        await stream.send(GroupMember(signed_info(sim, 9, 9)))

    fails_with(answer, "does not include this member as it sent itself")


def test_a_leader_that_brings_a_member_who_has_not_asked_it():
    async def answer(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.send(Accepted(1.0))
        await stream.send(Begin(b"g" * 16, 3))
        for member in (signed_info(sim, 9, 9), request.member, signed_info(sim, 5, 4)):
            await stream.send(GroupMember(member))

    fails_with(answer, "has not asked")


def test_a_leader_that_begins_before_it_accepts():
    async def answer(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.send(Begin(b"g" * 16, 2))

    fails_with(answer, "answers a request by Begin")


def test_a_leader_that_ends_the_stream():
    async def answer(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.send(Accepted(1.0))

    fails_with(answer, "has finished the stream")


def test_a_leader_that_redirects_in_circles_or_rejects_without_end():
    async def redirect(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.send(Redirect(peer_id(sim, 9).to_bytes(), ()))

    async def redirect_back(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.send(Redirect(stream.remote.to_bytes(), ()))

    async def reject(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.send(Rejected(RejectReason.FULL))

    fails_with(redirect, "redirected to itself")
    fails_with(redirect_back, "redirected to")
    fails_with(reject, "rejected: its group is full")


def test_a_leader_that_never_begins():
    async def answer(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.send(Accepted(0.5))
        await stream.receive()

    fails_with(answer, "neither began nor postponed")


def test_a_leader_that_never_answers():
    async def answer(sim: SimulatedMatchmaking, stream: Stream, request: JoinRequest) -> None:
        await stream.receive()

    fails_with(answer, "no answer in 3 s")


# ---- members that give up in every round


@pytest.mark.sweep
def test_a_member_that_gives_up_in_every_round_is_invited_less_and_less():
    """Asked for 40 s, as a step does that tries again; each round would have cost the others an attempt."""

    async def story(sim: SimulatedMatchmaking) -> None:
        began, attempts = sim.now(), 0
        while sim.now() - began < 40.0:
            searches = [sim.search(number, starts_in=1.0) for number in range(4)]
            groups = [await search for search in searches[:3]]
            searches[3].cancel()
            assert all(isinstance(group, GroupInfo) for group in groups)
            for number, group in enumerate(groups):
                if peer_id(sim, 3) in group.peer_ids:
                    attempts += number == 0
                    sim.matchmakers[number].hear_of_exclusions(group.leader, [peer_id(sim, 3)])
                sim.matchmakers[number].round_committed(group, [peer_id(sim, 3)])
            await settle(0.1)
        assert 1 <= attempts <= 6

    tell(story, peers=4, wait=3.0)


def test_the_word_of_one_leader_keeps_nobody_apart():
    async def story(sim: SimulatedMatchmaking) -> None:
        victim, liar = peer_id(sim, 3), peer_id(sim, 2)
        for number in range(3):
            for _ in range(5):
                sim.matchmakers[number].hear_of_exclusions(liar, [victim])
        groups = [await search for search in [sim.search(number) for number in (0, 1, 3)]]
        assert groups == [groups[0]] * 3
        assert victim in groups[0].peer_ids

    tell(story, peers=4, target=3)


def test_a_peer_that_leaders_exclude_does_not_avoid_itself():
    """A leader that was replaced hears that it was excluded itself, as do those that it led."""

    async def story(sim: SimulatedMatchmaking) -> None:
        for leader in (0, 0, 1, 2, 1, 2):
            sim.matchmakers[0].hear_of_exclusions(peer_id(sim, leader), [peer_id(sim, 0), peer_id(sim, 3)])
        sim.search(0)
        await settle()
        declared = await sim.matchmakers[0]._peer.declarations.read(KEY)
        assert [declaration.lost for _, declaration in declared] == [(peer_id(sim, 3).to_bytes(),)]

    tell(story, peers=1, target=2)


# ---- faults


def test_when_the_leader_dies_its_followers_find_another():
    async def story(sim: SimulatedMatchmaking) -> None:
        sim.search(0, starts_in=5.0)
        followers = [sim.search(number, starts_in=6.0) for number in (1, 2)]
        await settle()
        began = sim.now()
        await sim.kill(0)
        groups = [await follower for follower in followers]
        assert groups[0] == groups[1]
        assert set(groups[0].peer_ids) == {peer_id(sim, 1), peer_id(sim, 2)}
        assert sim.now() - began < 7.0

    tell(story, peers=3, target=4)


@pytest.mark.parametrize("request_timeout", [3.0, 5.0, 20.0])
def test_a_silent_leader_holds_up_nobody_for_ever(request_timeout):
    async def story(sim: SimulatedMatchmaking) -> None:
        began = sim.now()
        silent = sim.search(0, starts_in=4.0)
        await settle(0.1)
        for number in (1, 2):
            sim.network.silence("node0", f"node{number}")
        others = [await search for search in [sim.search(number, starts_in=5.0) for number in (1, 2)]]
        assert others[0] == others[1]
        assert len(others[0]) == 2
        assert sim.now() - began < 30.0
        silent.cancel()

    tell(story, peers=3, target=3, request_timeout=request_timeout)


def test_cancelling_frees_followers_and_leader_at_once():
    async def story(sim: SimulatedMatchmaking) -> None:
        searches = [sim.search(number, starts_in=4.0 + number) for number in range(4)]
        await settle()
        searches[0].cancel()  # their leader
        searches[3].cancel()  # a follower
        await settle(0.5)
        assert searches[0].cancelled()
        assert searches[3].cancelled()
        groups = [await search for search in searches[1:3]]
        assert groups[0] == groups[1]
        assert set(groups[0].peer_ids) == {peer_id(sim, 1), peer_id(sim, 2)}

    tell(story, peers=4, target=5)


def test_what_all_have_gathered_may_take_longer_than_the_request_timeout_on_a_slow_link():
    async def story(sim: SimulatedMatchmaking) -> None:
        for number in (1, 2):
            sim.network.set_bandwidth("node0", f"node{number}", 200_000.0)
        searches = [sim.search(n, starts_in=5.0 + n, gather=bytes(MAX_GATHER_BYTES - 1000)) for n in range(3)]
        groups = [await search for search in searches]
        assert groups == [groups[0]] * 3
        assert sim.now() - groups[0].members[0].signed_at > 6.0

    tell(story, peers=3, request_timeout=3.0)


# ---- who leaves while the group begins


@pytest.mark.parametrize("what", ["cancelled", "other bits", "another time"])
def test_the_leader_learns_at_once_that_a_follower_left_before_it_heard_that_the_group_begins(what):
    async def story(sim: SimulatedMatchmaking) -> None:
        leader, follower, leaver = (sim.search(number, starts_in=4.0 + number) for number in range(3))
        assert (await leader).leader == peer_id(sim, 0)
        gone = []
        sim.matchmakers[0].watch_members(lambda peer, reason: gone.append((peer, reason)))
        if what == "cancelled":
            leaver.cancel()
        elif what == "other bits":
            sim.matchmakers[2].set_bits("1")
        else:
            sim.matchmakers[2].reschedule(sim.now() + 3.0)
        assert await follower == leader.result()
        await settle(0.1)
        assert [peer for peer, _ in gone] == [peer_id(sim, 2)]
        assert "left before it heard" in gone[0][1]
        again = []
        sim.matchmakers[0].watch_members(lambda peer, reason: again.append((peer, reason)))
        assert again == gone
        assert not leaver.done() or leaver.cancelled()

    tell(story, peers=3, target=3)


def test_nobody_is_said_to_have_left_a_group_that_all_have_heard_of():
    async def story(sim: SimulatedMatchmaking) -> None:
        gone = []
        searches = [sim.search(number) for number in range(4)]
        groups = [await search for search in searches]
        leader = next(number for number in range(4) if peer_id(sim, number) == groups[0].leader)
        sim.matchmakers[leader].watch_members(lambda peer, reason: gone.append(peer))
        await settle(100.0)
        assert gone == []

    tell(story, peers=4, target=4)


@pytest.mark.parametrize("number", [0, 1])
def test_who_is_cancelled_in_the_moment_when_the_group_stands_gets_it_to_withdraw_from_it(
    number, monkeypatch
):
    async def story(sim: SimulatedMatchmaking) -> None:
        found: list[GroupInfo] = []

        async def step() -> None:
            matchmaker = sim.matchmakers[number]
            start_time = sim.now() + 4.0 + number
            found.append(await matchmaker.find_group(start_time=start_time, deadline=None))
            await asyncio.sleep(1.0)
            raise AssertionError("the cancellation is lost")

        def finish(search: Search, effect: FinishWithGroup | FinishWithout) -> None:
            original(search, effect)
            if search is sim.matchmakers[number]._search:
                task.cancel()

        original = Search._finish
        monkeypatch.setattr(Search, "_finish", finish)
        task = asyncio.ensure_future(step())
        other = sim.search(1 - number, starts_in=4.0 + (1 - number))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert found == [await other]

    tell(story, peers=2, target=2)


# ---- failure and misuse


def test_the_error_names_peers_of_another_schema():
    async def story(sim: SimulatedMatchmaking) -> None:
        await sim.start_one(1, schema=b"other".ljust(SCHEMA_HASH_BYTES, b"."))
        searches = [sim.search(number, timeout=7.0) for number in range(2)]
        for number, search in enumerate(searches):
            error = await search
            assert isinstance(error, MatchmakingException)
            assert f"{peer_id(sim, 1 - number)} averages something else under this prefix" in str(error)
            assert "(shapes, dtypes, " in str(error)
            assert "prefix 'swarm' in 7 s: no other peer looks" in str(error)

    tell(story, peers=1)


def test_a_long_search_says_with_growing_pauses_why_there_is_no_group(caplog):
    async def story(sim: SimulatedMatchmaking) -> None:
        search = sim.search(0, timeout=None, starts_in=100.0)
        await asyncio.sleep(215.0)
        search.cancel()

    with caplog.at_level("INFO", logger="shoal.averaging.matchmaking.search"):
        tell(story, peers=1)
    records = [one for one in caplog.records if one.name == "shoal.averaging.matchmaking.search"]
    levels = ["INFO", "INFO", "INFO", "WARNING"]  # at once, after 30, 90 and 210 s
    assert [one.levelname for one in records] == levels
    lines = [one.getMessage() for one in records]
    address = "Others join by initial_peers=['/ip4/10.0.0.1/tcp/4000/p2p/"
    assert lines[0].startswith(
        "swarm: waiting for 1 more peer with prefix 'swarm' (a group has 2 or more peers)"
    )
    assert address in lines[0]
    assert all("no other peer looks for a group with prefix 'swarm'" in line for line in lines[1:])


@pytest.mark.parametrize("wait", [2.0, 4.7, 5.0, 7.0])
def test_a_search_that_lasts_longer_than_it_should_warns_however_often_its_start_is_postponed(wait, caplog):
    async def story(sim: SimulatedMatchmaking) -> None:
        search = sim.search(0, timeout=None)
        await asyncio.sleep(31.0 + 60 + 120)
        search.cancel()

    with caplog.at_level("INFO", logger="shoal.averaging.matchmaking.search"):
        tell(story, peers=1, wait=wait)
    levels = [one.levelname for one in caplog.records if one.name == "shoal.averaging.matchmaking.search"]
    assert levels == ["INFO"] + ["WARNING"] * 3


def test_closing_ends_a_search_with_an_error():
    async def story(sim: SimulatedMatchmaking) -> None:
        search = sim.search(0)
        await settle()
        matchmaker = sim.matchmakers[0]
        await matchmaker.close()
        await matchmaker.close()
        assert isinstance(await search, MatchmakingException)
        with pytest.raises(InvalidStateError, match="closed"):
            await matchmaker.find_group(start_time=sim.now(), deadline=None)

    tell(story, peers=1)


def test_arguments_are_checked():
    async def story(sim: SimulatedMatchmaking) -> None:
        matchmaker = sim.matchmakers[0]
        with pytest.raises(InvalidValueError, match=r"prefix must be .*, got 'swarm'"):
            await sim_again(sim)
        with pytest.raises(InvalidValueError, match="gather"):
            await matchmaker.find_group(
                start_time=sim.now(), deadline=None, gather=bytes(MAX_GATHER_BYTES + 1)
            )
        with pytest.raises(InvalidValueError, match="start_time must be a finite number, got nan"):
            await matchmaker.find_group(start_time=float("nan"), deadline=None)
        with pytest.raises(InvalidValueError, match="weight must be at least 0, got -1"):
            await matchmaker.find_group(start_time=sim.now(), deadline=None, weight=-1)
        with pytest.raises(InvalidValueError, match=r"bits must be at most 64 .*, got '2'"):
            matchmaker.set_bits("2")

    tell(story, peers=1)


async def sim_again(sim: SimulatedMatchmaking) -> None:
    node = sim.dht.nodes[0]
    Matchmaker(node, Router.of(node.host), prefix="swarm", schema_hash=SCHEMA, config=sim.config)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"min_group_size": 0}, "min_group_size must be 1 to 4096 peers, got 0"),
        (
            {"target_group_size": 2, "min_group_size": 3},
            "target_group_size must be None or at least 3 .*, got 2",
        ),
        ({"target_group_size": 100_000}, "target_group_size must be 1 to 4096 peers, got 100000"),
        ({"min_matchmaking_time": 0.0}, "min_matchmaking_time must be more than 0 .*, got 0.0"),
        ({"request_timeout": float("nan")}, "request_timeout must be a finite number, got nan"),
    ],
)
def test_the_configuration_is_checked_where_it_is_made(values, text):
    with pytest.raises(InvalidValueError, match=text):
        MatchmakingConfig(**values)
