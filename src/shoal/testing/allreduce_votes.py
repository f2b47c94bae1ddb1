"""Questions and answers of a vote between members in simulated time: what :mod:`.allreduce_cores` asks through.

A question has its own way, beside the streams. The asker gives it up after a while; it may arrive later all the same.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from shoal.averaging.allreduce.commit import REFUSED_FOR, answer_question, to_event
from shoal.averaging.allreduce.effects import (
    AskForAcceptance,
    AskForOutcome,
    AskForPromise,
    Effect,
    Reply,
)
from shoal.averaging.allreduce.events import DECIDED, OVER, Event, MemberAnswered, MemberLeft
from shoal.averaging.allreduce.messages import AskOutcome, NotKnown, Prepare, Propose, Question
from shoal.averaging.allreduce.rounds import QUESTION_TIMEOUT
from shoal.testing.allreduce_members import Member
from shoal.testing.links import ASK_TIMEOUT, Links

PREFIX, GROUP = "test", b"g" * 16


@dataclass(eq=False)
class _Asked:
    """A question of one member to another one."""

    by: int
    to: int
    question: Question
    term: int | None
    burials: int
    is_open: bool = True
    """Whether the asker still waits."""


class Votes(Links[Member]):
    """Members that vote."""

    @abstractmethod
    def feed(self, me: int, event: Event) -> None:
        """Have a core take in an event, and carry out what follows."""

    @abstractmethod
    def carry_out(self, me: int, effect: Effect) -> list[Event]:
        """Do what a core says; return what happened at once."""

    def see_goodbye(self, me: int, other: int) -> None:
        """See :class:`.links.Links`."""
        self.feed(me, MemberLeft(other))

    def ask(self, me: int, effect: AskForOutcome | AskForPromise | AskForAcceptance) -> None:
        """Put a question of a member to others."""
        term: int | None = None
        question: Question = AskOutcome(PREFIX, GROUP)
        burials = 0
        match effect:
            case AskForOutcome(_, _, burials):
                pass
            case AskForPromise(_, term, _, burials, floor):
                question = Prepare(PREFIX, GROUP, term, floor)
            case AskForAcceptance(_, term, outcome):
                question = Propose(PREFIX, GROUP, term, outcome)
        for member in effect.members:
            asked = _Asked(me, member, question, term, burials)
            self.later(effect.delay, lambda asked=asked: self.do(me, lambda: self._put(asked)))  # type: ignore[misc]

    def _put(self, asked: _Asked) -> None:
        """A question leaves its asker."""
        me, member = asked.by, asked.to
        if self.members[me].core.phase in DECIDED:
            return
        if self.refuses(me, member):
            self.later(self.delay(), lambda: self.do(me, lambda: self._miss(asked, refused=True)))
        elif not (self.serves[member] or self.serves[me]):
            self.later(self.delay(), lambda: self.do(me, lambda: self._miss(asked)))
        else:
            self.later(ASK_TIMEOUT, lambda: self.do(me, lambda: self._miss(asked)))
            self.later(self.delay(me, member), lambda: self._arrive_at(asked))

    def _arrive_at(self, asked: _Asked) -> None:
        """A question comes to the other member, later if the link is cut meanwhile, or never."""
        if (asked.by, asked.to) in self.cuts:
            if self.rng.random() < 0.9:
                self.later(1.0, lambda: self._arrive_at(asked))
            return
        other = self.members[asked.to]
        if other.is_back:
            self._reply(asked, NotKnown())
        else:
            self._answer_soon(asked, self.now + QUESTION_TIMEOUT)

    def _answer_soon(self, asked: _Asked, until: float) -> None:
        """A question waits for its round to begin."""
        other = self.members[asked.to]
        if other.has_begun:
            self.do(asked.to, lambda: self._answer(asked))
        elif other.is_alive and self.now >= until:
            self._reply(asked, NotKnown())
        elif other.is_alive:
            self.later(0.05, lambda: self._answer_soon(asked, until))

    def _answer(self, asked: _Asked) -> None:
        one, me, question = self.members[asked.to], asked.by, asked.question
        if one.has_forgotten and one.core.phase in OVER:
            answer: Any = NotKnown()
        elif isinstance(question, AskOutcome):
            answer = one.core.answer()
        elif one.core.phase in OVER:
            answer = answer_question(one.core, question, me, self.now)
        else:
            answer = self._vote(asked.to, question, me)
        self._reply(asked, answer)

    def _reply(self, asked: _Asked, answer: Any) -> None:
        self.later(self.delay(asked.to, asked.by), lambda: self._hear_answer(asked, answer))

    def _vote(self, member: int, question: Question, asker: int) -> Any:
        event = to_event(question, asker)
        assert event is not None
        answer = None
        pending: list[Event] = []
        for effect in self.members[member].core.handle(event, self.now):
            if isinstance(effect, Reply):
                answer = effect.answer
            else:
                pending += self.carry_out(member, effect)
        for event_ in pending:
            self.feed(member, event_)
        self.wake(member)
        return answer

    def _hear_answer(self, asked: _Asked, answer: Any) -> None:
        """An answer arrives, unless the link is cut: then the asker's patience ends."""
        if (asked.to, asked.by) not in self.cuts:
            self.do(asked.by, lambda: self._take_answer(asked, answer))

    def _take_answer(self, asked: _Asked, answer: Any) -> None:
        if asked.is_open:
            asked.is_open = False
            self.members[asked.by].refused_since.pop(asked.to, None)
            self.feed(asked.by, MemberAnswered(asked.to, asked.term, answer, burials=asked.burials))

    def _miss(self, asked: _Asked, *, refused: bool = False) -> None:
        """A question has found nobody, or its answer was lost."""
        if not asked.is_open:
            return
        asked.is_open = False
        one, member, is_dead = self.members[asked.by], asked.to, False
        if refused and self.serves[member]:
            is_dead = self.now - one.refused_since.setdefault(member, self.now) >= REFUSED_FOR
        else:
            one.refused_since.pop(member, None)
        self.feed(asked.by, MemberAnswered(member, asked.term, None, is_dead, asked.burials))
