"""Which codec each averaged tensor gets, and whether the user gave some that peers can find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.compression import CompressionBase, CompressionInfo
from shoal.compression.registry import CODECS
from shoal.errors import InvalidTypeError, InvalidValueError


def check_codec(name: str, codec: Any) -> None:
    """:raises InvalidTypeError: ``codec`` is no codec object
    :raises InvalidValueError: a plain codec that receivers would not find under its id, or with other settings;
      those that an adaptive codec chooses are checked when they are known
    """
    if not isinstance(codec, CompressionBase):
        raise InvalidTypeError(
            f"{name} must be an object of a CompressionBase subclass, got {codec!r}: pass shoal.Float16Compression(), "
            "for example"
        )
    if codec.is_plain:
        CODECS.check(name, codec)


def choose_codecs(
    tensors: Sequence[torch.Tensor], compression: CompressionBase, infos: Sequence[CompressionInfo] | None
) -> list[CompressionBase]:
    """The codec of each tensor, known to the registry by its wire id.

    :param infos: as :func:`check_infos` returns them; None: the number of a tensor is its key
    :raises InvalidValueError: a codec that was not registered, or with other settings
    """
    if infos is None:
        infos = [CompressionInfo.from_tensor(tensor, key=index) for index, tensor in enumerate(tensors)]
    codecs = [compression.choose(info) for info in infos]
    for codec in codecs:
        CODECS.check("compression", codec)
    return codecs


def check_infos(tensors: Sequence[torch.Tensor], tensor_infos: Any) -> tuple[CompressionInfo, ...] | None:
    """
    :param tensor_infos: any iterable of a :class:`~shoal.compression.CompressionInfo` for each tensor, or None
    :raises InvalidTypeError: not an iterable of such objects
    :raises InvalidValueError: another number of items than tensors, or an item of another shape or dtype
    """
    if tensor_infos is None:
        return None
    try:
        infos = tuple(tensor_infos)
    except TypeError:
        raise InvalidTypeError(
            f"tensor_infos must be None or a CompressionInfo for each tensor, got {tensor_infos!r}"
        ) from None
    if len(infos) != len(tensors):
        raise InvalidValueError(
            f"tensor_infos must have {len(tensors)} items, one for each averaged tensor, got {len(infos)}"
        )
    for index, (info, tensor) in enumerate(zip(infos, tensors, strict=True)):
        if not isinstance(info, CompressionInfo):
            raise InvalidTypeError(
                f"tensor_infos[{index}] must be a CompressionInfo, got {info!r}: "
                "pass CompressionInfo.from_tensor(tensor), for example"
            )
        if (tuple(info.shape), info.dtype) != (tuple(tensor.shape), tensor.dtype):
            raise InvalidValueError(
                f"tensor_infos[{index}] must describe {tensor.dtype} {list(tensor.shape)}, which is what "
                f"averaged_tensors[{index}] is, got {info.dtype} {list(info.shape)}"
            )
    return infos
