"""Members that hold up the decision though every span has been averaged, and for how long a leader waits. Pure.

Every span is averaged when all owners said so, or when the leader is ready: it holds all averages then. A leader that
is excluded or auxiliary never is ready. There it counts that another member is, or that everybody has sent what the
leader averages. So each living member says how it gets on.
"""

from __future__ import annotations

from shoal.averaging.allreduce.part_clocks import PartClocks
from shoal.averaging.allreduce.repair import Spans, most_averages
from shoal.averaging.allreduce.roll import Roll
from shoal.errors import ProtocolViolation

PROGRESS_INTERVAL = 1.0
"""Seconds between two words of a member to the leader about averages that it has taken."""


class Awaited:
    """The clocks of one leader for the members that it waits for.

    :param timeout: seconds for which one of them may do nothing; None: there is no limit
    """

    def __init__(self, roll: Roll, spans: Spans, timeout: float | None) -> None:
        self._roll = roll
        self._spans = spans
        self._clocks: PartClocks[int] = PartClocks(None if timeout is None else timeout + PROGRESS_INTERVAL)
        self._received: dict[int, int] = {}
        """Averages that members said they have taken."""

    @property
    def deadline(self) -> float:
        """When the patience with one of them ends."""
        return self._clocks.deadline

    @property
    def members(self) -> set[int]:
        """Those that are awaited now."""
        roll, spans = self._roll, self._spans
        unready = set(roll.unready)
        unreported = {span.owner for span in spans.unreported} - roll.gone
        leader = roll.roles.me
        is_under_way = leader not in roll.committers and (bool(roll.ready) or spans.has_averaged(leader))
        if unready and unreported and leader not in roll.ready and not is_under_way:
            return set()
        return (unready | unreported) - {leader}

    def watch(self, now: float) -> None:
        """Have a clock run for each of them, and for no other member."""
        awaited = self.members
        for member in self._roll.roles.others:
            if member not in awaited:
                self._clocks.stop(member)
            elif not self._clocks.runs(member):
                self._clocks.start(member, now)

    def stop(self) -> None:
        """There is nothing to wait for any more."""
        self._clocks.clear()

    def note_progress(self, member: int, count: int) -> None:
        """A member says how many averages it has taken: its time begins anew.

        :raises ProtocolViolation: they are not more than before, or more than there are
        """
        name = self._roll.roles.name(member)
        if not self._received.get(member, 0) < count <= most_averages(self._roll.roles):
            raise ProtocolViolation(f"{name} took {count} averages, out of turn or too many")
        self._received[member] = count
        self._clocks.stop(member)  # it starts again with the next watch

    def shift(self, seconds: float) -> None:
        """Time that does not count."""
        self._clocks.shift(seconds)

    def expire(self, now: float) -> list[tuple[int, str]]:
        """Members whose time is up, and why the group goes on without each."""
        limit, expired = self._clocks.timeout, self._clocks.expired(now)
        for member in expired:
            self._clocks.stop(member)
        return [
            (member, f"everything was averaged, but it said nothing for {limit:g} s") for member in expired
        ]
