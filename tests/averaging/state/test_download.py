"""Donors and joiners on the simulated network: real streams and encryption, virtual time, scripted faults and liars."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from shoal.averaging import formats
from shoal.averaging.router import Router
from shoal.averaging.state.capture import Capture, capture_state
from shoal.averaging.state.digest import KEY_BYTES
from shoal.averaging.state.donor import YIELD_CHUNKS, CopyUnavailable, StateDonor
from shoal.averaging.state.download import (
    MAX_WINDOW_BYTES,
    WINDOW_BYTES,
    Downloaded,
    Progress,
    StateDownload,
)
from shoal.averaging.state.manifest import MAX_TENSORS, Manifest, metadata_entry
from shoal.averaging.state.messages import (
    MAX_DIMENSIONS,
    PAGE_ENTRIES,
    STATE,
    STATE_ID_BYTES,
    Digest,
    ManifestPage,
    Offer,
    RequestState,
    Resumed,
    TensorEntry,
    Waiting,
)
from shoal.averaging.state.partial import PartialState
from shoal.averaging.state.policy import FRONT_PATIENCE, LAST_PATIENCE, SILENCE, Donor
from shoal.averaging.state.queue import KEEP_SECONDS, UploadQueue
from shoal.averaging.trainer.state_sharing import tensors_in
from shoal.compression import CompressionBase, Float16Compression, NoCompression
from shoal.compression.registry import CODECS
from shoal.errors import InvalidValueError, RemoteError
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.frames import FrameKind
from shoal.p2p.rpc import DELIVERY_TIMEOUT, Lane, Stream
from shoal.testing import transport
from shoal.testing.clock import run
from shoal.testing.network import SimulatedNetwork
from shoal.testing.peers import make_host
from shoal.utils.serializer import MSGPackSerializer

PREFIX = "run"
CHUNK = 1 << 18
"""Bytes of a chunk of int8, of which most of these states consist."""


class Swarm:
    """Donors with different states, and joiners, on one network."""

    def __init__(
        self, seed: int, *, bandwidth: float | None = 2e6, latency: tuple[float, float] = (0.005, 0.05)
    ) -> None:
        self.network = SimulatedNetwork(random.Random(seed), latency=latency, bandwidth=bandwidth)
        self.hosts: dict[str, Host] = {}
        self.donors: dict[str, StateDonor] = {}
        self.states: dict[str, list[torch.Tensor]] = {}
        self.captures: dict[str, int] = {}
        self.memories: list[Any] = []

    async def __aenter__(self) -> Swarm:
        return self

    async def __aexit__(self, *_: object) -> None:
        for donor in self.donors.values():
            await donor.close()
        for host in self.hosts.values():
            await host.close()

    async def host(self, name: str) -> Host:
        if name not in self.hosts:
            self.hosts[name] = await make_host(self.network, name)
        return self.hosts[name]

    async def donor(
        self,
        name: str,
        chunks: int = 3,
        *,
        compression: CompressionBase = NoCompression(),
        queue: UploadQueue | None = None,
        seconds: float = 0.0,
        failure: Exception | None = None,
    ) -> StateDonor:
        """A donor whose state has this many chunks, and takes some seconds to copy."""
        host = await self.host(name)
        generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        self.states[name] = [
            torch.randint(-128, 128, (chunks * CHUNK - 5,), dtype=torch.int8, generator=generator),
            torch.randn(300, 7, generator=generator),
            torch.ones(5, dtype=torch.bool),
            torch.zeros(0, 2),
        ]
        self.captures[name] = 0

        async def capture() -> Capture:
            self.captures[name] += 1
            await asyncio.sleep(seconds)
            if failure is not None:
                raise failure
            captured = capture_state(
                lambda: ({"donor": name}, self.states[name]),
                hold=contextlib.nullcontext,
                serializer=MSGPackSerializer,
                compression=compression,
                reserve=0,
            )
            self.memories.append(captured.memory)
            return captured

        self.donors[name] = StateDonor(Router.of(host), PREFIX, allowed=True, capture=capture, queue=queue)
        return self.donors[name]

    async def liar(self, name: str, handler: Callable[[Stream, RequestState], Awaitable[None]]) -> None:
        Router.of(await self.host(name)).register(STATE, PREFIX, handler)

    def known(self, name: str, priority: float = 0.0, tiebreak: float = 0.0) -> Donor:
        host = self.hosts[name]
        return Donor(host.peer_id, priority, tiebreak, tuple(map(str, host.announced_addresses)))

    async def load(
        self,
        joiner: str,
        donors: list[Donor],
        *,
        timeout: float | None = 600.0,
        next_chunk_timeout: float | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        available: int = 1 << 30,
    ) -> tuple[Any, list[torch.Tensor]] | str:
        """Metadata and tensors, or why there are none."""
        memory = bytearray()

        async def find() -> list[Donor]:
            return donors

        async def allocate(nbytes: int) -> memoryview:
            nonlocal memory
            if nbytes > available:
                raise InvalidValueError("there is no memory")
            memory = bytearray(nbytes)
            return memoryview(memory)

        download = StateDownload(
            await self.host(joiner),
            PREFIX,
            find_donors=find,
            allocate=allocate,
            next_chunk_timeout=next_chunk_timeout,
            on_progress=on_progress,
        )
        result = await download.run(timeout)
        if isinstance(result, str):
            return result
        assert isinstance(result, Downloaded)
        metadata, *tensors = tensors_in(result.manifest, memoryview(memory))
        return MSGPackSerializer.loads(bytes(metadata.numpy())), tensors

    def check(self, loaded: Any, donor: str) -> None:
        """A download is the whole state of this donor."""
        assert not isinstance(loaded, str), loaded
        metadata, tensors = loaded
        assert metadata == {"donor": donor}
        assert all(torch.equal(*pair) for pair in zip(tensors, self.states[donor], strict=True))


def test_a_state_arrives_whole_and_the_copy_is_freed_a_minute_later():
    async def main() -> None:
        async with Swarm(1) as swarm:
            donor = await swarm.donor("a")
            seen: list[Progress] = []
            swarm.check(await swarm.load("j", [swarm.known("a")], on_progress=seen.append), "a")
            assert seen[-1].received == seen[-1].total > 3 * CHUNK - 5
            await asyncio.sleep(1)
            assert donor.uploads == 0
            (memory,) = swarm.memories
            assert memory.buffer
            await asyncio.sleep(KEEP_SECONDS)
            with pytest.raises(RuntimeError):
                assert memory.buffer

    run(main)


@pytest.mark.parametrize("place", [(Stream, "send_payload"), (PartialState, "take")], ids=["donor", "joiner"])
def test_many_small_tensors_leave_others_their_turns_on_the_event_loop(place, monkeypatch):
    original = getattr(*place)
    since, longest = 0, 0

    def turn_of_others() -> None:
        nonlocal since
        since = 0

    async def counted(*args: Any) -> None:
        nonlocal since, longest
        since += 1
        longest = max(longest, since)
        asyncio.get_running_loop().call_soon(turn_of_others)
        await original(*args)

    async def main() -> None:
        async with Swarm(3, bandwidth=None) as swarm:
            await swarm.donor("a")
            swarm.states["a"] = [torch.tensor(float(i)) for i in range(1000)]
            monkeypatch.setattr(*place, counted)
            swarm.check(await swarm.load("j", [swarm.known("a")]), "a")

    run(main)
    assert 0 < longest <= YIELD_CHUNKS


def test_a_lossy_codec_is_decoded_as_it_comes():
    async def main() -> None:
        async with Swarm(2) as swarm:
            await swarm.donor("a", compression=Float16Compression())
            loaded = await swarm.load("j", [swarm.known("a")])
            assert not isinstance(loaded, str)
            own = swarm.states["a"]
            assert torch.equal(loaded[1][0], own[0])
            assert torch.equal(loaded[1][1], own[1].half().float())

    run(main)


def test_joiners_share_one_copy_and_more_than_there_are_slots_for_are_served_in_turn():
    async def main() -> None:
        async with Swarm(3) as swarm:
            donor = await swarm.donor("a", seconds=2.0)
            peak = 0

            async def watch() -> None:
                nonlocal peak
                while True:
                    peak = max(peak, donor.uploads)
                    await asyncio.sleep(0.01)

            watching = asyncio.create_task(watch())
            loads = [swarm.load(f"j{n}", [swarm.known("a")]) for n in range(7)]
            for loaded in await asyncio.gather(*loads):
                swarm.check(loaded, "a")
            watching.cancel()
            await asyncio.wait([watching])
            assert peak == 4
            assert swarm.captures["a"] == 1

    run(main)


def test_who_is_queued_goes_to_another_donor_of_the_same_priority_at_once():
    async def main() -> None:
        async with Swarm(4) as swarm:
            for name in ("a", "b"):
                await swarm.donor(name, queue=UploadQueue(max_uploads=1))
            first = asyncio.create_task(swarm.load("j0", [swarm.known("a")]))
            await asyncio.sleep(0.3)
            donors = [swarm.known("a"), swarm.known("b", tiebreak=0.5)]
            swarm.check(await swarm.load("j1", donors), "b")
            swarm.check(await first, "a")

    run(main)


def test_the_highest_priority_is_asked_first_and_the_next_when_it_fails():
    async def main() -> None:
        async with Swarm(5) as swarm:
            for name in ("a", "b", "c"):
                await swarm.donor(name)
            donors = [swarm.known("a", 1.0), swarm.known("b", 3.0), swarm.known("c", 2.0)]
            swarm.check(await swarm.load("j", donors), "b")
            swarm.donors["b"].switch(False)
            swarm.check(await swarm.load("j", donors), "c")
            swarm.network.kill("c")
            swarm.check(await swarm.load("j", donors), "a")

    run(main)


def test_a_broken_connection_is_resumed_where_it_was():
    async def main() -> None:
        async with Swarm(6) as swarm:
            await swarm.donor("a", chunks=12)
            seen: list[int] = []
            breaks = 0

            def on_progress(progress: Progress) -> None:
                nonlocal breaks
                seen.append(progress.received)
                if breaks < 3 and progress.received > (breaks + 1) * 2.5 * CHUNK:
                    breaks += 1
                    asyncio.get_running_loop().call_soon(swarm.network.drop_connections, "j", "a")

            swarm.check(await swarm.load("j", [swarm.known("a")], on_progress=on_progress), "a")
            assert breaks == 3
            assert seen == sorted(seen)  # it never started over
            assert swarm.captures["a"] == 1

    run(main)


@pytest.mark.parametrize("says_goodbye", [False, True], ids=["killed", "says goodbye"])
def test_a_donor_that_dies_midway_is_replaced_by_the_next_one_at_once(says_goodbye: bool):
    async def main() -> None:
        async with Swarm(7) as swarm:
            for name in ("a", "b"):
                await swarm.donor(name, chunks=8)
            loop, since = asyncio.get_running_loop(), 0.0
            waited: list[float] = []

            def on_progress(progress: Progress) -> None:
                nonlocal since
                if progress.donor == swarm.hosts["b"].peer_id:
                    waited.append(loop.time() - since)
                elif progress.received > 2 * CHUNK and not since:
                    since = loop.time()
                    if says_goodbye:
                        swarm.hosts["a"].leave()
                    swarm.network.kill("a")

            donors = [swarm.known("a", 2.0), swarm.known("b", 1.0)]
            swarm.check(await swarm.load("j", donors, on_progress=on_progress), "b")
            assert waited[0] < 1.0

    run(main)


def test_a_joiner_that_dies_frees_its_slot():
    async def main() -> None:
        async with Swarm(8) as swarm:
            donor = await swarm.donor("a", chunks=20, queue=UploadQueue(max_uploads=1))
            dying = asyncio.create_task(swarm.load("j0", [swarm.known("a")]))
            await asyncio.sleep(1.0)
            assert donor.uploads == 1
            waiting = asyncio.create_task(swarm.load("j1", [swarm.known("a")]))
            await asyncio.sleep(0.5)
            swarm.network.kill("j0")
            dying.cancel()
            swarm.check(await waiting, "a")
            await asyncio.wait([dying])
            await asyncio.sleep(1.0)
            assert donor.uploads == 0

    run(main)


def test_cancelling_frees_the_slot_at_once():
    async def main() -> None:
        async with Swarm(9) as swarm:
            donor = await swarm.donor("a", chunks=20)
            loading = asyncio.create_task(swarm.load("j0", [swarm.known("a")]))
            await asyncio.sleep(1.0)
            assert donor.uploads == 1
            loading.cancel()
            await asyncio.wait([loading])
            await asyncio.sleep(1.0)
            assert donor.uploads == 0

    run(main)


def test_the_timeout_bounds_everything_and_the_story_tells_how_far_it_came():
    async def main() -> None:
        async with Swarm(10) as swarm:
            await swarm.donor("a", chunks=40)
            began = asyncio.get_running_loop().time()
            loaded = await swarm.load("j", [swarm.known("a", 2.0)], timeout=1.5)
            assert asyncio.get_running_loop().time() - began == pytest.approx(1.5)
            assert isinstance(loaded, str)
            assert "longer than timeout=1.5 s" in loaded
            assert str(swarm.hosts["a"].peer_id) in loaded

    run(main)


def test_nobody_there_is_said_at_once():
    async def main() -> None:
        async with Swarm(11) as swarm:
            loaded = await swarm.load("j", [])
            assert isinstance(loaded, str)
            assert "no other peer shares its state under prefix 'run'" in loaded

    run(main)


def test_switching_off_ends_waiting_and_lets_running_downloads_finish():
    async def main() -> None:
        async with Swarm(12) as swarm:
            donor = await swarm.donor("a", chunks=20, queue=UploadQueue(max_uploads=1))
            running = asyncio.create_task(swarm.load("j0", [swarm.known("a")]))
            await asyncio.sleep(0.5)
            waiting = asyncio.create_task(swarm.load("j1", [swarm.known("a")]))
            await asyncio.sleep(0.6)
            donor.switch(False)
            refused = await waiting
            assert isinstance(refused, str)
            assert "shares its state no longer" in refused
            swarm.check(await running, "a")

    run(main)


def test_a_state_that_cannot_be_copied_sends_joiners_to_the_next_donor(caplog: pytest.LogCaptureFixture):
    async def main() -> None:
        async with Swarm(13) as swarm:
            await swarm.donor("a", failure=CopyUnavailable("KeyError"))
            await swarm.donor("b", failure=ValueError("codec"))
            loaded = await swarm.load("j", [swarm.known("a"), swarm.known("b")])
            assert isinstance(loaded, str)
            assert loaded.count("the donor's get_current_state failed") == 2
            await swarm.donor("c")
            swarm.check(await swarm.load("j", [swarm.known("a", 1.0), swarm.known("c")]), "c")

    with caplog.at_level(logging.WARNING):
        run(main)
    assert "ValueError: codec" in caplog.text


def test_a_state_that_does_not_fit_into_memory_is_refused_before_it_comes():
    async def main() -> None:
        async with Swarm(14) as swarm:
            await swarm.donor("a", chunks=8)
            await swarm.donor("b", chunks=1)
            donors = [swarm.known("a", 1.0), swarm.known("b")]
            swarm.check(await swarm.load("j", donors, available=4 * CHUNK), "b")

    run(main)


def test_a_silent_donor_is_left_after_next_chunk_timeout_and_named():
    async def main() -> None:
        async with Swarm(15) as swarm:
            for name in ("a", "b"):
                await swarm.donor(name, chunks=8)
            silenced: list[float] = []

            def on_progress(progress: Progress) -> None:
                if progress.received > 3 * CHUNK and not silenced:
                    silenced.append(asyncio.get_running_loop().time())
                    swarm.network.silence("j", "a")

            donors = [swarm.known("a", 1.0), swarm.known("b")]
            loaded = await swarm.load("j", donors, next_chunk_timeout=1.0, on_progress=on_progress)
            swarm.check(loaded, "b")
            assert asyncio.get_running_loop().time() - silenced[0] < 5.0
            swarm.network.silence("j", "b")

            alone = await swarm.load("j", [swarm.known("a", 1.0)], next_chunk_timeout=1.0, timeout=30.0)
            assert isinstance(alone, str)

    run(main)


def test_a_long_copy_is_waited_for_although_no_chunk_comes():
    async def main() -> None:
        async with Swarm(16) as swarm:
            await swarm.donor("a", seconds=60.0)
            swarm.check(await swarm.load("j", [swarm.known("a")], next_chunk_timeout=1.0), "a")

    run(main)


def test_a_joiner_that_reads_nothing_loses_its_slot():
    async def main() -> None:
        async with Swarm(17) as swarm:
            donor = await swarm.donor("a", chunks=8, queue=UploadQueue(max_uploads=1))
            joiner = await swarm.host("j")
            joiner.add_addresses(swarm.hosts["a"].peer_id, swarm.hosts["a"].announced_addresses)
            async with joiner.open_stream(swarm.hosts["a"].peer_id, STATE) as stream:
                await stream.send(RequestState(PREFIX))
                await asyncio.sleep(30.0)
                assert donor.uploads == 1
                await asyncio.sleep(60.0)
                assert donor.uploads == 0

    run(main)


def test_over_a_long_path_the_window_grows_to_what_the_path_holds(monkeypatch: pytest.MonkeyPatch):
    """With a round trip of 200 ms, 16 MiB would let pass 84 MB/s at most."""
    windows: list[int] = []
    accept_payloads = Stream.accept_payloads

    def noted(stream: Stream, sink: Any, window: int) -> None:
        windows.append(window)
        accept_payloads(stream, sink, window)

    monkeypatch.setattr(transport, "RECEIVE_WINDOW", 1 << 30)  # the kernel's is as large as the path needs
    monkeypatch.setattr(Stream, "accept_payloads", noted)

    async def main() -> None:
        async with Swarm(19, bandwidth=200e6, latency=(0.1, 0.1)) as swarm:
            await swarm.donor("a", chunks=400)
            seen: list[tuple[float, int]] = []

            def on_progress(progress: Progress) -> None:
                seen.append((asyncio.get_running_loop().time(), progress.received))

            swarm.check(await swarm.load("j", [swarm.known("a")], on_progress=on_progress), "a")
            (began, first), (ended, last) = seen[0], seen[-1]
            assert (last - first) / (ended - began) > 120e6

    run(main)
    assert WINDOW_BYTES < windows[0] < windows[-1] == MAX_WINDOW_BYTES


def test_a_joiner_that_confirms_no_last_chunk_keeps_its_slot_until_the_copy_is_let_go():
    """So many copies are in memory as there are slots at most, whatever joiners do."""

    async def main() -> None:
        async with Swarm(18) as swarm:
            for name in ("a", "j"):
                swarm.hosts[name] = await make_host(swarm.network, name, HostConfig(lanes_per_peer=2))
            donor = await swarm.donor("a", queue=UploadQueue(max_uploads=1))
            joiner, giver = swarm.hosts["j"], swarm.hosts["a"]
            joiner.add_addresses(giver.peer_id, giver.announced_addresses)
            async with joiner.open_stream(giver.peer_id, STATE, lane=Lane.BULK) as stream:
                await stream.send(RequestState(PREFIX))
                while not isinstance(await stream.receive(), ManifestPage):
                    pass
                state = stream._state
                send_frame = state._send_frame

                def withhold(kind: FrameKind, stream_id: int, body: bytes) -> None:
                    if kind is not FrameKind.RECEIVED:
                        send_frame(kind, stream_id, body)

                state._send_frame = withhold
                await asyncio.sleep(1.0)  # the lanes are open
                stream.accept_payloads(None, 8 * CHUNK)
                while not isinstance(await stream.receive(), Digest):
                    pass
                await stream.finish()
                (memory,) = (weakref.ref(one.buffer) for one in swarm.memories)
                for _ in range(5):
                    await asyncio.sleep(DELIVERY_TIMEOUT / 6)
                    send_frame(FrameKind.CREDIT, state.id, wire.encode_credit(1))
                    assert donor.uploads == 1
                await asyncio.sleep(DELIVERY_TIMEOUT / 6 + 1)
                assert donor.uploads == 0
                assert isinstance(stream.failure, RemoteError)
            assert memory() is not None
            await asyncio.sleep(KEEP_SECONDS)
            assert memory() is None

    run(main)


# liars

BODY = b"\1\2\3" + bytes(CHUNK) * 2
ENTRIES = (metadata_entry(3), TensorEntry("int8", (2 * CHUNK,), 0))
ID = bytes(STATE_ID_BYTES)
KEY = bytes(range(KEY_BYTES))


async def _offer(stream: Stream, entries: tuple[TensorEntry, ...] = ENTRIES, nbytes: int = len(BODY)) -> None:
    await stream.send(Offer(ID, len(entries), nbytes, KEY))
    await stream.send(ManifestPage(entries))


async def _chunks(stream: Stream) -> None:
    await stream.send_payload(0, BODY[:3])
    await stream.send_payload(1, BODY[3 : 3 + CHUNK])
    await stream.send_payload(2, BODY[3 + CHUNK :])


async def wrong_hash(stream: Stream) -> None:
    await _offer(stream)
    await _chunks(stream)
    await stream.send(Digest(bytes(32)))


async def hash_of_other_shape(stream: Stream) -> None:
    await _offer(stream)
    await _chunks(stream)
    other = Manifest((metadata_entry(3), TensorEntry("int8", (2, CHUNK), 0))).new_digest(KEY)
    for begin, end in ((0, 3), (3, 3 + CHUNK), (3 + CHUNK, len(BODY))):
        other.update(BODY[begin:end])
    await stream.send(Digest(other.value()))


async def short_hash(stream: Stream) -> None:
    await _offer(stream)
    await _chunks(stream)
    await stream.send(Digest(b"x"))


async def no_hash(stream: Stream) -> None:
    await _offer(stream)
    await _chunks(stream)


async def short_data(stream: Stream) -> None:
    await _offer(stream)
    await stream.send_payload(0, BODY[:3])


async def short_chunk(stream: Stream) -> None:
    await _offer(stream)
    await stream.send_payload(0, BODY[:2])


async def oversize_chunk(stream: Stream) -> None:
    await _offer(stream)
    await stream.send_payload(0, BODY[:4])


async def wrong_order(stream: Stream) -> None:
    await _offer(stream)
    await stream.send_payload(0, BODY[:3])
    await stream.send_payload(2, BODY[3 : 3 + CHUNK])


async def one_chunk_more(stream: Stream) -> None:
    await _offer(stream)
    await _chunks(stream)
    await stream.send_payload(3, b"x")


async def other_size_than_offered(stream: Stream) -> None:
    await _offer(stream, nbytes=5)


async def huge_offer(stream: Stream) -> None:
    await stream.send(Offer(ID, 1 << 40, 1 << 62, KEY))


async def huge_tensor(stream: Stream) -> None:
    entries = (metadata_entry(3), TensorEntry("int8", (1 << 41,), 0))
    await _offer(stream, entries, 3 + (1 << 41))


async def bad_dtype(stream: Stream) -> None:
    await _offer(stream, (metadata_entry(3), TensorEntry("__import__", (3,), 0)), 6)


async def bad_codec(stream: Stream) -> None:
    await _offer(stream, (metadata_entry(3), TensorEntry("float32", (3,), 250)), 15)


async def more_entries_than_offered(stream: Stream) -> None:
    await stream.send(Offer(ID, 1, 3, KEY))
    await stream.send(ManifestPage(ENTRIES))


async def too_many_dimensions(stream: Stream) -> None:
    await _offer(stream, (metadata_entry(3), TensorEntry("int8", (0,) * 100_000, 0)), 3)


async def endless_dimensions(stream: Stream) -> None:
    await stream.send(Offer(ID, MAX_TENSORS, 3, KEY))
    await stream.send(ManifestPage((metadata_entry(3),)))
    for _ in range(MAX_TENSORS // PAGE_ENTRIES):
        await stream.send(ManifestPage((TensorEntry("int8", (0,) * MAX_DIMENSIONS, 0),) * PAGE_ENTRIES))


async def long_dtype(stream: Stream) -> None:
    await _offer(stream, (metadata_entry(3), TensorEntry("x" * 100_000, (0,), 0)), 3)


async def too_much_metadata(stream: Stream) -> None:
    await _offer(stream, (metadata_entry((1 << 24) + 1),), (1 << 24) + 1)


async def resumes_nothing(stream: Stream) -> None:
    await stream.send(Resumed())


async def short_id(stream: Stream) -> None:
    await stream.send(Offer(b"x", 1, 3, KEY))


async def short_key(stream: Stream) -> None:
    await stream.send(Offer(ID, 1, 3, KEY[1:]))


async def message_instead_of_chunk(stream: Stream) -> None:
    await _offer(stream)
    await stream.send(Waiting(0))


async def stalls(stream: Stream) -> None:
    await _offer(stream)
    await stream.send_payload(0, BODY[:3])
    await asyncio.sleep(1000.0)


async def never_begins(stream: Stream) -> None:
    await asyncio.sleep(1000.0)


async def stops_in_the_manifest(stream: Stream) -> None:
    await stream.send(Offer(ID, 2, len(BODY), KEY))
    await stream.send(ManifestPage(ENTRIES[:1]))
    await asyncio.sleep(1000.0)


async def refuses_in_a_new_way(stream: Stream) -> None:
    """A code that only later versions know."""
    raise RemoteError("moved_away", "to another town")


async def raises(stream: Stream) -> None:
    raise KeyError("a bug of the donor")


REASONS = {
    wrong_hash: "the digest of what it sent is not the one that it gave",
    hash_of_other_shape: "the digest of what it sent is not the one that it gave",
    short_hash: "sent no digest at the end",
    no_hash: "ended before the state did",
    short_data: "ended before the state did",
    short_chunk: "chunk 0 of 2 bytes; it has 3",
    oversize_chunk: "chunk 0 of 4 bytes; it has 3",
    wrong_order: "chunk 2 of a state; 1 is due",
    one_chunk_more: "chunk 3 of a state",
    other_size_than_offered: "offered a state of 5 bytes",
    huge_offer: "an offer of",
    huge_tensor: "there is no memory",
    bad_dtype: "unknown dtype '__import__'",
    bad_codec: "unknown codec 250",
    more_entries_than_offered: "more tensors than the 1 that were offered",
    too_many_dimensions: "Expected `array` of length <= 64",
    endless_dimensions: "dimensions in all; at most 1048576 are allowed",
    long_dtype: "Expected `str` of length <= 32",
    too_much_metadata: "metadata of 16777217 bytes",
    resumes_nothing: "resumed what had not begun",
    short_id: "a state id of 1 bytes",
    short_key: "Expected `bytes` of length >= 32",
    refuses_in_a_new_way: "to another town [moved_away]",
    message_instead_of_chunk: "sent Waiting instead of a chunk",
    stalls: "did not send the next chunk within 5 s",
    never_begins: "did not send its state within 5 s",
    stops_in_the_manifest: "did not send its manifest within 5 s",
    raises: "the handler of averaging.state failed",
}
LIARS = list(REASONS)


@pytest.mark.parametrize("lie", LIARS, ids=lambda lie: lie.__name__)
def test_a_liar_is_found_out_and_the_next_donor_gives_the_state(lie: Any):
    async def main() -> None:
        async def handler(stream: Stream, first: RequestState) -> None:
            await lie(stream)

        async with Swarm(20, bandwidth=None) as swarm:
            await swarm.liar("liar", handler)
            await swarm.donor("honest")
            donors = [swarm.known("liar", 9.0), swarm.known("honest")]
            swarm.check(await swarm.load("j", donors, next_chunk_timeout=5.0), "honest")
            alone = await swarm.load("k", donors[:1], next_chunk_timeout=5.0)
            assert isinstance(alone, str)
            assert str(swarm.hosts["liar"].peer_id) in alone
            assert REASONS[lie] in alone
            assert asyncio.get_running_loop().time() < 60.0

    run(main)


async def always_asks_to_wait(stream: Stream) -> None:
    while True:
        await stream.send(Waiting(0))
        await asyncio.sleep(1.0)


async def begins_again_and_again(stream: Stream) -> None:
    await _offer(stream)
    await stream.send_payload(0, BODY[:3])
    await asyncio.sleep(0.2)
    stream.reset("cancelled", "about to end")


@pytest.mark.parametrize(
    ("lie", "seconds"), [(always_asks_to_wait, FRONT_PATIENCE + 5.0), (begins_again_and_again, 10.0)]
)
def test_a_donor_that_never_comes_to_the_point_holds_nobody_up(lie: Any, seconds: float):
    async def main() -> None:
        async def handler(stream: Stream, first: RequestState) -> None:
            await lie(stream)

        async with Swarm(23, bandwidth=None) as swarm:
            await swarm.liar("liar", handler)
            await swarm.donor("honest")
            donors = [swarm.known("liar", 9.0), swarm.known("honest")]
            swarm.check(await swarm.load("j", donors, timeout=None), "honest")
            assert asyncio.get_running_loop().time() < seconds

    run(main)


def test_a_donor_alone_that_never_comes_to_the_point_is_given_up():
    async def main() -> None:
        async def handler(stream: Stream, first: RequestState) -> None:
            await always_asks_to_wait(stream)

        async with Swarm(23, bandwidth=None) as swarm:
            await swarm.liar("liar", handler)
            why = await swarm.load("j", [swarm.known("liar")], timeout=None)
            assert isinstance(why, str)
            assert "nothing but place 0 in its queue for 3 min" in why
            assert asyncio.get_running_loop().time() < LAST_PATIENCE + 5.0

    run(main)


@pytest.mark.parametrize("lie", [stalls, never_begins, stops_in_the_manifest], ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("next_chunk_timeout", [None, 20.0, 5.0])
def test_a_stalled_donor_is_left_within_seconds_for_another_one(lie: Any, next_chunk_timeout: float | None):
    async def main() -> None:
        async def handler(stream: Stream, first: RequestState) -> None:
            await lie(stream)

        async with Swarm(24) as swarm:
            await swarm.liar("stalled", handler)
            await swarm.donor("honest", chunks=8)
            donors = [swarm.known("stalled", 9.0), swarm.known("honest")]
            began = asyncio.get_running_loop().time()
            loaded = await swarm.load("j", donors, next_chunk_timeout=next_chunk_timeout)
            swarm.check(loaded, "honest")
            assert asyncio.get_running_loop().time() - began < SILENCE + 3.0

    run(main)


@pytest.mark.parametrize("falls_silent", [True, False], ids=["silent", "dead"])
def test_a_donor_that_vanishes_midway_is_left_within_seconds_for_another_one(falls_silent: bool):
    async def main() -> None:
        async with Swarm(25) as swarm:
            for name in ("a", "b"):
                await swarm.donor(name, chunks=8)
            since: list[float] = []

            def on_progress(progress: Progress) -> None:
                if progress.received > 3 * CHUNK and not since:
                    since.append(asyncio.get_running_loop().time())
                    if falls_silent:
                        swarm.network.silence("j", "a")
                    else:
                        swarm.network.kill("a", silently=True)

            donors = [swarm.known("a", 1.0), swarm.known("b")]
            swarm.check(await swarm.load("j", donors, on_progress=on_progress), "b")
            assert asyncio.get_running_loop().time() - since[0] < SILENCE + 4.0

    run(main)


@pytest.mark.parametrize("names", ["a", "abc"])
def test_over_a_link_too_slow_for_any_donor_to_seem_alive_the_state_comes_nevertheless(names: str):
    async def main() -> None:
        async with Swarm(27, bandwidth=CHUNK / (2 * SILENCE)) as swarm:
            for name in names:
                await swarm.donor(name, chunks=4)
            loaded = await swarm.load("j", [swarm.known(name) for name in names])
            assert not isinstance(loaded, str), loaded
            swarm.check(loaded, loaded[0]["donor"])
            assert (
                asyncio.get_running_loop().time() < 15 * 2 * SILENCE
            )  # its chunks, and one try at each other donor

    run(main)


def test_a_newcomer_is_told_that_a_slow_joiner_holds_an_old_copy():
    async def main() -> None:
        async with Swarm(24, bandwidth=None) as swarm:
            donor = await swarm.donor("a", chunks=40)
            joiner = await swarm.host("slow")
            joiner.add_addresses(swarm.hosts["a"].peer_id, swarm.hosts["a"].announced_addresses)

            async def download_slowly() -> None:
                async with joiner.open_stream(swarm.hosts["a"].peer_id, STATE) as stream:
                    await stream.send(RequestState(PREFIX))
                    while not isinstance(await stream.receive(), ManifestPage):
                        pass
                    stream.accept_payloads(lambda tag, nbytes: memoryview(bytearray(nbytes)), CHUNK)
                    while True:
                        await stream.receive()
                        await asyncio.sleep(45.0)

            slow = asyncio.create_task(download_slowly())
            await asyncio.sleep(70.0)
            assert donor.uploads == 1
            refused = await swarm.load("j", [swarm.known("a")])
            assert isinstance(refused, str)
            assert "max_state_age=60 s" in refused
            assert asyncio.get_running_loop().time() < 70.0 + 140.0
            assert swarm.captures["a"] == 1
            slow.cancel()
            await asyncio.wait([slow])

    run(main)


class KnowsFloat32(NoCompression):
    """A user's codec that was never asked about other dtypes."""

    compression_type = 88

    def is_raw(self, dtype):
        return {torch.float32: False}[dtype]

    def encoded_nbytes(self, dtype, count):
        return {torch.float32: 4 * count, torch.float16: -count, torch.bfloat16: 2.0 * count}[dtype]


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        ("float64", "float64 with KnowsFloat32() has no size: KeyError"),
        ("float16", "makes chunks of -3 bytes"),
        ("bfloat16", "bfloat16 with KnowsFloat32() has no size: TypeError: 'float' object"),
    ],
)
def test_a_donor_that_offers_what_a_users_codec_cannot_do_is_left(
    monkeypatch: pytest.MonkeyPatch, dtype: str, reason: str
):
    monkeypatch.setitem(CODECS._codecs, KnowsFloat32.compression_type, KnowsFloat32())

    async def main() -> None:
        async def handler(stream: Stream, first: RequestState) -> None:
            await _offer(stream, (metadata_entry(3), TensorEntry(dtype, (3,), 88)), 15)

        async with Swarm(22, bandwidth=None) as swarm:
            await swarm.liar("liar", handler)
            await swarm.donor("honest")
            swarm.check(await swarm.load("j", [swarm.known("liar", 9.0), swarm.known("honest")]), "honest")
            alone = await swarm.load("k", [swarm.known("liar")])
            assert isinstance(alone, str)
            assert reason in alone

    run(main)


def test_bools_that_are_neither_0_nor_1_are_made_bools():
    async def main() -> None:
        entries = (metadata_entry(1), TensorEntry("bool", (3,), 0))
        body = MSGPackSerializer.dumps(None) + b"\0\1\7"

        async def handler(stream: Stream, first: RequestState) -> None:
            await _offer(stream, entries, len(body))
            await stream.send_payload(0, body[:1])
            await stream.send_payload(1, body[1:])
            digest = Manifest(entries).new_digest(KEY)
            digest.update(body[:1])
            digest.update(body[1:])
            await stream.send(Digest(digest.value()))
            await stream.receive()

        async with Swarm(21) as swarm:
            await swarm.liar("a", handler)
            loaded = await swarm.load("j", [swarm.known("a")])
            assert not isinstance(loaded, str)
            assert loaded[1][0].view(torch.uint8).tolist() == [0, 1, 1]

    run(main)


# any fault at any moment


async def play(seed: int) -> None:
    rng = random.Random(seed)
    async with Swarm(seed, bandwidth=rng.choice([None, 1e6, 5e6])) as swarm:
        names = [f"d{n}" for n in range(rng.randrange(1, 4))]
        for name in names:
            await swarm.donor(name, chunks=rng.randrange(1, 4), seconds=rng.choice([0.0, 0.5]))
        lies = rng.sample(LIARS, rng.randrange(3))
        for lie in lies:

            async def handler(stream: Stream, first: RequestState, lie: Any = lie) -> None:
                await lie(stream)

            await swarm.liar(lie.__name__, handler)
        donors = [
            swarm.known(name, rng.choice([0.0, 1.0]), rng.random())
            for name in [*names, *(lie.__name__ for lie in lies)]
        ]
        joiners = [f"j{n}" for n in range(rng.randrange(1, 4))]
        loads = [
            asyncio.create_task(swarm.load(joiner, donors, next_chunk_timeout=3.0, timeout=300.0))
            for joiner in joiners
        ]
        killed: set[str] = set()
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(rng.random() * 0.7)
            name, joiner = rng.choice(names), rng.choice(joiners)
            match rng.randrange(4):
                case 0 if len(killed) < len(names) - 1:
                    killed.add(name)
                    swarm.network.kill(name, silently=rng.random() < 0.5)
                case 1:
                    swarm.donors[name].switch(False)
                    swarm.donors[name].switch(True)
                case _:
                    swarm.network.drop_connections(joiner, name)
        for loaded in await asyncio.gather(*loads):
            if isinstance(loaded, str):
                # Only breaking again and again, or refusing in that moment, keeps a donor from giving its state.
                assert all(str(swarm.hosts[name].peer_id) in loaded for name in names), loaded
            else:
                swarm.check(loaded, loaded[0]["donor"])
        await asyncio.sleep(KEEP_SECONDS + 20.0)
        assert all(swarm.donors[name].uploads == 0 for name in names if name not in killed)
        assert all(memory._fd < 0 for memory in swarm.memories)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_breaks_a_joiner_gets_one_donors_whole_state_or_a_reason(seed: int):
    run(lambda: play(seed))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(30, 2000))
def test_whatever_breaks_a_joiner_gets_one_donors_whole_state_or_a_reason_in_many_runs(seed: int):
    run(lambda: play(seed))


def test_codecs_are_imported_on_a_thread_before_a_manifest_is_read(monkeypatch: pytest.MonkeyPatch):
    """That brings torch, whose import takes seconds for which the loop would do nothing else."""
    given: list[object] = []
    to_thread = asyncio.to_thread

    def note(work: Callable[..., object], *arguments: object) -> Awaitable[object]:
        given.append(work)
        return to_thread(work, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", note)

    async def main() -> None:
        async with Swarm(41, bandwidth=None) as swarm:
            await swarm.donor("plain")
            swarm.check(await swarm.load("j", [swarm.known("plain")]), "plain")
            assert formats.prepare_codecs not in given

            async def handler(stream: Stream, first: RequestState) -> None:
                await _offer(stream, (metadata_entry(3), TensorEntry("float32", (3,), 1)), 9)

            await swarm.liar("coded", handler)
            await swarm.load("k", [swarm.known("coded")])
            assert formats.prepare_codecs in given

    run(main)
