"""Warnings of peers that make rounds long: one line for each peer now and then."""

from __future__ import annotations

import logging
import math

from shoal.averaging.allreduce.pace import Wait
from shoal.averaging.group import GroupInfo
from shoal.averaging.partition import Partition
from shoal.p2p.identity import PeerID
from shoal.utils import figures

AGAIN_AFTER = 600.0
"""Seconds after which a peer that is still slow is named again."""
MAX_PEERS = 256

logger = logging.getLogger(__name__)


class SlowPeers:
    """Tells the user of one averager which peer its rounds wait for, and what helps."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._told: dict[PeerID, float] = {}

    def note(
        self,
        held_up: tuple[PeerID, Wait] | None,
        duration: float,
        now: float,
        group: GroupInfo,
        partition: Partition,
    ) -> None:
        """A round of ``group`` has ended whose all-reduce took ``duration`` seconds. ``now`` is of any steady clock."""
        if held_up is None:
            return
        peer, wait = held_up
        if now < self._told.get(peer, -math.inf) + AGAIN_AFTER:
            return
        if len(self._told) >= MAX_PEERS:
            self._told.clear()
        self._told[peer] = now
        logger.warning(
            "%s: rounds wait for %s, whose parts come at %s: %s of the %s that the last all-reduce took. "
            "%s; sender_timeout here lets the others go on without a peer that sends nothing for so long",
            self._prefix,
            peer,
            figures.rate(wait.rate),
            figures.duration(wait.seconds),
            figures.duration(duration),
            _advice(group.peer_ids.index(peer), wait, group, partition),
        )


def _advice(slow: int, wait: Wait, group: GroupInfo, partition: Partition) -> str:
    if not partition.parts_of(slow):
        return "it averages nothing for the others, and its own tensors take so long"
    if any(member.bandwidth for index, member in enumerate(group.members) if index != slow):
        figure = figures.number(wait.rate * 8 / 1e6)
        return f"bandwidth={figure} (Mbit/s) at that peer gives it a smaller share of the work"
    # A member without a figure counts as the mean of those given: here of that peer's own.
    return (
        "bandwidth=0 at that peer leaves the work to the others (no other one gives a figure to compare with)"
    )
