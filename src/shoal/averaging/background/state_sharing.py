"""State sharing in the background process: the donor, the joiner, and the way to the user process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import cast

from shoal.averaging.router import Router
from shoal.averaging.state.declarations import DonorDeclarations, Wish
from shoal.averaging.state.donor import CopyUnavailable, StateDonor, UserIsAbsent
from shoal.averaging.state.download import Progress, StateDownload
from shoal.averaging.state.encoding import Capture
from shoal.averaging.state.messages import pack_entries, unpack_entries
from shoal.averaging.state.policy import Donor
from shoal.averaging.state.queue import DEFAULT_MAX_AGE, MAX_REQUESTS_PER_PEER, UploadQueue
from shoal.averaging.state_commands import (
    AllocateState,
    CaptureFailed,
    CaptureState,
    LoadedState,
    LoadState,
    MemoryRefused,
    SetStateSharing,
    ShowProgress,
    StateCaptured,
    StateCommand,
)
from shoal.dht.node import DHTNode
from shoal.errors import InvalidStateError, InvalidValueError
from shoal.runtime import pickling
from shoal.runtime.descriptors import WithDescriptors
from shoal.runtime.memory import SharedMemory
from shoal.runtime.presence import UserProcessAbsent
from shoal.runtime.service import ServiceContext
from shoal.utils.tasks import TaskSet
from shoal.utils.timed import get_dht_time

logger = logging.getLogger(__name__)


class StateService:
    """The part of an averager's service that carries out :mod:`~shoal.averaging.state_commands`. Nothing is shared
    before the user process says so.

    :param declare_period: seconds between two declarations of a donor
    :param next_chunk_timeout: see :class:`StateDownload`
    :param max_state_age: see :class:`UploadQueue`
    """

    def __init__(
        self,
        context: ServiceContext,
        node: DHTNode,
        router: Router,
        prefix: str,
        *,
        declare_period: float,
        next_chunk_timeout: float | None,
        max_state_age: float | None = DEFAULT_MAX_AGE,
    ) -> None:
        self._context = context
        self._node = node
        self._prefix = prefix
        self._next_chunk_timeout = next_chunk_timeout
        self._downloads = asyncio.Semaphore(MAX_REQUESTS_PER_PEER)
        self._memories: dict[int, SharedMemory] = {}
        self._tasks = TaskSet()
        self._rng = random.SystemRandom()
        self._donor = StateDonor(
            router, prefix, allowed=False, capture=self._capture, queue=UploadQueue(max_age=max_state_age)
        )
        self._declarations = DonorDeclarations(
            node, prefix, Wish(False, 0.0), period=declare_period, clock=get_dht_time
        )

    def start(self) -> None:
        """The user process is ready to make copies: begin to declare this peer as a donor."""
        self._declarations.start()

    async def carry_out(self, command: StateCommand) -> object:
        """Carry out a command of the user process."""
        match command:
            case SetStateSharing(allowed, priority):
                self._donor.switch(allowed)
                self._declarations.update(Wish(allowed, priority))
            case LoadState():
                return await self._load(command)
            case _:
                raise InvalidStateError(f"an averager has no command {type(command).__name__}")
        return None

    async def close(self) -> None:
        """End uploads, free the copy, and withdraw the declaration."""
        await self._donor.close()
        await self._declarations.close()
        await self._tasks.close()

    # as a donor

    async def _capture(self) -> Capture:
        try:
            answer = await self._context.user.unless_absent(self._context.call_user(CaptureState()))
        except UserProcessAbsent as e:
            raise UserIsAbsent(f"the donor's {e}") from None
        if isinstance(answer, CaptureFailed):
            raise CopyUnavailable(answer.reason)
        assert isinstance(answer, WithDescriptors)
        captured = cast("StateCaptured", answer.value)
        try:
            formats = await asyncio.to_thread(pickling.loads, captured.formats)
        except Exception as e:  # of the user's codecs: may be anything
            logger.warning(
                "%s: other peers cannot download this one's state, because its codecs could not be loaded in the "
                "background process: %s: %s",
                self._prefix,
                type(e).__name__,
                e,
            )
            raise CopyUnavailable(type(e).__name__) from e
        (descriptor,) = answer.take()
        memory = SharedMemory.from_descriptor(descriptor, captured.nbytes)
        return Capture(memory, unpack_entries(captured.entries), formats)

    # as a joiner

    async def _load(self, command: LoadState) -> LoadedState:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(command.timeout):
                await self._downloads.acquire()  # donors refuse more requests of one peer
        except TimeoutError:
            reason = "the downloads that this peer had begun before took longer"
            return LoadedState(b"", b"", f"{reason} than timeout={command.timeout:g} s")
        try:
            return await self._download(command, began)
        finally:
            self._downloads.release()

    async def _download(self, command: LoadState, began: float) -> LoadedState:
        download = StateDownload(
            self._node.host,
            self._prefix,
            find_donors=self._find_donors,
            allocate=lambda nbytes: self._allocate(command.download, nbytes),
            next_chunk_timeout=self._next_chunk_timeout,
            on_progress=lambda progress: self._show(command, progress),
        )
        try:
            result = await download.run(command.timeout, began=began)
        finally:
            self._forget_memory(command.download)
        if isinstance(result, str):
            return LoadedState(b"", b"", result)
        seconds = asyncio.get_running_loop().time() - began
        entries = pack_entries(result.manifest.entries)
        return LoadedState(result.donor.to_bytes(), entries, age=result.age, seconds=seconds)

    async def _find_donors(self) -> list[Donor]:
        found = await self._declarations.read()
        return [
            Donor(peer, declared.priority, self._rng.random(), declared.addresses) for peer, declared in found
        ]

    async def _allocate(self, download: int, nbytes: int) -> memoryview:
        self._forget_memory(download)
        answer = await self._context.call_user(AllocateState(download, nbytes))
        if isinstance(answer, MemoryRefused):
            raise InvalidValueError(answer.reason)
        assert isinstance(answer, WithDescriptors)
        (descriptor,) = answer.take()
        memory = self._memories[download] = SharedMemory.from_descriptor(descriptor, nbytes)
        return memory.buffer

    def _forget_memory(self, download: int) -> None:
        memory = self._memories.pop(download, None)
        if memory is not None:
            memory.close()

    def _show(self, command: LoadState, progress: Progress) -> None:
        if not command.wants_progress:
            return
        message = ShowProgress(command.download, str(progress.donor), progress.received, progress.total)

        async def show() -> None:
            with contextlib.suppress(InvalidStateError):  # the averager was shut down meanwhile
                await self._context.call_user(message)

        self._tasks.start(show(), "show the progress of a download")
