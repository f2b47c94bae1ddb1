"""What a host sends and receives of bulk data stays within its rates, over one connection and over several."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest
from tests.p2p.test_host import ECHO, Swarm

from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.pacing import MAX_HELD_CREDITS, CreditPace, ReadingPace, ReadingTurns
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.rate_limit import BURST_SECONDS, RateLimit
from shoal.p2p.rpc import Lane, Stream
from shoal.testing.clock import run
from shoal.testing.conformance.world import STREAM, Number

RATE = 1e6
SIZE, COUNT = 250_000, 40


def test_what_was_spent_is_paid_for_before_more_is():
    limit = RateLimit(1000.0)
    assert limit.wait(5.0) == 0.0
    limit.spend(3000, 5.0)
    assert limit.wait(5.0) == pytest.approx(3.0 - BURST_SECONDS)
    assert limit.wait(9.0) == 0.0


def test_a_pause_is_not_saved_up():
    limit = RateLimit(1000.0)
    limit.spend(100, 0.0)
    moved, now = 0, 1000.0
    while now < 1010.0:
        limit.spend(100, now)
        moved += 100
        now += max(limit.wait(now), 1e-6)
    assert moved == pytest.approx(10_000, rel=0.02)


def test_without_a_rate_nothing_waits():
    limit = RateLimit(None)
    limit.spend(1 << 40, 0.0)
    assert limit.wait(0.0) == 0.0
    assert limit.quantum is None


@pytest.mark.parametrize("lanes", [0, 4])
@pytest.mark.parametrize("side", ["upload", "download"])
def test_a_rate_is_kept_within_five_percent(side: str, lanes: int):
    async def main() -> None:
        async with Swarm() as swarm:
            limits = {f"max_{side}_rate": RATE}
            a = await swarm.host(
                "a", HostConfig(lanes_per_peer=lanes, **(limits if side == "download" else {}))
            )
            b = await swarm.host(
                "b", HostConfig(lanes_per_peer=lanes, **(limits if side == "upload" else {}))
            )
            b.add_addresses(a.peer_id, a.listen_addresses)

            async def receive(stream: Stream) -> None:
                stream.accept_payloads(None, 4 * SIZE)
                await stream.send(Number(0))
                for _ in range(COUNT):
                    await stream.receive()
                await stream.send(Number(1))

            async def send() -> None:
                async with b.open_stream(a.peer_id, STREAM, lane=Lane.BULK) as stream:
                    await stream.receive()
                    for index in range(COUNT):
                        await stream.send_payload(index, bytes(SIZE))
                    assert (await stream.receive()).value == 1

            a.serve_stream(STREAM, receive)
            began = asyncio.get_running_loop().time()
            await asyncio.gather(send(), send())  # the rate is that of all streams together
            took = asyncio.get_running_loop().time() - began
            report = b.lane_report(a.peer_id)
            assert report is not None
            assert report.resent < 0.1 * 2 * SIZE * COUNT
            assert (2 * SIZE * COUNT + report.resent) / took == pytest.approx(RATE, rel=0.05)
            # What is no bulk data is not held up.
            before = asyncio.get_running_loop().time()
            sending = asyncio.ensure_future(send())
            await asyncio.sleep(1.0)
            await b.call(a.peer_id, ECHO, Number(1), timeout=10)
            assert asyncio.get_running_loop().time() - before < 1.5
            await sending

    run(main)


async def take_all(stream: Stream, size: int, received: list[int]) -> None:
    stream.accept_payloads(None, 4 * size)
    await stream.send(Number(0))
    while True:
        received.append(len((await stream.receive()).data))


async def send_without_end(one: Host, other: Host, size: int) -> None:
    async with one.open_stream(other.peer_id, STREAM, lane=Lane.BULK) as stream:
        await stream.receive()
        while True:
            await stream.send_payload(1, bytes(size))


@pytest.mark.parametrize("lanes", [0, 4])
@pytest.mark.parametrize("side", ["upload", "download"])
def test_peers_share_a_rate_evenly(side: str, lanes: int):
    """Woken all at once, the same ones would always be first."""

    async def main() -> None:
        async with Swarm() as swarm:
            limits: dict[str, Any] = {f"max_{side}_rate": RATE}
            limited = await swarm.host("limited", HostConfig(lanes_per_peer=lanes, **limits))
            received: list[list[int]] = [[], [], []]
            numbers, sending, paths = itertools.count(), [], []
            for number in range(3):
                other = await swarm.host(f"other{number}", HostConfig(lanes_per_peer=lanes))
                sender, receiver = (limited, other) if side == "upload" else (other, limited)
                sender.add_addresses(receiver.peer_id, receiver.listen_addresses)
                if side == "upload" or number == 0:
                    receiver.serve_stream(
                        STREAM, lambda stream: take_all(stream, SIZE, received[next(numbers)])
                    )
                sending.append(asyncio.ensure_future(send_without_end(sender, receiver, SIZE)))
                paths.append((sender, receiver))
            await asyncio.sleep(20.0)
            reports = [sender.lane_report(receiver.peer_id) for sender, receiver in paths]
            again = sum(report.resent for report in reports if report is not None) / (20.0 * RATE)
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
        shares = [sum(one) / (20.0 * RATE) for one in received]
        assert max(shares) < 1.2 * min(shares), shares
        moved = sum(shares) + again  # the simulated kernel tells nothing: pieces go out twice
        assert 0.8 < moved < 1.05, "what has arrived of payloads that are under way does not count"

    run(main)


def test_a_receiver_that_gives_up_again_and_again_does_not_exceed_the_rate():
    async def main() -> None:
        async with Swarm() as swarm:
            sender = await swarm.host("sender", HostConfig(max_upload_rate=RATE))
            receiver = await swarm.host("receiver")
            receiver.add_addresses(sender.peer_id, sender.listen_addresses)

            async def give(stream: Stream) -> None:
                while True:
                    await stream.send_payload(1, bytes(1 << 20))

            sender.serve_stream(STREAM, give)
            for _ in range(50):
                async with receiver.open_stream(sender.peer_id, STREAM, lane=Lane.BULK) as stream:
                    stream.accept_payloads(None, 2 << 20)
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.1)
            connections = sender._connections._all_to(receiver.peer_id)
            assert 5e6 < sum(one.writer.written for one in connections) < 12.5e6

    run(main)


@pytest.mark.parametrize(
    ("side", "count", "rate", "seconds"), [("upload", 32, 125_000.0, 60.0), ("download", 6, 25_000.0, 100.0)]
)
def test_a_low_rate_is_no_death(side: str, count: int, rate: float, seconds: float):
    """Peers that wait for their turn, or are read slowly, hear signs of life all the same."""

    async def main() -> None:
        async with Swarm() as swarm:
            limits: dict[str, Any] = {f"max_{side}_rate": rate}
            limited = await swarm.host("limited", HostConfig(**limits))
            sending = []
            for number in range(count):
                other = await swarm.host(f"other{number}")
                sender, receiver = (limited, other) if side == "upload" else (other, limited)
                sender.add_addresses(receiver.peer_id, receiver.listen_addresses)
                if side == "upload" or number == 0:
                    receiver.serve_stream(STREAM, lambda stream: take_all(stream, 1 << 19, []))
                sending.append(asyncio.ensure_future(send_without_end(sender, receiver, 1 << 19)))
            await asyncio.sleep(seconds)
            assert not [task for task in sending if task.done()]
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    run(main)


def test_peers_that_take_less_than_their_share_hold_up_nobody_else():
    """So few payloads may be under way at this rate that those to slow peers could be all of them."""

    async def main() -> None:
        async with Swarm() as swarm:
            sender = await swarm.host("sender", HostConfig(max_upload_rate=125_000.0))
            received: list[int] = []
            sending = []
            for number in range(8):
                rate = None if number == 7 else 4000.0
                other = await swarm.host(f"other{number}", HostConfig(max_download_rate=rate))
                taken = received if number == 7 else []
                other.serve_stream(STREAM, lambda stream, taken=taken: take_all(stream, 1 << 21, taken))
                sender.add_addresses(other.peer_id, other.listen_addresses)
                sending.append(asyncio.ensure_future(send_without_end(sender, other, 1 << 21)))
            await asyncio.sleep(150.0)
            before = sum(received)
            await asyncio.sleep(150.0)
            assert not [task for task in sending if task.done()]
            assert sum(received) - before > 0.5 * 150.0 * 125_000.0
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    run(main)


def only_control(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no bulk lane can be had: payloads travel on the control connection."""

    async def open_none(peer: PeerID, deadline: float) -> bool:
        return False

    monkeypatch.setattr(host._connections, "_open_lane", open_none)


@pytest.mark.parametrize("size", [20_000, SIZE], ids=["one message", "many messages"])
def test_payloads_on_a_control_connection_keep_the_rate(size: int, monkeypatch: pytest.MonkeyPatch):
    """A peer can choose that one at will."""

    async def main() -> None:
        async with Swarm() as swarm:
            receiver = await swarm.host("receiver", HostConfig(max_download_rate=RATE))
            sender, other = await swarm.host("sender"), await swarm.host("other")
            for one in (sender, other):
                one.add_addresses(receiver.peer_id, receiver.listen_addresses)
            only_control(sender, monkeypatch)
            received: list[int] = []
            receiver.serve_stream(STREAM, lambda stream: take_all(stream, size, received))
            sending = asyncio.ensure_future(send_without_end(sender, receiver, size))
            await asyncio.sleep(20.0)
            assert 0.9 < sum(received) / (20.0 * RATE) < 1.05
            # Small calls on other control connections do not wait, though all of the rate is used.
            began = asyncio.get_running_loop().time()
            for _ in range(20):
                await other.call(receiver.peer_id, ECHO, Number(1), timeout=10)
            assert asyncio.get_running_loop().time() - began < 20 * 0.05 + 0.2
            admitted = [one for one in receiver._connections._connections if one.is_admitted]
            assert {one.remote for one in admitted} == {sender.peer_id, other.peer_id}
            assert not any(one.hears_late for one in admitted)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    run(main)


def test_calls_do_not_wait_for_payloads_on_the_same_control_connection(monkeypatch: pytest.MonkeyPatch):
    """Votes and look-ups travel there."""

    async def main() -> None:
        async with Swarm() as swarm:
            rate, size, loop = 125_000.0, 1 << 19, asyncio.get_running_loop()
            receiver = await swarm.host("receiver", HostConfig(max_download_rate=rate))
            sender = await swarm.host("sender")
            swarm.network.set_bandwidth("sender", "receiver", 10e6)
            sender.add_addresses(receiver.peer_id, receiver.listen_addresses)
            only_control(sender, monkeypatch)
            received: list[int] = []
            receiver.serve_stream(STREAM, lambda stream: take_all(stream, size, received))
            sending = asyncio.ensure_future(send_without_end(sender, receiver, size))
            await asyncio.sleep(10.0)
            took = []
            while loop.time() < 200.0:
                for one, other in ((sender, receiver), (receiver, sender)):
                    began = loop.time()
                    await one.call(other.peer_id, ECHO, Number(1), timeout=60)
                    took.append(loop.time() - began)
                await asyncio.sleep(0.7)
            assert max(took) < 1.0
            assert len(sender._connections._all_to(receiver.peer_id)) == 1
            # The first window has come at once.
            assert 0.95 < sum(received) / (loop.time() * rate) < 1.05 + 4 * size / (loop.time() * rate)
            turns = receiver._connections.download_turns
            assert turns._waiting
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await sender.close()
            await asyncio.sleep(1.0)
            assert not turns._waiting, "the connection has ended"

    run(main)


def test_control_connections_whose_payloads_wait_are_not_dead(monkeypatch: pytest.MonkeyPatch):
    """Little goes on there for long, and there is no other connection that shows life."""

    async def main() -> None:
        async with Swarm() as swarm:
            receiver = await swarm.host("receiver", HostConfig(max_download_rate=25_000.0))
            receiver.serve_stream(STREAM, lambda stream: take_all(stream, 1 << 19, []))
            sending = []
            for number in range(4):
                sender = await swarm.host(f"sender{number}")
                sender.add_addresses(receiver.peer_id, receiver.listen_addresses)
                only_control(sender, monkeypatch)
                sending.append(asyncio.ensure_future(send_without_end(sender, receiver, 1 << 19)))
            await asyncio.sleep(100.0)
            assert not [task for task in sending if task.done()]
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    run(main)


class Socket(asyncio.Transport):
    """Of a connection whose peer has sent so many bytes, or sends as much as it can."""

    def __init__(self, turns: ReadingTurns, unread: float) -> None:
        super().__init__()
        self.unread = unread
        self.taken = 0
        self.pace = ReadingPace(turns)
        self.pace.connect(self)
        self._is_reading = True

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        assert self._is_reading
        self._is_reading = False

    def resume_reading(self) -> None:
        assert not self._is_reading
        self._is_reading = True

    def read(self) -> int:
        """What an event loop does that finds the socket readable."""
        if not self._is_reading or not self.unread:
            return 0
        most = self.pace.most
        assert most is not None
        count = int(min(most, self.unread, 1 << 18))
        self.unread -= count
        self.taken += count
        self.pace.note(count)
        return count


def most_in(seconds: float, reads: list[tuple[float, int]]) -> int:
    """The most bytes that were read within so many seconds."""
    most = total = first = 0
    for now, count in reads:
        total += count
        while reads[first][0] <= now - seconds:
            total -= reads[first][1]
            first += 1
        most = max(most, total)
    return most


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("rate", [100_000.0, RATE])
def test_connections_read_one_after_the_other(rate: float, seed: int):
    """Resumed all at once, they would overdraw the rate by a step each: with 64 of them for seconds."""

    async def main() -> None:
        rng, turns, loop = random.Random(seed), ReadingTurns(rate), asyncio.get_running_loop()
        busy = [Socket(turns, float("inf")) for _ in range(64 - 8 * seed)]
        calm = [Socket(turns, 0) for _ in range(8 * seed)]
        reads: list[tuple[float, int]] = []
        while loop.time() < 20.0:
            for socket in calm:
                if rng.random() < 0.001:
                    socket.unread += rng.randint(1, 300)
            reads += [(loop.time(), socket.read()) for socket in rng.sample(busy + calm, 64)]
            await asyncio.sleep(0.002)
        assert most_in(4.0, reads) < 1.05 * 4.0 * rate
        assert sum(count for _, count in reads) > 0.95 * 20.0 * rate
        shares = [socket.taken for socket in busy]
        assert min(shares) > 0.8 * max(shares)
        assert all(socket.unread < 1000 for socket in calm)

    run(main)


def test_a_connection_that_ends_leaves_its_turn_to_others():
    async def main() -> None:
        turns, loop = ReadingTurns(RATE), asyncio.get_running_loop()
        ended, left = [Socket(turns, float("inf")) for _ in range(8)], Socket(turns, float("inf"))
        while loop.time() < 10.0:
            for socket in [*ended, left]:
                socket.read()
            if loop.time() > 1.0:
                for socket in ended:
                    socket.unread = 0
                    socket.pace.disconnect()
            await asyncio.sleep(0.002)
        assert left.taken > 0.95 * 9.0 * RATE

    run(main)


def test_an_event_loop_that_looks_seldom_has_its_turns():
    """At a low rate a step is paid for longer than a burst lasts: so long it may take to read it."""

    async def main() -> None:
        rate, loop = 4000.0, asyncio.get_running_loop()
        turns = ReadingTurns(rate)
        sockets = [Socket(turns, float("inf")) for _ in range(4)]
        while loop.time() < 60.0:
            for socket in sockets:
                socket.read()
            await asyncio.sleep(0.1)
        assert 0.9 < sum(socket.taken for socket in sockets) / (60.0 * rate) < 1.05

    run(main)


class Receiver:
    """Of payloads on a connection for calls, whose peer sends at once what it has credit for."""

    def __init__(self, turns: ReadingTurns, window: int) -> None:
        self.taken = 0
        self.given: list[float] = []
        """When it gave credit."""
        self.pace = CreditPace(turns, self._give)
        self._window = window

    def _give(self, stream_id: int, body: bytes) -> None:
        self.given.append(asyncio.get_running_loop().time())
        asyncio.get_running_loop().call_later(0.05, self.receive)

    def receive(self) -> None:
        """A window comes, is taken, and there is to be credit for another."""
        self.taken += self._window
        self.pace.note(self._window)
        self.pace.send(1, wire.encode_credit(self._window))


def test_credit_is_held_back_while_more_was_read_than_may_be():
    async def main() -> None:
        given: list[tuple[int, bytes]] = []
        turns = ReadingTurns(RATE)
        pace = CreditPace(turns, lambda stream_id, body: given.append((stream_id, body)))
        first, *others = [(number, wire.encode_credit(1000 + number)) for number in (1, 5, 3, 5)]
        pace.send(*first)
        assert given == [first]
        pace.note(1_000_000)
        for one in others:
            pace.send(*one)
        await asyncio.sleep(0.5)
        turns.spend(1_000_000)  # another connection was read meanwhile
        await asyncio.sleep(1.2)
        assert given == [first]
        await asyncio.sleep(2.0)
        assert given == [first, *others]

    run(main)


def test_a_connection_that_ends_gives_no_credit():
    async def main() -> None:
        given: list[int] = []
        turns = ReadingTurns(RATE)
        pace = CreditPace(turns, lambda stream_id, body: given.append(stream_id))
        turns.spend(1_000_000)
        pace.send(1, wire.encode_credit(1000))
        pace.disconnect()
        assert turns._timer is None
        await asyncio.sleep(2.0)
        assert not given
        assert turns.is_free

    run(main)


def test_credit_that_is_not_used_is_paid_for_once():
    """It may be for messages, which do not count."""

    async def main() -> None:
        given: list[int] = []
        turns = ReadingTurns(RATE)
        pace = CreditPace(turns, lambda stream_id, body: given.append(stream_id))
        turns.spend(100_000)
        for number in range(20):
            pace.send(number, wire.encode_credit(1_000_000))
        await asyncio.sleep(0.5)
        assert given == list(range(20))
        turns.spend(1_000_000)
        before = turns.wait
        pace.send(20, wire.encode_credit(1_000_000))
        pace.disconnect()
        assert turns.wait == pytest.approx(before - 0.25), (
            "what was paid for, and has not come, is given back"
        )

    run(main)


def test_credit_for_streams_without_end_is_not_held_without_end():
    async def main() -> None:
        given: list[int] = []
        turns = ReadingTurns(RATE)
        pace = CreditPace(turns, lambda stream_id, body: given.append(stream_id))
        turns.spend(1_000_000)
        for number in range(MAX_HELD_CREDITS + 2):
            pace.send(number, wire.encode_credit(1000))
        assert given == [0, 1]

    run(main)


def test_connections_do_not_give_credit_at_the_same_time():
    """Each for a window that is several seconds of the rate: together they would overdraw it for minutes."""

    async def main() -> None:
        turns, window = ReadingTurns(RATE), 4_000_000
        receivers = [Receiver(turns, window) for _ in range(16)]
        for one in receivers:
            one.receive()  # the first windows
        await asyncio.sleep(500.0)
        given = sorted(itertools.chain.from_iterable(one.given for one in receivers))
        assert all(later - earlier > 2.0 for earlier, later in itertools.pairwise(given))
        taken = [one.taken for one in receivers]
        assert 0.95 < sum(taken) / (500.0 * RATE) < 1.05
        assert max(taken) - min(taken) <= window

    run(main)


def test_large_windows_do_not_take_the_turns_of_connections_that_are_read_in_steps():
    async def main() -> None:
        turns, loop = ReadingTurns(RATE), asyncio.get_running_loop()
        sockets = [Socket(turns, float("inf")) for _ in range(3)]
        receiver = Receiver(turns, 1_000_000)
        receiver.receive()
        while loop.time() < 100.0:
            for socket in sockets:
                socket.read()
            await asyncio.sleep(0.002)
        shares = [one.taken / (100.0 * RATE) for one in (*sockets, receiver)]
        assert 0.95 < sum(shares) < 1.05
        assert max(shares) < 1.2 * min(shares), shares

    run(main)
