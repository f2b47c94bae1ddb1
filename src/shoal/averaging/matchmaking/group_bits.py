"""Under which group key a peer looks that was given bits: they change after every committed round. Pure.

**Given bits** make the peers a grid (Ryabinin et al. 2021, "Moshpit SGD", section 3.2). Of N = M^d peers each has d
digits to the base M; its bits are the first d - 1 of them, so that each key holds the M peers that differ in the last
digit. They average, deal themselves M different digits, and each shifts its own in from the right: the next M peers
that meet differ in what was the first digit. After d rounds every digit has been averaged over once, and all N hold
the exact average.
"""

from __future__ import annotations

import hashlib

from shoal.averaging.checks import check_bits
from shoal.averaging.group import MAX_GRID_ROUND, GroupInfo, bits_of_key, group_key
from shoal.p2p.identity import PeerID

MAX_CATCH_UP = 1 << 16
"""Rounds by which a group's slowest member catches up with its fastest one at once. How many a member has been through
is its word alone, and a lie must not bring the others to the end of what can be said."""


class GroupBits:
    """The bits of one peer. A round that failed changes nothing, so that its members stay where they would be met."""

    def __init__(self, peer_id: PeerID, initial: str = "") -> None:
        """:raises InvalidValueError: ``initial`` is no string of bits"""
        self._peer_id = peer_id.to_bytes()
        self.set(initial)

    def set(self, bits: str) -> None:
        """From now on use ``bits``; none: none are given any more.

        :raises InvalidValueError: no string of bits, or too long
        """
        check_bits("group_bits", bits)
        self._given = bits
        self.grid_round = 0
        """Committed rounds since the bits were given, so that peers of different rounds of the grid are not mixed up:
        the fast ones come to a key where the slow ones of the round before still wait for each other."""

    @property
    def are_given(self) -> bool:
        return bool(self._given)

    @property
    def bits(self) -> str:
        """Those of the next search, or of the one that goes on."""
        return self._given

    def key(self, prefix: str) -> str:
        """The group key that goes with :attr:`bits`."""
        return group_key(prefix, self._given)

    def round_committed(self, group: GroupInfo, target_group_size: int | None) -> None:
        """The next bits, by what all members know alike: the group's id and the order of its members.

        Bits that were given while the round ran are those of the next group already.
        """
        if not self._given or bits_of_key(group.key) != self._given:
            return
        index = [member.peer_id for member in group.members].index(self._peer_id)
        base = max(len(group), target_group_size or 0)  # the leader may want larger groups than this peer
        width = (base - 1).bit_length()
        digit = deal_digits(group.group_id, len(group), base)[index]
        digits = format(digit, f"0{width}b") if width else ""
        self._given = (self._given + digits)[-len(self._given) :]
        rounds = [member.grid_round for member in group.members]
        self.grid_round = min(1 + min(max(rounds), min(rounds) + MAX_CATCH_UP), MAX_GRID_ROUND)


def deal_digits(group_id: bytes, size: int, base: int) -> list[int]:
    """A different digit below ``base`` for each of ``size`` members, drawn from the group's id.

    Drawn, because a fixed order would send the same peers to the same keys again and again, and a group smaller than
    ``base`` would never fill the last ones.
    """
    digits = sorted(
        range(base), key=lambda digit: hashlib.sha256(group_id + digit.to_bytes(4, "big")).digest()
    )
    return digits[:size]
