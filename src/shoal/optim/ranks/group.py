"""The ranks of one peer, and their collectives: a shell around ``torch.distributed``.

A gloo group of their own carries all of them, whatever carries those of DistributedDataParallel: groups have sockets
of their own, so that neither waits for the other. Only the thread that calls the optimizer may use it, since all ranks
must begin the same collectives in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError, RankError
from shoal.optim.ranks import frames
from shoal.optim.ranks.pieces import padded, pieces, places

SLICE = timedelta(seconds=0.5)
"""Of a wait in torch's code, where Python hears no Ctrl+C."""


class RankGroup(Protocol):
    """The ranks of one peer. Each call is one of all ranks.

    Every call raises :class:`RankError` if another rank is gone or does not come, and the group has ended then.
    """

    rank: int
    size: int
    ended: bool

    def gather(self, message: Any) -> list[Any]:
        """The message of each rank."""

    def tell(self, message: Any = None) -> Any:
        """The message of rank 0."""

    def copy(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give tensors the values that they have at rank 0; shapes and dtypes are the same at all ranks."""

    def leave(self) -> None:
        """End; not a call of all. Ranks that wait for this one fail."""


class GlooGroup:
    """A :class:`RankGroup` of processes.

    :param members: ranks of the job in the group, in order; None: all of them
    :param patience: seconds that a rank waits for the others in one call
    """

    def __init__(self, members: Sequence[int] | None, patience: float) -> None:
        self._patience = patience
        # All processes of a job take part in making a group, unless told that it is an affair of its members.
        self._all = members is None
        self._group: Any = dist.new_group(
            None if members is None else list(members),
            timeout=timedelta(seconds=patience),
            backend="gloo",
            use_local_synchronization=not self._all,
        )
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._speaker = dist.get_global_rank(self._group, 0)
        self.ended = False

    def gather(self, message: Any) -> list[Any]:
        encoded = frames.encode(message)
        firsts = self._all_gather(frames.first_frame(encoded))
        longest = max(map(frames.length, firsts)) - frames.ROOM
        rests = self._all_gather(encoded[frames.ROOM :].ljust(longest, b"\0")) if longest > 0 else firsts
        return [frames.decode(first, rest) for first, rest in zip(firsts, rests, strict=True)]

    def tell(self, message: Any = None) -> Any:
        encoded = frames.encode(message) if self.rank == 0 else b""
        first = self._broadcast(frames.first_frame(encoded))
        longer = frames.length(first) - frames.ROOM
        rest = self._broadcast(encoded[frames.ROOM :].ljust(longer, b"\0")) if longer > 0 else b""
        return message if self.rank == 0 else frames.decode(first, rest)

    @torch.no_grad()
    def copy(self, tensors: Sequence[torch.Tensor]) -> None:
        flat = [tensor.detach() for tensor in tensors if tensor.numel()]
        for piece in pieces([tensor.nbytes for tensor in flat]):
            self._copy_piece([flat[index] for index in piece])

    def _copy_piece(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) == 1 and tensors[0].is_cpu and tensors[0].is_contiguous():
            self._broadcast_tensor(
                tensors[0].reshape(-1).view(torch.uint8)
            )  # it may be large: without a copy
            return
        size = sum(padded(tensor.nbytes) for tensor in tensors[:-1]) + tensors[-1].nbytes
        piece = torch.empty(size, dtype=torch.uint8)
        if self.rank == 0:
            for place, tensor in zip(places(tensors, piece), tensors, strict=True):
                place.copy_(tensor)
        self._broadcast_tensor(piece)
        if self.rank != 0:
            for place, tensor in zip(places(tensors, piece), tensors, strict=True):
                tensor.copy_(place)

    def leave(self) -> None:
        if self.ended:
            return
        self.ended = True
        # The name of a group that its members have made alone would be that of the next one, whose members would then
        # find each other at addresses of this one: such a group ends with its process.
        if self._all and dist.is_initialized():
            with contextlib.suppress(ValueError):  # the user has ended all groups
                dist.destroy_process_group(self._group)
        self._group = None

    def _all_gather(self, sent: bytes) -> list[bytes]:
        own = _tensor_of(sent)
        received = [torch.empty_like(own) for _ in range(self.size)]
        self._complete(lambda: dist.all_gather(received, own, group=self._group, async_op=True))
        return [_bytes_of(tensor) for tensor in received]

    def _broadcast(self, sent: bytes) -> bytes:
        carried = _tensor_of(sent)
        self._broadcast_tensor(carried)
        return _bytes_of(carried)

    def _broadcast_tensor(self, carried: torch.Tensor) -> None:
        self._complete(lambda: dist.broadcast(carried, self._speaker, group=self._group, async_op=True))

    def _complete(self, start: Callable[[], Any]) -> None:
        if self.ended:
            raise InvalidStateError("the ranks of this peer have parted: make another optimizer")
        try:
            work = start()
            while not work.is_completed():
                with contextlib.suppress(
                    RuntimeError
                ):  # the slice is over; or it failed, which is raised below
                    work.wait(SLICE)
            work.wait()
        except RuntimeError as e:
            self.leave()
            raise RankError(
                "another rank of this peer is gone, has shut down its optimizer, or did not come within "
                f"{self._patience:g} s ({_first_sentence(e)})"
            ) from e
        except BaseException:
            self.leave()  # this rank has missed a call of all
            raise


def find_members(process_group: Any) -> tuple[Sequence[int] | None, int]:
    """The ranks of the job that are one peer (None: all of them), and how many they are.

    :param process_group: as of the optimizer
    :raises InvalidTypeError: no process group; :raises InvalidValueError: this process is not in it
    """
    ready = dist.is_available() and dist.is_initialized()
    if process_group is None:
        return None, dist.get_world_size() if ready else 1
    if not ready:
        raise InvalidStateError("process_group must be None without torch.distributed.init_process_group()")
    if not isinstance(process_group, dist.ProcessGroup):
        raise InvalidTypeError(
            "process_group must be a torch.distributed.ProcessGroup that has this process, or None, "
            f"got {process_group!r}"
        )
    members = dist.get_process_group_ranks(process_group)
    if dist.get_rank() not in members:
        raise InvalidValueError(
            f"process_group must have this process, which is rank {dist.get_rank()}, got {members}"
        )
    return None if len(members) == dist.get_world_size() else members, len(members)


def _tensor_of(sent: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(sent), dtype=torch.uint8)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _first_sentence(error: RuntimeError) -> str:
    """Without the place in gloo's source, and its advice."""
    line = str(error).split("\n", 1)[0]
    return line.rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or line or type(error).__name__
