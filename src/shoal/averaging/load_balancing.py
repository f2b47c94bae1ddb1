"""How much of the vector each member of a group averages, from their bandwidths. Pure.

Model (butterfly all-reduce, full-duplex links): of ``n`` members, member ``i`` with bandwidth ``b_i`` owns a
share ``s_i`` of the vector. It sends the other shares of its own vector to their owners, ``1 - s_i``, and the
average of its share to the other members, ``(n - 1) s_i``; it receives as much. Its link is busy for ``(1 +
(n - 2) s_i) / b_i``. The shares that minimise the time of the slowest link solve a linear program whose
optimum is a water level: with a time ``T``, member ``i`` can take ``max(0, (T b_i - 1) / (n - 2))``; the
shares grow with ``T`` until they sum to 1. Members so slow that sending their own vector takes longer than
``T`` own nothing, so the owners are the ``k`` fastest for some ``k``, and ``T = (n - 2 + k) / (b_1 + ... +
b_k)``. Auxiliary members send no vector of their own and keep no average: of ``m`` contributors, theirs is
``m s_i / b_i``, a water level that starts at 0.

With two contributors or fewer every share costs a contributor's link the same; then shares are in proportion
to bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from shoal.errors import AllreduceException, InvalidValueError
from shoal.utils.scalars import plain


def load_balance_peers(
    vector_size: int,
    bandwidths: Sequence[float | None],
    min_size: int = 0,
    *,
    can_own: Sequence[bool] | None = None,
    contributes: Sequence[bool] | None = None,
) -> tuple[int, ...]:
    """Elements of the vector that each member owns; they sum to ``vector_size``, and every member computes
    the same.

    :param bandwidths: one for each member, in any unit; 0 owns nothing (unless all are 0: then equal spans),
      None counts as the mean of the positive ones that were given
    :param min_size: members who would own less than this own nothing, unless that would leave nobody
    :param can_own: False for members that cannot be dialed, who own nothing in any case; default: everybody
      can
    :param contributes: False for auxiliary members, who average but send nothing of their own; default:
      everybody does
    :raises AllreduceException: no member can own anything
    :raises InvalidValueError: a negative, infinite or NaN number, or sequences of unequal length
    """
    vector_size, min_size = plain(vector_size), plain(min_size)
    bandwidths = [plain(bandwidth) for bandwidth in bandwidths]
    count = len(bandwidths)
    can_own = [True] * count if can_own is None else [plain(able) for able in can_own]
    contributes = [True] * count if contributes is None else [plain(gives) for gives in contributes]
    _check(vector_size, bandwidths, min_size, can_own, contributes)
    if not any(can_own):
        raise AllreduceException(
            f"none of the group's {count} members can average anything:"
            " each is in client mode and can't be dialed"
        )
    speeds = _speeds(bandwidths, can_own)
    owners = [index for index in range(count) if speeds[index] > 0]
    while True:
        shares = _shares(speeds, owners, contributes)
        smallest = min((i for i in owners if shares[i] > 0), key=lambda i: (shares[i], -i))
        if shares[smallest] * vector_size >= min_size or max(shares) * vector_size < min_size:
            break
        owners = [index for index in owners if shares[index] > 0 and index != smallest]
    return _round_to_sum(shares, vector_size)


def _check(
    vector_size: int,
    bandwidths: Sequence[float | None],
    min_size: int,
    can_own: Sequence[bool],
    contributes: Sequence[bool],
) -> None:
    if vector_size < 0 or min_size < 0:
        raise InvalidValueError(
            f"vector_size and min_size must be at least 0, got {vector_size} and {min_size}"
        )
    if not len(bandwidths) == len(can_own) == len(contributes) > 0:
        raise InvalidValueError(
            "bandwidths, can_own and contributes must have one item for each member, got "
            f"{len(bandwidths)}, {len(can_own)} and {len(contributes)}"
        )
    for index, bandwidth in enumerate(bandwidths):
        if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth >= 0):
            raise InvalidValueError(
                f"bandwidths[{index}] must be None or a finite number of at least 0, got {bandwidth}"
            )


def _speeds(bandwidths: Sequence[float | None], can_own: Sequence[bool]) -> list[Fraction]:
    """Bandwidths as exact numbers (equal on every machine), 0 for a member that owns nothing."""
    given = [Fraction(bandwidth) for bandwidth in bandwidths if bandwidth is not None and bandwidth > 0]
    mean = sum(given, Fraction(0)) / len(given) if given else Fraction(1)
    speeds = [mean if bandwidth is None else Fraction(bandwidth) for bandwidth in bandwidths]
    speeds = [speed if able else Fraction(0) for speed, able in zip(speeds, can_own, strict=True)]
    return speeds if any(speeds) else [Fraction(int(able)) for able in can_own]


def _shares(speeds: Sequence[Fraction], owners: Sequence[int], contributes: Sequence[bool]) -> list[Fraction]:
    """The share of each member, 0 for those that are not in ``owners``; sums to 1 exactly."""
    shares = [Fraction(0)] * len(speeds)
    contributors = sum(contributes)
    if contributors <= 2:
        total = sum((speeds[i] for i in owners), Fraction(0))
        for i in owners:
            shares[i] = speeds[i] / total
        return shares
    # A member's share at level T is max(0, slope * T - base): 0 up to base / slope, and rising from there.
    slope = {i: speeds[i] / (contributors - 2 if contributes[i] else contributors) for i in owners}
    base = {i: Fraction(int(contributes[i]), contributors - 2) for i in owners}
    by_water_line = sorted(owners, key=lambda i: (base[i] / slope[i], i))
    sum_slope = sum_base = level = Fraction(0)
    for i in by_water_line:
        if sum_slope and base[i] / slope[i] >= level:
            break
        sum_slope, sum_base = sum_slope + slope[i], sum_base + base[i]
        level = (1 + sum_base) / sum_slope
    for i in owners:
        shares[i] = max(Fraction(0), slope[i] * level - base[i])
    return shares


def _round_to_sum(shares: Sequence[Fraction], total: int) -> tuple[int, ...]:
    """Integers in proportion to the shares that sum to ``total`` (largest remainder; ties go to the earlier
    member).
    """
    exact = [share * total for share in shares]
    sizes = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (sizes[i] - exact[i], i))
    for index in by_remainder[: total - sum(sizes)]:
        sizes[index] += 1
    return tuple(sizes)
