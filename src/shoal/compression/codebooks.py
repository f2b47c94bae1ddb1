"""Levels for 8-bit codes, and tables that give each value its code. Pure; CPU tensors only.

Looking up the nearest of 256 levels takes 40 ns an element by bisection. Here a value is first rounded to half
precision, of which there are 65,536, and a table says which code each of those has: 1 ns. The rounding moves the
border between two codes by 2^-12 of its value at most, which is little beside the distance of two levels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from shoal.compression.base import tensor_array

Floats: TypeAlias = npt.NDArray[np.floating]

LEVELS = 256
HALVES = 1 << 16
PIECE = 1 << 16
"""Elements that are worked on at a time, so that all operations after the first find them in the cache."""

_FLOAT32 = np.dtype(np.float32)
_FINITE = 0x7C00  # half-precision numbers of one sign that are finite, zero included
_SAMPLE = 1 << 15
"""128 values for each level."""
_CELLS = 1 << 10
"""Where a fit begins: cells of equal mass, four for each level."""
_UNIFORM_SHARE = 1 / 16
"""Of the levels, those that are spread evenly: they bound the error of values that the sample may have missed."""
_STEPS = 4
"""Corrections of a fit, at most."""
_NEGLIGIBLE = 0.01  # of the mean squared error


@functools.cache
def _finite_halves() -> Floats:
    """All finite numbers of half precision in ascending order, -0 before +0."""
    positive = np.arange(_FINITE, dtype=np.uint16).view(np.float16).astype(np.float64)
    return np.concatenate([-positive[::-1], positive])


def code_table(borders: Floats) -> torch.Tensor:
    """The code of each number of half precision by its 16 bits: how many of the (at most 255) ascending borders are
    below it.

    uint8, 65,536 elements; what is not finite gets code 0.
    """
    ends = np.searchsorted(_finite_halves(), borders, side="right")
    counts = np.diff(ends, prepend=0, append=2 * _FINITE)
    ascending = np.repeat(np.arange(len(borders) + 1, dtype=np.uint8), counts)
    table = np.zeros(HALVES, dtype=np.uint8)
    table[:_FINITE] = ascending[_FINITE:]
    table[HALVES // 2 : HALVES // 2 + _FINITE] = ascending[:_FINITE][::-1]
    return torch.from_numpy(table)


def half_bits(values: torch.Tensor) -> torch.Tensor:
    """The 16 bits of each float32 value rounded to half precision, as int32."""
    return values.to(torch.float16).view(torch.uint16).to(torch.int32)


@dataclass(frozen=True)
class Codebook:
    """Ascending levels (float32, at most 256) for one set of values, and how to find a value's code."""

    levels: npt.NDArray[np.float32]
    borders: npt.NDArray[np.float32]
    """Of neighbouring levels; a value has as many below it as its code says."""

    centre: float
    scale: float
    """Values minus centre, times scale, go to the table; a scale of 0 means that none is fine enough."""

    def encode(self, values: torch.Tensor, codes: torch.Tensor) -> None:
        """Write the codes of float32 values (to uint8)."""
        if not self.scale:
            codes.copy_(torch.bucketize(values, torch.from_numpy(self.borders), out_int32=True))
            return
        table = code_table((self.borders.astype(np.float64) - self.centre) * self.scale)
        for start in range(0, len(values), PIECE):
            scaled = values[start : start + PIECE].mul(self.scale)
            if self.centre:
                scaled.sub_(self.centre * self.scale)
            torch.index_select(table, 0, half_bits(scaled), out=codes[start : start + PIECE])


def fit_codebook(values: torch.Tensor) -> Codebook:
    """Levels that suit finite float32 values, one-dimensional and at least one.

    Up to 256 values are their own levels. Else the range is cut into 256 buckets, each with the mean of its values as
    its level, so that the squared errors of all buckets are about the same, which makes their sum the least (Panter
    and Dite 1951, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels"). A sixteenth
    of the buckets is spread evenly over the range all the same, so that none is wider than a sixteenth of it.
    Large inputs are judged by 32,768 of their values and the two extremes.
    """
    if len(values) <= LEVELS:
        own = np.sort(tensor_array(values, _FLOAT32))
        return Codebook(own, own[:-1], 0.0, 0.0)
    sample = np.sort(_sample(values))
    first, last = float(sample[0]), float(sample[-1])
    if first == last:
        same = np.full(LEVELS, sample[0])
        return Codebook(same, same[1:], first, 1.0)
    relative = (sample.astype(np.float64) - first) / (last - first)
    levels = np.clip(_fit_levels(relative) * (last - first) + first, first, last).astype(np.float32)
    borders = (levels[:-1] / 2 + levels[1:] / 2).astype(np.float32)
    mass = np.diff(np.searchsorted(sample, borders, side="right"), prepend=0, append=len(sample))
    for centre in (0.0, float(sample[len(sample) // 2])):
        scale = _scale_to_halves(first, last, centre)
        if _is_fine_enough(levels.astype(np.float64), borders, mass, centre, scale):
            return Codebook(levels, borders, centre, scale)
    return Codebook(levels, borders, 0.0, 0.0)


def _sample(values: torch.Tensor) -> npt.NDArray[np.float32]:
    if len(values) <= _SAMPLE:
        return tensor_array(values, _FLOAT32)
    low, high = torch.aminmax(values)
    chosen = values.index_select(0, _places(len(values)))
    return torch.cat([chosen, low.view(1), high.view(1)]).numpy()


@functools.lru_cache(maxsize=8)
def _places(count: int) -> torch.Tensor:
    """Where to sample: multiples of the golden ratio, which fall in step with no row length of any matrix."""
    # Odd, so that it has no factor in common with the sizes that are powers of two: no place is taken twice there.
    stride = int(count * 0.6180339887498949) | 1
    return torch.arange(_SAMPLE) * stride % count


def _fit_levels(sample: Floats) -> Floats:
    """256 ascending levels for an ascending sample from 0 to 1.

    Begins with cells of equal mass. An even density in each would be right after one step. Further ones find the gaps
    inside cells, and give the levels there to others; what gains less than half by that is the sample's chance.
    """
    positions = np.linspace(0, len(sample) - 1, min(len(sample), _CELLS + 1)).round().astype(np.intp)
    edges = sample[positions]
    errors = _fill(sample, edges).errors
    best: _Fit | None = None
    for _ in range(_STEPS):
        # A cell of error m w^2 / 12 (mass m, width w) is worth m^(1/3) w^(2/3) levels. That is
        # Panter and Dite's rule: levels are as dense as the cube root of the values' density.
        worth = np.concatenate([[0.0], np.cumsum(np.cbrt(errors))])
        if worth[-1] == 0:
            if best is not None:
                break
            worth = np.arange(len(edges))  # as many values as cells, or fewer, each a cell of its own
        share = (1 - _UNIFORM_SHARE) * worth / worth[-1] + _UNIFORM_SHARE * edges
        share[-1] = 1.0
        edges = np.interp(np.arange(LEVELS + 1) / LEVELS, share, edges)
        fit = _fill(sample, edges)
        errors = fit.errors
        if best is not None and errors.sum() > best.errors.sum() / 2:
            break
        best = fit
    assert best is not None
    return best.levels


@dataclass(frozen=True)
class _Fit:
    """For each bucket: the mean of the sample in it (its middle, if it is empty), and its sum of squared errors.

    A level at the mean of its bucket has the least squared error there (Lloyd 1982, Max 1960).
    """

    levels: Floats
    errors: Floats


def _fill(sample: Floats, edges: Floats) -> _Fit:
    bounds = np.concatenate([[0], np.searchsorted(sample, edges[1:-1], side="right"), [len(sample)]])
    counts = np.diff(bounds)
    sums = np.diff(np.concatenate([[0.0], np.cumsum(sample)])[bounds])
    middles = (edges[:-1] + edges[1:]) / 2
    means = np.where(counts > 0, sums / np.maximum(counts, 1), middles)
    levels = np.clip(means, edges[:-1], edges[1:])
    deviations = sample - np.repeat(levels, counts)
    squares = np.concatenate([[0.0], np.cumsum(deviations * deviations)])
    return _Fit(levels, np.diff(squares[bounds]))


def _scale_to_halves(first: float, last: float, centre: float) -> float:
    """The power of two that takes deviations from the centre as far as half precision goes."""
    _, exponent = np.frexp(max(last - centre, centre - first))
    return float(2.0 ** min(15 - int(exponent), 127))


def _is_fine_enough(
    levels: Floats, borders: Floats, mass: npt.NDArray[np.integer], centre: float, scale: float
) -> bool:
    """Whether rounding the borders to half precision adds less than 1 % to the mean squared error.

    With levels a gap g apart, mass m around their border and halves r apart there, the error is the sum of m g^2 / 12
    and the rounding adds m r^2 / 12.
    """
    at_border = (borders.astype(np.float64) - centre) * scale
    spacing = (
        np.spacing(np.abs(at_border).clip(2.0**-14, 2.0**15).astype(np.float16)).astype(np.float64) / scale
    )
    weights = mass[:-1] + mass[1:]
    return bool((weights * spacing**2).sum() <= _NEGLIGIBLE * (weights * np.diff(levels) ** 2).sum())
