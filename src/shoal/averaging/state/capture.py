"""From what ``get_current_state()`` returned to the encoded state that a donor sends: checks, one copy, encoding.

:func:`capture_state` runs in the user process, under the averager's lock, for as long as one plain copy takes;
:mod:`.encoding` turns that copy into the encoded chunks, in the same memory, afterwards and elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shoal.averaging.codec_formats import format_by
from shoal.averaging.formats import Format, PlainFormat
from shoal.averaging.state.encoding import Capture
from shoal.averaging.state.manifest import (
    CHUNK_ELEMENTS,
    MAX_METADATA_NBYTES,
    MAX_STATE_NBYTES,
    CaptureLayout,
    Manifest,
    metadata_entry,
    tensor_entry,
)
from shoal.averaging.state.messages import TensorEntry
from shoal.compression.base import UINT8 as BYTES
from shoal.compression.base import CompressionBase, CompressionInfo, NoCompression, tensor_array
from shoal.compression.registry import CODECS
from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation
from shoal.runtime.memory import SharedMemory, populate
from shoal.utils.dtypes import DTYPES, UINT8, dtype_of, name_of

MAX_UNREADY = 1 << 26
"""Bytes whose pages may be got under the lock: some 70 ms."""
GROWTH = 1 << 16
"""Bytes by which a state, its metadata for instance, may grow until it is asked for again."""

_EXPECTED = "get_current_state() must return (metadata, tensors) or (metadata, tensors, infos)"


@dataclass(frozen=True)
class CheckedState:
    """What ``get_current_state()`` returned, once it is known that it can be sent."""

    metadata: bytes
    tensors: tuple[torch.Tensor, ...]
    formats: tuple[Format, ...]


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
                    *map(tensor_entry, state.tensors, state.formats[1:]),
                )
                layout = _layout(entries, state.formats)
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
        return Capture(memory, entries, state.formats)

    made = attempt(_ready_memory(reserve), MAX_UNREADY)
    if isinstance(made, int):
        made = attempt(_ready_memory(made + GROWTH), MAX_STATE_NBYTES * 2)
    assert isinstance(made, Capture)
    return made


def _ready_memory(nbytes: int) -> SharedMemory:
    """Memory that has its pages already: getting them takes several times as long as filling them."""
    memory = SharedMemory.create(max(1, nbytes))
    if not populate(memory.buffer):
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
    formats = [format_by(dtype_of(tensor), codec) for tensor, codec in zip(tensors, codecs, strict=True)]
    return CheckedState(bytes(encoded), tensors, (PlainFormat(UINT8), *formats))


def _check_tensor(index: int, tensor: object) -> None:
    name = f"tensor {index} of get_current_state()"
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        raise InvalidTypeError(f"{name} must be dense, got another layout: pass tensor.to_dense()")
    if name_of(tensor.dtype) not in DTYPES:
        raise InvalidTypeError(f"{name} must be of {', '.join(DTYPES)}, got {tensor.dtype}")
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


def _layout(entries: Sequence[TensorEntry], formats: Sequence[Format]) -> CaptureLayout:
    try:
        return CaptureLayout(Manifest(entries, formats))
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
            np.copyto(target, tensor_array(source, BYTES))
        else:
            torch.from_numpy(target).view(source.dtype).view(source.shape).copy_(source.detach())


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the memory holds the conjugate or the negative of the tensor's values."""
    return tensor.is_conj() or tensor.is_neg()


def expected_nbytes(tensors: Sequence[torch.Tensor]) -> int:
    """About how much memory a state of these tensors takes: what to reserve for the first capture."""
    chunks = sum(-(-tensor.numel() // CHUNK_ELEMENTS) for tensor in tensors)
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors) + 64 * (len(tensors) + chunks) + 4096
