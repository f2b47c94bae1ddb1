"""Under which key a peer looks for its next group: by its bits, or by its seat in the grid of a large swarm. Pure.

A peer without a seat looks where its bits say (:mod:`.group_bits`). One that found too few at its seat looks under the
key without bits: all meet there that were left over, and those that know of no grid.
"""

from __future__ import annotations

import msgspec

from shoal.averaging.grid import NO_GRID, ONE_GROUP, UNKNOWN_ROUND, Grid
from shoal.averaging.group import GroupInfo, bits_of_key, group_key
from shoal.averaging.matchmaking.group_bits import GroupBits
from shoal.averaging.matchmaking.missed import Missed
from shoal.averaging.matchmaking.seats import NO_SEAT, Seat, first_seat, next_seat, seat_after_missed
from shoal.p2p.identity import PeerID

MOST_MISSED = 1024
"""One that has missed more rounds of the grid joins it anew: the numbers of rounds may be a lie."""


class GroupKeys:
    """Where one peer looks. A round that failed changes nothing, so that its members stay where they would be met."""

    def __init__(self, peer_id: PeerID, initial_bits: str = "") -> None:
        """:raises InvalidValueError: ``initial_bits`` is no string of bits"""
        self._peer_id = peer_id.to_bytes()
        self.bits = GroupBits(peer_id, initial_bits)
        self._seat = NO_SEAT
        self._is_left_over = False
        self.news: Grid | None = None
        """What newcomers are to know after the latest round: the grid that is made now, or that it is given up. None:
        there was none before either."""

    def set_bits(self, bits: str) -> None:
        """From now on use ``bits``; none: choose automatically.

        :raises InvalidValueError: no string of bits, or too long
        """
        self.bits.set(bits)
        self._seat, self.news, self._is_left_over = NO_SEAT, None, False

    @property
    def grid(self) -> Grid:
        """What this peer knows of the automatic grid."""
        return self._seat.grid if self.has_seat else NO_GRID

    @property
    def has_seat(self) -> bool:
        """Whether this peer has been dealt to a group of a grid."""
        return self._seat.is_dealt

    @property
    def is_seated(self) -> bool:
        """Whether it looks at its seat, and not where those are that were left over."""
        return self.has_seat and not self._is_left_over

    @property
    def may_spread(self) -> bool:
        """Whether others that know of no grid meet where it looks."""
        return not (self.has_seat or self.bits.bits)

    @property
    def expects(self) -> int:
        """How many peers are expected under the key; 0: that is not known."""
        return self._seat.expects if self.is_seated else 0

    def key(self, prefix: str) -> str:
        """The key of the next search, or of the one that goes on."""
        if not self.has_seat:
            return self.bits.key(prefix)
        return group_key(prefix) if self._is_left_over else self._seat.key(prefix)

    def found_too_few(self, seen: int) -> bool:
        """The start time came without enough peers, of ``seen`` ones in all: look where those are that were left over,
        or at the own place again. False: there is no other key.
        """
        if not self.has_seat:
            return self.bits.found_too_few(seen)
        self._is_left_over = not self._is_left_over
        return True

    def search_ended(self) -> None:
        """The next one begins at the own place."""
        self._is_left_over = False
        self.bits.search_ended()

    def round_committed(self, group: GroupInfo, target_group_size: int | None, minimum: int = 2) -> None:
        """Where to look next, by what all members know alike."""
        self.bits.round_committed(group, target_group_size)
        if self.bits.are_given or bits_of_key(group.key):
            return  # or the bits were taken back while the round ran
        index = [member.peer_id for member in group.members].index(self._peer_id)
        before = self._seat
        self._seat = next_seat(group, index, target_group_size, minimum)
        self.news = None
        if self._seat.is_dealt:
            self.news = self._seat.grid
        elif before.is_dealt:
            self.news = Grid(ONE_GROUP, before.grid.round + 1, before.grid.swarm)

    def spread(self, peers: int, rank: int, target: int | None, minimum: int = 2) -> bool:
        """So many peers make a grid, in which this one has that rank. False: it has a seat, or one group holds all."""
        if not self.may_spread or target is None:
            return False
        self._seat = first_seat(peers, rank, target, minimum)
        return self._seat.is_dealt

    def catch_up(self, missed: Missed, draw: int) -> bool:
        """Those at this peer's seat have gone on without it: take the place that they left, or one of several by
        ``draw``, a random number. False: it has no seat any more, or has been away for longer than one can follow.
        """
        if not self.is_seated or not 0 < missed.round - self._seat.grid.round <= MOST_MISSED:
            return False
        self._seat = seat_after_missed(self._seat, missed, draw)
        return True

    def join_grid(self, grid: Grid, draw: int) -> bool:
        """This peer has no seat, or lost it, and others say that they make this grid: take the seat there that
        ``draw``, a random number, gives. False: it has one there.
        """
        if self.bits.are_given or (self.has_seat and self._seat.grid.layout == grid.layout):
            return False
        # It takes the round of those that it meets: others may be in a later one by now.
        grid = msgspec.structs.replace(grid, round=UNKNOWN_ROUND)
        self._seat = Seat(grid, draw % grid.layout.groups)
        self._is_left_over = False
        return True
