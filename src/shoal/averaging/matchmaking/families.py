"""Peers whose addresses are of different families cannot dial each other: which of them stand back. Pure.

A peer with IPv4 alone and one with IPv6 alone can only be in one group if a third one, with both, leads it and owns
all of the vector. So the two take part as clients, as long as everybody who looks for a group fits into one. In a
larger swarm nobody stands back: one peer of another family must not leave the others without leaders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Families = frozenset[str]

_FAMILIES = {
    "ip4": Families({"IPv4"}),
    "dns4": Families({"IPv4"}),
    "ip6": Families({"IPv6"}),
    "dns6": Families({"IPv6"}),
}


class Station(NamedTuple):
    """Where a peer can be dialed, as it declares it."""

    can_lead: bool
    addresses: Sequence[str]


def families_of(addresses: Iterable[str]) -> Families:
    """The families of these addresses, in the form of a multiaddr; of a client, which has none, nothing is known."""
    found = Families()
    for address in addresses:
        _, _, rest = address.partition("/")
        found |= _FAMILIES.get(rest.partition("/")[0], Families())
    return found


def why_stand_back(own: Sequence[str], others: Sequence[Station], target: int | None) -> str | None:
    """Why a peer with these addresses shall take part as a client; None if it need not.

    :param others: the other peers that look for a group under the same key
    :param target: the size up to which they make one group; None: any
    """
    mine = families_of(own)
    theirs = [families_of(other.addresses) for other in others]
    apart = next((families for families in theirs if families and not families & mine), None)
    if not mine or apart is None or (target is not None and len(others) >= target):
        return None
    needed = [families for families in (mine, *theirs) if families]
    if not any(
        other.can_lead and all(families & reached for families in needed)
        for other, reached in zip(others, theirs, strict=True)
    ):
        return None
    return (
        f"this peer can be dialed by {_listed(mine)} only, and another one by {_listed(apart)} only: both take part as "
        "clients of one that has both"
    )


def _listed(families: Families) -> str:
    return " and ".join(sorted(families))
