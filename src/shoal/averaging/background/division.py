"""Who averages what: the vector of one averager divided among the members of a group, alike at each of them."""

from __future__ import annotations

from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.load_balancing import load_balance_peers
from shoal.averaging.matchmaking.apart import owns_nothing
from shoal.averaging.matchmaking.candidate import candidate_of
from shoal.averaging.partition import Layout, Partition


class Division:
    """Divides the vector.

    :param part_size_bytes: a part's largest size
    :param min_vector_size: a member whose share would have fewer elements owns nothing
    """

    def __init__(self, layout: Layout, *, part_size_bytes: int, min_vector_size: int) -> None:
        self._layout = layout
        self._part_size_bytes = part_size_bytes
        # Owned bytes are what is divided; with tensors of several dtypes an element counts with its mean size.
        elements = layout.numel
        self._min_span_nbytes = -(-min_vector_size * layout.data_nbytes // elements) if elements else 0

    def among(self, group: GroupInfo) -> Partition:
        """The spans and parts of a group's members. Two of which one could not reach the other exchange no parts."""
        modes = [member.mode for member in group.members]
        idle = owns_nothing([candidate_of(member) for member in group.members])
        owned = load_balance_peers(
            self._layout.data_nbytes,
            [member.bandwidth for member in group.members],
            can_own=[mode is not PeerMode.CLIENT and index not in idle for index, mode in enumerate(modes)],
            contributes=[mode is not PeerMode.AUXILIARY for mode in modes],
            min_size=self._min_span_nbytes,
        )
        return Partition.create(self._layout, owned, self._part_size_bytes)
