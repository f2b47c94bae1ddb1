"""Which codec a wire id means. The set is closed: an id that nobody registered in this process is a protocol
violation.

Ids 0 to 63 belong to Shoal, 64 to 255 to users, who must agree on them, and on their codecs' settings, among their
peers. Codecs on the wire have no parameters: an id says all that a receiver needs to know. So each id has one object
in a process, with one set of settings.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shoal.compression.base import CompressionBase, CompressionInfo, NoCompression, SerializedTensor
from shoal.compression.floating import BFloat16Compression, Float16Compression, ScaledFloat16Compression
from shoal.compression.quantization import (
    BlockwiseQuantization,
    Quantile8BitQuantization,
    Uniform8BitQuantization,
)
from shoal.errors import InvalidTypeError, InvalidValueError, ProtocolViolation

USER_IDS = range(64, 256)


class CodecRegistry:
    """Codecs by wire id; each id means one class for as long as the registry lives.

    A class that was defined again under the same name, as happens in notebooks, takes the place of the former one.
    """

    def __init__(self, codecs: Iterable[CompressionBase] = ()) -> None:
        self._codecs: dict[int, CompressionBase] = {codec.compression_type: codec for codec in codecs}

    def register(self, codec: CompressionBase) -> None:
        """Add a user's codec; registering an equal one again is harmless.

        :raises InvalidTypeError: no codec object
        :raises InvalidValueError: a bad or taken id, or its class is registered with other settings
        """
        if not isinstance(codec, CompressionBase):
            raise InvalidTypeError(f"codec must be an object of a CompressionBase subclass, got {codec!r}")
        wire_id = getattr(codec, "compression_type", None)
        known = self._codecs.get(wire_id) if isinstance(wire_id, int) else None
        if known is not None and type(known) is type(codec):
            _check_equal("codec", codec, known)
            return
        if known is not None and wire_id in USER_IDS and _name(known) == _name(codec):
            known = None
        name = f"{type(codec).__name__}.compression_type"
        if not isinstance(wire_id, int) or isinstance(wire_id, bool) or wire_id not in USER_IDS:
            raise InvalidValueError(
                f"{name} must be {USER_IDS[0]} to {USER_IDS[-1]}, the numbers for codecs of users, got {wire_id!r}"
            )
        if known is not None:
            raise InvalidValueError(
                f"{name} must be a number that no other codec has, got {wire_id}, that of {type(known).__name__}"
            )
        self._codecs[wire_id] = codec

    def adopt(self, codec: CompressionBase) -> None:
        """Add what another registry holds, of which this one follows the registrations: a class has one object there.
        The one that was adopted first stays: in use by now, it may differ from its original.

        :raises InvalidValueError: as :meth:`register`
        """
        if type(self._codecs.get(codec.compression_type)) is not type(codec):
            self.register(codec)

    def codec(self, wire_id: int) -> CompressionBase:
        """The codec of an id that came from another peer; :class:`ProtocolViolation` if it is unknown."""
        codec = self._codecs.get(wire_id)
        if codec is None:
            raise ProtocolViolation(f"unknown codec {wire_id}; known here: {sorted(self._codecs)}")
        return codec

    def check(self, name: str, codec: CompressionBase) -> None:
        """A plain codec, given as parameter ``name``, is what receivers find under its id.

        :raises InvalidValueError: it was not registered, or with other settings
        """
        known = self._codecs.get(getattr(codec, "compression_type", -1))
        kind = type(codec).__name__
        if known is None or type(known) is not type(codec):
            raise InvalidValueError(
                f"{name} must be a registered codec, got {codec!r}; "
                f"call shoal.compression.register_codec({kind}()) first, in every peer"
            )
        _check_equal(name, codec, known)

    def user_codecs(self) -> tuple[CompressionBase, ...]:
        """What users registered, in the order of the ids: what another process needs besides Shoal's own."""
        return tuple(self._codecs[wire_id] for wire_id in sorted(self._codecs) if wire_id in USER_IDS)

    def __contains__(self, wire_id: object) -> bool:
        return wire_id in self._codecs


def _check_equal(name: str, codec: CompressionBase, known: CompressionBase) -> None:
    """:raises InvalidValueError: the codec and the one of its class that is registered are not equal, or do not say"""
    kind = type(codec).__name__
    try:
        is_equal = bool(codec == known)
    except Exception as e:  # codecs of users, with settings of any kind: their == may raise anything
        raise InvalidValueError(
            f"{name} must be a codec that can be compared, got {codec!r}, whose == raises {type(e).__name__}: {e}; "
            f"define __eq__ and __hash__ in {kind}"
        ) from e
    if not is_equal:
        raise InvalidValueError(
            f"{name} must be equal to {known!r}, since a class has one set of settings in a process, got {codec!r}; "
            f"pass shoal.get_codec({codec.compression_type}), the registered one. If both do the same, "
            f"define __eq__ and __hash__ in {kind}"
        )


def _name(codec: CompressionBase) -> tuple[str, str]:
    return type(codec).__module__, type(codec).__qualname__


CODECS = CodecRegistry(
    [
        NoCompression(),
        Float16Compression(),
        BFloat16Compression(),
        ScaledFloat16Compression(),
        Uniform8BitQuantization(),
        Quantile8BitQuantization(),
        BlockwiseQuantization(),
    ]
)
"""The registry of this process."""


def register_codec(codec: CompressionBase) -> None:
    """Make a codec of the user's own known in this process; see :meth:`CodecRegistry.register`."""
    CODECS.register(codec)


def user_codecs() -> tuple[CompressionBase, ...]:
    """The codecs that users registered in this process, in the order of their ids."""
    return CODECS.user_codecs()


def get_codec(wire_id: int) -> CompressionBase:
    """The codec with this wire id; :class:`ProtocolViolation` if there is none."""
    return CODECS.codec(wire_id)


def serialize_tensor(
    tensor: torch.Tensor,
    codec: CompressionBase | None = None,
    info: CompressionInfo | None = None,
    allow_inplace: bool = False,
) -> SerializedTensor:
    """Encode a whole tensor, by default without compression."""
    return (codec if codec is not None else NoCompression()).compress(tensor, info, allow_inplace)


def deserialize_tensor(serialized: SerializedTensor, *, max_elements: int | None = None) -> torch.Tensor:
    """Restore a tensor that another peer encoded with any registered codec; raises
    :class:`ProtocolViolation`.
    """
    return get_codec(serialized.compression_type).extract(serialized, max_elements=max_elements)
