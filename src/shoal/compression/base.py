"""What a tensor codec is, the codec that changes nothing, and the memory of tensors as bytes.

A codec turns a one-dimensional piece of a tensor (a *part*) into bytes and back; averaging streams such
parts. Whole tensors (:meth:`CompressionBase.compress`) are one part and a description of their shape. Codecs
are stateless: one object serves any number of threads. This file may touch tensors on the CPU only; it knows
no sockets and no peers.

The wire is little-endian, as is every machine that torch supports.
"""

from __future__ import annotations

import enum
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation, UsageError
from shoal.utils.dtypes import AVERAGED, name_of
from shoal.utils.structs import CompactStruct

Bytes: TypeAlias = bytes | bytearray | memoryview

FLOATING_DTYPES: dict[str, torch.dtype] = {name: dtype.torch_dtype for name, dtype in AVERAGED.items()}
"""The dtypes that can be averaged, by their name on the wire."""

WHOLE_DTYPES: dict[str, torch.dtype] = {
    **FLOATING_DTYPES,
    **{
        name: getattr(torch, name)
        for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "complex64", "complex128")
    },
}
"""The dtypes of whole tensors that travel without compression."""

UINT8 = np.dtype(np.uint8)


class TensorRole(enum.Enum):
    """What a tensor is for; adaptive codecs choose by it."""

    ACTIVATION = "activation"
    PARAMETER = "parameter"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    UNSPECIFIED = "unspecified"


@dataclass(frozen=True)
class CompressionInfo:
    """What a codec may know about a tensor, or about one part of it, before it sees the values.

    :param key: the tensor's name or number in its collection
    :param shape: of the whole tensor
    :param part_index: number of the part, and ``part_size`` its elements (None: the whole tensor)
    """

    key: Any = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    role: TensorRole = TensorRole.UNSPECIFIED
    part_index: int = 0
    part_size: int | None = None

    @classmethod
    def from_tensor(
        cls, tensor: torch.Tensor, key: Any = None, role: TensorRole = TensorRole.UNSPECIFIED
    ) -> CompressionInfo:
        """That of a whole tensor, with its shape and dtype."""
        return cls(key=key, shape=tuple(tensor.shape), dtype=tensor.dtype, role=role)

    def get_part(self, part_index: int, part_size: int | None) -> CompressionInfo:
        """That of one part of the flattened tensor, of ``part_size`` elements."""
        return replace(self, part_index=part_index, part_size=part_size)

    @property
    def numel(self) -> int:
        """Number of elements: of the part, or of the whole tensor."""
        return math.prod(self.shape) if self.part_size is None else self.part_size


class SerializedTensor(CompactStruct, frozen=True):
    """A whole tensor as it travels; :func:`shoal.compression.deserialize_tensor` restores it."""

    compression_type: int
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    requires_grad: bool = False
    """Whether the sender's tensor does; integers never do."""


class CompressionBase(ABC):
    """A tensor codec. Subclasses define ``compression_type``, ``lossless``, ``encoded_nbytes``, ``encode``
    and ``_decode``; :func:`shoal.compression.register_codec` makes them known.

    The size of an encoded part follows from its dtype and count alone, so that a receiver knows it
    beforehand.

    A codec defines what makes it equal to another one. The default: both are of one class and have equal *settings*,
    the attributes whose names do not begin with an underscore. Tensors and arrays are compared by dtype and elements,
    everything else by its own ``==``. Names with an underscore are for caches, and for what else changes in use. A
    codec with other settings (lists of tensors, functions) defines ``__eq__`` and ``__hash__`` itself.
    """

    compression_type: ClassVar[int]
    """The codec's wire id; see :mod:`shoal.compression.registry`."""

    whole_dtypes: ClassVar[Mapping[str, torch.dtype]] = FLOATING_DTYPES
    """What :meth:`compress` takes, by name."""

    elementwise: ClassVar[bool] = False
    """Whether each element is encoded by itself, so that its neighbours do not matter. If not, a codec is given the
    elements of one tensor at a time, as those of several may differ in magnitude.
    """

    @abstractmethod
    def lossless(self, dtype: torch.dtype) -> bool:
        """Whether finite values of ``dtype`` come back bit for bit."""

    @abstractmethod
    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> int:
        """Exact size in bytes of ``count`` encoded elements of ``dtype``; never falls as ``count`` grows."""

    @abstractmethod
    def encode(self, part: torch.Tensor) -> memoryview:
        """Encode a one-dimensional contiguous CPU tensor; the result may share its memory, and reads it until
        it is sent.
        """

    @abstractmethod
    def _decode(
        self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None
    ) -> torch.Tensor:
        """As :meth:`decode`, with everything checked; ``data`` is one-dimensional and of unsigned bytes."""

    def decode(
        self, data: Bytes, dtype: torch.dtype, count: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decode ``count`` elements of ``dtype`` from what another peer sent.

        Returns ``out`` (one-dimensional, contiguous, of that dtype and count) if it was given, else a tensor
        that may share the memory of a writable ``data``.

        :raises ProtocolViolation: ``data`` can't be such a part; if it has not the right size, nothing is allocated
        :raises InvalidValueError: a codec of the user's made something else than a part, which is its own mistake
        """
        expected = self.encoded_nbytes(dtype, count)
        view = memoryview(data).cast("B")
        if len(view) != expected:
            raise ProtocolViolation(
                f"{type(self).__name__}: {count} elements of {name_of(dtype)} take {expected} bytes,"
                f" not {len(view)}"
            )
        if out is not None:
            assert out.dtype == dtype, out.dtype
            assert out.shape == (count,), out.shape
            assert out.is_contiguous()
        try:
            decoded = self._decode(view, dtype, count, out)
        except (ProtocolViolation, UsageError):
            raise
        except Exception as e:  # codecs of users, on bytes from strangers: may be anything
            raise ProtocolViolation(f"{self!r} could not decode it: {type(e).__name__}: {e}") from e
        if decoded.dtype != dtype or decoded.shape != (count,):
            raise InvalidValueError(
                f"{self!r}._decode must make {dtype} [{count}], got {decoded.dtype} {list(decoded.shape)}"
            )
        return decoded

    def encode_checked(self, part: torch.Tensor) -> memoryview:
        """As :meth:`encode`, whose result has the size that everybody expects.

        :raises InvalidValueError: it has not, or there is none: a mistake in the codec, which must not look like one
          of whom it is sent to
        """
        try:
            data = self.encode(part)
        except UsageError:
            raise
        except Exception as e:  # codecs of users: may be anything
            raise InvalidValueError(f"{self!r} could not encode: {type(e).__name__}: {e}") from e
        expected = self.encoded_nbytes(part.dtype, len(part))
        if len(view := memoryview(data).cast("B")) != expected:
            raise InvalidValueError(
                f"{self!r}.encode must make {expected} bytes of {len(part)} elements of {name_of(part.dtype)}, as "
                f"its encoded_nbytes says, got {len(view)}"
            )
        return view

    def is_raw(self, dtype: torch.dtype) -> bool:
        """Whether an encoded part is the memory of the part itself, so that it can be received in place
        (:func:`tensor_bytes`).
        """
        return False

    def max_count(self, dtype: torch.dtype, nbytes: int) -> int:
        """The largest number of elements whose encoding takes at most ``nbytes`` bytes (0 if not even one
        fits).

        :raises InvalidValueError: ``encoded_nbytes`` is not what it should be
        """
        # Codecs have any law of sizes: double until it is too much, then halve the gap.
        low, high = 0, 1
        while self.encoded_nbytes(dtype, high) <= nbytes:
            low, high = high, high * 2
            if high > 1 << 62:
                raise InvalidValueError(f"{self!r}.encoded_nbytes must grow with the number of elements")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.encoded_nbytes(dtype, middle) <= nbytes else (low, middle)
        return low

    def choose(self, info: CompressionInfo) -> CompressionBase:
        """The plain codec for this tensor: itself, unless the codec adapts to what it is told about the
        tensor.
        """
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the codec itself is used for every tensor; false for those that :meth:`choose` another one."""
        return type(self).choose is CompressionBase.choose

    def estimate_compression_ratio(self, info: CompressionInfo) -> float:
        """Encoded size over original size: below 1 if the codec saves bytes; 1 for an empty tensor."""
        if info.numel == 0:
            return 1.0
        codec = self.choose(info)
        return codec.encoded_nbytes(info.dtype, info.numel) / (info.dtype.itemsize * info.numel)

    def compress(
        self, tensor: torch.Tensor, info: CompressionInfo | None = None, allow_inplace: bool = False
    ) -> SerializedTensor:
        """Encode a whole tensor on any device, of any shape and strides, and keep its ``requires_grad``.

        Codecs that lose something take floating tensors; :class:`NoCompression` takes all of torch's usual dtypes.

        :param allow_inplace: the codec may use the tensor's own memory as scratch space
        """
        name = name_of(tensor.dtype)
        if name not in self.whole_dtypes:
            raise InvalidTypeError(
                f"tensor must have a dtype that {type(self).__name__} takes ({', '.join(self.whole_dtypes)}), "
                f"got {name}"
            )
        codec = self.choose(info if info is not None else CompressionInfo.from_tensor(tensor))
        flat = tensor.detach().to("cpu").reshape(-1).contiguous()
        return SerializedTensor(
            codec.compression_type,
            name,
            tuple(tensor.shape),
            bytes(codec.encode_checked(flat)),
            tensor.requires_grad,
        )

    def extract(self, serialized: SerializedTensor, *, max_elements: int | None = None) -> torch.Tensor:
        """Restore a tensor from a message of another peer; the result owns its memory.

        Raises :class:`ProtocolViolation` before any memory is taken if the message contradicts itself or
        exceeds ``max_elements``.
        """
        dtype = self.whole_dtypes.get(serialized.dtype)
        if dtype is None:
            raise ProtocolViolation(f"unknown dtype {serialized.dtype[:32]!r} of a tensor")
        # Torch allows 64 dimensions, and multiplies the sizes other than 0, for the strides, even of an empty tensor.
        largest = math.prod(max(1, size) for size in serialized.shape[:64])
        if len(serialized.shape) > 64 or min(serialized.shape, default=0) < 0 or largest >= 1 << 63:
            raise ProtocolViolation("impossible shape of a tensor")
        count = math.prod(serialized.shape)
        if max_elements is not None and count > max_elements:
            raise ProtocolViolation(f"a tensor of {count} elements where at most {max_elements} are allowed")
        flat = self.decode(serialized.data, dtype, count)
        whole = flat.reshape(serialized.shape)
        may_require_grad = dtype.is_floating_point or dtype.is_complex
        return whole.requires_grad_(serialized.requires_grad and may_require_grad)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        ours, theirs = settings_of(self), settings_of(other)
        return ours.keys() == theirs.keys() and all(_is_same(ours[name], theirs[name]) for name in ours)

    def __hash__(self) -> int:
        # Settings may be unhashable, and a class has hardly more than one set of them.
        return hash(type(self))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in settings_of(self).items())
        return f"{type(self).__name__}({settings})"


def settings_of(codec: CompressionBase) -> dict[str, Any]:
    """By name, what a codec was made with: all of its attributes but those that begin with an underscore."""
    return {name: value for name, value in vars(codec).items() if not name.startswith("_")}


def _is_same(first: Any, second: Any) -> bool:
    """The ``==`` of tensors and arrays has no truth value."""
    if first is second:
        return True
    match first, second:
        case torch.Tensor(), torch.Tensor():
            return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())
        case np.ndarray(), np.ndarray():
            return first.dtype == second.dtype and np.array_equal(first, second)
    return bool(first == second)


class NoCompression(CompressionBase):
    """The tensor's own bytes: nothing is lost, and nothing is copied on the way to the socket."""

    compression_type = 0
    whole_dtypes = WHOLE_DTYPES
    elementwise = True

    def lossless(self, dtype: torch.dtype) -> bool:
        return True

    def is_raw(self, dtype: torch.dtype) -> bool:
        return True

    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> int:
        return dtype.itemsize * count

    def encode(self, part: torch.Tensor) -> memoryview:
        return tensor_bytes(part)

    def _decode(
        self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None
    ) -> torch.Tensor:
        return decode_raw(data, dtype, count, out)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes; it lives as long as the view does."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise InvalidValueError(
            f"tensor must be contiguous and on the CPU, got one on {tensor.device} with strides {tensor.stride()}"
        )
    return tensor_array(tensor.detach(), UINT8).data


def tensor_array(tensor: torch.Tensor, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The memory of a contiguous CPU tensor as a flat writable array, which keeps it alive.

    Unlike that of ``tensor.numpy()``, which nobody can resize ever again, the tensor's storage stays the caller's to
    resize: only while the array is used, it may not be. Nor does it matter which stride a single element has.

    :param dtype: of the array: one whose size divides that of the memory
    """
    return np.asarray(_Memory(tensor, dtype, tensor))


def borrowed_array(tensor: torch.Tensor, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """As :func:`tensor_array`, but without keeping the memory alive: to be used only while the tensor has it."""
    return np.asarray(_Memory(tensor, dtype, None))


class _Memory:
    """Tells numpy where a tensor lies, and keeps it there."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, tensor: torch.Tensor, dtype: np.dtype[Any], owner: torch.Tensor | None) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": (tensor.nbytes // dtype.itemsize,),
            "typestr": dtype.str,
            "version": 3,
        }


def decode_raw(data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None) -> torch.Tensor:
    """Elements in the memory form of their own dtype; not copied where ``data`` already is the memory of
    ``out``.
    """
    if count == 0:
        return torch.empty(0, dtype=dtype) if out is None else out
    if data.readonly:
        data = memoryview(bytearray(data))
    # A bool in memory is 0 or 1; strangers may send other bytes.
    as_bool = dtype == torch.bool
    values = torch.frombuffer(data, dtype=torch.uint8 if as_bool else dtype, count=count)
    values = values != 0 if as_bool else values
    if out is None:
        return values
    if values.data_ptr() != out.data_ptr():
        out.copy_(values)
    return out
