"""The rules of an epoch: when a round is prepared, which epoch comes next, what a round's outcome is worth. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeAlias

AfterFailedRound: TypeAlias = Literal["local", "skip", "wait"]
"""What a peer does whose gradients were not averaged: use its own mean, make no update, or try until a group has."""


EPOCH_BITS = 16


def lags(local_epoch: int, global_epoch: int, exact: bool) -> bool:
    """Whether a peer must load the state of another one.

    :param exact: the peer has ended an epoch since it last compared, so that being one behind is no delay of others
    """
    return local_epoch < global_epoch - (0 if exact else 1)


def next_epoch(local_epoch: int, global_epoch: int) -> int:
    """The epoch that follows; a peer that is one behind when the others have just moved on catches up with them."""
    return max(local_epoch + 1, global_epoch)


def is_near(end: float, now: float, lead: float) -> bool:
    """Whether the group of a round at ``end`` is to be looked for by now."""
    return end - now <= lead


def state_round_due(epoch: int, every: int, is_alone: bool, in_progress: bool) -> bool:
    """Whether the parameters are averaged at the beginning of ``epoch``."""
    return not is_alone and epoch % every == 0 and not in_progress


def round_timeout(averaging_timeout: float, matchmaking_time: float, may_be_elsewhere: bool) -> float:
    """Seconds for a round of gradients or parameters.

    :param may_be_elsewhere: whether the others may look for no such group any more, or not yet: they have ended the
      epoch already, or gradients were not averaged. Two peers that waited as long for parameters as for gradients would
      miss each other in turns, for good
    """
    return min(averaging_timeout, 2 * matchmaking_time) if may_be_elsewhere else averaging_timeout


def group_bits(epoch: int) -> str:
    """The bits under which peers of an epoch look for a group; few epochs are under way at a time."""
    return format(epoch % (1 << EPOCH_BITS), f"0{EPOCH_BITS}b")


def mixed_epochs(gathered: Mapping[Any, Any], weights: Mapping[Any, float], epoch: int) -> list[Any]:
    """The members whose gradients went into a round although they are not of this epoch.

    :param gathered: what each member told
    :param weights: of each member in the average; those that are not in it count for nothing
    """
    return [
        member
        for member, told in gathered.items()
        if weights.get(member, 0.0) > 0 and not (isinstance(told, Mapping) and told.get("epoch") == epoch)
    ]


def ended_epoch(told: Collection[Any], epoch: int) -> int:
    """The latest epoch that a round has ended: that of the members, but at most the one after this peer's.

    A peer that is one behind, and comes to a round of the next epoch, would stay one behind for good if it went on by
    one: that round ends the epoch of the others. The bound keeps a peer that lies from moving the others.
    """
    ahead = any(isinstance(entry, Mapping) and entry.get("epoch") == epoch + 1 for entry in told)
    return epoch + 1 if ahead else epoch


def parameters_agree(told: Collection[Any]) -> bool:
    """Whether all members of a group that have parameters of their own had the same before the update.

    :param told: what each member gathered. Auxiliaries have the digest None, which says nothing.
    """
    digests: set[Any] = set()
    for entry in told:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("digest", 0), bytes | None):
            return False
        if entry["digest"] is not None:
            digests.add(entry["digest"])
    return len(digests) == 1
