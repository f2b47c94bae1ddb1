"""The arithmetic of one part: weighted averages, and differences for lossy codecs. Pure.

Precision. For float32, |error| <= 1e-6 x the mean of the |inputs|, for up to any number of senders and any
weights. With equal weights and at most 16 senders the parts are summed in float32, with one rounding for each
sender (n x 2^-24 <= 0.96e-6, relative to the mean of the |inputs|, the division included). That bound does
not hold for unequal weights, where one input may count for nearly all of the result and be 16 times the mean;
there the sums are in float64, and the only rounding that matters is the last one. float16 and bfloat16 are
summed in float32, float64 in itself. Sums are taken in the order of the members, never in that of arrival,
and each operation rounds once (no fused multiply-add), so that the same parts give the same bits on every
machine. Where such a sum exceeds the range of its type, :func:`reduce_wide` does it again in float64, of inputs that
are scaled first: an average of finite values is always finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shoal.averaging.elements import Elements, empty, is_finite, is_native, largest, narrow, widen
from shoal.averaging.formats import Format
from shoal.errors import AllreduceException, InvalidValueError, UsageError
from shoal.utils.dtypes import FLOAT32, FLOAT64, DType

CHUNK_NBYTES = 1 << 18
"""Bytes of a sum that are worked on at a time, so that all operations after the first find them in the cache."""

MAX_FLOAT32_SENDERS = 16


@np.errstate(all="ignore")
def reduce_part(parts: Sequence[Elements], weights: Sequence[float], out: Elements, dtype: DType) -> Elements:
    """The weighted average of the senders' versions of one part, into ``out``; returns ``out``.

    Both sequences are in the order of the members, without those that did not arrive: the weights are divided
    by their own sum. A weight of 0 leaves its part out.

    All are of one dtype and count; ``out`` may be one of the parts. Inputs
    are finite; the result is too unless the sum of the inputs, each times its weight over the largest weight,
    exceeds the range of the type that sums are in: then see :func:`reduce_wide`.
    """
    _check_weights(weights)
    if len(parts) != len(weights):
        raise InvalidValueError(f"weights must be one for each of the {len(parts)} parts, got {len(weights)}")
    terms = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    heaviest = max(weight for _, weight in terms)
    scales = [weight / heaviest for _, weight in terms]
    divisor = math.fsum(scales)
    wide = _sum_dtype(dtype, scales)
    # The sum may be built in `out` itself unless that would overwrite a part that is read later.
    in_place = wide == dtype and all(_address(part) != _address(out) for part, _ in terms[1:])
    count = len(out)
    size = max(1, min(CHUNK_NBYTES // wide.itemsize, count))
    total = out if in_place else empty(wide, size)
    needs_term = not is_native(dtype) or any(scale != 1 for scale in scales)
    term = empty(wide, size) if needs_term else total
    for start in range(0, count, size):
        target = out[start : start + size]
        chunks = [part[start : start + size] for part, _ in terms]
        chunk_total = target if in_place else total[: len(target)]
        _sum(chunks, scales, dtype, chunk_total, term[: len(target)])
        _divide(chunk_total, divisor)
        if not in_place:
            narrow(chunk_total, dtype, target)
    return out


def _address(values: Elements) -> int:
    address: int = values.__array_interface__["data"][0]
    return address


def _divide(total: npt.NDArray[np.floating], divisor: float) -> None:
    """In place. A division takes up to four times as long as a multiplication, which gives the same bits where the
    divisor is a power of two. In float64 what it rounds once more is far below what the bounds allow.
    """
    if divisor == 1:
        return
    if total.dtype == np.float64 or math.frexp(divisor)[0] == 0.5:
        total *= 1 / divisor
    else:
        total /= divisor


@np.errstate(all="ignore")
def reduce_wide(parts: Sequence[Elements], weights: Sequence[float], out: Elements, dtype: DType) -> Elements:
    """As :func:`reduce_part`, for inputs so large that their sum overflows; ``out`` is none of the parts.

    Each input is multiplied with its share of all weights before it is added, in float64; what the last rounding takes
    beyond the range of the dtype is the end of the range.
    """
    _check_weights(weights)
    heaviest = max(weights)
    whole = math.fsum(weight / heaviest for weight in weights)
    shares = [weight / heaviest / whole for weight in weights]
    size = CHUNK_NBYTES // FLOAT64.itemsize
    for start in range(0, len(out), size):
        target = out[start : start + size]
        total, term = np.zeros(len(target)), np.empty(len(target))
        for part, share in zip(parts, shares, strict=True):
            if share:
                widen(part[start : start + size], dtype, term)
                total += term * share
        narrow(np.clip(total, -largest(dtype), largest(dtype)), dtype, target)
    return out


def _sum(
    chunks: Sequence[Elements],
    scales: Sequence[float],
    dtype: DType,
    total: npt.NDArray[np.floating],
    term: npt.NDArray[np.floating],
) -> None:
    """``total`` = the sum of the chunks times their scales, in the dtype of ``total`` and ``term``."""
    if total.dtype == chunks[0].dtype and scales[0] == 1 and len(chunks) > 1 and scales[1] == 1:
        np.add(chunks[0], chunks[1], out=total)
        chunks, scales = chunks[2:], scales[2:]
    else:
        _scale(chunks[0], scales[0], dtype, total)
        chunks, scales = chunks[1:], scales[1:]
    for chunk, scale in zip(chunks, scales, strict=True):
        if scale == 1 and is_native(dtype):
            total += chunk  # widened on the way, which is exact
        else:
            _scale(chunk, scale, dtype, term)
            total += term


def _scale(chunk: Elements, scale: float, dtype: DType, out: npt.NDArray[np.floating]) -> None:
    widen(chunk, dtype, out)
    if scale != 1:
        out *= scale


def _sum_dtype(dtype: DType, scales: Sequence[float]) -> DType:
    """The dtype in which sums of ``dtype`` are taken; see the module's docstring."""
    if dtype == FLOAT64:
        return FLOAT64
    unequal = any(scale != 1 for scale in scales)
    if dtype == FLOAT32 and (unequal or len(scales) > MAX_FLOAT32_SENDERS):
        return FLOAT64
    return FLOAT32


def _wide_dtype(dtype: DType) -> DType:
    """That in which two values of ``dtype`` are added with one rounding."""
    return dtype if is_native(dtype) else FLOAT32


def _check_weights(weights: Sequence[float]) -> None:
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise InvalidValueError(f"weights[{index}] must be a finite number of at least 0, got {weight}")
    if not any(weight > 0 for weight in weights):
        raise InvalidValueError("weights must hold one above 0, got only zeros")


class OutOfRangeError(AllreduceException):
    """A difference between finite values is not finite."""


def encode_part(form: Format, values: Elements) -> memoryview:
    """What a member sends of finite values.

    :raises AllreduceException: the codec, one of the user's own, made another size than it says. That is this member's
      fault, and its groupmates must not be told that it broke the protocol, nor it that they did.
    """
    try:
        return form.encode(values)
    except UsageError as e:
        raise AllreduceException(str(e)) from e


def encode_difference(form: Format, average: Elements, decoded: Elements) -> memoryview:
    """What an owner sends a member under a lossy codec: the encoded difference between the average and that
    member's part, as the owner decoded it.

    The member adds it to its *exact* part (:func:`apply_difference`). With ``a`` the average of the decoded
    parts ``d_i`` of exact parts ``x_i``, the members end up with ``x_i + (a - d_i)``, whose weighted mean is
    that of the ``x_i``: what the codec lost on the way to the owner cancels. A member that took the decoded
    average, or added the difference to its decoded part, would let the mean drift by the codec's errors in
    every round. Differences also shrink as the members agree, and with them what the codec loses on the way
    back.

    :raises OutOfRangeError: the dtype of the tensor cannot hold the difference
    """
    dtype = form.dtype
    difference = empty(dtype, len(average))
    _combine(np.subtract, average, decoded, difference, dtype)
    if not is_finite(difference, dtype):
        raise OutOfRangeError(f"its values are further from the average than {dtype} reaches")
    return encode_part(form, difference)


def apply_difference(local: Elements, difference: Elements, out: Elements, dtype: DType) -> Elements:
    """A member's result: its exact part plus the decoded difference, rounded once, into ``out``.

    ``out`` may be ``local`` or ``difference``. Near the end of the dtype's range, what the codec lost could make a
    finite average infinite: the result is clipped to the range, unless the difference itself is not finite. Where the
    member's part never reached the owner there is no difference; the owner sends the encoded average itself, and that
    is the result.
    """
    bounded = is_finite(difference, dtype)
    _combine(np.add, local, difference, out, dtype, limit=largest(dtype) if bounded else None)
    return out


@np.errstate(all="ignore")
def _combine(
    operation: np.ufunc,
    first: Elements,
    second: Elements,
    out: Elements,
    dtype: DType,
    *,
    limit: float | None = None,
) -> None:
    """``operation`` on each pair, rounded once; clipped to +-``limit``."""
    wide = _wide_dtype(dtype)
    size = max(1, min(CHUNK_NBYTES // wide.itemsize, len(out)))
    left, right = empty(wide, size), empty(wide, size)
    for start in range(0, len(out), size):
        target = out[start : start + size]
        a, b = left[: len(target)], right[: len(target)]
        widen(first[start : start + size], dtype, a)
        widen(second[start : start + size], dtype, b)
        operation(a, b, out=a)
        if limit is not None:
            np.clip(a, -limit, limit, out=a)
        narrow(a, dtype, target)
