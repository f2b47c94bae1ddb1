"""How a member stands to its leader: whom it follows, what it promised, and how it finds another leader. Pure.

A member that lost the leader asks all others what they know of the decision, and looks for a new leader. The first
member in the group's order that can be reached *stands*, in a term of its own (:mod:`.voter`). The others wait for
their turn: :data:`TURN` seconds for each member before them that they could reach so far. The candidate leads when a
quorum has promised to follow. It waits a moment longer for those that have not answered, since a member without a
promise is left behind.

**The floor.** A quorum without an accepted proposal shows that nothing was decided in a lower term, or will be. But
only the candidate knows. Another candidate, whose quorum has other members, might find a proposal that one member
accepted, and would have to adopt it, after members had dropped these averages by the word of the first one. So a
candidate that is free to propose what it likes asks once more, and tells that *floor*. It leads when a quorum knows it:
then no later candidate adopts anything from below.

A member that hears a living leader makes no promise to another one. So one broken connection deposes nobody.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal.averaging.allreduce.effects import AskForOutcome, AskForPromise, Effect, StopLeading
from shoal.averaging.allreduce.events import LEAD_TRANSITIONS, Lead, MemberAnswered, Roles
from shoal.averaging.allreduce.evidence import Evidence
from shoal.averaging.allreduce.messages import NotKnown, Outcome, Promised, Refused, Undecided
from shoal.averaging.allreduce.voter import Voter, is_quorum, leader_of, next_term, to_adopt
from shoal.sansio.core import NEVER
from shoal.sansio.machine import Machine

TURN = 1.0
"""Seconds that a member gives each one before it to stand."""
GATHER = 1.0
"""Seconds that a candidate with a quorum waits for the promises of members that do not answer."""
LAG = 5.0
"""Likewise of members that still hear the old leader: they notice the loss of a silent one a little later."""
STAND = 10.0
"""Seconds after which a candidate without a quorum lets others stand."""
ASK_AGAIN = 0.25
"""Seconds between two questions to one member."""
ASK_DEAD_AGAIN = 1.0
"""Likewise to one that is taken for dead."""


class Election:
    """``term``: the one that this member follows, leads or stands in. ``story``: how the last leader was lost."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.voter = Voter()
        self.term = 0
        self.story = ""
        self.since = NEVER
        """When the leader was lost; NEVER while there is one that has shown that it leads."""
        self.evidence = Evidence(roles, self.voter)
        self.lost: set[int] = set()
        """Members that could not be reached last. A hint: for the order of candidates, and for a member that is not
        ready, which gives up at once if a quorum seems to be lost."""
        self.promises: dict[int, Promised] = {}
        """Of the members that follow this candidate."""
        self._machine = Machine(Lead.LEADING if roles.me == 0 else Lead.FOLLOWING, LEAD_TRANSITIONS)
        self._turn_from = NEVER
        self._stood_at = NEVER
        self._floor = 0
        """The term of this candidate, once it knows that no decision of a lower term was made; 0 before."""
        self._seen = 0
        """The highest term that anybody spoke of."""

    @property
    def lead(self) -> Lead:
        return self._machine.state

    @property
    def leader(self) -> int:
        return leader_of(self.term, self.roles.size)

    @property
    def has_leader(self) -> bool:
        return self.lead in (Lead.FOLLOWING, Lead.LEADING)

    @property
    def deadline(self) -> float:
        if self.lead is Lead.LEADERLESS:
            return self._turn
        if self.lead is Lead.CANDIDATE:
            return self._stood_at + (self._patience if self._has_quorum and not self._floor else STAND)
        return NEVER

    @property
    def _has_quorum(self) -> bool:
        members = {self.roles.me, *self.promises}
        return is_quorum(members, self.roles.size, self._caster)

    @property
    def _caster(self) -> int:
        """The member that has the casting vote, as far as this candidate heard."""
        if self.voter.casts:
            return self.roles.me
        return next((member for member, one in self.promises.items() if one.casts), 0)

    @property
    def _patience(self) -> float:
        """Seconds for which a candidate with a quorum waits for the rest, since it stood."""
        silent = [one for one in self.roles.others if one not in self.promises]
        return LAG if self.evidence.still_hears_leader(silent) else GATHER

    def shift(self, seconds: float) -> None:
        """Time that does not count: this process was stopped, or busy."""
        self.since += seconds
        self._turn_from += seconds
        self._stood_at += seconds

    # losing a leader, and standing

    def lose_leader(self, reason: str, now: float, *, others_first: bool = False) -> list[Effect]:
        """There is no leader any more, for this member. ``others_first``: another one may lead already."""
        self._machine.move(Lead.LEADERLESS)
        self.story = reason
        self.since = min(self.since, now)
        self._turn_from = now + TURN if others_first else now
        self.evidence.forget_answers()
        return [self._ask_all(), *self.consider(now)]

    def heard_leader(self) -> None:
        """The leader of this term has shown that it leads."""
        self.since = NEVER

    def consider(self, now: float) -> list[Effect]:
        """Stand, if it is this member's turn; let others, if nobody promises anything."""
        if self.lead is Lead.CANDIDATE and now >= self._stood_at + STAND and not self.is_elected(now):
            return self.step_down(now)
        if self.lead is not Lead.LEADERLESS or now < self._turn:
            return []
        self._machine.move(Lead.CANDIDATE)
        self.term = next_term(max(self.voter.promised, self._seen), self.roles.me, self.roles.size)
        self._stood_at = now
        self.promises = {}
        self._floor = 0
        self.voter.promise(self.term)
        return [self._ask_for_promise(self.evidence.others)]

    def _ask_for_promise(self, members: Iterable[int], delay: float = 0.0) -> Effect:
        return AskForPromise(tuple(members), self.term, delay, self.evidence.burials, self._floor)

    def _ask_all(self) -> Effect:
        return AskForOutcome(self.evidence.others, burials=self.evidence.burials)

    @property
    def _turn(self) -> float:
        if not self.roles.serves(self.roles.me):
            return NEVER
        ahead = [one for one in range(self.roles.me) if self.roles.serves(one)]
        count = sum(one not in self.lost and one not in self.evidence.dead for one in ahead)
        return self._turn_from + TURN * count

    def step_down(self, now: float) -> list[Effect]:
        """This candidate does not stand any more; the others have their turn first."""
        self._machine.move(Lead.LEADERLESS)
        self._turn_from = now + TURN  # others first
        self.promises = {}
        return [StopLeading(), self._ask_all()]

    def is_elected(self, now: float) -> bool:
        """Whether this candidate leads from now on."""
        if self.lead is Lead.CANDIDATE and self._floor:
            return self._is_free  # it has waited for the others before it told its floor
        return self._is_followed(now) and self._adopted is not None

    def _is_followed(self, now: float) -> bool:
        """Whether a quorum follows this candidate, and no other member will in the next moment."""
        if self.lead is not Lead.CANDIDATE or not self._has_quorum:
            return False
        silent = set(self.roles.others) - self.promises.keys() - self.lost - self.evidence.dead
        return not silent or now >= self._stood_at + self._patience

    @property
    def _adopted(self) -> Outcome | None:
        """The decision that this candidate has to propose, if one may have been made."""
        votes = [(one.floor, one.accepted) for one in self.promises.values()]
        return to_adopt([(self.voter.floor, self.voter.accepted), *votes])

    @property
    def _is_free(self) -> bool:
        """Whether a quorum knows that no decision of a lower term was made. Before, nothing may be undone."""
        if self.voter.floor < self.term:
            return False
        knowing = {member for member, one in self.promises.items() if one.floor >= self.term}
        return is_quorum({self.roles.me, *knowing}, self.roles.size, self._caster)

    def tell_floor(self, now: float) -> list[Effect]:
        """A candidate that found nothing to adopt lets those that follow it know that."""
        if self._floor or not self._is_followed(now) or self._adopted is not None:
            return []
        self._floor = self.term
        self.voter.raise_floor(self.term)
        followers = sorted(self.promises)
        return [self._ask_for_promise(followers)] if followers else []

    def win(self, own: Promised) -> Outcome | None:
        """Lead. What this member says of itself counts as a promise.

        :returns: the decision that has to be proposed, if one may have been made
        """
        adopted = self._adopted
        if adopted is None:
            self.evidence.retract(self.term - 1)  # no former leader's proposal will be decided
        self._machine.move(Lead.LEADING)
        self.since = NEVER
        self.promises[self.roles.me] = own
        return adopted

    # the words of others

    def lose_member(self, member: int) -> None:
        """The connection to a member ended."""
        self.lost.add(member)

    def promise(self, member: int, term: int, floor: int = 0) -> bool:
        """``member`` asks for this one's promise: whether it gets it, and is followed from now on. It says that no
        decision was made below ``floor``.
        """
        self._seen = max(self._seen, term)
        self.evidence.show_life(member)
        if leader_of(term, self.roles.size) != member or not self.voter.promise(term):
            return False
        self.voter.raise_floor(floor)
        self.lost.discard(member)
        self._machine.move(Lead.FOLLOWING)
        self.term = term
        return True

    def accept(self, member: int, term: int, outcome: Outcome) -> bool:
        """``member`` leads, and proposes an outcome: whether this one accepts it."""
        self._seen = max(self._seen, term)
        self.evidence.show_life(member)
        return leader_of(term, self.roles.size) == member and self.voter.accept(term, outcome)

    def on_answer(self, event: MemberAnswered, now: float) -> list[Effect]:
        """A member answered, or could not be asked. What it knows of the outcome is the caller's affair."""
        member, answer, burials = event.member, event.answer, self.evidence.burials
        self.weigh(event, now)
        match answer:
            case Refused(promised):
                self._seen = max(self._seen, promised)
                if event.term == self.term and promised > self.term and self.lead is Lead.CANDIDATE:
                    return self.step_down(now)
            case Promised() if event.term == self.term and self.lead is Lead.CANDIDATE:
                self.promises[member] = answer
                # It may have been asked before the floor was known. Only a quorum has to know it.
                tell = [self._ask_for_promise([member], ASK_AGAIN)] if answer.floor < self._floor else []
                return [*tell, *self.ask_followers([member], event.burials)]
        return [*self.ask_followers(self.promises, burials), *self._ask_again(event), *self.consider(now)]

    def ask_followers(self, members: Iterable[int], burials: int) -> list[Effect]:
        """A candidate asks those that promised to follow it what they know of the decision, if they were asked last
        before a member died, after so many ``burials``.

        Else it would hope for their news as long as it waits.
        """
        asked = tuple(sorted(members)) if self.lead is Lead.CANDIDATE else ()
        is_old = burials < self.evidence.burials
        return [AskForOutcome(asked, burials=self.evidence.burials)] if asked and is_old else []

    def weigh(self, event: MemberAnswered, now: float) -> None:
        """Take an answer, or the lack of one, as a sign of life or death."""
        member, answer = event.member, event.answer
        if answer is None and not self.roles.can_talk(self.roles.me, member):
            return
        if answer is None or isinstance(answer, NotKnown):
            self.lost.add(member)
        else:
            self.lost.discard(member)
        if isinstance(answer, Undecided) and self.lead is Lead.CANDIDATE and member in self.promises:
            answer = msgspec.structs.replace(answer, has_leader=False)  # it means this candidate
        if answer is not None:
            self.evidence.hear(member, answer, event.burials, now)
        elif event.is_dead:
            self.evidence.bury(member)

    def _ask_again(self, event: MemberAnswered) -> list[Effect]:
        member, evidence = event.member, self.evidence
        if member in evidence.left:
            return []
        delay = ASK_DEAD_AGAIN if member in evidence.dead else ASK_AGAIN
        if event.term is None and self.lead is Lead.LEADERLESS:
            return [AskForOutcome((member,), delay, evidence.burials)]
        if event.term == self.term and self.lead is Lead.CANDIDATE:
            return [self._ask_for_promise([member], delay)]
        return []
