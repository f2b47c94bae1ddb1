"""From what ``get_current_state()`` returned to the encoded state that a donor sends: checks, one copy, encoding.

:func:`capture_state` runs in the user process, under the averager's lock, for as long as one plain copy takes;
:func:`encode_in_place` turns that copy into the encoded chunks, in the same memory, afterwards and elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shoal.averaging.state.manifest import (
    CHUNK_ELEMENTS,
    MAX_METADATA_NBYTES,
    MAX_STATE_NBYTES,
    STATE_DTYPE_NAMES,
    STATE_DTYPES,
    CaptureLayout,
    Manifest,
    metadata_entry,
    tensor_entry,
)
from shoal.averaging.state.messages import TensorEntry
from shoal.compression.base import UINT8, CompressionBase, CompressionInfo, NoCompression, tensor_array
from shoal.compression.registry import CODECS
from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation
from shoal.runtime.memory import SharedMemory

MAX_UNREADY = 1 << 26
"""Bytes whose pages may be got under the lock: some 70 ms."""
GROWTH = 1 << 16
"""Bytes by which a state, its metadata for instance, may grow until it is asked for again."""

_EXPECTED = "get_current_state() must return (metadata, tensors) or (metadata, tensors, infos)"


@dataclass(frozen=True)
class Capture:
    """A copy of a state as it is, in shared memory; whoever has it closes the memory."""

    memory: SharedMemory
    entries: tuple[TensorEntry, ...]
    codecs: tuple[CompressionBase, ...]

    def layout(self) -> CaptureLayout:
        return CaptureLayout(Manifest(self.entries, self.codecs))


@dataclass(frozen=True)
class CheckedState:
    """What ``get_current_state()`` returned, once it is known that it can be sent."""

    metadata: bytes
    tensors: tuple[torch.Tensor, ...]
    codecs: tuple[CompressionBase, ...]


def capture_state(
    get_state: Callable[[], Any],
    *,
    hold: Callable[[], AbstractContextManager[Any]],
    serializer: Any,
    compression: CompressionBase,
    reserve: int,
) -> Capture:
    """Call ``get_state`` and copy what it returns, both under the lock that ``hold()`` takes.

    :param reserve: how many bytes the copy will probably take; that much memory is made ready before, so that
      the lock is held only for copying. A state that takes more, and more than ``MAX_UNREADY``, is asked for once again
      when the memory for it is ready: the lock is free meanwhile.
    :raises UsageError: what was returned is no state; the message says what is wrong with it. Whatever
      ``get_state`` itself raises passes through.
    """

    def attempt(memory: SharedMemory, unready: int) -> Capture | int:
        """A copy, or how many bytes it takes, if these are more than those of ``memory`` and than ``unready``."""
        try:
            with hold():
                state = check_state(get_state(), serializer, compression)
                entries = (
                    metadata_entry(len(state.metadata)),
                    *map(tensor_entry, state.tensors, state.codecs[1:]),
                )
                layout = _layout(entries, state.codecs)
                if layout.nbytes > max(memory.nbytes, unready):
                    memory.close()
                    return layout.nbytes
                if memory.nbytes < layout.nbytes:
                    memory.close()
                    memory = SharedMemory.create(layout.nbytes)
                _copy(state, layout, memory.buffer)
        except BaseException:  # the memory has no owner yet
            memory.close()
            raise
        return Capture(memory, entries, state.codecs)

    made = attempt(_ready_memory(reserve), MAX_UNREADY)
    if isinstance(made, int):
        made = attempt(_ready_memory(made + GROWTH), MAX_STATE_NBYTES * 2)
    assert isinstance(made, Capture)
    return made


def _ready_memory(nbytes: int) -> SharedMemory:
    """Memory that has its pages already: getting them takes several times as long as filling them."""
    memory = SharedMemory.create(max(1, nbytes))
    np.frombuffer(memory.buffer, dtype=np.uint8).fill(0)
    return memory


def check_state(state: Any, serializer: Any, compression: CompressionBase) -> CheckedState:
    """:raises UsageError: not what ``get_current_state()`` may return; names the index of a bad tensor"""
    if not isinstance(state, tuple | list):
        raise InvalidTypeError(f"{_EXPECTED}, got {type(state).__name__}")
    if len(state) not in (2, 3):
        raise InvalidValueError(f"{_EXPECTED}, got {len(state)} items")
    metadata, given, infos = (*state, None)[:3]
    if isinstance(given, torch.Tensor):
        raise InvalidTypeError(
            "the tensors of get_current_state() must be a sequence, got a single tensor: return [tensor]"
        )
    try:
        tensors = tuple(given)
    except TypeError:
        raise InvalidTypeError(
            f"the tensors of get_current_state() must be a sequence, got {type(given).__name__}"
        ) from None
    for index, tensor in enumerate(tensors):
        _check_tensor(index, tensor)
    try:
        encoded = serializer.dumps(metadata)
    except Exception as e:  # the serializer is the user's, and so is what it is given
        raise InvalidTypeError(
            f"the metadata of get_current_state() must be what the serializer takes, got an error: {e}"
        ) from e
    if not isinstance(encoded, bytes | bytearray):
        raise InvalidTypeError(
            f"the serializer must make bytes of the metadata, got {type(encoded).__name__}"
        )
    if len(encoded) > MAX_METADATA_NBYTES:
        raise InvalidValueError(
            f"the metadata of get_current_state() must take at most {MAX_METADATA_NBYTES:,} bytes when encoded, got "
            f"{len(encoded):,}: return what is large as tensors"
        )
    codecs = [_choose(compression, info) for info in _check_infos(tensors, infos)]
    for codec in {id(codec): codec for codec in codecs}.values():
        CODECS.check("state_compression", codec)
    return CheckedState(bytes(encoded), tensors, (NoCompression(), *codecs))


def encode_in_place(buffer: memoryview, layout: CaptureLayout) -> None:
    """Turn a captured state into its encoded chunks, at ``layout.encoded_offsets`` of the same memory.

    :raises InvalidValueError: a codec made another number of bytes than it had said
    """
    manifest = layout.manifest
    block = torch.frombuffer(buffer, dtype=torch.uint8)
    for index in range(manifest.chunk_count):
        chunk = manifest.chunk(index)
        dtype, codec = manifest.dtypes[chunk.tensor], manifest.codecs[chunk.tensor]
        source = layout.raw_offsets[chunk.tensor] + chunk.start * dtype.itemsize
        end = source + chunk.count * dtype.itemsize
        begin, stop = layout.chunk_offset(index)
        if not dtype.is_floating_point or codec.is_raw(dtype):
            if begin != source:
                buffer[begin:stop] = buffer[source:end]
            continue
        buffer[begin:stop] = codec.encode_checked(block[source:end].view(dtype))


def _check_tensor(index: int, tensor: object) -> None:
    name = f"tensor {index} of get_current_state()"
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        raise InvalidTypeError(f"{name} must be dense, got another layout: pass tensor.to_dense()")
    if tensor.dtype not in STATE_DTYPE_NAMES:
        raise InvalidTypeError(f"{name} must be of {', '.join(STATE_DTYPES)}, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise InvalidTypeError(f"{name} must have values, got one on the meta device")


def _check_infos(tensors: Sequence[torch.Tensor], infos: Any) -> Sequence[CompressionInfo]:
    if infos is None:
        return [CompressionInfo.from_tensor(tensor, key=i) for i, tensor in enumerate(tensors)]
    given: list[CompressionInfo] = list(infos)
    if len(given) != len(tensors):
        raise InvalidValueError(
            f"get_current_state() must return an info for each of its {len(tensors)} tensors, got {len(given)}"
        )
    for index, (info, tensor) in enumerate(zip(given, tensors, strict=True)):
        if not isinstance(info, CompressionInfo):
            raise InvalidTypeError(
                f"info {index} of get_current_state() must be a CompressionInfo, got {type(info).__name__}"
            )
        if tuple(info.shape) != tuple(tensor.shape) or info.dtype != tensor.dtype:
            raise InvalidValueError(
                f"info {index} of get_current_state() must describe {tensor.dtype} {list(tensor.shape)}, as the tensor "
                f"is, got {info.dtype} {list(info.shape)}"
            )
    return given


def _choose(compression: CompressionBase, info: CompressionInfo) -> CompressionBase:
    return compression.choose(info) if info.dtype.is_floating_point else NoCompression()


def _layout(entries: Sequence[TensorEntry], codecs: Sequence[CompressionBase]) -> CaptureLayout:
    try:
        return CaptureLayout(Manifest(entries, codecs))
    except ProtocolViolation as e:  # what a joiner would refuse, the donor refuses itself
        raise InvalidValueError(f"get_current_state() returned what can't be sent: {e}") from e


def _copy(state: CheckedState, layout: CaptureLayout, buffer: memoryview) -> None:
    memory = np.frombuffer(buffer, dtype=np.uint8)
    buffer[layout.raw_offsets[0] : layout.raw_offsets[0] + len(state.metadata)] = state.metadata
    for device in {tensor.device for tensor in state.tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # whatever the trainer has enqueued, on whatever stream
    for source, offset in zip(state.tensors, layout.raw_offsets[1:], strict=True):
        target = memory[offset : offset + source.nbytes]
        if source.device.type == "cpu" and source.is_contiguous() and not _is_lazy(source):
            # numpy copies on this thread alone: the trainer keeps its cores
            np.copyto(target, tensor_array(source, UINT8))
        else:
            torch.from_numpy(target).view(source.dtype).view(source.shape).copy_(source.detach())


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the memory holds the conjugate or the negative of the tensor's values."""
    return tensor.is_conj() or tensor.is_neg()


def expected_nbytes(tensors: Sequence[torch.Tensor]) -> int:
    """About how much memory a state of these tensors takes: what to reserve for the first capture."""
    chunks = sum(-(-tensor.numel() // CHUNK_ELEMENTS) for tensor in tensors)
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors) + 64 * (len(tensors) + chunks) + 4096


def drop_tracebacks(error: BaseException | None) -> None:
    """Let go of what the frames refer to through which an error has passed.

    A stream keeps the error with which it has failed, and the error's frames the stream: only the garbage collector
    would find that, much later, and with it a view of a whole state's memory.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
