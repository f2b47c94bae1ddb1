"""Codecs that choose another codec for each tensor. They are never on the wire themselves: a message or part names
the codec that was chosen. No tensor is touched here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn, cast

import torch

from shoal.compression.base import (
    CompressionBase,
    CompressionInfo,
    NoCompression,
    SerializedTensor,
    TensorRole,
)
from shoal.compression.registry import deserialize_tensor
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.checks import Count


class _NoWireId:
    """Stands where a codec has its wire id, and says why there is none."""

    def __get__(self, codec: AdaptiveCompressionBase | None, owner: type) -> _NoWireId:
        if codec is None:
            return self
        raise codec._not_plain()


class AdaptiveCompressionBase(CompressionBase):
    """A codec that chooses by what it is told about a tensor. Subclasses define ``choose_compression``; what it returns
    may be adaptive too.

    :meth:`choose` gives the plain codec, :meth:`compress` uses it, :meth:`extract` follows the message. All that only
    a plain codec can answer (``compression_type``, ``encode``, ``encoded_nbytes`` and so on) raises
    :class:`InvalidTypeError`, and so does a choice that is no codec.
    """

    compression_type: ClassVar[int] = cast("int", _NoWireId())

    @abstractmethod
    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        """The codec for the tensor that ``info`` describes."""

    def choose(self, info: CompressionInfo) -> CompressionBase:
        codec: object = self.choose_compression(info)
        if not isinstance(codec, CompressionBase):
            raise InvalidTypeError(
                f"{type(self).__name__}.choose_compression({info}) must return a codec, such as Float16Compression(), "
                f"got {codec!r}"
            )
        return codec.choose(info)

    def extract(self, serialized: SerializedTensor, *, max_elements: int | None = None) -> torch.Tensor:
        return deserialize_tensor(serialized, max_elements=max_elements)

    def lossless(self, dtype: torch.dtype) -> NoReturn:
        raise self._not_plain()

    def is_raw(self, dtype: torch.dtype) -> NoReturn:
        raise self._not_plain()

    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> NoReturn:
        raise self._not_plain()

    def encode(self, part: torch.Tensor) -> NoReturn:
        raise self._not_plain()

    def _decode(self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None) -> NoReturn:
        raise self._not_plain()

    def _not_plain(self) -> InvalidTypeError:
        return InvalidTypeError(
            f"{type(self).__name__} chooses another codec for each tensor and has no wire id or encoding of its own;"
            " choose(info) returns the codec of a tensor"
        )


class SizeAdaptiveCompression(AdaptiveCompressionBase):
    """One codec for small tensors, another one for those with at least ``threshold`` elements.

    :param threshold: elements of the whole tensor, not of its parts
    :param less: for tensors with fewer
    :param greater_equal: for all others
    """

    def __init__(self, threshold: int, less: CompressionBase, greater_equal: CompressionBase) -> None:
        self.threshold: int = Count(0, unit="elements").check("threshold", threshold)
        self.less = _codec("less", less)
        self.greater_equal = _codec("greater_equal", greater_equal)

    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        return self.greater_equal if math.prod(info.shape) >= self.threshold else self.less

    def __repr__(self) -> str:
        return f"SizeAdaptiveCompression({self.threshold}, {self.less!r}, {self.greater_equal!r})"


class RoleAdaptiveCompression(AdaptiveCompressionBase):
    """A codec by what a tensor is for (:class:`~shoal.compression.TensorRole`).

    :param activation, parameter, gradient, optimizer: for tensors of that role; None: the default
    :param default: for all others
    """

    def __init__(
        self,
        *,
        activation: CompressionBase | None = None,
        parameter: CompressionBase | None = None,
        gradient: CompressionBase | None = None,
        optimizer: CompressionBase | None = None,
        default: CompressionBase = NoCompression(),
    ) -> None:
        given = {
            TensorRole.ACTIVATION: activation,
            TensorRole.PARAMETER: parameter,
            TensorRole.GRADIENT: gradient,
            TensorRole.OPTIMIZER: optimizer,
        }
        self.default = _codec("default", default)
        self.role_compressions: dict[TensorRole, CompressionBase] = {
            role: _codec(role.value, codec) for role, codec in given.items() if codec is not None
        }

    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        return self.role_compressions.get(info.role, self.default)

    def __repr__(self) -> str:
        given = "".join(f"{role.value}={codec!r}, " for role, codec in self.role_compressions.items())
        return f"RoleAdaptiveCompression({given}default={self.default!r})"


class PerTensorCompression(AdaptiveCompressionBase):
    """A codec for each tensor by its key (``CompressionInfo.key``: an averager's tensors have their number, if
    ``tensor_infos`` says nothing else).

    :param tensor_compressions: a sequence by number, or a mapping by key. A tensor that it has nothing for raises
      :class:`InvalidValueError`, which names the key.
    """

    def __init__(
        self, tensor_compressions: Sequence[CompressionBase] | Mapping[Any, CompressionBase]
    ) -> None:
        if isinstance(tensor_compressions, Mapping):
            items = dict(tensor_compressions)
        elif isinstance(tensor_compressions, Sequence):
            items = dict(enumerate(tensor_compressions))
        else:
            raise InvalidTypeError(
                f"tensor_compressions must be a sequence or a mapping of codecs, got {tensor_compressions!r}"
            )
        self.tensor_compressions = {
            key: _codec(f"tensor_compressions[{key!r}]", codec) for key, codec in items.items()
        }

    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        codec = self.tensor_compressions.get(info.key)
        if codec is None:
            known = ", ".join(map(repr, list(self.tensor_compressions)[:10])) or "none"
            raise InvalidValueError(
                f"PerTensorCompression has no codec for the tensor with key {info.key!r}; it has"
                f" {len(self.tensor_compressions)}: {known}{', ...' if len(self.tensor_compressions) > 10 else ''}"
            )
        return codec

    def __repr__(self) -> str:
        return f"PerTensorCompression({self.tensor_compressions!r})"


def _codec(name: str, codec: object) -> CompressionBase:
    if not isinstance(codec, CompressionBase):
        raise InvalidTypeError(f"{name} must be a codec, such as Float16Compression(), got {codec!r}")
    return codec
