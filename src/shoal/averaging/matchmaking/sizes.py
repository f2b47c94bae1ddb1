"""Into how many groups, and of which sizes, a number of peers is cut. Pure."""

from __future__ import annotations


def plan_groups(n: int, target: int | None, minimum: int, leaders: int | None = None) -> tuple[int, ...]:
    """Sizes of the groups into which ``n`` peers are cut, of whom ``leaders`` (default: all) can lead.

    As few peers as possible are left over; among such plans, as many groups as possible have the target size,
    and these come first. Every size is from ``minimum`` to ``target``.
    """
    leaders = n if leaders is None else min(leaders, n)
    if leaders == 0 or n < minimum:
        return ()
    if target is None:
        return (n,)
    count = min(-(-n // target), leaders)
    if count * minimum > n:  # one group more would take in everybody, but somewhere below the minimum
        count -= 1
    return _share_out(n, count, target, minimum)


def stays_full(index: int, n: int, target: int | None, minimum: int) -> bool:
    """Whether group ``index`` (from 0) of the plan has the target size for ``n`` peers and for any larger
    number.

    The last groups are the smaller ones. In a plan of ``count`` groups that takes in everybody, the groups up
    to ``index`` are full if ``n >= (index + 1) * target + (count - 1 - index) * minimum``; so it is enough to
    look at the smallest number of peers for each count. Fewer than ``target`` places are empty, so no more
    than the last ``target - 1`` groups are ever smaller.
    """
    if target is None:
        return False
    smallest_count = -(-n // target)
    for count in range(smallest_count, max(smallest_count, index + target) + 1):
        peers = max(n, (count - 1) * target + 1, count * minimum)
        takes_in_everybody = peers <= count * target
        if takes_in_everybody and peers < (index + 1) * target + (count - 1 - index) * minimum:
            return False
    return n >= (index + 1) * target


def plan_with_helpers(
    full: int, clients: int, helpers: int, target: int | None, minimum: int
) -> tuple[int, ...]:
    """As :func:`plan_groups`, where some peers only help: they can lead, and have nothing to average.

    Each group has a leader and a peer that contributes. First, as few contributors as possible are left over; then,
    as few as possible are the only one of their group, whose average is what they had before; last, as few helpers as
    possible are left over.
    """
    contributors, everybody = full + clients, full + clients + helpers
    if target is None:
        can_average = contributors and full + helpers and everybody >= minimum
        return (everybody,) if can_average else ()
    best: tuple[int, ...] = ()
    least = (contributors, 0, helpers)
    for count in range(1, min(full + helpers, contributors, everybody // minimum) + 1):
        sizes = _share_out(min(everybody, count * target), count, target, minimum)
        led_by_helpers = max(0, count - full)
        placed = min(contributors, sum(sizes) - led_by_helpers)
        if placed < count or sum(size > 1 for size in sizes) < led_by_helpers:
            continue
        # A group of two that a helper leads has room for one contributor.
        can_pair = sum(size > 1 for size in sizes) - (led_by_helpers if target == 2 else 0)
        alone = count - min(placed - count, can_pair)
        cost = (contributors - placed, alone, everybody - sum(sizes))
        if not best or cost < least:
            best, least = sizes, cost
    return best


def _share_out(peers: int, count: int, target: int, minimum: int) -> tuple[int, ...]:
    """The sizes of ``count`` groups of so many peers in all, full ones first."""
    sizes: list[int] = []
    for later_groups in reversed(range(count)):
        sizes.append(min(target, peers - sum(sizes) - later_groups * minimum))
    return tuple(sizes)
