"""The joiner's side in the background process: gets one state from whichever donor can give it, whole and verified.

The asyncio shell of :mod:`.choice`. Chunks that travel as they are arrive in the memory that the host will see;
others are decoded there. Hashing and decoding follow on a thread. What has come of a donor's state is kept while its
connection is made again, and dropped with the donor.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from shoal.averaging.state.capture import drop_tracebacks
from shoal.averaging.state.choice import (
    MAX_RESUMPTIONS,
    Action,
    AskDonor,
    ChunkReceived,
    ConnectionBroke,
    Donor,
    DonorBusy,
    DonorChoice,
    DonorFailed,
    DonorsFound,
    Event,
    GiveUp,
    LookForDonors,
    Stay,
)
from shoal.averaging.state.donor import YIELD_CHUNKS
from shoal.averaging.state.manifest import Chunk, Manifest, ManifestReader
from shoal.averaging.state.messages import (
    REPLACED,
    SHA256_BYTES,
    STATE,
    STATE_ID_BYTES,
    Digest,
    DonorMessage,
    ManifestPage,
    Offer,
    RequestState,
    Resume,
    Resumed,
    Waiting,
)
from shoal.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidValueError,
    PeerUnreachable,
    ProtocolViolation,
    RemoteError,
    ShoalError,
)
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.rpc import EndOfStream, Lane, Payload, Stream
from shoal.utils import figures

logger = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20
"""Credit of the stream; it takes no memory beyond that of the state, unless a codec has to be decoded."""
MAX_UNVERIFIED = 16 << 20
"""Bytes that may wait to be hashed and decoded."""
LEAST_FIRST_TIMEOUT = 5.0
"""A donor that has not begun to send gives signs of life every second, whatever ``next_chunk_timeout`` is."""
FAREWELL_TIMEOUT = 1.0
LOG_PERIOD = 5.0
PROGRESS_PERIOD = 0.25


@dataclass(frozen=True)
class Progress:
    """How far a download is."""

    donor: PeerID
    received: int
    total: int
    rate: float
    """Bytes per second from this donor."""


@dataclass(frozen=True)
class Downloaded:
    """A whole state, verified; its tensors lie in the memory that was allocated last, at ``manifest.offsets``."""

    donor: PeerID
    manifest: Manifest


class _StalledError(Exception):
    """The donor sent nothing for too long."""


class _Leave(Exception):
    """Go on with ``action`` instead."""

    def __init__(self, action: Action) -> None:
        self.action = action


class PartialState:
    """What has come of one donor's state."""

    def __init__(self, donor: PeerID, state_id: bytes, manifest: Manifest, memory: memoryview) -> None:
        self.donor = donor
        self.state_id = state_id
        self.manifest = manifest
        self.next_chunk = 0
        self.received = 0
        self._expected = 0
        self._memory = memory[:]  # a slice keeps the mapping
        self._block = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._digest = manifest.new_digest()
        self._unverified: list[tuple[Chunk, memoryview]] = []
        self._unverified_nbytes = 0
        self._verifying: asyncio.Future[None] | None = None

    def resume(self) -> None:
        """A new stream begins: what was on its way on the old one will not come."""
        self._expected = self.next_chunk

    def place(self, tag: int, length: int) -> memoryview:
        """Memory for the next chunk; :class:`ProtocolViolation` if it is not the next one, in its exact size."""
        if tag != self._expected or tag >= self.manifest.chunk_count:
            raise ProtocolViolation(f"chunk {tag} of a state; {self._expected} is due")
        chunk = self.manifest.chunk(tag)
        if length != chunk.nbytes:
            raise ProtocolViolation(f"chunk {tag} of {length} bytes; it has {chunk.nbytes}")
        self._expected += 1
        if not self.manifest.is_raw(chunk.tensor):
            return memoryview(bytearray(length))
        begin, end = self._extent(chunk)
        return self._memory[begin:end]

    async def take(self, payload: Payload) -> None:
        """The next chunk has arrived whole."""
        chunk = self.manifest.chunk(self.next_chunk)
        self.next_chunk += 1
        self.received += chunk.nbytes
        self._unverified.append((chunk, payload.data))
        self._unverified_nbytes += chunk.nbytes
        if self._verifying is not None and (
            self._verifying.done() or self._unverified_nbytes > MAX_UNVERIFIED
        ):
            await self._verified()
        if self._verifying is None:
            self._verify()

    async def digest(self) -> bytes:
        """Of everything that has come; all of it is decoded then."""
        while self._verifying is not None or self._unverified:
            if self._verifying is None:
                self._verify()
            await self._verified()
        return self._digest.digest()

    async def close(self) -> None:
        """Let go of the memory. Not by being forgotten alone: the stream still refers to :meth:`place`."""
        if self._verifying is not None:
            await asyncio.wait([self._verifying])
            self._verifying.exception()  # looked at: the donor is dropped anyway
        self._unverified = []
        self._memory = memoryview(b"")
        self._block = torch.empty(0, dtype=torch.uint8)

    def _verify(self) -> None:
        batch, self._unverified, self._unverified_nbytes = self._unverified, [], 0
        self._verifying = asyncio.ensure_future(asyncio.to_thread(self._work_through, batch))

    async def _verified(self) -> None:
        assert self._verifying is not None
        await asyncio.wait([self._verifying])
        done, self._verifying = self._verifying, None
        done.result()

    def _work_through(self, batch: list[tuple[Chunk, memoryview]]) -> None:
        manifest = self.manifest
        for chunk, data in batch:
            self._digest.update(data)
            if manifest.is_raw(chunk.tensor):
                continue
            begin, end = self._extent(chunk)
            dtype = manifest.dtypes[chunk.tensor]
            if dtype == torch.bool:
                # A bool in memory is 0 or 1: what else is computed with it is undefined.
                torch.ne(torch.frombuffer(data, dtype=torch.uint8), 0, out=self._block[begin:end].view(dtype))
            else:
                out = self._block[begin:end].view(dtype)
                manifest.codecs[chunk.tensor].decode(data, dtype, chunk.count, out)

    def _extent(self, chunk: Chunk) -> tuple[int, int]:
        size = self.manifest.dtypes[chunk.tensor].itemsize
        begin = self.manifest.offsets[chunk.tensor] + chunk.start * size
        return begin, begin + chunk.count * size


class StateDownload:
    """One download. Make it, and :meth:`run` it once.

    :param find_donors: asks the DHT, and draws a tiebreak for each donor
    :param allocate: makes memory of so many bytes for a state, in place of what was made before; raises
      :class:`InvalidValueError` if there is not so much
    :param next_chunk_timeout: seconds between two whole chunks (2^18 elements; 1 MiB of float32) after which the next
      donor's turn comes; None: no limit
    :param on_progress: called now and then
    """

    def __init__(
        self,
        host: Host,
        prefix: str,
        *,
        find_donors: Callable[[], Awaitable[list[Donor]]],
        allocate: Callable[[int], Awaitable[memoryview]],
        next_chunk_timeout: float | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._host = host
        self._prefix = prefix
        self._find_donors = find_donors
        self._allocate = allocate
        self._next_chunk_timeout = next_chunk_timeout
        self._on_progress = on_progress
        self._choice = DonorChoice()
        self._partial: PartialState | None = None
        self._offers: Counter[PeerID] = Counter()
        self._waiting: tuple[PeerID, float] | None = None
        """For whom, and since when nothing of the state has come."""
        self._began = self._logged = self._shown = 0.0
        self._began_at_byte = 0

    async def run(self, timeout: float | None = None, *, began: float | None = None) -> Downloaded | str:
        """A whole state, or why there is none.

        :param timeout: seconds for all of it
        :param began: from when they count, by the loop's clock; None: from now on
        """
        began = asyncio.get_running_loop().time() if began is None else began
        try:
            async with asyncio.timeout_at(None if timeout is None else began + timeout):
                return await self._run()
        except TimeoutError:
            return f"it took longer than timeout={timeout:g} s. {self._story()}"
        finally:
            await self._drop()

    async def _run(self) -> Downloaded | str:
        action: Action = LookForDonors()
        while True:
            match action:
                case LookForDonors():
                    try:
                        donors = tuple(await self._find_donors())
                    except ShoalError as e:
                        return f"the DHT could not be asked for donors: {e}. {self._story()}"
                    action = self._choice.handle(DonorsFound(donors))
                case AskDonor(donor, delay):
                    await asyncio.sleep(delay)
                    outcome = await self._ask(donor)
                    if isinstance(outcome, Downloaded):
                        return outcome
                    action = outcome
                case Stay() | GiveUp():
                    return self._story()

    def _story(self) -> str:
        return self._choice.story() or (
            f"no other peer shares its state under prefix {self._prefix!r}: either nobody else is there yet, or "
            "nobody has allow_state_sharing"
        )

    def _tell(self, event: Event) -> None:
        action = self._choice.handle(event)
        if not isinstance(action, Stay):
            raise _Leave(action)

    async def _ask(self, donor: Donor) -> Downloaded | Action:
        """Get what is missing from one donor: the state, or what to do instead."""
        if self._partial is not None and self._partial.donor != donor.peer:
            await self._drop()
        if self._waiting is None or self._waiting[0] != donor.peer:
            self._waiting = donor.peer, asyncio.get_running_loop().time()
        event: Event
        try:
            try:
                return await self._download(donor)
            except BaseException as e:
                drop_tracebacks(e)
                raise
        except _Leave as e:
            return e.action
        except _StalledError as e:
            event = DonorFailed(str(e))
        except (ConnectionLost, DeadlineExceeded, PeerUnreachable) as e:
            event = ConnectionBroke(str(e))
        except RemoteError as e:
            # Its process is about to end, or has got a second request for what it still holds for the first one.
            event = ConnectionBroke(str(e)) if e.code in ("cancelled", REPLACED) else DonorFailed(str(e))
        except (ProtocolViolation, InvalidValueError) as e:
            event = DonorFailed(str(e))
        except EndOfStream:
            event = DonorFailed("it ended before the state did")
        log = logger.warning if isinstance(event, DonorFailed) else logger.info
        log("%s: %s does not give its state: %s", self._prefix, donor.peer, event.reason)
        if isinstance(event, DonorFailed):
            await self._drop()
        return self._choice.handle(event)

    async def _download(self, donor: Donor) -> Downloaded:
        self._host.add_addresses(donor.peer, map(Multiaddr.parse, donor.addresses))
        resume = None if self._partial is None else Resume(self._partial.state_id, self._partial.next_chunk)
        async with self._host.open_stream(donor.peer, STATE, lane=Lane.BULK) as stream:
            await stream.send(RequestState(self._prefix, resume))
            partial = await self._begin(stream, donor)
            stream.accept_payloads(partial.place, WINDOW_BYTES)
            for _ in range(partial.next_chunk, partial.manifest.chunk_count):
                payload = await self._receive(stream, self._next_chunk_timeout, "the next chunk")
                if not isinstance(payload, Payload):
                    raise ProtocolViolation(f"sent {type(payload).__name__} instead of a chunk")
                await partial.take(payload)
                if partial.next_chunk % YIELD_CHUNKS == 0:
                    await asyncio.sleep(0)
                self._waiting = donor.peer, asyncio.get_running_loop().time()
                self._tell(ChunkReceived())
                self._show(partial)
            await self._check_digest(stream, partial)
            await stream.finish()
            try:
                async with asyncio.timeout(FAREWELL_TIMEOUT):
                    await stream.receive()  # the donor's end: it knows that all has come
            except (ShoalError, TimeoutError) as e:
                drop_tracebacks(e)
        logger.info(
            "%s: loaded the state of %s, %s in %s",
            self._prefix,
            donor.peer,
            figures.size(partial.manifest.nbytes),
            figures.duration(asyncio.get_running_loop().time() - self._began),
        )
        return Downloaded(donor.peer, partial.manifest)

    async def _begin(self, stream: Stream, donor: Donor) -> PartialState:
        """Wait for the donor to begin; then it is known what will come."""
        limit = (
            None if self._next_chunk_timeout is None else max(self._next_chunk_timeout, LEAST_FIRST_TIMEOUT)
        )
        while isinstance(answer := await self._receive(stream, limit, "its state"), Waiting):
            assert self._waiting is not None
            waited = asyncio.get_running_loop().time() - self._waiting[1]
            self._tell(DonorBusy(answer.position, waited))
        partial = self._partial
        if isinstance(answer, Resumed):
            if partial is None:
                raise ProtocolViolation("resumed what had not begun")
            partial.resume()
            logger.info("%s: resuming the download from %s", self._prefix, donor.peer)
        elif isinstance(answer, Offer):
            await self._drop()
            self._offers[donor.peer] += 1
            if self._offers[donor.peer] > 1 + MAX_RESUMPTIONS:
                raise ProtocolViolation(f"began {MAX_RESUMPTIONS + 1} times, and did not come to the end")
            partial = self._partial = await self._accept(stream, answer, limit)
        else:
            raise ProtocolViolation(f"sent {type(answer).__name__} instead of an offer")
        self._began = self._logged = asyncio.get_running_loop().time()
        self._began_at_byte = partial.received
        return partial

    async def _accept(self, stream: Stream, offer: Offer, limit: float | None) -> PartialState:
        reader = ManifestReader(offer.tensors, offer.nbytes)
        if len(offer.state_id) != STATE_ID_BYTES:
            raise ProtocolViolation(f"a state id of {len(offer.state_id)} bytes")
        while not reader.is_complete:
            page = await self._receive(stream, limit, "its manifest")
            if not isinstance(page, ManifestPage):
                raise ProtocolViolation(f"sent {type(page).__name__} instead of its manifest")
            reader.add(page.entries)
            await asyncio.sleep(0)
        manifest = await asyncio.to_thread(reader.manifest)
        memory = await self._allocate(manifest.decoded_nbytes)
        return PartialState(stream.remote, offer.state_id, manifest, memory)

    async def _check_digest(self, stream: Stream, partial: PartialState) -> None:
        answer = await self._receive(stream, self._next_chunk_timeout, "the digest")
        if not isinstance(answer, Digest) or len(answer.sha256) != SHA256_BYTES:
            raise ProtocolViolation("sent no digest at the end")
        if await partial.digest() != answer.sha256:
            raise ProtocolViolation("the SHA-256 of what it sent is not the one that it gave")

    async def _receive(self, stream: Stream, limit: float | None, awaited: str) -> DonorMessage | Payload:
        try:
            async with asyncio.timeout(limit):
                received: DonorMessage | Payload = await stream.receive()
                return received
        except TimeoutError as e:
            if isinstance(e, ShoalError):
                raise
            raise _StalledError(f"{stream.remote} did not send {awaited} within {limit:g} s") from None

    async def _drop(self) -> None:
        partial, self._partial = self._partial, None
        if partial is not None:
            await partial.close()

    def _show(self, partial: PartialState) -> None:
        now = asyncio.get_running_loop().time()
        is_last = partial.next_chunk == partial.manifest.chunk_count
        if not is_last and now - self._shown < PROGRESS_PERIOD:
            return
        self._shown = now
        rate = (partial.received - self._began_at_byte) / max(now - self._began, 1e-9)
        progress = Progress(partial.donor, partial.received, partial.manifest.nbytes, rate)
        self._on_progress(progress)
        if now - self._logged >= LOG_PERIOD:
            self._logged = now
            logger.info(
                "%s: %s of %s of the state of %s, %s/s",
                self._prefix,
                figures.size(progress.received),
                figures.size(progress.total),
                partial.donor,
                figures.size(rate),
            )
