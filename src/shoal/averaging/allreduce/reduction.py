"""The arithmetic of one part: weighted averages, and differences for lossy codecs. Pure; CPU tensors only.

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

import torch

from shoal.compression.base import CompressionBase
from shoal.compression.finite import is_finite
from shoal.errors import AllreduceException, InvalidValueError, UsageError

CHUNK_NBYTES = 1 << 18
"""Bytes of a sum that are worked on at a time, so that all operations after the first find them in the cache."""

MAX_FLOAT32_SENDERS = 16


def reduce_part(parts: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> torch.Tensor:
    """The weighted average of the senders' versions of one part, into ``out``; returns ``out``.

    Both sequences are in the order of the members, without those that did not arrive: the weights are divided
    by their own sum. A weight of 0 leaves its part out.

    All are one-dimensional, contiguous and of one dtype and count; ``out`` may be one of the parts. Inputs
    are finite; the result is too unless the sum of the inputs, each times its weight over the largest weight,
    exceeds the range of the type that sums are in: then see :func:`reduce_wide`.
    """
    _check_weights(weights)
    if len(parts) != len(weights):
        raise InvalidValueError(f"weights must be one for each of the {len(parts)} parts, got {len(weights)}")
    terms = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    largest = max(weight for _, weight in terms)
    scales = [weight / largest for _, weight in terms]
    divisor = math.fsum(scales)
    wide = _sum_dtype(out.dtype, scales)
    # The sum may be built in `out` itself unless that would overwrite a part that is read later.
    in_place = wide == out.dtype and all(part.data_ptr() != out.data_ptr() for part, _ in terms[1:])
    count = out.numel()
    size = max(1, min(CHUNK_NBYTES // wide.itemsize, count))
    total = out if in_place else torch.empty(size, dtype=wide)
    term = torch.empty(size, dtype=wide) if any(scale != 1 for scale in scales) else total  # or is not needed
    for start in range(0, count, size):
        # Each operation on a tensor costs as much as thousands of elements: none without need.
        is_whole = size == count
        target = out if is_whole else out[start : start + size]
        chunks = [part if is_whole else part[start : start + size] for part, _ in terms]
        length = min(size, count - start)
        chunk_total = target if in_place else total[:length]
        _sum(chunks, scales, chunk_total, term[:length] if term is not total else chunk_total)
        _divide(chunk_total, divisor)
        if not in_place:
            target.copy_(chunk_total)
    return out


def _divide(total: torch.Tensor, divisor: float) -> None:
    """In place. A division takes up to four times as long as a multiplication, which gives the same bits where the
    divisor is a power of two. In float64 what it rounds once more is far below what the bounds allow.
    """
    if divisor == 1:
        return
    if total.dtype == torch.float64 or math.frexp(divisor)[0] == 0.5:
        total.mul_(1 / divisor)
    else:
        total.div_(divisor)


def reduce_wide(parts: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> torch.Tensor:
    """As :func:`reduce_part`, for inputs so large that their sum overflows; ``out`` is none of the parts.

    Each input is multiplied with its share of all weights before it is added, in float64; what the last rounding takes
    beyond the range of the dtype is the end of the range.
    """
    _check_weights(weights)
    largest = max(weights)
    whole = math.fsum(weight / largest for weight in weights)
    shares = [weight / largest / whole for weight in weights]
    limit = torch.finfo(out.dtype).max
    size = CHUNK_NBYTES // torch.float64.itemsize
    for start in range(0, len(out), size):
        target = out[start : start + size]
        total = torch.zeros(len(target), dtype=torch.float64)
        for part, share in zip(parts, shares, strict=True):
            if share:
                total.add_(part[start : start + size].double() * share)
        target.copy_(total.clamp_(-limit, limit))
    return out


def _sum(
    chunks: Sequence[torch.Tensor], scales: Sequence[float], total: torch.Tensor, term: torch.Tensor
) -> None:
    """``total`` = the sum of the chunks times their scales, in the dtype of ``total`` and ``term``."""
    native = total.dtype == chunks[0].dtype
    if native and scales[0] == 1 and len(chunks) > 1 and scales[1] == 1:
        torch.add(chunks[0], chunks[1], out=total)
        chunks, scales = chunks[2:], scales[2:]
    else:
        _scale(chunks[0], scales[0], total)
        chunks, scales = chunks[1:], scales[1:]
    for chunk, scale in zip(chunks, scales, strict=True):
        if scale == 1:
            total.add_(chunk)  # widened on the way, which is exact
        else:
            _scale(chunk, scale, term)
            total.add_(term)


def _scale(chunk: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    out.copy_(chunk)
    if scale != 1:
        out.mul_(scale)


def _sum_dtype(dtype: torch.dtype, scales: Sequence[float]) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are taken; see the module's docstring."""
    if dtype == torch.float64:
        return torch.float64
    unequal = any(scale != 1 for scale in scales)
    if dtype == torch.float32 and (unequal or len(scales) > MAX_FLOAT32_SENDERS):
        return torch.float64
    return torch.float32


def _check_weights(weights: Sequence[float]) -> None:
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise InvalidValueError(f"weights[{index}] must be a finite number of at least 0, got {weight}")
    if not any(weight > 0 for weight in weights):
        raise InvalidValueError("weights must hold one above 0, got only zeros")


class OutOfRangeError(AllreduceException):
    """A difference between finite values is not finite."""


def encode_part(codec: CompressionBase, values: torch.Tensor) -> memoryview:
    """What a member sends of finite values.

    :raises AllreduceException: the codec, one of the user's own, made another size than it says. That is this member's
      fault, and its groupmates must not be told that it broke the protocol, nor it that they did.
    """
    try:
        return codec.encode_checked(values)
    except UsageError as e:
        raise AllreduceException(str(e)) from e


def encode_difference(codec: CompressionBase, average: torch.Tensor, decoded: torch.Tensor) -> memoryview:
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
    difference = torch.sub(average, decoded)
    if not is_finite(difference):
        raise OutOfRangeError(f"its values are further from the average than {average.dtype} reaches")
    return encode_part(codec, difference)


def apply_difference(local: torch.Tensor, difference: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A member's result: its exact part plus the decoded difference, rounded once, into ``out``.

    ``out`` may be ``local`` or ``difference``. Near the end of the dtype's range, what the codec lost could make a
    finite average infinite: the result is clipped to the range, unless the difference itself is not finite. Where the
    member's part never reached the owner there is no difference; the owner sends the encoded average itself, and that
    is the result.
    """
    bounded = is_finite(difference)
    torch.add(local, difference, out=out)
    if bounded and not is_finite(out):
        limit = torch.finfo(out.dtype).max
        out.clamp_(-limit, limit)
    return out
