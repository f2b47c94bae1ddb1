"""What a state consists of and how it is cut: tensors of any usual dtype, each with a codec, in chunks.

A *state* is what ``get_current_state`` returns. Its first tensor is made here: the bytes of the metadata. Each tensor
is cut into *chunks* of ``CHUNK_ELEMENTS`` elements, which are encoded, sent, verified and decoded one by one. Both
sides compute the same cut from the list of :class:`TensorEntry`, so that a receiver knows the exact size of every
chunk, and of the memory that it needs, before either comes.

Floating tensors travel with the codec that the donor chose; all others as they are. No I/O; memory is only counted
here.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from shoal.averaging.formats import PLAIN_ID, Format, PlainFormat, format_of
from shoal.averaging.state.digest import StateDigest
from shoal.averaging.state.messages import MAX_DIMENSIONS, TensorEntry, pack_entries
from shoal.errors import ProtocolViolation
from shoal.utils.dtypes import BOOL, DTYPES, UINT8, DType, dtype_of

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 18
"""Part of the wire protocol: 1 MiB of float32."""
MAX_CHUNK_NBYTES = 1 << 26
"""The largest payload that a connection takes."""
MAX_TENSORS = 1 << 17
MAX_STATE_NBYTES = 1 << 42
MAX_METADATA_NBYTES = 1 << 24
"""Decoding takes much more than that, on threads of the user process."""
MAX_DIMENSIONS_IN_ALL = 1 << 20
"""Of all tensors: a manifest is in memory before anything of the state has come."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Chunk:
    """``count`` elements of one tensor from element ``start`` on; ``nbytes`` when encoded."""

    tensor: int
    start: int
    count: int
    nbytes: int


class Manifest:
    """The tensors of one state and the sequence of their chunks.

    :param formats: one for each entry; by default those that the entries name. A donor gives those of its own codecs,
      whose settings matter for encoding.
    """

    def __init__(self, entries: Sequence[TensorEntry], formats: Sequence[Format] | None = None) -> None:
        """:raises ProtocolViolation: a dtype, shape, codec or size that no state has"""
        if not 1 <= len(entries) <= MAX_TENSORS:
            raise ProtocolViolation(f"a state of {len(entries)} tensors; 1 to {MAX_TENSORS} are allowed")
        self.entries = tuple(entries)
        self.counts = tuple(_count(entry) for entry in self.entries)
        found = [_format(entry) for entry in self.entries]
        self.formats = tuple(found if formats is None else formats)
        self.dtypes = tuple(form.dtype for form in self.formats)
        first = self.entries[0]
        if self.dtypes[0] != UINT8 or len(first.shape) != 1:
            raise ProtocolViolation(f"the metadata of a state are {first.dtype} {list(first.shape)}")
        if self.counts[0] > MAX_METADATA_NBYTES:
            raise ProtocolViolation(
                f"a state with metadata of {self.counts[0]} bytes; at most {MAX_METADATA_NBYTES} are allowed"
            )
        _check_dimensions(sum(len(entry.shape) for entry in self.entries))
        self._raw = tuple(map(_is_raw, self.formats))
        self.tensor_nbytes = tuple(map(encoded_nbytes, self.formats, self.counts))
        self.nbytes = sum(self.tensor_nbytes)
        """Of everything that travels."""
        decoded = [d.itemsize * n for d, n in zip(self.dtypes, self.counts, strict=True)]
        *offsets, end = accumulate(map(aligned, decoded), initial=0)
        self.offsets = tuple(offsets)
        """Where each tensor lies, once it is decoded, in one block of memory."""
        self.decoded_nbytes = max(1, end)
        if max(self.nbytes, self.decoded_nbytes) > MAX_STATE_NBYTES:
            raise ProtocolViolation(
                f"a state of {max(self.nbytes, self.decoded_nbytes)} bytes; at most {MAX_STATE_NBYTES} are allowed"
            )
        *firsts, self.chunk_count = accumulate(
            (-(-count // CHUNK_ELEMENTS) for count in self.counts), initial=0
        )
        self._first_chunks = firsts

    def chunk(self, index: int) -> Chunk:
        """The chunk with this number, 0 to ``chunk_count`` - 1."""
        tensor = bisect_right(self._first_chunks, index) - 1
        start = (index - self._first_chunks[tensor]) * CHUNK_ELEMENTS
        count = min(CHUNK_ELEMENTS, self.counts[tensor] - start)
        return Chunk(tensor, start, count, self.formats[tensor].encoded_nbytes(count))

    def is_raw(self, tensor: int) -> bool:
        """Whether a tensor's encoded chunks are the memory of the tensor itself. Bytes that stand for bools are no
        memory of bools before they are known to be 0 or 1.
        """
        return self._raw[tensor]

    def fingerprint(self) -> bytes:
        """What the digest of a state begins with, so that it covers dtypes and shapes too."""
        return pack_entries(self.entries)

    def new_digest(self, key: bytes) -> StateDigest:
        """A digest under this key that waits for the encoded chunks, in order."""
        return StateDigest(key, self.fingerprint())


class ManifestReader:
    """Takes in the pages of a manifest that another peer sends, and refuses at once what exceeds its offer."""

    def __init__(self, tensors: int, nbytes: int) -> None:
        """:raises ProtocolViolation: no state has so many tensors or bytes"""
        if not 1 <= tensors <= MAX_TENSORS or not 0 <= nbytes <= MAX_STATE_NBYTES:
            raise ProtocolViolation(f"an offer of {tensors} tensors with {nbytes} bytes")
        self._tensors = tensors
        self._nbytes = nbytes
        self._entries: list[TensorEntry] = []
        self._encoded = self._dimensions = 0

    @property
    def is_complete(self) -> bool:
        """All tensors that were offered are known."""
        return len(self._entries) == self._tensors

    def add(self, entries: Sequence[TensorEntry]) -> None:
        """:raises ProtocolViolation: more tensors, bytes or dimensions than were offered or are allowed"""
        if len(self._entries) + len(entries) > self._tensors:
            raise ProtocolViolation(f"more tensors than the {self._tensors} that were offered")
        for entry in entries:
            self._encoded += encoded_nbytes(_format(entry), _count(entry))
            self._dimensions += len(entry.shape)
        _check_dimensions(self._dimensions)
        if self._encoded > self._nbytes:
            raise ProtocolViolation(
                f"offered a state of {self._nbytes} bytes; its tensors take {self._encoded} and more"
            )
        self._entries += entries

    def manifest(self) -> Manifest:
        """:raises ProtocolViolation: what was sent is not what was offered, or no state"""
        manifest = Manifest(self._entries)
        if manifest.nbytes != self._nbytes:
            raise ProtocolViolation(
                f"offered a state of {self._nbytes} bytes; its tensors take {manifest.nbytes}"
            )
        return manifest


class CaptureLayout:
    """Where the tensors of a state lie in the one block of memory in which a donor copies and then encodes them.

    Tensors are copied as they are to ``raw_offsets``, under the lock, and encoded chunk by chunk to
    ``encoded_offsets`` afterwards: what is encoded never reaches what is still to be read.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        raw_sizes = [d.itemsize * n for d, n in zip(manifest.dtypes, manifest.counts, strict=True)]
        *raw, raw_end = accumulate(map(aligned, raw_sizes), initial=0)
        *encoded, encoded_end = accumulate(map(aligned, manifest.tensor_nbytes), initial=0)
        shift = aligned(
            max(map(self._lead, range(len(raw)), raw, encoded, [*raw[1:], 2 * MAX_STATE_NBYTES]), default=0)
        )
        self.raw_offsets = tuple(offset + shift for offset in raw)
        self.encoded_offsets = tuple(encoded)
        self.encoded_nbytes = max(1, encoded_end)
        self.nbytes = max(1, raw_end + shift, encoded_end)

    def chunk_offset(self, index: int) -> tuple[int, int]:
        """Where an encoded chunk begins and ends."""
        chunk = self.manifest.chunk(index)
        whole = chunk.start // CHUNK_ELEMENTS
        full = self.manifest.formats[chunk.tensor].encoded_nbytes(CHUNK_ELEMENTS)
        begin = self.encoded_offsets[chunk.tensor] + whole * full
        return begin, begin + chunk.nbytes

    def _lead(self, tensor: int, raw: int, encoded: int, next_raw: int) -> int:
        """By how many bytes the encoded chunks of a tensor would overrun what is read after them."""
        manifest = self.manifest
        form = manifest.formats[tensor]
        lead = max(0, encoded + manifest.tensor_nbytes[tensor] - next_raw)
        followed = (manifest.counts[tensor] - 1) // CHUNK_ELEMENTS  # chunks that another one follows
        if followed > 0:
            step = form.encoded_nbytes(CHUNK_ELEMENTS)
            raw_step = form.dtype.itemsize * CHUNK_ELEMENTS
            # Both run linearly: the encoded ones are furthest ahead after the first chunk or after the last.
            for done in (1, followed):
                lead = max(lead, encoded + done * step - (raw + done * raw_step))
        return lead


def metadata_entry(nbytes: int) -> TensorEntry:
    """The entry of the metadata's bytes: always the first."""
    return TensorEntry(UINT8.name, (nbytes,), PLAIN_ID)


def tensor_entry(tensor: torch.Tensor, form: Format) -> TensorEntry:
    """The entry of a tensor whose dtype is in :data:`~shoal.utils.dtypes.DTYPES`."""
    return TensorEntry(dtype_of(tensor).name, tuple(tensor.shape), form.wire_id)


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up so that what follows is aligned for any dtype."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _dtype(entry: TensorEntry) -> DType:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise ProtocolViolation(f"unknown dtype {entry.dtype[:32]!r} of a tensor")
    return dtype


def _count(entry: TensorEntry) -> int:
    # Torch multiplies the sizes other than 0, for the strides, even of an empty tensor.
    if len(entry.shape) > MAX_DIMENSIONS or min(entry.shape, default=0) < 0:
        raise ProtocolViolation("impossible shape of a tensor")
    if math.prod(max(1, size) for size in entry.shape) >= 1 << 63:
        raise ProtocolViolation("impossible shape of a tensor")
    return math.prod(entry.shape)


def _format(entry: TensorEntry) -> Format:
    dtype = _dtype(entry)
    if entry.codec == PLAIN_ID:
        return PlainFormat(dtype)
    if not dtype.is_floating:
        raise ProtocolViolation(f"codec {entry.codec} for a tensor of {entry.dtype}")
    return format_of(dtype, entry.codec)


def encoded_nbytes(form: Format, count: int) -> int:
    """Size in bytes of all encoded chunks of a tensor.

    :raises ProtocolViolation: the codec, which may be a user's, has no size for it, or none that a chunk may have: the
      donor chose dtype and codec
    """
    whole, rest = divmod(count, CHUNK_ELEMENTS)
    return (whole * _chunk_nbytes(form, CHUNK_ELEMENTS) if whole else 0) + (
        _chunk_nbytes(form, rest) if rest else 0
    )


def _chunk_nbytes(form: Format, count: int) -> int:
    try:
        nbytes = operator.index(form.encoded_nbytes(count))
    except Exception as e:  # codecs of users: may be anything
        raise ProtocolViolation(f"{form} has no size: {type(e).__name__}: {e}") from e
    if not 0 <= nbytes <= MAX_CHUNK_NBYTES:
        raise ProtocolViolation(f"{form} makes chunks of {nbytes} bytes")
    return nbytes


def _is_raw(form: Format) -> bool:
    try:
        return form.dtype != BOOL and form.is_raw
    except Exception as e:  # codecs of users: may be anything
        raise ProtocolViolation(
            f"{form} cannot tell whether elements travel as they are: {type(e).__name__}: {e}"
        ) from e


def _check_dimensions(dimensions: int) -> None:
    if dimensions > MAX_DIMENSIONS_IN_ALL:
        raise ProtocolViolation(
            f"tensors with {dimensions} dimensions in all; at most {MAX_DIMENSIONS_IN_ALL} are allowed"
        )
