"""A reader gets each entry from one node; marks show what others have besides."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from shoal.dht.ids import key_id, node_id
from shoal.dht.marks import MARK_BYTES, join_marks, mark_of, split_marks
from shoal.dht.messages import FIND, FindRequest, FindResponse
from shoal.dht.node import DHTNode
from shoal.p2p.identity import PeerID
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT
from shoal.utils.serializer import MSGPackSerializer

dumps = MSGPackSerializer.dumps
KEY = "key"


def test_a_mark_depends_on_all_of_an_entry():
    entries = [(b"a", b"bc", 1.0), (b"ab", b"c", 1.0), (b"a", b"bd", 1.0), (b"a", b"bc", 2.0)]
    marks = [mark_of(*entry) for entry in entries]
    assert len(set(marks)) == 4
    assert split_marks(join_marks(marks)) == marks
    assert split_marks(join_marks(marks)[:-1]) == marks[:3]
    assert {len(mark) for mark in marks} == {MARK_BYTES}


class Replicas:
    """Eight nodes, of which the nearest five keep the record, and the farthest reads it."""

    def __init__(self, sim: SimulatedDHT) -> None:
        self.sim = sim
        identifier = key_id(dumps(KEY))
        self.nodes = sorted(sim.nodes.values(), key=lambda node: node_id(node.peer_id) ^ identifier)
        self.keepers, self.reader = self.nodes[:5], self.nodes[7]

    def put(self, node: DHTNode, subkey: str, value: Any, lifetime: float = 100.0) -> None:
        """One node alone has this entry."""
        now = self.sim.now()
        reason = node._storage.store(dumps(KEY), dumps(subkey), dumps(value), now + lifetime, now)
        assert reason is None

    async def read(self) -> dict[Any, Any]:
        found = await self.reader.get(KEY, latest=True)
        assert found is not None
        return {subkey: value for subkey, (value, _) in found.value.items()}

    def watch(
        self, monkeypatch: pytest.MonkeyPatch, change: Callable[[PeerID, FindResponse], FindResponse]
    ) -> list[tuple[PeerID, FindRequest, FindResponse]]:
        """What the reader asks for, and gets; ``change`` is what becomes of an answer on its way."""
        seen: list[tuple[PeerID, FindRequest, FindResponse]] = []
        original = self.reader.host.call

        async def call(peer: PeerID, method: Any, request: Any, *, timeout: float) -> Any:
            response = await original(peer, method, request, timeout=timeout)
            if method is FIND and request.want_record:
                response = change(peer, response)
                seen.append((peer, request, response))
            return response

        monkeypatch.setattr(self.reader.host, "call", call)
        return seen


def simulate(story: Callable[[Replicas], Awaitable[None]]) -> None:
    async def main() -> None:
        sim = SimulatedDHT(0)
        try:
            await sim.start_many(8)
            await story(Replicas(sim))
        finally:
            await sim.close()

    run(main)


def test_what_any_one_node_has_is_found_in_one_read_and_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(replicas: Replicas) -> None:
        seen = replicas.watch(monkeypatch, lambda peer, response: response)
        for keeper in replicas.keepers:
            replicas.put(keeper, "same", 1, 100.0)
        for number, keeper in enumerate(replicas.keepers):
            replicas.put(keeper, f"own {number}", number)
        assert await replicas.read() == {"same": 1, **{f"own {number}": number for number in range(5)}}
        got = [entry.subkey for _, _, response in seen for entry in response.entries]
        assert sorted(got) == sorted([dumps("same"), *(dumps(f"own {number}") for number in range(5))])
        seen.clear()
        await replicas.read()
        assert not any(response.entries or response.marks for _, _, response in seen)
        assert len(seen) == 5

    simulate(story)


def test_a_node_that_names_what_it_does_not_give_hides_it_from_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(replicas: Replicas) -> None:
        liars: list[PeerID] = []

        def lie(peer: PeerID, response: FindResponse) -> FindResponse:
            """The one that is asked first for the entry that it has named does not give it."""
            if response.entries and not liars:
                liars.append(peer)
            return FindResponse(sequence=response.sequence) if peer in liars[:1] else response

        seen = replicas.watch(monkeypatch, lie)
        for keeper in replicas.keepers[1:]:
            replicas.put(keeper, "new", 1)
        assert await replicas.read() == {"new": 1}
        assert len(liars) == 1
        assert [request.wanted != b"" for peer, request, _ in seen if peer == liars[0]] == [False, True]
        assert any(peer != liars[0] and response.entries for peer, _, response in seen)

    simulate(story)


def test_a_node_that_is_behind_is_not_asked_for_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(replicas: Replicas) -> None:
        for keeper in replicas.keepers:
            replicas.put(keeper, "a", "first", 100.0)
        assert await replicas.read() == {"a": "first"}
        seen = replicas.watch(monkeypatch, lambda peer, response: response)
        for keeper in replicas.keepers[:4]:
            replicas.put(keeper, "a", "second", 200.0)
        assert await replicas.read() == {"a": "second"}
        assert sum(len(response.entries) for _, _, response in seen) == 1
        assert not any(request.wanted for _, request, _ in seen)

    simulate(story)


def test_the_caller_hears_when_all_have_answered_and_before_the_rest_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(replicas: Replicas) -> None:
        seen = replicas.watch(monkeypatch, lambda peer, response: response)
        replicas.put(replicas.keepers[1], "a", 1)
        answered: list[int] = []
        found = await replicas.reader.get(KEY, latest=True, when_answered=lambda: answered.append(len(seen)))
        assert found is not None
        assert answered == [5]
        assert len(seen) == 6

    simulate(story)
