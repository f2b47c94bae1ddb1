"""Codecs that send each element as one byte. May touch CPU tensors only.

An encoded part is what the chunks need to be decoded (their *side information*), one after another, and then one
code for each element. All work in float32: float64 is rounded first, and float16 and bfloat16 are rounded once more
when they are decoded. Infinities are clipped to the largest finite value of the tensor's dtype. NaN raises
:class:`~shoal.errors.InvalidValueError`, for no code means NaN. What was decoded is always finite, whatever a peer
sent.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from shoal.compression.base import CompressionBase, decode_raw
from shoal.compression.codebooks import HALVES, LEVELS, PIECE, code_table, fit_codebook, half_bits
from shoal.compression.finite import FLOAT32_MAX, finite_float32
from shoal.errors import ProtocolViolation

Side: TypeAlias = npt.NDArray[np.uint8]


class Quantization(CompressionBase):
    """What the 8-bit codecs have in common: the layout of an encoded part, and chunks."""

    chunk: ClassVar[int]
    """Elements that are encoded at a time, each with side information of its own."""

    @abstractmethod
    def side_nbytes(self, count: int) -> int:
        """Size in bytes of the side information of one chunk of ``count`` elements; a multiple of 4."""

    @abstractmethod
    def _encode_chunk(self, values: torch.Tensor, codes: torch.Tensor, side: Side) -> None:
        """Write codes (uint8) and side information of finite float32 values, at least one."""

    @abstractmethod
    def _decode_chunk(self, codes: torch.Tensor, side: Side, out: torch.Tensor) -> None:
        """The opposite, into ``out``, of any floating dtype; :class:`ProtocolViolation` if ``side`` is
        impossible.
        """

    def lossless(self, dtype: torch.dtype) -> bool:
        return False

    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> int:
        chunks, rest = divmod(count, self.chunk)
        return count + chunks * self.side_nbytes(self.chunk) + (self.side_nbytes(rest) if rest else 0)

    def encode(self, part: torch.Tensor) -> memoryview:
        count = len(part)
        buffer = bytearray(self.encoded_nbytes(part.dtype, count))
        if count:
            side = np.frombuffer(buffer, dtype=np.uint8, count=len(buffer) - count)
            codes = torch.frombuffer(buffer, dtype=torch.uint8, offset=len(side))
            for start, chunk_side in self._chunks(count, side):
                values = finite_float32(part[start : start + self.chunk], self)
                self._encode_chunk(values, codes[start : start + self.chunk], chunk_side)
        return memoryview(buffer)

    def _decode(
        self, data: memoryview, dtype: torch.dtype, count: int, out: torch.Tensor | None
    ) -> torch.Tensor:
        decoded = torch.empty(count, dtype=dtype) if out is None else out
        if count:
            side = np.frombuffer(data, dtype=np.uint8, count=len(data) - count)
            codes = decode_raw(data[len(side) :], torch.uint8, count, None)
            for start, chunk_side in self._chunks(count, side):
                stop = start + self.chunk
                self._decode_chunk(codes[start:stop], chunk_side, decoded[start:stop])
        return decoded

    def _chunks(self, count: int, side: Side) -> list[tuple[int, Side]]:
        """Where each chunk starts, and its side information."""
        whole = self.side_nbytes(self.chunk)
        return [
            (start, side[index * whole : (index + 1) * whole])
            for index, start in enumerate(range(0, count, self.chunk))
        ]

    def _impossible(self, what: str) -> ProtocolViolation:
        return ProtocolViolation(f"{self!r}: {what}")


# Uniform

_ROW = 128
"""Elements of which only the extremes are looked at in the search for outliers."""
_LARGEST_INDEX = 1 << 24
"""Whole numbers up to here are exact in float32, in which level numbers are added."""
_MOST_OUTLIERS = 63
"""With the step and the first level, 512 bytes for a chunk."""
_ELEMENTS_PER_OUTLIER = 4096
"""An outlier takes 8 bytes, so that outliers add a 512th at most."""


class Uniform8BitQuantization(Quantization):
    """256 equally spaced levels for each chunk of 262,144 elements: 1 byte an element and 512 for each chunk.

    The levels reach from the lowest to the highest value of the chunk, but for its *outliers*: the 63 values (one for
    4,096 elements of a smaller chunk, rounded down) that are furthest from the others are sent as float32, and do
    not stretch the levels; LLM.int8() sets outliers apart in a similar way (Dettmers et al. 2022, arXiv 2208.07339).
    So the error of a value x is at most range / 508 + 2^-16 range + 2^-22 |x|, where *range*
    is that of the others, and 0 for outliers. 0 comes back as 0 if there are values on both sides of it or it is
    itself one; constant chunks come back exactly. A single huge value costs the others nothing; many do.

    Size: count + 8 + 8 * min(63, count // 4096) bytes for each chunk of ``count`` elements.
    """

    compression_type = 4
    chunk = 4 * PIECE

    def side_nbytes(self, count: int) -> int:
        return 8 + 8 * _outlier_slots(count)

    def _encode_chunk(self, values: torch.Tensor, codes: torch.Tensor, side: Side) -> None:
        outliers, low, high = _split_outliers(values, _outlier_slots(len(values)))
        step, first = _grid(low, high)
        side[:8].view("<f4")[:] = (step, first)
        indices, exact = np.split(side[8:].view("<u4"), 2)
        indices[:] = outliers.numpy()
        exact.view("<f4")[:] = values[outliers].numpy()
        scratch = torch.empty(min(len(values), PIECE))
        for start in range(0, len(values), PIECE):
            piece = values[start : start + PIECE]
            levels = torch.div(piece, step, out=scratch[: len(piece)])
            levels.sub_(first).round_().clamp_(0, LEVELS - 1)
            np.copyto(codes[start : start + PIECE].numpy(), levels.numpy(), casting="unsafe")

    def _decode_chunk(self, codes: torch.Tensor, side: Side, out: torch.Tensor) -> None:
        step, first = side[:8].view("<f4").tolist()
        indices, exact = np.split(side[8:].view("<u4"), 2)
        outliers = exact.view("<f4")
        # NaN fails each of these comparisons, too.
        if not (0 < step < math.inf and abs(first) <= _LARGEST_INDEX):
            raise self._impossible("the levels of a chunk are impossible")
        if not ((indices < len(codes)).all() and np.isfinite(outliers).all()):
            raise self._impossible("an outlier of a chunk is impossible")
        limit = min(torch.finfo(out.dtype).max, FLOAT32_MAX)
        scratch = torch.empty(min(len(codes), PIECE))
        for start in range(0, len(codes), PIECE):
            piece = out[start : start + PIECE]
            values = piece if piece.dtype == torch.float32 else scratch[: len(piece)]
            values.copy_(codes[start : start + PIECE]).add_(first).mul_(step)
            if (abs(first) + LEVELS) * step > limit:
                values.clamp_(-limit, limit)
            if values is not piece:
                piece.copy_(values)
        if len(indices):
            exactly = torch.from_numpy(outliers.astype(np.float32)).clamp_(-limit, limit)
            out[torch.from_numpy(indices.astype(np.int64))] = exactly.to(out.dtype)


def _outlier_slots(count: int) -> int:
    return min(_MOST_OUTLIERS, count // _ELEMENTS_PER_OUTLIER)


def _split_outliers(values: torch.Tensor, slots: int) -> tuple[torch.Tensor, float, float]:
    """Where the ``slots`` values are that lie furthest out, and the lowest and highest of the others.

    Only rows with an extreme among the ``slots`` furthest can hold one: nothing else is looked at twice.
    """
    if slots == 0:
        lowest, highest = torch.aminmax(values)
        return torch.empty(0, dtype=torch.int64), lowest.item(), highest.item()
    whole = len(values) // _ROW * _ROW
    tops, bottoms = (extreme(values[:whole].view(-1, _ROW), 1) for extreme in (torch.amax, torch.amin))
    if whole < len(values):
        tops = torch.cat([tops, values[whole:].amax().view(1)])
        bottoms = torch.cat([bottoms, values[whole:].amin().view(1)])
    # A median, since a few rows with outliers do not move it. Halves, here and below: sums and differences of huge
    # values would overflow.
    centre = (tops / 2 + bottoms / 2).median()
    reach = torch.maximum(tops / 2 - centre / 2, centre / 2 - bottoms / 2)
    rows = reach.topk(slots).indices
    places = torch.add((rows * _ROW).unsqueeze(1), torch.arange(_ROW)).view(-1)
    if whole < len(values):
        places = places[places < len(values)]
    candidates = values.index_select(0, places)
    picked = (candidates / 2).sub_(centre / 2).abs_().topk(slots).indices
    candidates.index_fill_(0, picked, centre)
    # The centre stands in for what was picked, and for rows that have been searched: it is no extreme.
    low = min(bottoms.index_fill_(0, rows, centre).min().item(), candidates.min().item())
    high = max(tops.index_fill_(0, rows, centre).max().item(), candidates.max().item())
    return places[picked], low, high


def _grid(low: float, high: float) -> tuple[float, int]:
    """``step`` and ``first`` of levels (first + code) * step that cover two float32 numbers.

    The step has 16 significant bits at most, so that (first + code) * step is exact for most levels, and 0 is a level
    if it is between the two. It is no finer than float32 is at the larger one, so that ``first`` fits in 24 bits.
    """
    magnitude = max(abs(low), abs(high))
    finest = math.ldexp(1.0, max(math.frexp(magnitude)[1] - 24, -149))
    # One gap fewer than 256 levels have: rounding ``first`` down may cost one.
    step = max((high - low) / (LEVELS - 2), finest)
    quantum = math.ldexp(1.0, max(math.frexp(step)[1] - 16, -149))
    step = math.ceil(step / quantum) * quantum
    return step, math.floor(low / step)


# Quantiles


class Quantile8BitQuantization(Quantization):
    """256 levels that follow the distribution of the values, for each chunk of 524,288 elements: 1 byte an element
    and 1,024 for each chunk (4 for each element of a chunk of 256 or fewer, which come back exactly). Parts and tensors
    have chunks of their own, so that small ones cost more: 1.33 bytes an element where 4 KiB are allowed for a part, 5
    where it is 1 KiB.

    Best where values are spread unevenly and magnitudes alike matter. The levels are those of
    :func:`shoal.compression.codebooks.fit_codebook`: dense where values are many, though not in proportion as pure
    quantiles are, which would lose four times as much on a normal distribution. The error of any value x is at most
    1/16 of the chunk's range + 2^-22 |x|, and much less where values are many: 0.007 standard deviations (RMS) of a
    normal distribution. Constant chunks come back exactly.
    """

    compression_type = 5
    chunk = 1 << 19

    def side_nbytes(self, count: int) -> int:
        return 4 * min(count, LEVELS)

    def _encode_chunk(self, values: torch.Tensor, codes: torch.Tensor, side: Side) -> None:
        codebook = fit_codebook(values)
        side.view("<f4")[:] = codebook.levels
        codebook.encode(values, codes)

    def _decode_chunk(self, codes: torch.Tensor, side: Side, out: torch.Tensor) -> None:
        levels = np.zeros(LEVELS, dtype=np.float32)
        levels[: len(side) // 4] = side.view("<f4")
        if not np.isfinite(levels).all():
            raise self._impossible("a level of a chunk is not finite")
        limit = min(torch.finfo(out.dtype).max, FLOAT32_MAX)
        table = torch.from_numpy(levels).clamp_(-limit, limit).to(out.dtype)
        for start in range(0, len(codes), PIECE):
            indices = codes[start : start + PIECE].to(torch.int32)
            torch.index_select(table, 0, indices, out=out[start : start + PIECE])


# Blocks

_BLOCK = 4096
"""As in bitsandbytes, the library of the paper below. A huge value costs its neighbours alone."""
_PEAKED = 6.0
"""Largest magnitude over root mean square. 4,096 normal values reach 3.7 on average, and hardly ever 6."""
_STEPS = 127
"""Levels of each sign."""
_TINY = 2.0**-50
"""A norm below that has lost squares that matter."""
_ROWS = PIECE // _BLOCK


class BlockwiseQuantization(Quantization):
    """255 levels between minus and plus the largest magnitude of each block of 4,096 elements: 1 byte an element and 4
    for each block.

    Best where magnitudes differ from place to place. Each block is scaled by its largest magnitude (Dettmers et al.
    2021, arXiv 2110.02861), and small values get finer levels: +-(u + u^2) / 2 for u = k / 127, k = 0 to 127, or +-u^2
    in *peaked* blocks, where the largest magnitude is more than 6 times the root mean square. For all usual
    distributions that loses less than the levels of that paper, which spread over seven decades: 0.0073 standard
    deviations (RMS) for a normal one. The error is at most 1/160 of the block's largest magnitude, in
    peaked blocks 1/120. Zeros come back exactly; the largest magnitude, and so constant blocks, to 2^-22 of it. All of
    that is to within 2^-134, which float32 cannot do better, and which shows below 1e-34.
    """

    compression_type = 6
    chunk = 16 * PIECE

    def side_nbytes(self, count: int) -> int:
        return 4 * -(-count // _BLOCK)

    def _encode_chunk(self, values: torch.Tensor, codes: torch.Tensor, side: Side) -> None:
        scales = side.view("<f4")
        whole = len(values) // _BLOCK * _BLOCK
        if whole:
            _encode_blocks(
                values[:whole].view(-1, _BLOCK), codes[:whole].view(-1, _BLOCK), scales[: whole // _BLOCK]
            )
        if whole < len(values):
            _encode_blocks(values[whole:].view(1, -1), codes[whole:].view(1, -1), scales[whole // _BLOCK :])

    def _decode_chunk(self, codes: torch.Tensor, side: Side, out: torch.Tensor) -> None:
        scales = side.view("<f4")
        if not np.isfinite(scales).all():
            raise self._impossible("the scale of a block is not finite")
        whole = len(codes) // _BLOCK * _BLOCK
        if whole:
            _decode_blocks(
                codes[:whole].view(-1, _BLOCK), scales[: whole // _BLOCK], out[:whole].view(-1, _BLOCK)
            )
        if whole < len(codes):
            _decode_blocks(codes[whole:].view(1, -1), scales[whole // _BLOCK :], out[whole:].view(1, -1))


def _encode_blocks(blocks: torch.Tensor, codes: torch.Tensor, scales: npt.NDArray[np.float32]) -> None:
    """Blocks are rows of one length; a negative scale says that its block is peaked."""
    largest = torch.maximum(blocks.amax(1), -blocks.amin(1))
    norms = _norms(blocks, largest)
    peaked = largest > norms * (_PEAKED / math.sqrt(blocks.shape[1]))
    scales[:] = torch.where(peaked, -largest, largest).numpy()
    divisors = torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    offsets = (peaked * HALVES).to(torch.int32).unsqueeze(1)
    any_peaked = bool(peaked.any())
    for first in range(0, len(blocks), _ROWS):
        rows = slice(first, first + _ROWS)
        indices = half_bits(torch.div(blocks[rows], divisors[rows]))
        if any_peaked:
            indices.add_(offsets[rows])
        torch.index_select(_codes_of_halves(), 0, indices.view(-1), out=codes[rows].view(-1))


def _norms(blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Of each row, in float64 where the squares of small or huge values are beyond float32."""
    norms: torch.Tensor = torch.linalg.vector_norm(blocks, dim=1).double()
    rows = ((largest > 0) & ~((norms > _TINY) & (norms < math.inf))).nonzero().squeeze(1)
    if len(rows):
        norms[rows] = torch.linalg.vector_norm(blocks[rows], dim=1, dtype=torch.float64)
    return norms


def _decode_blocks(codes: torch.Tensor, scales: npt.NDArray[np.float32], out: torch.Tensor) -> None:
    """By arithmetic, which is faster than a table: k (|k| + 127), in peaked blocks k |k|, is an integer of 16 bits;
    all that is left to do is to scale it.
    """
    peaked = scales < 0
    largest = np.abs(scales).astype(np.float64)
    units = largest / np.where(peaked, _STEPS**2, 2 * _STEPS**2)
    unit = torch.from_numpy(units.astype(np.float32)).unsqueeze(1)
    shift = torch.from_numpy(np.where(peaked, 0, _STEPS).astype(np.int16)).unsqueeze(1)
    limit = min(torch.finfo(out.dtype).max, FLOAT32_MAX)
    # Rounding may go beyond the largest magnitude, and -128, which no encoder makes, is beyond it.
    may_overflow = bool(largest.max() > 0.9 * limit)
    rows = 2 * _ROWS
    k, levels = torch.empty(2, min(rows, len(codes)), codes.shape[1], dtype=torch.int16)
    wide = None if out.dtype == torch.float32 else torch.empty(k.shape)
    pieces = (torch.split(tensor, rows) for tensor in (codes.view(torch.int8), out, unit, shift))
    for piece, result, scale, offset in zip(*pieces, strict=True):
        size = len(piece)
        k[:size].copy_(piece)
        torch.abs(k[:size], out=levels[:size]).add_(offset).mul_(k[:size])
        values = result if wide is None else wide[:size]
        values.copy_(levels[:size]).mul_(scale)
        if may_overflow:
            values.clamp_(-limit, limit)
        if values is not result:
            result.copy_(values)


@functools.cache
def _codes_of_halves() -> torch.Tensor:
    """The code, k as a signed byte, of each number of half precision: for flat blocks, then for peaked ones."""
    steps = np.arange(-_STEPS, _STEPS + 1) / _STEPS
    flat, peaked = steps * (np.abs(steps) + 1) / 2, steps * np.abs(steps)
    return torch.cat([code_table((levels[:-1] + levels[1:]) / 2) - _STEPS for levels in (flat, peaked)])
