"""What a member keeps book of in a round: parts that it collects as an owner, averages that it gets from others. Pure.

Each book has clocks: for whom something is awaited, since when; see :mod:`.part_clocks`.
"""

from __future__ import annotations

from shoal.averaging.allreduce.events import Roles
from shoal.averaging.allreduce.messages import is_weight
from shoal.averaging.allreduce.part_clocks import PartClocks
from shoal.errors import ProtocolViolation


class Collection:
    """Which parts of its span an owner has from whom; ``count`` is their number.

    A part is complete when everybody who is waited for has delivered it: members that contribute with a weight above 0
    and were not dropped. Nothing is complete before the owner's own contribution is settled. A sender's clock runs
    while the owner waits for its next part: not before that, and not while the sender is held.
    """

    def __init__(self, roles: Roles, timeout: float | None) -> None:
        self.count = roles.parts_owned[roles.me]
        self.clocks = PartClocks(timeout)
        self.weights: list[float | None] = [None if does else 0.0 for does in roles.contributes]
        """As each member declared its own; None: not yet."""
        self.dropped: dict[int, str] = {}
        """Members from which nothing is taken any more, and why."""
        self._roles = roles
        self._settled = False
        self._delivered = [0] * roles.size
        self._held: set[int] = set()
        self._released = 0
        self._averaged = 0

    @property
    def is_averaged(self) -> bool:
        """Whether the whole span has been averaged."""
        return self._averaged == self.count

    @property
    def averaged(self) -> int:
        return self._averaged

    def delivered_by(self, sender: int) -> int:
        """Parts that a member has delivered."""
        return self._delivered[sender]

    def settle(self, weight: float | None, now: float) -> None:
        """The own contribution lies in the arena (``weight`` None: there will be none): the others are awaited."""
        me = self._roles.me
        if weight is not None:
            self.weights[me], self._delivered[me] = weight, self.count
        elif self.weights[me] is None:
            self.dropped[me] = "it contributes nothing"
        self._settled = True
        for sender in self._roles.others:
            self._watch(sender, now)

    def declare(self, sender: int, weight: float) -> None:
        """:raises ProtocolViolation: not a weight, declared before, or none is expected of this member"""
        name = self._roles.name(sender)
        if not self._roles.contributes[sender] or sender == self._roles.me:
            raise ProtocolViolation(f"{name} declared a weight, but contributes nothing here")
        if self.weights[sender] is not None:
            raise ProtocolViolation(f"{name} declared its weight twice")
        if not is_weight(weight):
            raise ProtocolViolation(f"{name} declared the weight {weight}")
        self.weights[sender] = weight
        if weight == 0:
            self.clocks.stop(sender)

    def deliver(self, sender: int, index: int, now: float) -> None:
        """:raises ProtocolViolation: not the sender's next part, or it declared no weight for it"""
        name = self._roles.name(sender)
        if not self.weights[sender] or sender == self._roles.me:
            raise ProtocolViolation(f"{name} sent a part, but declared no weight for it")
        if index != self._delivered[sender] or index >= self.count:
            raise ProtocolViolation(
                f"{name} sent part {index} of {self.count}, expected {self._delivered[sender]}"
            )
        self._delivered[sender] += 1
        self._watch(sender, now)

    def hold(self, sender: int) -> None:
        """Nothing is taken from the sender for now, which is ahead: its clock stands still."""
        self._held.add(sender)
        self.clocks.stop(sender)

    def resume(self, sender: int, now: float) -> None:
        self._held.discard(sender)
        self._watch(sender, now)

    def drop(self, sender: int, reason: str) -> None:
        """Wait no more for what a sender has not delivered."""
        self.dropped[sender] = reason
        self.clocks.stop(sender)

    def release(self) -> range:
        """The parts that became complete since the last call."""
        complete = 0
        if self._settled:
            counts = (n for sender, n in enumerate(self._delivered) if self._waits_for(sender))
            complete = min(counts, default=self.count)
        first, self._released = self._released, max(self._released, complete)
        return range(first, self._released)

    def average(self, index: int) -> None:
        """A part that was released has been averaged."""
        if index != self._averaged or index >= self._released:
            raise AssertionError(
                f"part {index} averaged out of turn, after {self._averaged} of {self._released}"
            )
        self._averaged += 1

    def _waits_for(self, sender: int) -> bool:
        return sender not in self.dropped and self.weights[sender] != 0

    def _watch(self, sender: int, now: float) -> None:
        """Start the sender's clock, unless nothing more is awaited of it, or it is held back."""
        awaited = self._settled and self._waits_for(sender) and self._delivered[sender] < self.count
        if awaited and sender not in self._held:
            self.clocks.start(sender, now)
        else:
            self.clocks.stop(sender)


class Returns:
    """Which averages a member has of which owner.

    An owner's clock runs from the member's snapshot on, and later while the owner has all that its next average needs
    of this member, since the average before.
    """

    def __init__(self, roles: Roles, timeout: float | None) -> None:
        self.clocks = PartClocks(timeout)
        self._roles = roles
        self._owed = [
            parts if roles.contributes[roles.me] and owner != roles.me else 0
            for owner, parts in enumerate(roles.parts_owned)
        ]
        self._missing = sum(self._owed)
        self.received = 0
        """Averages of all owners that have come."""
        self._sends = True
        self._sent, self._received = [0] * roles.size, [0] * roles.size

    @property
    def is_complete(self) -> bool:
        return self._missing == 0

    def missing_from(self, owner: int) -> int:
        return self._owed[owner] - self._received[owner]

    def begin(self, weight: float, now: float) -> None:
        """The own snapshot was taken; with weight 0 nothing is sent."""
        self._sends = weight != 0
        for owner in self._roles.others:
            if self.missing_from(owner):
                self.clocks.start(owner, now)

    def open(self, owner: int, now: float) -> None:
        """The owner takes parts from now on."""
        self._watch(owner, now)

    def send(self, owner: int, index: int, now: float) -> None:
        self._sent[owner] = index + 1
        if not self.clocks.runs(owner):
            self._watch(owner, now)

    def receive(self, owner: int, index: int, now: float) -> None:
        """:raises ProtocolViolation: not the owner's next average"""
        if index != self._received[owner] or not self.missing_from(owner):
            raise ProtocolViolation(
                f"{self._roles.name(owner)} returned part {index} of {self._owed[owner]}, expected "
                f"{self._received[owner]}"
            )
        self._received[owner] += 1
        self.received += 1
        self._missing -= 1
        self._watch(owner, now)

    def _watch(self, owner: int, now: float) -> None:
        is_due = not self._sends or self._sent[owner] > self._received[owner]
        if is_due and self.missing_from(owner):
            self.clocks.start(owner, now)
        else:
            self.clocks.stop(owner)
