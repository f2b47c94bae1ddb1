"""A node's storing and getting, on a simulated network with a virtual clock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from shoal.dht.config import DHTConfig
from shoal.dht.ids import key_id, node_id
from shoal.dht.marks import MARK_BYTES
from shoal.dht.messages import FIND, STORE, FindRequest, FindResponse, StoredEntry, StoreRequest
from shoal.dht.node import DHTNode
from shoal.dht.schema import SchemaValidator
from shoal.dht.server import NodeServer
from shoal.dht.types import ValueWithExpiration
from shoal.dht.validation import protected_key
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.probing import Prober
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT
from shoal.utils.serializer import MSGPackSerializer

dumps = MSGPackSerializer.dumps

Story = Callable[[SimulatedDHT], Awaitable[None]]


def simulate(story: Story, seed: int = 0) -> None:
    async def main() -> None:
        sim = SimulatedDHT(seed)
        try:
            await story(sim)
        finally:
            await sim.close()

    run(main)


def replicas(sim: SimulatedDHT, key: Any, count: int = 5) -> list[int]:
    """The numbers of the running nodes nearest to a key, nearest first."""
    identifier = key_id(dumps(key))
    return sorted(sim.nodes, key=lambda number: node_id(sim.nodes[number].peer_id) ^ identifier)[:count]


def subkeys(found: ValueWithExpiration | None) -> dict[Any, Any]:
    assert found is not None
    return {subkey: value for subkey, (value, _) in found.value.items()}


def count_calls(monkeypatch: pytest.MonkeyPatch, node: DHTNode) -> list[str]:
    calls: list[str] = []
    original = node.host.call

    async def call(peer: Any, method: Any, request: Any, *, timeout: float) -> Any:
        calls.append(method.name)
        return await original(peer, method, request, timeout=timeout)

    monkeypatch.setattr(node.host, "call", call)
    return calls


def test_values_keep_their_types_and_expire() -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(3)
        value = {"a": (1, [2.5, None]), (1, "k"): b"bytes"}
        expiration = sim.now() + 30
        assert await nodes[0].store(("key", 1), value, expiration)
        for latest in (False, True):
            for node in nodes:
                assert await node.get(("key", 1), latest=latest) == ValueWithExpiration(value, expiration)
        await asyncio.sleep(31)
        for latest in (False, True):
            assert [await node.get(("key", 1), latest=latest) for node in nodes] == [None] * 3
        assert [node.num_records for node in nodes] == [0, 0, 0]

    simulate(story)


def test_the_first_node_alone_works() -> None:
    async def story(sim: SimulatedDHT) -> None:
        node = await sim.start(0)
        assert await node.get("key") is None
        assert await node.store("key", 1, sim.now() + 10)
        assert await node.get("key", latest=True) == (1, sim.now() + 10)

    simulate(story)


def test_subkeys_of_several_writers_are_merged() -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(8)
        now = sim.now()
        stores = [node.store("key", n, now + 50 + n, subkey=("sub", n)) for n, node in enumerate(nodes)]
        assert all(await asyncio.gather(*stores))
        found = await nodes[3].get("key", latest=True)
        assert subkeys(found) == {("sub", n): n for n in range(8)}
        assert found is not None
        assert found.expiration_time == now + 57
        assert await nodes[3].store("key", "new", now + 100, subkey=("sub", 0))
        assert not await nodes[4].store("key", "older", now + 60, subkey=("sub", 0))
        assert subkeys(await nodes[5].get("key", latest=True))[("sub", 0)] == "new"
        await asyncio.sleep(now + 54 - sim.now())
        assert set(subkeys(await nodes[6].get("key", latest=True))) == {("sub", n) for n in (0, 5, 6, 7)}

    simulate(story)


def test_expirations_that_are_not_allowed(caplog: pytest.LogCaptureFixture) -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(2)
        with pytest.raises(InvalidValueError, match="max_expiration"):
            await nodes[0].store("key", 1, sim.now() + 3601)
        assert not await nodes[0].store("key", 1, sim.now() - 1)
        assert "it expired 1 s ago" in caplog.text
        for duration in (60, 0, -1.0):
            text = rf"expiration_time must be a time, as get_dht_time\(\) \+ 60, got {duration:g}"
            with pytest.raises(InvalidValueError, match=text):
                await nodes[0].store("key", 1, duration)
        with pytest.raises(
            InvalidValueError, match=r"at most 1 h from now \(max_expiration\), got 2 h from now"
        ):
            await nodes[0].store("key", 1, sim.now() + 7200)
        with pytest.raises(InvalidTypeError, match="object"):
            await nodes[0].store("key", object(), sim.now() + 1)
        long = await sim.start(5, [sim.address(0)], DHTConfig(max_expiration=10_000))
        assert await long.store("key", 1, sim.now() + 9_000)  # it keeps it itself; the others refuse it
        assert await long.get("key") == (1, pytest.approx(sim.now() + 9_000, abs=5))
        assert await nodes[0].get("key") is None  # and neither do they believe it
        assert [node.num_records for node in nodes] == [0, 0]

    simulate(story)


def test_refusals_and_dial_backs_forge_no_lines_of_a_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forged = "no\n[ERROR] forged"

    async def refuse(self: NodeServer, key: bytes, entries: list[object]) -> list[str]:
        return [forged for _ in entries]

    async def cannot_dial(self: Prober, peer: PeerID, address: Multiaddr) -> str:
        return forged

    async def story(sim: SimulatedDHT) -> None:
        await sim.start(0)
        client = await sim.start(1, [sim.address(0)])
        assert client.client_mode
        assert not await client.store("key", 1, sim.now() + 100)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert (
            len([text for text in warnings if "forged" in text]) == 3
        )  # one of each dial-back, one of the store
        assert all(text.isprintable() for text in warnings)

    monkeypatch.setattr(NodeServer, "_keep", refuse)
    monkeypatch.setattr(Prober, "probe", cannot_dial)
    simulate(story)


def test_that_nobody_answers_is_said_once_until_somebody_does(caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        return [text for text in texts if "stored nowhere" in text]

    async def story(sim: SimulatedDHT) -> None:
        await sim.start(0)
        client = await sim.start(1, [sim.address(0)], DHTConfig(client_mode=True))
        for said in (1, 2):
            await sim.stop(0)
            for _ in range(3):
                assert not await client.store("key", said, sim.now() + 100)
            assert warnings() == ["a value was stored nowhere: no node answered"] * said
            await sim.start(0)
            await asyncio.sleep(90.0)  # it joins again by itself
            assert await client.store("key", said, sim.now() + 100)

    simulate(story)


def test_records_lie_at_the_nearest_nodes() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(9)
        assert await sim.nodes[0].store("key", 1, sim.now() + 100)
        holders = [number for number, node in sim.nodes.items() if node.num_records]
        assert sorted(holders) == sorted(replicas(sim, "key"))

    simulate(story)


@pytest.mark.sweep
def test_a_large_dht_is_searched() -> None:
    """Buckets of 3 for 30 nodes: nobody knows everybody."""

    async def story(sim: SimulatedDHT) -> None:
        config = DHTConfig(bucket_size=3, num_replicas=3, parallel_rpc=2)
        await sim.start(0, (), config)
        for number in range(1, 30):
            await sim.start(number, [sim.address(0)], config)
        await asyncio.sleep(60)
        assert max(len(node.neighbours) for node in sim.nodes.values()) < 25
        for number in range(0, 30, 3):
            assert await sim.nodes[number].store(f"key {number}", number, sim.now() + 300)
            holders = [
                n for n, node in sim.nodes.items() if key_id(dumps(f"key {number}")) in node._storage._records
            ]
            nearest = replicas(sim, f"key {number}", 5)
            assert nearest[0] in holders
            assert set(holders) <= set(nearest)
        for number in range(0, 30, 3):
            for latest in (True, False):
                reader = sim.nodes[(number + 7) % 30]
                assert (await reader.get(f"key {number}", latest=latest) or (None,))[0] == number

    simulate(story)


def test_in_a_settled_small_dht_a_store_is_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(8)
        writer = sim.nodes[replicas(sim, "key", 8)[7]]  # none of the nearest itself
        calls = count_calls(monkeypatch, writer)
        assert await writer.store("key", 1, sim.now() + 100)
        assert calls.count("dht.store") == 5
        assert calls.count("dht.find") == 0
        reader = sim.nodes[replicas(sim, "key", 8)[6]]
        calls = count_calls(monkeypatch, reader)
        assert await reader.get("key", latest=True)
        assert calls.count("dht.find") == 5
        assert len(nodes) == 8

    simulate(story)


def test_equal_gets_share_one_search_and_answers_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        order = replicas(sim, "key", 8)
        reader, writer = sim.nodes[order[7]], sim.nodes[order[6]]
        assert await writer.store("key", "old", sim.now() + 100)
        calls = count_calls(monkeypatch, reader)
        found = await asyncio.gather(*(reader.get("key") for _ in range(10)))
        assert [value and value.value for value in found] == ["old"] * 10
        assert calls.count("dht.find") <= 2
        calls.clear()
        assert await writer.store("key", "new", sim.now() + 200)
        assert (await reader.get("key") or ("",))[0] == "old"  # cached
        assert calls.count("dht.find") == 0
        await asyncio.sleep(10)
        assert (await reader.get("key") or ("",))[0] == "new"  # too old for the cache

    simulate(story)


def test_a_cached_answer_that_expires_soon_is_refreshed_in_the_background() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        order = replicas(sim, "key", 8)
        reader, writer = sim.nodes[order[7]], sim.nodes[order[6]]
        assert await writer.store("key", "old", sim.now() + 4)
        assert (await reader.get("key") or ("",))[0] == "old"
        assert await writer.store("key", "new", sim.now() + 100)
        assert (await reader.get("key") or ("",))[0] == "old"
        await asyncio.sleep(1)
        assert (await reader.get("key") or ("",))[0] == "new"

    simulate(story)


def test_a_get_after_a_store_sees_it_though_an_equal_get_began_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8, DHTConfig(cache_on_store=False))
        node = sim.nodes[replicas(sim, "key", 8)[7]]
        assert await node.store("key", "old", sim.now() + 100)
        gate = asyncio.Event()
        original = node.host.call

        async def call(peer: Any, method: Any, request: Any, *, timeout: float) -> Any:
            response = await original(peer, method, request, timeout=timeout)
            if method is FIND:
                await gate.wait()
            return response

        monkeypatch.setattr(node.host, "call", call)
        early = asyncio.ensure_future(node.get("key", latest=True))
        await asyncio.sleep(0.3)  # its answers are there, but held back
        assert await node.store("key", "new", sim.now() + 200)
        late = asyncio.ensure_future(node.get("key", latest=True))
        await asyncio.sleep(0.3)
        gate.set()
        assert (await early or ("",))[0] in ("old", "new")
        assert (await late or ("",))[0] == "new"

    simulate(story)


def test_the_cache_follows_what_the_node_stores() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        node = sim.nodes[replicas(sim, "key", 8)[7]]
        for number in range(3):
            assert await node.store("key", number, sim.now() + 100 + number)
            assert (await node.get("key") or (None,))[0] == number  # cached from the first round on

    simulate(story)


def test_polling_brings_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        order = replicas(sim, "key", 8)
        reader, writer = sim.nodes[order[7]], sim.nodes[order[6]]
        received: list[int] = []
        marks: list[int] = []
        original = reader.host.call

        async def call(peer: Any, method: Any, request: Any, *, timeout: float) -> Any:
            response = await original(peer, method, request, timeout=timeout)
            if method is FIND and request.want_record:
                received.append(len(response.entries))
                marks.append(len(response.marks) // MARK_BYTES)
                assert response.nodes == []
            return response

        monkeypatch.setattr(reader.host, "call", call)
        for number in range(10):
            assert await writer.store("key", number, sim.now() + 100, subkey=number)
            assert len(subkeys(await reader.get("key", latest=True))) == number + 1
            assert await reader.get("key", latest=True)
        # One node gives the new entry, the others only say that they have it.
        assert sorted(received) == [0] * 90 + [1] * 10
        assert [sum(marks[start : start + 5]) for start in range(0, 100, 5)] == [4, 0] * 10

    simulate(story)


def test_a_replica_that_restarted_tells_everything_again() -> None:
    async def story(sim: SimulatedDHT) -> None:
        config = DHTConfig(num_replicas=1)
        await sim.start_many(3, config)
        order = replicas(sim, "key", 3)
        holder, reader = order[0], sim.nodes[order[2]]
        assert await reader.store("key", 1, sim.now() + 100, subkey="a")
        assert subkeys(await reader.get("key", latest=True)) == {"a": 1}
        await sim.stop(holder)
        await sim.start(holder, [sim.address(order[1])], config)
        await asyncio.sleep(15)
        assert await sim.nodes[order[1]].store("key", 2, sim.now() + 100, subkey="b")
        assert subkeys(await reader.get("key", latest=True))["b"] == 2

    simulate(story)


# ---- nodes that come and go


def test_records_survive_the_loss_of_nodes_one_after_the_other() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(10)
        reader = replicas(sim, "key", 10)[9]
        assert await sim.nodes[0].store("key", "kept", sim.now() + 1000)
        for _ in range(8):
            await sim.kill(next(number for number in replicas(sim, "key", 9) if number != reader))
            await asyncio.sleep(30)
            assert (await sim.nodes[reader].get("key", latest=True) or ("",))[0] == "kept"
        assert len(sim.nodes) == 2

    simulate(story)


def test_records_are_handed_over_to_newcomers() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(3)
        for number in range(20):
            assert await sim.nodes[0].store("key", number, sim.now() + 1000, subkey=number)
        for number in range(3, 12):
            await sim.start(number, [sim.address(0), sim.address(1)])
        await asyncio.sleep(30)
        for number in replicas(sim, "key"):
            record = sim.nodes[number]._storage.get(key_id(dumps("key")), sim.now())
            assert record is not None
            assert len(record.entries) == 20
        for number in range(3):
            await sim.kill(number)
        assert len(subkeys(await sim.nodes[11].get("key", latest=True))) == 20

    simulate(story)


def test_silent_nodes_hold_nobody_up_for_long() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        order = replicas(sim, "key", 8)
        assert await sim.nodes[order[7]].store("key", 1, sim.now() + 100)
        for number in order[:3]:
            await sim.kill(number, silently=True)
        began = asyncio.get_running_loop().time()
        assert (await sim.nodes[order[7]].get("key", latest=True) or (None,))[0] == 1
        assert await sim.nodes[order[6]].store("key", 2, sim.now() + 200)
        assert (await sim.nodes[order[5]].get("key", latest=True) or (None,))[0] == 2
        assert asyncio.get_running_loop().time() - began < 3.0

    simulate(story)


def test_a_dead_node_that_others_still_name_is_not_asked_again_and_again() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        order = replicas(sim, "key", 8)
        writer = sim.nodes[order[7]]
        await sim.kill(order[0], silently=True)
        assert await writer.store("key", 0, sim.now() + 100)
        await asyncio.sleep(2.5)  # the call that stalled has failed by now
        for number in range(3):
            began = asyncio.get_running_loop().time()
            assert await writer.store("key", number, sim.now() + 200 + number)
            assert asyncio.get_running_loop().time() - began < 0.5

    simulate(story)


def test_a_nearer_node_that_only_others_know_is_asked() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        order = replicas(sim, "key", 8)
        nearest, writer, reader = (sim.nodes[order[place]] for place in (0, 7, 6))
        writer._neighbours.table.failed(nearest.peer_id)
        reader._neighbours.table.failed(nearest.peer_id)
        assert await writer.store("key", 1, sim.now() + 100)
        assert nearest.num_records == 1
        for number in order[1:]:
            sim.nodes[number]._storage.remove_expired(sim.now() + 101)
        assert await reader.get("key", latest=True) == (1, pytest.approx(sim.now() + 100, abs=1))

    simulate(story)


def test_a_connection_that_breaks_under_a_call_is_made_again() -> None:
    async def story(sim: SimulatedDHT) -> None:
        node = await sim.start(0)
        client = await sim.start(1, [sim.address(0)], DHTConfig(client_mode=True))
        for number in range(5):
            storing = asyncio.ensure_future(client.store("key", number, sim.now() + 100 + number))
            await asyncio.sleep(0.0001)
            assert sim.network.drop_connections("node1", "node0")
            assert await storing
            assert (await node.get("key", latest=True) or (None,))[0] == number

    simulate(story)


def test_who_cannot_be_dialed_enters_no_table_whatever_it_says() -> None:
    async def story(sim: SimulatedDHT) -> None:
        node = await sim.start(0)
        host = await sim.start_host(1, client_mode=True)

        async def answer(peer: PeerID, request: FindRequest) -> FindResponse:
            return FindResponse()

        host.serve(FIND, answer)
        host.add_addresses(node.peer_id, [sim.address(0, with_peer_id=False)])
        await host.call(node.peer_id, FIND, FindRequest(bytes(20), listening=True), timeout=3)
        await asyncio.sleep(5)
        assert host.is_connected(node.peer_id)
        assert node.neighbours == []
        await host.close()

    simulate(story)


def test_a_node_in_client_mode_stores_and_gets_but_is_in_no_table() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(3)
        client = await sim.start(3, [sim.address(0)], DHTConfig(client_mode=True))
        assert client.client_mode
        assert await client.store("key", "from the client", sim.now() + 100)
        assert (await sim.nodes[2].get("key") or ("",))[0] == "from the client"
        assert await sim.nodes[1].store("key", "to the client", sim.now() + 200)
        assert (await client.get("key", latest=True) or ("",))[0] == "to the client"
        await asyncio.sleep(30)
        assert len(client.neighbours) == 3
        assert client.num_records == 0
        for number in range(3):
            assert client.peer_id not in sim.nodes[number].neighbours

    simulate(story)


# ---- what is refused


def test_validators_refuse_at_the_node_that_stores(caplog: pytest.LogCaptureFixture) -> None:
    async def story(sim: SimulatedDHT) -> None:
        for number in range(2):
            initial = [sim.address(0)] if number else []
            await sim.start(number, initial, validators=[SchemaValidator({"count": int})])
        writer = await sim.start(2, [sim.address(0)], DHTConfig(client_mode=True))
        assert await writer.store("count", 5, sim.now() + 100)
        assert not await writer.store("count", "many", sim.now() + 200)
        assert "it does not match the schema: Expected `int`, got `str`" in caplog.text
        assert (await writer.get("count") or (None,))[0] == 5
        # the same node with the same rule refuses before it asks anybody
        writer.add_validators([SchemaValidator({"count": int})])
        assert not await writer.store("count", "many", sim.now() + 200)
        assert "own validators refuse" in caplog.text

    with caplog.at_level(logging.INFO, "shoal"):
        simulate(story)


def test_validators_refuse_what_is_got() -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(2)
        reader = await sim.start(2, [sim.address(0)], DHTConfig(client_mode=True))
        assert await nodes[0].store("count", "many", sim.now() + 100, subkey="a")
        assert await nodes[0].store("count", 7, sim.now() + 100, subkey="b")
        assert subkeys(await reader.get("count")) == {"a": "many", "b": 7}
        reader.add_validators([SchemaValidator({"count": dict[str, int]})])
        assert subkeys(await reader.get("count")) == {"b": 7}

    simulate(story)


def test_protected_records_belong_to_their_peer(caplog: pytest.LogCaptureFixture) -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(3)
        key = protected_key("group")
        own, other = (node.peer_id.to_bytes() for node in nodes[:2])
        assert await nodes[0].store(key, "mine", sim.now() + 100, subkey=own)
        assert not await nodes[0].store(key, "forged", sim.now() + 200, subkey=other)
        assert not await nodes[0].store(key, "no sub-key", sim.now() + 200)
        assert subkeys(await nodes[2].get(key, latest=True)) == {own: "mine"}
        # past the node's own check, straight to others
        entry = StoredEntry(dumps(other), dumps("forged") + bytes(64), sim.now() + 200)
        response = await nodes[0].host.call(
            nodes[2].peer_id, STORE, StoreRequest(dumps(key), True, [entry]), timeout=3
        )
        assert "does not match" in response.refused[0]
        assert subkeys(await nodes[1].get(key, latest=True)) == {own: "mine"}

    simulate(story)


def test_what_nobody_can_decode_is_ignored() -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(2)
        entries = [
            StoredEntry(dumps("good"), dumps(1), sim.now() + 100),
            StoredEntry(dumps("bad value"), b"\xc1", sim.now() + 100),
            StoredEntry(b"\xc1", dumps(2), sim.now() + 100),
            StoredEntry(dumps([1]), dumps(3), sim.now() + 100),  # no key for a dictionary
        ]
        request = StoreRequest(dumps("key"), True, entries)
        await nodes[0].host.call(nodes[1].peer_id, STORE, request, timeout=3)
        assert subkeys(await nodes[0].get("key", latest=True)) == {"good": 1}
        assert subkeys(await nodes[1].get("key")) == {"good": 1}

    simulate(story)


def test_limits_on_records_hold_over_the_network() -> None:
    async def story(sim: SimulatedDHT) -> None:
        config = DHTConfig(max_value_size=1000, max_subkeys=3)
        nodes = await sim.start_many(2, config)
        for arguments, reason in [
            (("key", bytes(1000)), "max_value_size"),
            (("k" * 1024, 1), "^key must take at most 1,024 bytes when serialized, got 1,027"),
            (("key", 1, "s" * 1024), "^subkey must take at most 1,024 bytes when serialized, got 1,027"),
        ]:
            key, value, *subkey = arguments
            with pytest.raises(InvalidValueError, match=reason):
                await nodes[0].store(key, value, sim.now() + 100, *subkey)
        refused = await nodes[0].host.call(
            nodes[1].peer_id,
            STORE,
            StoreRequest(dumps("key"), True, [StoredEntry(b"", bytes(1001), sim.now() + 100)]),
            timeout=3,
        )
        assert "1,001 bytes, and at most 1,000 are allowed" in refused.refused[0]
        assert await nodes[0].store("key", bytes(990), sim.now() + 100)
        for number in range(5):
            assert await nodes[0].store("many", number, sim.now() + 100 + number, subkey=number)
        assert not await nodes[0].store("many", 9, sim.now() + 50, subkey=9)
        assert set(subkeys(await nodes[1].get("many"))) == {2, 3, 4}

    simulate(story)


def test_answers_name_only_nodes_that_the_asker_does_not_know() -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(4)
        request = FindRequest(bytes(20), True, b"", 20)
        ask = nodes[0].host.call
        everybody = await ask(nodes[1].peer_id, FIND, request, timeout=3)
        named = {contact.peer for contact in everybody.nodes}
        assert named == {nodes[n].peer_id.to_bytes() for n in (2, 3)}
        prefix = node_id(nodes[2].peer_id).to_bytes(20, "big")[:8]
        rest = await ask(nodes[1].peer_id, FIND, replace_known(request, prefix), timeout=3)
        assert [contact.peer for contact in rest.nodes] == [nodes[3].peer_id.to_bytes()]

    simulate(story)


def replace_known(request: FindRequest, known: bytes) -> FindRequest:
    return FindRequest(request.target, request.listening, known, request.count)


# ---- the end


def test_after_shutdown() -> None:
    async def story(sim: SimulatedDHT) -> None:
        nodes = await sim.start_many(2)
        order = replicas(sim, "key", 2)
        client = await sim.start(7, [sim.address(0)], DHTConfig(client_mode=True))
        getting = asyncio.ensure_future(client.get("key", latest=True))
        await asyncio.sleep(0)
        await client.shutdown()
        await client.shutdown()
        with pytest.raises(InvalidStateError, match="shut down"):
            await getting
        for attempt in (client.get("key"), client.store("key", 1, sim.now() + 1)):
            with pytest.raises(InvalidStateError, match="shut down"):
                await attempt
        assert len(order) == len(nodes)

    simulate(story)


def test_cancelling_one_of_several_equal_gets_leaves_the_others() -> None:
    async def story(sim: SimulatedDHT) -> None:
        await sim.start_many(8)
        order = replicas(sim, "key", 8)
        assert await sim.nodes[order[6]].store("key", 1, sim.now() + 100)
        first, second = (asyncio.ensure_future(sim.nodes[order[7]].get("key", latest=True)) for _ in range(2))
        await asyncio.sleep(0.001)
        first.cancel()
        assert (await second or (None,))[0] == 1
        assert first.cancelled()

    simulate(story)


@pytest.mark.parametrize(
    "options",
    [
        {"num_replicas": 0},
        {"wait_timeout": 0.0},
        {"bootstrap_timeout": float("nan")},
        {"cache_size": -1},
        {"max_record_size": 10**7},
        {"max_subkeys": 10**6},
        {"bucket_size": 1000},
    ],
)
def test_settings_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=next(iter(options))):
        replace(DHTConfig(), **options)
