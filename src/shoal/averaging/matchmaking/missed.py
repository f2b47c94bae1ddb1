"""Whether a peer that looks at its seat in a large swarm's grid has missed rounds. Pure.

Those that were dealt to one key in one round look there at about the same time. A peer that was away comes back to the
seat of a round that is over. It would be one too many there, and its place elsewhere would stay empty, for rounds to
come. So it goes to the place that the group left which it missed (:func:`.seats.seat_after_missed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

FEW_LATE = 4
"""A part of 1 / this of those that were dealt to a key are enough for a group of their own, however late."""
MOST = 2
"""A part of 1 / this have to be further, or have to have had a group, for a peer to go elsewhere: few may lie."""
SOME = 4
"""... and a part of 1 / this, for a group not to wait any longer for those that are missing."""
AT_LEAST = 2


class Missed(NamedTuple):
    """The ``round`` in which the others are now; ``begun``: so many made the group of the round before it, 0: that is
    not known.
    """

    round: int
    begun: int


def have_gone_on(rounds_ahead: Sequence[int], expects: int) -> bool:
    """Whether the peers in these later rounds show that the others of this one have had their groups."""
    return len(rounds_ahead) >= max(AT_LEAST, expects // SOME)


def find_missed(
    own: int, expects: int, together: int, rounds_ahead: Sequence[int], begun_before: Mapping[int, int]
) -> Missed | None:
    """What a peer in round ``own`` has missed; None: nothing.

    :param expects: how many were dealt to its key, and ``together`` how many of these it could be in a group with
    :param rounds_ahead: of the others that are declared there and are further
    :param begun_before: how many had a group when this peer began to look, by their rounds; they are one further now
    """
    many = max(AT_LEAST, expects // MOST)
    if together >= max(AT_LEAST, expects // FEW_LATE):
        return None
    began = (number + 1 for number, count in begun_before.items() for _ in range(count))
    ahead = sorted((one for one in (*rounds_ahead, *began) if one > own), reverse=True)
    if len(ahead) < many:
        return None
    latest = ahead[many - 1]
    return Missed(latest, begun_before.get(own, 0) if latest == own + 1 else 0)
