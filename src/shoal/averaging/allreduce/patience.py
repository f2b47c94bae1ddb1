"""For how long a member waits: for its leader's decision, for votes, or for news of a decision. Pure."""

from __future__ import annotations

import math

from shoal.averaging.allreduce.events import RoundTimeouts
from shoal.averaging.allreduce.evidence import Evidence, Hope
from shoal.averaging.allreduce.ledger import CATCH_UP
from shoal.sansio.core import NEVER

SLOWER = 4
"""The leader may wait for members whose links are so many times slower, before others look for another leader."""
GIVE_UP_AFTER = 15.0
"""Seconds without a leader after which a member that is not ready gives up, and one that is ready and has no hope:
members that are silent for a while, and live, are back by then.
"""


class Patience:
    """The clocks of one member. What it may conclude from silence depends on its ``evidence``."""

    def __init__(self, timeouts: RoundTimeouts, evidence: Evidence, others: int) -> None:
        self._timeouts = timeouts
        self._evidence = evidence
        self._others = others
        self._began_at = math.inf
        """When the exchange began here; infinity: it has not yet."""
        self.waits_since = NEVER
        """When this member had nothing left to do but to wait for the decision."""

    @property
    def has_begun(self) -> bool:
        """Whether the exchange has begun here."""
        return self._began_at != math.inf

    def begin(self, now: float) -> None:
        """The exchange begins."""
        self._began_at = now

    def wait(self, now: float) -> None:
        """From now on this member waits for the decision, and for nothing else."""
        self.waits_since = now

    def work(self) -> None:
        """There is more to do than to wait."""
        self.waits_since = NEVER

    def shift(self, late: float) -> None:
        """Time that does not count: this process was stopped, or busy."""
        self.waits_since += late + CATCH_UP

    @property
    def with_leader(self) -> float:
        """Until when this member waits for a leader that lives."""
        took = max(0.0, self.waits_since - self._began_at)
        return self.waits_since + self._timeouts.leader + SLOWER * took

    def for_votes(self, *, is_bound: bool) -> float:
        """Until when this leader waits for votes on what it has proposed."""
        return self.waits_since + self._seconds(is_bound, len(self._evidence.dead) < self._others)

    def without_leader(self, since: float, *, is_bound: bool) -> float:
        """Until when this member waits for a leader, or for news, since it lost the last leader."""
        return since + self._seconds(is_bound, self._evidence.hope is not Hope.NONE)

    def _seconds(self, is_bound: bool, has_hope: bool) -> float:
        if not is_bound:
            return GIVE_UP_AFTER
        if not self._evidence.others:
            return 0.0  # nobody is left that could come back
        return self._timeouts.doubt if has_hope else min(GIVE_UP_AFTER, self._timeouts.doubt)
