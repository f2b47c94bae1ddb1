"""Peers in client mode and auxiliaries: each group has one that can be dialed, and clients are never dialed."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.swept import rest_swept

from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.errors import MatchmakingException
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.reach.reachability import Evidence, Reachability, Standing
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking
from shoal.testing.network import HostNetwork

CLIENT, FULL, AUXILIARY = PeerMode.CLIENT, PeerMode.FULL, PeerMode.AUXILIARY


def results(seed: int, modes: list[PeerMode], target: int) -> list[GroupInfo | MatchmakingException]:
    """What a search of each peer ends with."""
    sim = SimulatedMatchmaking(seed, MatchmakingConfig(target, min_matchmaking_time=3.0))

    async def story() -> list[GroupInfo | MatchmakingException]:
        try:
            await sim.start(modes)
            searches = [sim.search(number, timeout=10.0) for number in range(len(modes))]
            return [await search for search in searches]
        finally:
            await sim.close()

    return run(story)


@pytest.mark.parametrize("seed", rest_swept(range(6), kept=2))
def test_clients_are_never_dialed_and_every_group_has_a_full_peer(seed, monkeypatch):
    dialed: set[str] = set()
    connect = HostNetwork.connect

    async def record(self, factory, address):
        dialed.add(address.host)
        return await connect(self, factory, address)

    monkeypatch.setattr(HostNetwork, "connect", record)
    rng = random.Random(seed)
    modes = [FULL, *rng.sample([FULL, FULL, CLIENT, CLIENT, CLIENT, CLIENT, CLIENT], 7)]
    sim = SimulatedMatchmaking(seed, MatchmakingConfig(4))
    hosts = [sim.network.host(f"node{number}").address().host for number in range(len(modes))]
    groups = results(seed, modes, 4)
    assert all(isinstance(group, GroupInfo) and len(group) == 4 for group in groups)
    assert all(group.members[0].mode is FULL for group in groups if isinstance(group, GroupInfo))
    assert dialed
    assert not dialed & {host for host, mode in zip(hosts, modes, strict=True) if mode is CLIENT}


def test_an_auxiliary_counts_in_the_groups_size():
    groups = results(0, [FULL, FULL, AUXILIARY], 3)
    assert all(isinstance(group, GroupInfo) and len(group) == 3 for group in groups)
    assert groups[0] == groups[1] == groups[2]


@pytest.mark.parametrize("clients", [1, 2, 3])
@pytest.mark.parametrize("seed", rest_swept(range(4), kept=2))
def test_clients_and_auxiliaries_make_a_group_that_an_auxiliary_leads(clients: int, seed: int):
    """Trainers behind NAT and public helpers."""
    modes = [AUXILIARY, *random.Random(seed).sample([AUXILIARY] * (3 - clients) + [CLIENT] * clients, 3)]
    groups = results(seed, modes, 4)
    assert all(isinstance(group, GroupInfo) and len(group) == 4 for group in groups)
    assert all(group == groups[0] for group in groups)
    assert isinstance(groups[0], GroupInfo)
    assert groups[0].members[0].mode is AUXILIARY


@pytest.mark.parametrize("seed", rest_swept(range(6), kept=2))
def test_helpers_that_come_first_keep_no_contributors_apart(seed: int):
    """Two full peers that a helper each could have had for itself average with each other."""
    groups = results(seed, [AUXILIARY, AUXILIARY, FULL, FULL], 2)
    assert all(isinstance(failure, MatchmakingException) for failure in groups[:2])
    assert isinstance(groups[2], GroupInfo)
    assert groups[2] == groups[3]


@pytest.mark.parametrize(
    ("mode", "why", "told"),
    [
        (CLIENT, "all 3 peers are clients", 3),
        # The others follow the first one by then, which says it.
        (AUXILIARY, "all 3 peers are auxiliary and have nothing to average", 1),
    ],
)
def test_who_cannot_average_at_all_makes_no_group_and_is_told_so_at_once(mode, why, told, caplog):
    for failure in results(0, [mode] * 3, 2):
        assert isinstance(failure, MatchmakingException)
        assert why in str(failure)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told <= sum(why in warning for warning in warnings) <= 3, "at most once at each peer"


@pytest.mark.parametrize("seed", rest_swept(range(4), kept=2))
@pytest.mark.parametrize("changing", range(3))
def test_a_peer_that_can_be_dialed_no_longer_goes_on_as_a_client(
    seed: int, changing: int, monkeypatch: pytest.MonkeyPatch
):
    """Its search begins anew, whether it has followers or a leader by then."""
    sim = SimulatedMatchmaking(seed, MatchmakingConfig(3, min_matchmaking_time=3.0))
    hidden: set[PeerID] = set()
    full, client = Host.reachability.fget, Reachability(Standing.CLIENT, Evidence.HELPERS)
    monkeypatch.setattr(
        Host, "reachability", property(lambda host: client if host.peer_id in hidden else full(host))
    )

    async def story() -> list[GroupInfo | MatchmakingException]:
        try:
            await sim.start([FULL] * 3)
            searches = [sim.search(number, timeout=10.0) for number in (changing, (changing + 1) % 3)]
            await asyncio.sleep(1.0)
            hidden.add(sim.dht.identity(changing).peer_id)
            await asyncio.sleep(1.0)
            searches.append(sim.search((changing + 2) % 3, timeout=10.0))
            return [await search for search in searches]
        finally:
            await sim.close()

    for group in run(story):
        assert isinstance(group, GroupInfo)
        modes = {PeerID.from_bytes(member.peer_id): member.mode for member in group.members}
        assert modes == {
            sim.dht.identity(number).peer_id: CLIENT if number == changing else FULL for number in range(3)
        }
