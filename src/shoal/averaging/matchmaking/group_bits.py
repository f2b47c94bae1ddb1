"""Under which group key a peer looks for its next group: bits that change after every committed round. Pure.

**Given bits** make the peers a grid (Ryabinin et al. 2021, "Moshpit SGD", section 3.2). Of N = M^d peers each has d
digits to the base M; its bits are the first d - 1 of them, so that each key holds the M peers that differ in the last
digit. They average, deal themselves M different digits, and each shifts its own in from the right: the next M peers
that meet differ in what was the first digit. After d rounds every digit has been averaged over once, and all N hold
the exact average.

**Without given bits** all peers look under one key as long as that holds few enough of them; what keeps old groupmates
apart there is their lineage (:mod:`.lineage`). A DHT record of many hundreds would be large, and everybody reads it
again and again, so that more peers spread over 2^depth keys: each has a position in a circle of 2^32, dealt anew with
every round so that the members of a group go apart, and its bits are the first *depth* bits of that. All must come to
the same depth, though each knows only whom it sees. They do as the sizes of populations tell them, which neighbours on
two depths see alike: one that is too large splits, two that would be small enough together unite. Who finds nobody
under its key looks under the key without bits, where all meet who were left over. Their keys have names of their own
(:func:`~shoal.averaging.group.automatic_key`): who counts them must not count a grid beside them, or what is left of
one whose bits were taken back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from shoal.averaging.checks import check_bits
from shoal.averaging.group import MAX_GRID_ROUND, GroupInfo, automatic_key, bits_of_key, group_key
from shoal.p2p.identity import PeerID

SPLIT_ABOVE = 128
"""More peers than this under one key spread over two (or four, ...)."""
UNITE_UP_TO = 96
"""Peers on neighbouring depths that are no more than this together use the key with fewer bits. Less than where they
split, so that a number of peers that varies a little does not send them to and fro."""
LONELY_BELOW = 24
"""Fewer peers than this under one key use the one with a bit less."""
MAX_DEPTH = 8
MAX_CATCH_UP = 1 << 16
"""Rounds by which a group's slowest member catches up with its fastest one at once. How many a member has been through
is its word alone, and a lie must not bring the others to the end of what can be said."""
CIRCLE_BITS = 32


class GroupBits:
    """The bits of one peer. A round that failed changes nothing, so that its members stay where they would be met."""

    def __init__(self, peer_id: PeerID, initial: str = "") -> None:
        """:raises InvalidValueError: ``initial`` is no string of bits"""
        self._peer_id = peer_id.to_bytes()
        self._position = _point(self._peer_id)
        self.depth = 0
        """How many bits this peer uses where none are given."""
        self.set(initial)

    def set(self, bits: str) -> None:
        """From now on use ``bits``; none: go back to automatic.

        :raises InvalidValueError: no string of bits, or too long
        """
        check_bits("group_bits", bits)
        self._given = bits
        self._is_visiting = False
        self.grid_round = 0
        """Committed rounds since the bits were given, so that peers of different rounds of the grid are not mixed up:
        the fast ones come to a key where the slow ones of the round before still wait for each other."""

    @property
    def are_given(self) -> bool:
        return bool(self._given)

    @property
    def bits(self) -> str:
        """Those of the next search, or of the one that goes on."""
        return self._given or self.bits_at(0 if self._is_visiting else self.depth)

    @property
    def is_at_home(self) -> bool:
        """Whether this peer looks under the key of its depth, and not under that of those who were left over."""
        return not self._is_visiting

    def key(self, prefix: str) -> str:
        """The group key that goes with :attr:`bits`."""
        return group_key(prefix, self._given) if self._given else automatic_key(prefix, self.bits)

    def key_at(self, prefix: str, depth: int) -> str:
        """The key of this peer's position at ``depth``, where those are who were given no bits."""
        return automatic_key(prefix, self.bits_at(depth))

    def bits_at(self, depth: int) -> str:
        """The first ``depth`` bits of this peer's position."""
        return format(self._position, f"0{CIRCLE_BITS}b")[:depth]

    def search_ended(self) -> None:
        """The next one begins at home."""
        self._is_visiting = False

    def round_committed(self, group: GroupInfo, target_group_size: int | None) -> None:
        """The next bits, by what all members know alike: the group's id and the order of its members.

        Bits that were given while the round ran are those of the next group already.
        """
        index = [member.peer_id for member in group.members].index(self._peer_id)
        if not self._given:
            step = (1 << CIRCLE_BITS) // len(group)
            self._position = (_point(group.group_id) + index * step) % (1 << CIRCLE_BITS)
            return
        if bits_of_key(group.key) != self._given:
            return
        base = max(len(group), target_group_size or 0)  # the leader may want larger groups than this peer
        width = (base - 1).bit_length()
        digit = deal_digits(group.group_id, len(group), base)[index]
        digits = format(digit, f"0{width}b") if width else ""
        self._given = (self._given + digits)[-len(self._given) :]
        rounds = [member.grid_round for member in group.members]
        self.grid_round = min(1 + min(max(rounds), min(rounds) + MAX_CATCH_UP), MAX_GRID_ROUND)

    # ---- the depth where no bits are given

    def found_too_few(self, seen: int) -> bool:
        """The start time came without enough peers, of ``seen`` ones in all: look under the other of the two keys.
        False: there is no other.
        """
        if self._given or self.depth == 0:
            return False
        self._is_visiting = not self._is_visiting
        if self._is_visiting and seen < LONELY_BELOW:
            self.depth -= 1
        return True

    def explored(self, counts: Mapping[int, int]) -> bool:
        """This peer is new or alone, and found so many others at each depth: go where most live. False: stay."""
        populations = {depth: count << depth for depth, count in counts.items() if count}
        if self._given or not populations:
            return False
        depth = max(populations, key=lambda depth: (populations[depth], -depth))
        moves = depth != self.depth or self._is_visiting
        self.depth, self._is_visiting = depth, False
        return moves

    def depths_to_count(self, own: int) -> range:
        """Which depths matter after a search at home that saw ``own`` peers, this one included."""
        if own < LONELY_BELOW:
            return range(MAX_DEPTH + 1)
        return range(max(0, self.depth - 1), min(MAX_DEPTH, self.depth + 1) + 1)

    def counted(self, own: int, others: Mapping[int, int]) -> None:
        """A search at home is over, in which ``own`` peers were under its key, this one included; ``others``: how many
        are under the keys of its position at :meth:`depths_to_count`.
        """
        if self._given or self._is_visiting:
            return
        above, below = others.get(self.depth - 1, 0), others.get(self.depth + 1, 0)
        if own < LONELY_BELOW and self.explored({**others, self.depth: own}):
            return
        if own > SPLIT_ABOVE:
            wanted = self.depth + (own // (SPLIT_ABOVE // 2)).bit_length() - 1
        elif below and own + 2 * below > UNITE_UP_TO:
            wanted = self.depth + 1
        elif own < LONELY_BELOW or (above and above + 2 * own <= UNITE_UP_TO):
            wanted = self.depth - 1
        else:
            return
        self.depth = min(MAX_DEPTH, max(0, wanted))


def deal_digits(group_id: bytes, size: int, base: int) -> list[int]:
    """A different digit below ``base`` for each of ``size`` members, drawn from the group's id.

    Drawn, because a fixed order would send the same peers to the same keys again and again, and a group smaller than
    ``base`` would never fill the last ones.
    """
    digits = sorted(
        range(base), key=lambda digit: hashlib.sha256(group_id + digit.to_bytes(4, "big")).digest()
    )
    return digits[:size]


def _point(seed: bytes) -> int:
    """A point of the circle, drawn from ``seed``."""
    return int.from_bytes(hashlib.sha256(seed).digest()[: CIRCLE_BITS // 8], "big")
