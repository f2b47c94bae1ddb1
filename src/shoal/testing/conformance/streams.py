"""Streams: messages and payloads in both directions, and who holds back whom."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace

from shoal.errors import (
    ConnectionLost,
    InvalidStateError,
    ProtocolViolation,
    RemoteError,
)
from shoal.p2p.config import INITIAL_WINDOW, HostConfig
from shoal.p2p.host import Host
from shoal.p2p.rpc import EndOfStream, Lane, Method, Payload, Stream
from shoal.testing.conformance.world import (
    ECHO,
    STREAM,
    Number,
    Text,
    World,
    double,
    failure_of,
    lost_by,
    on_world,
    pair,
)


class StreamConformance:
    """Every test runs on a fresh world."""

    @on_world
    async def test_streams_in_all_directions(self, world: World) -> None:
        server, client = await pair(world)

        async def total(stream: Stream) -> None:
            await stream.send(Number(sum([message.value async for message in stream])))

        async def count(stream: Stream) -> None:
            for value in range((await stream.receive()).value):
                await stream.send(Number(value))

        async def echo(stream: Stream) -> None:
            async for message in stream:
                await stream.send(message)

        for number, handler in enumerate((total, count, echo)):
            method = Method(f"test.{number}", Number, Number)
            server.serve_stream(method, handler)
        async with client.open_stream(server.peer_id, Method("test.0", Number, Number), timeout=10) as stream:
            for value in range(100):
                await stream.send(Number(value))
            await stream.finish()
            assert (await stream.receive()).value == 4950
            await failure_of(stream.receive(), EndOfStream)
            await failure_of(stream.send(Number(1)), InvalidStateError)
        async with client.open_stream(server.peer_id, Method("test.1", Number, Number), timeout=10) as stream:
            await stream.send(Number(50))
            assert [message.value async for message in stream] == list(range(50))
        async with client.open_stream(server.peer_id, Method("test.2", Number, Number), timeout=10) as stream:
            for value in range(20):
                await stream.send(Number(value))
                assert (await stream.receive()).value == value

    @on_world
    async def test_a_handler_that_ends_stops_its_sender(self, world: World) -> None:
        server, client = await pair(world)

        async def take_one(stream: Stream) -> None:
            await stream.receive()

        server.serve_stream(STREAM, take_one)

        async def send_for_ever(stream: Stream) -> None:
            while True:
                await stream.send(Number(1))
                await asyncio.sleep(0)

        async with client.open_stream(server.peer_id, STREAM, timeout=30) as stream:
            assert (await failure_of(send_for_ever(stream), RemoteError)).code == "finished"
            await failure_of(stream.receive(), EndOfStream)

    @on_world
    async def test_a_slow_reader_holds_back_its_own_sender_alone(self, world: World) -> None:
        server, client = await pair(world)
        texts = Method("test.texts", Text, Number)
        may_read = asyncio.Event()

        async def read_late(stream: Stream) -> None:
            await may_read.wait()
            await stream.send(Number(len([message async for message in stream])))

        server.serve_stream(texts, read_late)
        server.serve(ECHO, double)
        piece = Text("x" * 10_000)
        sent = 0

        async def send_much(stream: Stream) -> None:
            nonlocal sent
            for _ in range(200):
                await stream.send(piece)
                sent += 1
            await stream.finish()

        async with client.open_stream(server.peer_id, texts, timeout=30) as stream:
            sending = asyncio.ensure_future(send_much(stream))
            for n in range(50):
                assert (await client.call(server.peer_id, ECHO, Number(n), timeout=10)).value == 2 * n
            assert 20 <= sent <= INITIAL_WINDOW // 10_000 + 1
            may_read.set()
            await sending
            assert (await stream.receive()).value == 200

    @on_world
    async def test_payloads_arrive_in_the_memory_given_for_them(self, world: World) -> None:
        server, client = await pair(world)
        memory = bytearray(5_000_000)
        tags: list[int] = []

        def place(tag: int, length: int) -> memoryview:
            tags.append(tag)
            return memoryview(memory)[tag : tag + length]

        async def receive(stream: Stream) -> None:
            await stream.receive()
            stream.accept_payloads(place, 3_000_000)
            received = [item.data.nbytes async for item in stream]
            await stream.send(Number(sum(received)))

        server.serve_stream(STREAM, receive)
        data = bytes(range(251)) * 20_000
        cuts = [0, 1000, 1000, 2_000_000, 4_900_000, 5_000_000]
        async with client.open_stream(server.peer_id, STREAM, timeout=30, lane=Lane.BULK) as stream:
            await stream.send(Number(1))
            # The first ones may arrive before the receiver has said where they belong.
            for begin, end in itertools.pairwise(cuts):
                await stream.send_payload(begin, memoryview(data)[begin:end])
            await stream.finish()
            assert (await stream.receive()).value == 5_000_000
        assert memory == data[:5_000_000]
        assert tags == cuts[:-1]

    @on_world
    async def test_payloads_over_several_lanes_arrive_in_order_whoever_can_dial(self, world: World) -> None:
        config = HostConfig(lanes_per_peer=3)
        server = await world.host("server", config)
        client = await world.host("client", replace(config, client_mode=True))
        await client.connect(server.listen_addresses[0], timeout=10)
        size, count = 1_000_003, 12

        async def echo(stream: Stream) -> None:
            memory = bytearray(size * count)
            stream.accept_payloads(
                lambda tag, length: memoryview(memory)[tag * size : tag * size + length], 4 * size
            )
            await stream.send(Number(0))
            for index in range(count):
                message = await stream.receive()
                payload = await stream.receive()
                assert isinstance(payload, Payload)
                await stream.send_payload(payload.tag, payload.data)
                await stream.send(message)
                assert message.value == payload.tag == index

        async def exchange(one: Host, other: Host) -> None:
            data = random.Random(1).randbytes(size * count)
            got = bytearray(size * count)
            async with one.open_stream(other.peer_id, STREAM, timeout=30, lane=Lane.BULK) as stream:
                stream.accept_payloads(
                    lambda tag, length: memoryview(got)[tag * size : tag * size + length], 2 * size
                )
                await stream.receive()

                async def send() -> None:
                    for index in range(count):
                        await stream.send(Number(index))
                        await stream.send_payload(index, memoryview(data)[index * size : (index + 1) * size])
                    await stream.finish()

                sending = asyncio.ensure_future(send())
                for index in range(count):
                    assert (await stream.receive()).tag == index
                    assert (await stream.receive()).value == index
                await sending
                await failure_of(stream.receive(), EndOfStream)
            assert got == data

        for host in (server, client):
            host.serve_stream(STREAM, echo)
        # The first payloads may go out while the lanes are still being opened.
        for _ in range(2):
            await asyncio.gather(exchange(server, client), exchange(client, server))
        assert server.count_connections(client.peer_id)[Lane.STRIPE] >= 3
        report = client.lane_report(server.peer_id)
        assert report is not None
        assert report.lanes == 3

    @on_world
    async def test_payloads_without_a_sink_get_memory_of_their_own(self, world: World) -> None:
        server, client = await pair(world)

        async def answer(stream: Stream) -> None:
            stream.accept_payloads(None, 1_000_000)
            payload = await stream.receive()
            assert isinstance(payload, Payload)
            await stream.send_payload(payload.tag + 1, bytes(payload.data[:100_000]))

        server.serve_stream(STREAM, answer)
        async with client.open_stream(server.peer_id, STREAM, timeout=30) as stream:
            await stream.send_payload(2**64 - 2, b"z" * 900_000)
            payload = await stream.receive()
            assert payload.tag == 2**64 - 1
            assert bytes(payload.data) == b"z" * 100_000

    @on_world
    async def test_a_refused_payload_ends_the_connection(self, world: World) -> None:
        server, client = await pair(world)

        def refuse(tag: int, length: int) -> memoryview:
            raise ProtocolViolation(f"tag {tag} is not expected")

        async def receive(stream: Stream) -> None:
            stream.accept_payloads(refuse, 1_000_000)
            await stream.send(Number(0))
            await stream.receive()

        lost = lost_by(client)
        server.serve_stream(STREAM, receive)
        async with client.open_stream(server.peer_id, STREAM, timeout=30) as stream:
            await stream.receive()
            await stream.send_payload(77, b"data")
            error = await failure_of(stream.receive(), ConnectionLost)
            assert "tag 77 is not expected" in str(error)
        assert "tag 77" in (await lost)[1].reason
