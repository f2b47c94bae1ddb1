"""A captured state, and its encoding in place, which the user process and the background process both do."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.averaging.elements import elements_in
from shoal.averaging.formats import Format
from shoal.averaging.state.manifest import CaptureLayout, Manifest
from shoal.averaging.state.messages import TensorEntry
from shoal.runtime.memory import SharedMemory


@dataclass(frozen=True)
class Capture:
    """A copy of a state as it is, in shared memory, which its owner closes."""

    memory: SharedMemory
    entries: tuple[TensorEntry, ...]
    formats: tuple[Format, ...]

    def layout(self) -> CaptureLayout:
        return CaptureLayout(Manifest(self.entries, self.formats))


def encode_in_place(buffer: memoryview, layout: CaptureLayout) -> None:
    """Turn a captured state into its encoded chunks, at ``layout.encoded_offsets`` of the same memory.

    :raises InvalidValueError: a codec made another number of bytes than it had said
    """
    manifest = layout.manifest
    for index in range(manifest.chunk_count):
        chunk = manifest.chunk(index)
        form = manifest.formats[chunk.tensor]
        source = layout.raw_offsets[chunk.tensor] + chunk.start * form.dtype.itemsize
        begin, stop = layout.chunk_offset(index)
        if form.is_raw:
            if begin != source:
                buffer[begin:stop] = buffer[source : source + chunk.count * form.dtype.itemsize]
            continue
        buffer[begin:stop] = form.encode(elements_in(buffer, form.dtype, chunk.count, source))
