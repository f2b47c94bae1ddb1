"""What a member knows of the votes and the ends of the others, and what follows for itself. Pure.

A member that lost the leader sees silence, refused connections, goodbyes and answers. They weigh differently:

- **Taken for dead**: its machine has said for a while that nobody listens, or it does not know the round. A firewall
  says the same, and so does a member that learns of its group late. So this decides nothing. It says whom not to wait
  for, and for how long to hope. Such a member is asked on, and one that answers counts as living.
- **Left**: it said itself that its process ends. It will never say, accept or decide anything again.

**The rule.** A member that was ready *fails plainly* only where no decision to commit that counts it was made, or will
be. Else it is in doubt. That is so in three cases:

1. It has *told* nobody that it is ready: not the leader, not a candidate, and it has proposed nothing itself. Or the
   leader that it told, or a later one, orders a repair, or excludes it. Then that one has proposed nothing, and no
   proposal of a lower term will be decided (:attr:`.Voter.floor`). The same holds if it leads itself by now.
2. The members that may have accepted such a proposal, or still may, are no quorum. All may, but for this member, if it
   has accepted none, and those that had left before it first told that it is ready: the proposal came later.
3. Every other member has left or has answered since the last one left. None that lives has accepted a proposal to
   commit, those that live are no quorum without this member, and those that left after it was ready were none.

A member that has failed accepts no proposal that counts it (:meth:`~.decision.Decision.on_vote`). So in each case
nothing that happens later makes the failure wrong.

Why the third one holds: a leader that has left can only have counted acceptances that were given before. A member that
lives says so if it gave one. No leader that lives had proposed anything, since it would have accepted that itself. What
it proposes later needs a quorum of those that live.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum, auto

from shoal.averaging.allreduce.events import Roles
from shoal.averaging.allreduce.messages import Accepted, Answer, NotKnown, Promised, Undecided
from shoal.averaging.allreduce.voter import Voter, is_quorum

NOT_KNOWN_FOR = 15.0
"""Seconds for which a member says that it does not know the round, before it is taken for dead: the leader excludes a
member that learns of its group later than that.
"""


class Hope(Enum):
    """What a member that lost the leader can still expect. See :mod:`.evidence` for what it may conclude from that."""

    QUORUM = auto()
    """The members that may live are a quorum."""
    NEWS = auto()
    """They are none, but one of them may know of a decision, or have to be asked yet."""
    NONE = auto()
    """No member that seems to live knows of a decision, and none will be taken unless others come back."""


class Evidence:
    """Of one member in one round."""

    def __init__(self, roles: Roles, voter: Voter) -> None:
        self.dead: set[int] = set()
        """Members that are taken for dead, and those that have left."""
        self.left: set[int] = set()
        """Members whose processes have ended, as they said themselves."""
        self.burials = 0
        """How often a member was found dead. An answer that was asked for before the last time counts for little: the
        member that died may have told the decision to the one that answered, afterwards."""
        self._told: set[int] = set()
        """Terms in which somebody may have learned that this member is ready, and may count it."""
        self._roles = roles
        self._voter = voter
        self._left_before: frozenset[int] = frozenset()
        """Members that had left when this one first told that it is ready."""
        self._answers: dict[int, Answer] = {}
        """The last answer of each member since one was last found dead."""
        self._holders: dict[int, bool] = {}
        """Of members that said so: whether the founder handed its casting vote on to them."""
        self._not_known_since: dict[int, float] = {}

    @property
    def others(self) -> tuple[int, ...]:
        """Members that may still answer."""
        return tuple(one for one in self._roles.others if one not in self.left)

    # what happens

    @property
    def has_told(self) -> bool:
        """Whether somebody may count this member."""
        return bool(self._told)

    def tell(self, term: int) -> None:
        """From now on somebody may know that this member is ready: the leader of a term, or its followers."""
        if not self._told:
            self._left_before = frozenset(self.left)
        self._told.add(term)

    def retract(self, term: int) -> None:
        """The leader of a term has this member average again, or excludes it. It has proposed nothing yet, and will not
        count what it was told before. Nor will what was proposed in a lower term be adopted: a quorum knows its floor.
        """
        self._told = {told for told in self._told if told > term}

    def leave(self, member: int) -> None:
        """A member said that its process ends."""
        self.left.add(member)
        self.bury(member)

    def bury(self, member: int) -> None:
        """A member is taken for dead."""
        if member not in self.dead:
            self.dead.add(member)
            self.burials += 1
            self._answers.clear()

    def forget_answers(self) -> None:
        """All are asked anew."""
        self._answers.clear()

    def hear(self, member: int, answer: Answer, burials: int, now: float) -> None:
        """A member has answered a question that was asked after so many burials."""
        if isinstance(answer, NotKnown):
            if now - self._not_known_since.setdefault(member, now) >= NOT_KNOWN_FOR:
                self.bury(member)
        else:
            self._not_known_since.pop(member, None)
            self.show_life(member)
        if isinstance(answer, Undecided | Promised | Accepted):
            self._holders[member] = answer.casts
        if burials == self.burials:
            self._answers[member] = answer

    def show_life(self, member: int) -> None:
        """A member asks or answers something: it was taken for dead by mistake."""
        if member not in self.left:
            self.dead.discard(member)

    # what follows

    @property
    def casters(self) -> set[int]:
        """Members with which half of the group may be a quorum, as far as this one knows."""
        if self._voter.casts:
            return {self._roles.me}
        known = [member for member, casts in self._holders.items() if casts]
        if known or self._roles.size % 2:
            return set(known) or {0}
        unknown = (one for one in self._roles.others if self._roles.serves(one) and one not in self._holders)
        return {0, *unknown}

    def may_decide(self, members: Collection[int]) -> bool:
        """Whether these members could decide, whichever of those that may have the casting vote has it."""
        return any(is_quorum(members, self._roles.size, caster) for caster in self.casters)

    def may_decide_without(self, without: Collection[int]) -> bool:
        """Likewise of all but these."""
        return self.may_decide([one for one in range(self._roles.size) if one not in without])

    def still_hears_leader(self, members: Iterable[int]) -> bool:
        """Whether one of these said last that it hears a living leader."""
        answers = (self._answers.get(member) for member in members)
        return any(isinstance(one, Undecided) and one.has_leader for one in answers)

    @property
    def hope(self) -> Hope:
        if self.may_decide_without(self.dead):
            return Hope.QUORUM
        answers = [self._answers.get(member) for member in self._roles.others if member not in self.dead]
        known = (
            isinstance(one, NotKnown | Promised) or (isinstance(one, Undecided) and not one.has_leader)
            for one in answers
        )
        return Hope.NONE if all(known) else Hope.NEWS

    def may_be_counted(self) -> bool:
        """Whether a decision to commit that counts this member may have been made, or may yet be.

        The rule is at the head of :mod:`.evidence`.
        """
        if not self._told:
            return False
        me, has_accepted = self._roles.me, self._voter.has_accepted_commit
        closed = self._left_before if has_accepted else self._left_before | {me}
        if not self._may_ever_decide([one for one in range(self._roles.size) if one not in closed]):
            return False
        if has_accepted or not all(self._has_accepted_none(member) for member in self.others):
            return True
        return self._may_ever_decide(self.others) or self._may_ever_decide(self.left - self._left_before)

    def _has_accepted_none(self, member: int) -> bool:
        match self._answers.get(member):
            case Undecided(_, _, has_accepted):
                return not has_accepted
            case Promised(accepted=accepted):
                return accepted is None or accepted[1].reason is not None
        return False

    def _may_ever_decide(self, members: Collection[int]) -> bool:
        """Whether these could decide, or could have: the casting vote may be on its way to any of them."""
        half = 2 * len(members) == self._roles.size
        if half and not self._voter.casts and any(one != self._roles.me for one in members):
            return True
        return is_quorum(members, self._roles.size, self._roles.me if self._voter.casts else 0)
