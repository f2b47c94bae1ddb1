"""What a peer that downloads a state is sent, piece by piece, for users that look at it or carry it elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from shoal.averaging.state.encoding import Capture, encode_in_place


@dataclass(frozen=True)
class TensorPart:
    """``data`` encodes ``count`` elements, from element ``start`` on, of tensor number ``index``, which has this dtype
    (its name), shape and codec (its wire id).
    """

    index: int
    dtype: str
    shape: tuple[int, ...]
    codec: int
    start: int
    count: int
    data: bytes


@dataclass(frozen=True)
class DownloadData:
    """One piece: first one with the serialized metadata alone, then one for each part of each tensor. An empty tensor
    has one part without data.
    """

    metadata: bytes | None = None
    tensor_part: TensorPart | None = None


async def state_pieces(take_copy: Callable[[], Capture]) -> AsyncIterator[DownloadData]:
    """Take one copy of the state, on a thread, and yield it."""
    with (capture := await asyncio.to_thread(take_copy)).memory as memory:
        layout = capture.layout()
        manifest, buffer = layout.manifest, memory.buffer
        await asyncio.to_thread(encode_in_place, buffer, layout)
        begin = layout.encoded_offsets[0]
        yield DownloadData(metadata=bytes(buffer[begin : begin + manifest.counts[0]]))
        empty = [number for number, count in enumerate(manifest.counts) if count == 0 and number > 0]
        for index in range(manifest.chunk_count):
            chunk = manifest.chunk(index)
            while empty and empty[0] < chunk.tensor:
                number = empty.pop(0)
                entry = manifest.entries[number]
                yield DownloadData(
                    tensor_part=TensorPart(number - 1, entry.dtype, entry.shape, entry.codec, 0, 0, b"")
                )
            if chunk.tensor == 0:
                continue
            entry = manifest.entries[chunk.tensor]
            begin, end = layout.chunk_offset(index)
            part = TensorPart(
                chunk.tensor - 1,
                entry.dtype,
                entry.shape,
                entry.codec,
                chunk.start,
                chunk.count,
                bytes(buffer[begin:end]),
            )
            yield DownloadData(tensor_part=part)
        for number in empty:
            entry = manifest.entries[number]
            yield DownloadData(
                tensor_part=TensorPart(number - 1, entry.dtype, entry.shape, entry.codec, 0, 0, b"")
            )
