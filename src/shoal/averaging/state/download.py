"""The joiner's side in the background process: gets one state from whichever donor can give it, whole and verified.

The asyncio shell of :mod:`.choice`. Chunks that travel as they are arrive in memory that the user's process sees;
others are decoded there. Hashing and decoding follow on a thread. What has come of a donor's state is kept while its
connection is made again, and dropped with the donor.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shoal.averaging import formats
from shoal.averaging.codes import AveragingCode
from shoal.averaging.flow_window import FlowWindow, first_size
from shoal.averaging.state.choice import (
    MAX_RESUMPTIONS,
    AllChunksReceived,
    AskDonor,
    ChunkReceived,
    ConnectionBroke,
    DonorBusy,
    DonorChoice,
    DonorFailed,
    DonorsFound,
    Effect,
    Event,
    GiveUp,
    LeaveDonor,
    LookFailed,
    LookForDonors,
    OfferReceived,
    StateReceived,
    StateWanted,
)
from shoal.averaging.state.digest import DIGEST_BYTES
from shoal.averaging.state.donor import YIELD_CHUNKS
from shoal.averaging.state.manifest import Manifest, ManifestReader
from shoal.averaging.state.messages import (
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
from shoal.averaging.state.partial import PartialState
from shoal.averaging.state.policy import Donor
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
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.protocol.violations import Ending
from shoal.p2p.rpc import EndOfStream, Lane, Payload, Stream
from shoal.sansio.driver import Driver
from shoal.utils import figures
from shoal.utils.tracebacks import drop_tracebacks

logger = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20
"""Credit of the stream at least. More on a long path. It takes no memory beyond that of the state, unless a codec has
to be decoded.
"""
MAX_WINDOW_BYTES = 64 << 20
"""The same at most, where the path holds as much: 1 Gbit/s with a round trip of 200 ms needs 50 MB. Chunks that
are to be decoded hold so much memory at most until they are taken.
"""
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
    """A whole state, verified; its tensors lie in the memory that was allocated last, at ``manifest.offsets``.

    ``age``: seconds since the donor copied it, at the end of the download, as far as the donor told the truth.
    """

    donor: PeerID
    manifest: Manifest
    age: float


class _StalledError(Exception):
    """The donor sent nothing for too long."""


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
        self._choice = DonorChoice(next_chunk_timeout)
        self._driver: Driver[Event, Effect] = Driver(
            self._choice, self._carry_out, name="download", subject=prefix
        )
        self._to_do: AskDonor | LookForDonors | GiveUp | None = None
        """What the core wants next; None: to go on."""
        self._attempt: asyncio.Task[Downloaded | ConnectionBroke | DonorFailed] | None = None
        """Asks one donor."""
        self._left: set[PeerID] = set()
        """Donors whose processes said goodbye."""
        self._partial: PartialState | None = None
        self._offers: Counter[PeerID] = Counter()
        self._began = self._logged = self._shown = 0.0
        self._began_at_byte = 0

    async def run(self, timeout: float | None = None, *, began: float | None = None) -> Downloaded | str:
        """A whole state, or why there is none.

        :param timeout: seconds for all of it
        :param began: from when they count, by the loop's clock; None: from now on
        """
        began = asyncio.get_running_loop().time() if began is None else began
        unsubscribe = self._host.on_disconnect(self._note_goodbye)
        try:
            async with asyncio.timeout_at(None if timeout is None else began + timeout):
                return await self._run()
        except TimeoutError:
            return f"it took longer than timeout={timeout:g} s. {self._story()}"
        finally:
            unsubscribe()
            self._driver.close()
            await self._drop()

    def _note_goodbye(self, peer: PeerID, ending: Ending) -> None:
        if ending.peer_has_left:
            self._left.add(peer)

    async def _run(self) -> Downloaded | str:
        self._driver.tell(StateWanted())
        while True:
            match self._take_to_do():
                case LookForDonors():
                    await self._look()
                case AskDonor(donor, delay):
                    downloaded = await self._ask(donor, delay)
                    if downloaded is not None:
                        return downloaded
                case GiveUp(reason):
                    return f"{reason}. {self._story()}" if reason else self._story()

    def _take_to_do(self) -> AskDonor | LookForDonors | GiveUp:
        to_do, self._to_do = self._to_do, None
        assert to_do is not None, "a core that waits for nothing has ended"
        return to_do

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case LeaveDonor(peer, reason):
                self._tell_user(logging.INFO, peer, reason)
            case AskDonor() | LookForDonors() | GiveUp():
                self._to_do = effect
                if self._attempt is not None:
                    self._attempt.cancel()

    def _tell_user(self, level: int, donor: PeerID, reason: str) -> None:
        logger.log(level, "%s: %s does not give its state: %s", self._prefix, donor, reason)

    async def _look(self) -> None:
        try:
            donors = tuple(await self._find_donors())
        except ShoalError as e:
            self._driver.tell(LookFailed(f"the DHT could not be asked for donors: {e}"))
        else:
            self._driver.tell(DonorsFound(donors))

    def _story(self) -> str:
        return self._choice.story() or (
            f"no other peer shares its state under prefix {self._prefix!r}: either nobody else is there yet, or "
            "nobody has allow_state_sharing"
        )

    async def _ask(self, donor: Donor, delay: float) -> Downloaded | None:
        """Get what is missing from one donor: the state, or nothing when there is something else to do."""
        outcome = await self._until_left(donor, delay)
        if isinstance(outcome, Downloaded):
            return outcome
        if outcome is None or self._to_do is not None:
            return None  # the donor was left
        if isinstance(outcome, DonorFailed):
            await self._drop()
        self._tell_user(
            logging.WARNING if isinstance(outcome, DonorFailed) else logging.INFO, donor.peer, outcome.reason
        )
        self._driver.tell(outcome)
        return None

    async def _until_left(
        self, donor: Donor, delay: float
    ) -> Downloaded | ConnectionBroke | DonorFailed | None:
        """How asking a donor has ended; None: the core has left it."""
        attempt = self._attempt = asyncio.create_task(self._attempt_at(donor, delay))
        try:
            await asyncio.wait({attempt})
        finally:
            self._attempt = None
            if not attempt.done():
                attempt.cancel()
                await asyncio.wait({attempt})
        return None if attempt.cancelled() else attempt.result()

    async def _attempt_at(self, donor: Donor, delay: float) -> Downloaded | ConnectionBroke | DonorFailed:
        await asyncio.sleep(delay)
        if self._partial is not None and self._partial.donor != donor.peer:
            await self._drop()
        try:
            return await self._download(donor)
        except (ShoalError, _StalledError, EndOfStream) as e:
            drop_tracebacks(e)
            return self._event_of(donor.peer, e)
        except BaseException as e:
            drop_tracebacks(e)
            raise

    def _event_of(self, donor: PeerID, error: Exception) -> ConnectionBroke | DonorFailed:
        """What a download's error says of the donor that was asked.

        :raises ShoalError: ``error`` itself, if it is not the donor's
        """
        match error:
            case ConnectionLost() | DeadlineExceeded() | PeerUnreachable():
                return ConnectionBroke(str(error), donor in self._left or _is_refused(error))
            case RemoteError() if error.code in (ResetCode.CANCELLED, AveragingCode.REPLACED):
                # Its process is about to end, or has got a second request for what it still holds for the first one.
                return ConnectionBroke(str(error), has_ended=donor in self._left)
            case _StalledError() | RemoteError() | ProtocolViolation() | InvalidValueError():
                return DonorFailed(str(error))
            case EndOfStream():
                return DonorFailed("it ended before the state did")
        raise error

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _download(self, donor: Donor) -> Downloaded:
        self._host.add_addresses(donor.peer, map(Multiaddr.parse, donor.addresses))
        resume = None if self._partial is None else Resume(self._partial.state_id, self._partial.next_chunk)
        async with self._host.open_stream(donor.peer, STATE, lane=Lane.BULK) as stream:
            await stream.send(RequestState(self._prefix, resume))
            partial = await self._receive_offer(stream, donor)
            took = self._accept_chunks(stream, partial)
            for _ in range(partial.next_chunk, partial.manifest.chunk_count):
                payload = await self._receive(stream, self._next_chunk_timeout, "the next chunk")
                if not isinstance(payload, Payload):
                    raise ProtocolViolation(f"sent {type(payload).__name__} instead of a chunk")
                took(len(payload.data))
                await partial.take(payload)
                if partial.next_chunk % YIELD_CHUNKS == 0:
                    await asyncio.sleep(0)
                self._driver.tell(ChunkReceived())
                self._show(partial)
            self._driver.tell(AllChunksReceived())
            await self._check_digest(stream, partial)
            await stream.finish()
            try:
                async with asyncio.timeout(FAREWELL_TIMEOUT):
                    await stream.receive()  # the donor's end: it knows that all has come
            except (ShoalError, TimeoutError) as e:
                drop_tracebacks(e)
        self._driver.tell(StateReceived())
        age = self._now() - partial.copied_at
        logger.info(
            "%s: loaded the state of %s, %s in %s, copied %s ago",
            self._prefix,
            donor.peer,
            figures.size(partial.manifest.nbytes),
            figures.duration(self._now() - self._began),
            figures.duration(age),
        )
        return Downloaded(donor.peer, partial.manifest, age)

    async def _receive_offer(self, stream: Stream, donor: Donor) -> PartialState:
        """Wait for the donor to begin; then it is known what will come."""
        limit = (
            None if self._next_chunk_timeout is None else max(self._next_chunk_timeout, LEAST_FIRST_TIMEOUT)
        )
        while isinstance(answer := await self._receive(stream, limit, "its state"), Waiting):
            self._driver.tell(DonorBusy(answer.position))
            if self._to_do is not None:
                await asyncio.sleep(0)  # this attempt was cancelled: what the donor says counts no more
        partial = self._partial
        if isinstance(answer, Resumed):
            if partial is None:
                raise ProtocolViolation("resumed what had not begun")
            partial.resume()
            logger.info("%s: resuming the download from %s", self._prefix, donor.peer)
        elif isinstance(answer, Offer):
            await self._drop()
            self._driver.tell(OfferReceived())
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
        copied_at = asyncio.get_running_loop().time() - offer.age
        while not reader.is_complete:
            page = await self._receive(stream, limit, "its manifest")
            if not isinstance(page, ManifestPage):
                raise ProtocolViolation(f"sent {type(page).__name__} instead of its manifest")
            if any(entry.codec for entry in page.entries):
                await asyncio.to_thread(formats.prepare_codecs)
            reader.add(page.entries)
            await asyncio.sleep(0)
        manifest = await asyncio.to_thread(reader.manifest)
        memory = await self._allocate(manifest.decoded_nbytes)
        digest = manifest.new_digest(offer.key)
        return PartialState(stream.remote, offer.state_id, digest, manifest, memory, copied_at)

    def _accept_chunks(self, stream: Stream, partial: PartialState) -> Callable[[int], None]:
        """Let chunks pass. What is returned is to be called with the bytes of each that was taken: it fits the window
        to the path.
        """
        host, loop = self._host, asyncio.get_running_loop()
        first = first_size(host.least_rtt(stream.remote) or 0.0, WINDOW_BYTES, MAX_WINDOW_BYTES)
        window = FlowWindow(first, WINDOW_BYTES, MAX_WINDOW_BYTES)
        stream.accept_payloads(partial.place, window.size)

        def took(nbytes: int) -> None:
            if window.receive(nbytes, loop.time(), host.rtt(stream.remote) or 0.0) and stream.failure is None:
                stream.accept_payloads(partial.place, window.size)

        return took

    async def _check_digest(self, stream: Stream, partial: PartialState) -> None:
        answer = await self._receive(stream, self._next_chunk_timeout, "the digest")
        if not isinstance(answer, Digest) or len(answer.value) != DIGEST_BYTES:
            raise ProtocolViolation("sent no digest at the end")
        if await partial.digest() != answer.value:
            raise ProtocolViolation("the digest of what it sent is not the one that it gave")

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
            await partial.free()

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


def _is_refused(error: Exception) -> bool:
    """Whether a machine answers that nobody listens at any address that could be dialed."""
    return isinstance(error, PeerUnreachable) and bool(error.dials) and error.is_refused
