"""Under which key a peer looks for its next group: by the bits that it was given, or by its seat in the grid. Pure.

A peer that was given no bits and has no seat looks under the key without a number. So does one that found too few at
its seat: all meet there who were left over.
"""

from __future__ import annotations

from shoal.averaging.grid import NO_GRID, ONE_GROUP, Grid
from shoal.averaging.group import GroupInfo, bits_of_key, group_key
from shoal.averaging.matchmaking.group_bits import GroupBits
from shoal.averaging.matchmaking.seats import NO_SEAT, Seat, first_seat, next_seat
from shoal.p2p.identity import PeerID


class GroupKeys:
    """Where one peer looks. A round that failed changes nothing, so that its members stay where they would be met."""

    def __init__(self, peer_id: PeerID, initial_bits: str = "") -> None:
        """:raises InvalidValueError: ``initial_bits`` is no string of bits"""
        self._peer_id = peer_id.to_bytes()
        self._bits = GroupBits(peer_id, initial_bits)
        self._seat = NO_SEAT
        self._is_left_over = False
        self._news: Grid | None = None

    def set_bits(self, bits: str) -> None:
        """From now on use ``bits``; none: choose automatically.

        :raises InvalidValueError: no string of bits, or too long
        """
        self._bits.set(bits)
        self._is_left_over = False

    @property
    def bits(self) -> str:
        """Those that were given, as they are now; empty: the key is chosen automatically."""
        return self._bits.bits

    @property
    def are_bits_given(self) -> bool:
        return self._bits.are_given

    @property
    def grid_round(self) -> int:
        """Committed rounds since the bits were given."""
        return self._bits.grid_round

    @property
    def grid(self) -> Grid:
        """What this peer knows of the automatic grid."""
        return NO_GRID if self.are_bits_given else self._seat.grid

    @property
    def news(self) -> Grid | None:
        """What newcomers are to know after the latest round: the grid that is made now, or that there is none any more.
        None: there was none before either.
        """
        return None if self.are_bits_given else self._news

    @property
    def is_seated(self) -> bool:
        """Whether it looks for the group to which it was dealt, and not where those are who were left over."""
        return not self.are_bits_given and self._seat.is_dealt and not self._is_left_over

    @property
    def may_spread(self) -> bool:
        """Whether others that know of no grid meet there."""
        return not self.are_bits_given and not self._seat.is_dealt

    @property
    def expects(self) -> int:
        """How many peers are expected under the key; 0: that is not known."""
        return self._seat.expects if self.is_seated else 0

    def key(self, prefix: str) -> str:
        """The key of the next search, or of the one that goes on."""
        if self.are_bits_given:
            return self._bits.key(prefix)
        return group_key(prefix) if self._is_left_over else self._seat.key(prefix)

    def found_too_few(self) -> bool:
        """The start time came without enough peers: look where those are who were left over, or at the own seat again.
        False: there is no other key.
        """
        if self.are_bits_given or not self._seat.is_dealt:
            return False
        self._is_left_over = not self._is_left_over
        return True

    def search_ended(self) -> None:
        """The next one begins at the own seat."""
        self._is_left_over = False

    def round_committed(self, group: GroupInfo, target_group_size: int | None, minimum: int = 2) -> None:
        """Where to look next, by what all members know alike."""
        if self.are_bits_given:
            self._bits.round_committed(group, target_group_size)
            return
        if bits_of_key(group.key):
            return  # the bits were taken back while the round ran
        index = [member.peer_id for member in group.members].index(self._peer_id)
        before = self._seat
        self._seat = next_seat(group, index, target_group_size, minimum)
        self._news = None
        if self._seat.is_dealt:
            self._news = self._seat.grid
        elif before.is_dealt:
            self._news = Grid(ONE_GROUP, before.grid.round + 1, before.grid.swarm)

    def spread(self, peers: int, rank: int, target: int | None, minimum: int = 2) -> bool:
        """So many peers know of no grid, and make one, in which this one has that rank. False: one group holds all."""
        if self.are_bits_given or self._seat.is_dealt or target is None:
            return False
        self._seat = first_seat(peers, rank, target, minimum)
        return self._seat.is_dealt

    def join_grid(self, grid: Grid, draw: int) -> bool:
        """This peer has no seat, or lost it, and others say that they make this grid: take the seat there that
        ``draw``, a random number, gives.
        False: it has one there.
        """
        before = self._seat
        if self.are_bits_given or (before.is_dealt and before.grid.layout == grid.layout):
            return False
        self._seat = Seat(grid, draw % grid.layout.groups)
        self._is_left_over = False
        return True
