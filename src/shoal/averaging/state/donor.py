"""The donor's side in the background process: serves joiners from the one copy of the state that all of them share.

The asyncio shell of :mod:`.queue`. Chunks are sent straight out of the shared memory: what an upload takes on
top of the copy is what its connection encrypts ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from shoal.averaging.codes import AveragingCode
from shoal.averaging.router import Router
from shoal.averaging.state.digest import KEY_BYTES
from shoal.averaging.state.encoding import Capture, encode_in_place
from shoal.averaging.state.messages import (
    PAGE_ENTRIES,
    STATE,
    STATE_ID_BYTES,
    Digest,
    ManifestPage,
    Offer,
    RequestState,
    Resume,
    Resumed,
    Waiting,
    check_request,
)
from shoal.averaging.state.queue import (
    CopyFailed,
    CopyTaken,
    DropCopy,
    Effect,
    Event,
    Refuse,
    RequestArrived,
    RequestEnded,
    Serve,
    SharingSwitched,
    TakeCopy,
    TellPosition,
    UploadQueue,
)
from shoal.errors import InvalidStateError, ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.rpc import EndOfStream, Stream
from shoal.sansio.driver import Driver
from shoal.utils import figures
from shoal.utils.tasks import TaskSet
from shoal.utils.tracebacks import drop_tracebacks

logger = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT = 1.0
"""Seconds between the signs of life that a joiner gets while it waits."""
COPY_TIMEOUT = 600.0
"""Seconds that the user process may take to make a copy."""
STALL_TIMEOUT = 60.0
"""A joiner that takes nothing for so long loses its slot."""
YIELD_CHUNKS = 32
"""Chunks after which others on the event loop get their turn, whether or not the connection makes one wait: those of a
state of many small tensors fit into its buffers by the thousand.
"""
FAILED = "the donor's get_current_state failed"


class CopyUnavailable(ShoalError):
    """The user process made no copy, and has logged why."""


class UserIsAbsent(CopyUnavailable):
    """The user process is stopped, or does not answer; the message is for joiners."""


class HeldState:
    """The encoded state in shared memory, which lives until this object and all uploads from it are gone.

    :param capture: taken over
    :param taken_at: when it was asked for, by the loop's clock
    """

    def __init__(self, capture: Capture, taken_at: float) -> None:
        self.taken_at = taken_at
        self.state_id = secrets.token_bytes(STATE_ID_BYTES)
        self.key = secrets.token_bytes(KEY_BYTES)
        """Of its digest."""
        self.layout = capture.layout()
        self.manifest = self.layout.manifest
        self.digest: asyncio.Task[bytes] | None = None
        """Of manifest and chunks; computed once, beside the first uploads."""
        self._memory = capture.memory
        self._buffer: memoryview | None = capture.memory.buffer[:]

    def encode(self) -> None:
        """Turn the copy into encoded chunks, and give back the memory that this saves."""
        encode_in_place(self._view(), self.layout)
        os.ftruncate(self._memory.fd, self.layout.encoded_nbytes)

    def compute_digest(self) -> bytes:
        """Goes through all of the state; for a thread. Ends early, with an error, when the state is freed."""
        digest = self.manifest.new_digest(self.key)
        for index in range(self.manifest.chunk_count):
            digest.update(self.chunk(index))
        return digest.value()

    def chunk(self, index: int) -> memoryview:
        """An encoded chunk, where it lies."""
        begin, end = self.layout.chunk_offset(index)
        return self._view()[begin:end]

    def free(self) -> None:
        """Nobody is served from it any more; the memory goes with the last chunk that is on its way, or hashed."""
        self._buffer = None
        if self.digest is not None:
            self.digest.cancel()
        self._memory.close()

    def _view(self) -> memoryview:
        if self._buffer is None:
            raise InvalidStateError("this copy of the state was freed")
        return self._buffer


@dataclass
class _Admission:
    """What a waiting request is told, by the queue: its place, and in the end a state or an error."""

    position: int = 0
    state: HeldState | None = None
    refusal: RemoteError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class StateDonor:
    """Serves the state of one averager under its prefix.

    :param capture: has the user process copy its state; raises whatever went wrong
    """

    def __init__(
        self,
        router: Router,
        prefix: str,
        *,
        allowed: bool,
        capture: Callable[[], Awaitable[Capture]],
        queue: UploadQueue | None = None,
    ) -> None:
        self._router = router
        self._prefix = prefix
        self._capture = capture
        self._queue = UploadQueue() if queue is None else queue
        self._driver: Driver[Event, Effect] = Driver(
            self._queue, self._carry_out, name="uploads", subject=prefix
        )
        self._tasks = TaskSet()
        self._requests = 0
        self._admissions: dict[int, _Admission] = {}
        self._uploads: dict[int, Stream] = {}
        self._held: HeldState | None = None
        router.register(STATE, prefix, self._answer)
        self.switch(allowed)

    @property
    def uploads(self) -> int:
        """Joiners that are being served."""
        return self._queue.uploads

    def switch(self, allowed: bool) -> None:
        """Allow or forbid sharing: new requests and waiting ones are refused from now on, running ones get all."""
        self._driver.tell(SharingSwitched(allowed))

    async def close(self) -> None:
        """End all uploads, and free the copy."""
        self._router.unregister(STATE, self._prefix)
        self._driver.tell(SharingSwitched(False))
        for stream in self._uploads.values():
            stream.reset(ResetCode.CANCELLED, "the donor was shut down")
        self._driver.close()
        await self._tasks.close()
        self._drop_copy()

    # the queue

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case TakeCopy():
                self._tasks.start(self._take_copy(), f"copy the state of {self._prefix}")
            case DropCopy():
                self._drop_copy()
            case Serve(request):
                self._settle(request, state=self._held)
            case Refuse(request, code, reason):
                self._settle(request, refusal=RemoteError(code, reason))
            case TellPosition(request, position):
                self._settle(request, position=position)

    def _settle(
        self,
        request: int,
        *,
        position: int | None = None,
        state: HeldState | None = None,
        refusal: RemoteError | None = None,
    ) -> None:
        admission = self._admissions.get(request)
        if admission is None:
            return
        admission.position = admission.position if position is None else position
        admission.state = admission.state or state
        admission.refusal = admission.refusal or refusal
        admission.changed.set()
        if refusal is not None and request in self._uploads:
            self._uploads[request].reset(refusal.code, refusal.message)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _take_copy(self) -> None:
        try:
            async with asyncio.timeout(COPY_TIMEOUT):
                asked_at = self._now()
                self._held = await self._prepared(await self._capture(), asked_at)
        except TimeoutError:
            logger.warning("%s: the state was not copied within %g s", self._prefix, COPY_TIMEOUT)
            self._driver.tell(CopyFailed(FAILED))
        except UserIsAbsent as e:
            self._driver.tell(CopyFailed(str(e)))
        except CopyUnavailable:
            self._driver.tell(CopyFailed(FAILED))
        except Exception as e:  # noqa: BLE001 - of the user's codecs: may be anything
            logger.warning(
                "%s: other peers cannot download this one's state: %s: %s", self._prefix, type(e).__name__, e
            )
            self._driver.tell(CopyFailed(FAILED))
        else:
            nbytes = self._held.manifest.nbytes
            logger.info(
                "%s: took a copy of the state, %s, for peers that join", self._prefix, figures.size(nbytes)
            )
            self._driver.tell(CopyTaken(self._held.state_id))

    async def _prepared(self, capture: Capture, taken_at: float) -> HeldState:
        try:
            held = await asyncio.to_thread(HeldState, capture, taken_at)
            await asyncio.to_thread(held.encode)
        except BaseException:
            capture.memory.close()
            raise
        held.digest = self._tasks.start(asyncio.to_thread(held.compute_digest), "hash the state")
        return held

    def _drop_copy(self) -> None:
        if self._held is not None:
            self._held.free()
            self._held = None

    # one joiner

    async def _answer(self, stream: Stream, first: RequestState) -> None:
        check_request(first)
        self._requests += 1
        request = self._requests
        admission = self._admissions[request] = _Admission()
        complete = False
        try:
            resume = first.resume
            self._driver.tell(
                RequestArrived(request, stream.remote, None if resume is None else resume.state_id)
            )
            await self._admitted(stream, admission)
            self._uploads[request] = stream
            await self._upload(stream, admission, resume)
            complete = True
        except BaseException as e:
            drop_tracebacks(e)
            raise
        finally:
            admission.state = None
            del self._admissions[request]
            self._uploads.pop(request, None)
            self._driver.tell(RequestEnded(request, complete))

    async def _admitted(self, stream: Stream, admission: _Admission) -> None:
        """Wait for the request's turn, with signs of life for the joiner."""
        while True:
            if admission.refusal is not None:
                raise admission.refusal
            if admission.state is not None:
                return
            admission.changed.clear()
            await _promptly(stream.send(Waiting(admission.position)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT):
                    await admission.changed.wait()

    async def _upload(self, stream: Stream, admission: _Admission, resume: Resume | None) -> None:
        held = admission.state
        assert held is not None
        manifest, start = held.manifest, 0
        if resume is not None and resume.state_id == held.state_id:
            if resume.next_chunk > manifest.chunk_count:
                raise ProtocolViolation(f"{stream.remote} has more chunks than the state has")
            start = resume.next_chunk
            await _promptly(stream.send(Resumed()))
        else:
            age = self._now() - held.taken_at
            logger.debug("%s: %s gets a copy made %s ago", self._prefix, stream.remote, figures.duration(age))
            await _promptly(_send_offer(stream, held, age))
        for index in range(start, manifest.chunk_count):
            await _promptly(stream.send_payload(index, held.chunk(index)))
            if index % YIELD_CHUNKS == 0:
                await asyncio.sleep(0)
        assert held.digest is not None
        await stream.send(Digest(await asyncio.shield(held.digest)))
        # The copy is in use until the joiner has taken everything.
        try:
            await _promptly(stream.receive())
        except EndOfStream:
            logger.info("%s: %s has downloaded this peer's state", self._prefix, stream.remote)
        # Until all chunks are confirmed the connection may read the copy. An honest joiner has confirmed them by now.
        await stream.delivered()


async def _send_offer(stream: Stream, held: HeldState, age: float) -> None:
    entries = held.manifest.entries
    await stream.send(Offer(held.state_id, len(entries), held.manifest.nbytes, held.key, age))
    for first in range(0, len(entries), PAGE_ENTRIES):
        await stream.send(ManifestPage(entries[first : first + PAGE_ENTRIES]))
        await asyncio.sleep(0)


async def _promptly(taking: Awaitable[T]) -> T:
    """Wait for the joiner to take something, or to leave, but not for ever: others wait for its slot."""
    try:
        async with asyncio.timeout(STALL_TIMEOUT):
            return await taking
    except TimeoutError:
        raise RemoteError(
            AveragingCode.TOO_SLOW, f"took nothing of the state for {STALL_TIMEOUT:g} s"
        ) from None
