"""A member's vote on how the round ends: what it has promised and accepted. Pure.

One decision is taken in a round, by single-decree consensus (Lamport 2001, "Paxos made simple", section 2.2). Leaders
are proposers, terms are ballots, and every member of the group *as it was formed* is an acceptor, whatever became of it
since. A term belongs to one member: it leads the terms that leave its number as a remainder when divided by the size of
the group. The founding leader's first term, 0, needs no promises, because no term is lower.

**The casting vote.** Half of an even group decides nothing, unless the founding leader is in that half. A founder that
leaves may hand this on to one other member, the *heir*, if it has neither promised nor accepted anything. It gives up
its own vote with that, for good. Two quorums still have a member in common: of two halves one would be with the
founder, which votes no more, and a half counts only if its heir says that it has the casting vote. The heir keeps it
as long as its process lives.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shoal.averaging.allreduce.messages import Outcome


def is_quorum(members: Collection[int], size: int, caster: int = 0) -> bool:
    """Whether these members can decide for a group of ``size``: more than half, or half with the casting vote.

    Two quorums of one group have a member in common: two halves are never both with the ``caster``.
    """
    return 2 * len(members) > size or (2 * len(members) == size and caster in members)


def leader_of(term: int, size: int) -> int:
    """The member to which a term belongs."""
    return term % size


def next_term(after: int, member: int, size: int) -> int:
    """The first term of ``member`` that is greater than ``after``."""
    return after + 1 + (member - after - 1) % size


@dataclass
class Voter:
    """What one member answers leaders: it keeps its promise not to hear lower terms."""

    promised: int = 0
    accepted: tuple[int, Outcome] | None = None
    """The last decision that it accepted, and in which term."""
    floor: int = 0
    """A candidate of this term has found that its quorum had accepted nothing: no decision of a lower term was made, or
    ever will be, whatever single members accepted then. It leads once a quorum knows that."""
    casts: bool = False
    """Whether the founding leader has handed on its casting vote to this member."""
    is_closed: bool = False
    """Whether this founding leader has handed on its casting vote. It votes no more."""

    @property
    def has_accepted_commit(self) -> bool:
        """Whether the last decision that it accepted is to commit."""
        return self.accepted is not None and self.accepted[1].reason is None

    def hand_on(self) -> bool:
        """Give up this founding leader's vote, for another member to cast: not if it has been used."""
        if self.promised or self.accepted is not None:
            return False
        self.is_closed = True
        return True

    def promise(self, term: int) -> bool:
        """Whether the member hears nothing below ``term`` from now on: not if it promised more already."""
        if term < self.promised or self.is_closed:
            return False
        self.promised = term
        return True

    def accept(self, term: int, outcome: Outcome) -> bool:
        """Whether the member accepts a leader's proposal."""
        if not self.promise(term):
            return False
        self.accepted = (term, outcome)
        return True

    def raise_floor(self, term: int) -> None:
        """A candidate says that nothing was decided in a lower term."""
        self.floor = max(self.floor, term)


def to_adopt(votes: Collection[tuple[int, tuple[int, Outcome] | None]]) -> Outcome | None:
    """The decision that a new leader has to propose: the one accepted in the highest term.

    :param votes: the floor of each member of its quorum, and what that member accepted
    :returns: None: nothing was decided before, and the leader is free
    """
    floor = max((floor for floor, _ in votes), default=0)
    accepted = [vote for _, vote in votes if vote is not None and vote[0] >= floor]
    return max(accepted, key=lambda vote: vote[0])[1] if accepted else None
