"""What has come of one donor's state: placed, hashed and decoded, mostly on a thread."""

from __future__ import annotations

import asyncio

import numpy as np

from shoal.averaging.elements import elements_in
from shoal.averaging.state.digest import StateDigest
from shoal.averaging.state.manifest import Chunk, Manifest
from shoal.errors import ProtocolViolation
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Payload
from shoal.utils.dtypes import BOOL

MAX_UNVERIFIED = 16 << 20
"""Bytes that may wait to be hashed and decoded."""


class PartialState:
    """What has come of one donor's state."""

    def __init__(
        self,
        donor: PeerID,
        state_id: bytes,
        digest: StateDigest,
        manifest: Manifest,
        memory: memoryview,
        copied_at: float = 0.0,
    ) -> None:
        """``copied_at``: by the clock of this side's loop."""
        self.donor = donor
        self.copied_at = copied_at
        self.state_id = state_id
        self.manifest = manifest
        self.next_chunk = 0
        self.received = 0
        self._placed: set[int] = set()
        """Chunks that have a place, and are not taken yet."""
        self._memory = memory[:]  # a slice keeps the mapping
        self._digest = digest
        self._unverified: list[tuple[Chunk, memoryview]] = []
        self._unverified_nbytes = 0
        self._verifying: asyncio.Future[None] | None = None

    def resume(self) -> None:
        """A new stream begins: what was on its way on the old one will not come."""
        self._placed.clear()

    def place(self, tag: int, length: int) -> memoryview:
        """Memory for a chunk, in any order; :class:`ProtocolViolation` if it came before, or has another size."""
        if not self.next_chunk <= tag < self.manifest.chunk_count or tag in self._placed:
            raise ProtocolViolation(f"chunk {tag} of a state; {self.next_chunk} is due")
        chunk = self.manifest.chunk(tag)
        if length != chunk.nbytes:
            raise ProtocolViolation(f"chunk {tag} of {length} bytes; it has {chunk.nbytes}")
        self._placed.add(tag)
        if not self.manifest.is_raw(chunk.tensor):
            return memoryview(bytearray(length))
        begin, end = self._extent(chunk)
        return self._memory[begin:end]

    async def take(self, payload: Payload) -> None:
        """The next chunk has arrived whole."""
        if payload.tag != self.next_chunk:
            raise ProtocolViolation(f"chunk {payload.tag} of a state; {self.next_chunk} is due")
        self._placed.discard(payload.tag)
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
        return self._digest.value()

    async def free(self) -> None:
        """Let go of the memory. Not by being forgotten alone: the stream still refers to :meth:`place`."""
        if self._verifying is not None:
            await asyncio.wait([self._verifying])
            self._verifying.exception()  # looked at: the donor is dropped anyway
        self._unverified = []
        self._memory = memoryview(b"")

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
            form = manifest.formats[chunk.tensor]
            if form.dtype == BOOL:
                # A bool in memory is 0 or 1: what else is computed with it is undefined.
                np.not_equal(
                    np.frombuffer(data, np.uint8), 0, out=np.frombuffer(self._memory[begin:end], np.bool_)
                )
            else:
                form.decode(data, chunk.count, elements_in(self._memory, form.dtype, chunk.count, begin))

    def _extent(self, chunk: Chunk) -> tuple[int, int]:
        size = self.manifest.dtypes[chunk.tensor].itemsize
        begin = self.manifest.offsets[chunk.tensor] + chunk.start * size
        return begin, begin + chunk.count * size
