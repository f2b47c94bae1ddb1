"""What a search for a group saw and did, in words: for log lines and for the error of a search that failed. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.events import Log
from shoal.p2p.identity import PeerID
from shoal.utils import figures
from shoal.utils.text import printable

MAX_NOTES = 12
GREET_AFTER = 0.5
"""Seconds until an averager's first search says that it waits for others: by then it knows who is there."""
MAX_PEERS_NAMED = 8
FIRST_STATUS = 30.0
"""Seconds until a search that goes on says so; each later line comes after twice as long, up to the next value."""
SLOWEST_STATUS = 300.0


@dataclass(frozen=True)
class SearchStory:
    """What one search saw, as data.

    :param key: the group key, prefix and bits, of its end
    :param peers_seen: other peers of the same schema that looked for a group under that key, at the latest poll
    :param asked: the leaders that it asked last (base58 PeerIDs), each with its last answer in words; at most 8
    :param seconds: how long it lasted
    """

    key: str
    peers_seen: int
    asked: tuple[tuple[str, str], ...]
    seconds: float


class StoryTeller:
    """Collects facts while the search goes on; bounded, whatever others declare."""

    def __init__(self, key: str, target: int | None, minimum: int, *, is_first: bool = False) -> None:
        """``is_first``: its user has not seen yet that peers find each other, and is told more."""
        self.plan = "nothing was planned yet"
        """The reason of the latest decision."""
        self.key = key
        self._target = target
        self._minimum = minimum
        self._is_first = is_first
        self._has_greeted = not is_first
        self._began_at = 0.0
        self._status_pause = FIRST_STATUS
        self.next_status = math.inf
        """When to say again that the search goes on."""
        self._polls = 0
        self._taken = 0
        self._looking = 0
        self._other_schema: dict[PeerID, str] = {}
        """In what they differ, as far as it is known."""
        self._answers: dict[PeerID, str] = {}
        self._notes: deque[str] = deque(maxlen=MAX_NOTES)

    def search_began(self, now: float) -> None:
        self._began_at = now
        self.next_status = now + (FIRST_STATUS if self._has_greeted else GREET_AFTER)

    def summary(self, now: float) -> SearchStory:
        """The facts as they are now."""
        asked = tuple((str(leader), answer) for leader, answer in self._answers.items())
        return SearchStory(self.key, self._looking, asked, now - self._began_at)

    def saw(self, others: int, looking: int, other_schema: int) -> None:
        """The latest poll: of ``others`` that are declared, ``looking`` look for a group like this peer."""
        self._polls += 1
        self._looking = looking
        self._taken = others - looking - other_schema

    def saw_other_schema(self, peer_id: PeerID) -> bool:
        """Whether that is news, and there is room to note in what it differs."""
        if peer_id in self._other_schema or len(self._other_schema) >= MAX_PEERS_NAMED:
            return False
        self._other_schema[peer_id] = ""
        return True

    def learned_difference(self, peer_id: PeerID, difference: str) -> None:
        if peer_id in self._other_schema:
            self._other_schema[peer_id] = difference

    def asked(self, leader: PeerID) -> None:
        self._answers[leader] = "no answer yet"
        while len(self._answers) > MAX_PEERS_NAMED:
            del self._answers[next(iter(self._answers))]

    def answered(self, leader: PeerID, answer: str, now: float) -> None:
        self._answers[leader] = printable(answer)
        self.note(now, f"{leader}: {answer}")

    def note(self, now: float, text: str) -> None:
        self._notes.append(f"{now - self._began_at:.2f} s: {printable(text)}")

    # ---- lines for people

    def status(
        self, now: float, candidates: Sequence[Candidate], me: PeerID, *, begins_at: float, is_late: bool
    ) -> Log | None:
        """A line for a search that goes on, if there is something to say.

        :param begins_at: when a group that is not full begins
        :param is_late: a group was expected before now
        """
        if not self._has_greeted:
            if self._polls == 0:
                self.next_status = now + GREET_AFTER
                return None
            self._has_greeted = True
            self.next_status = self._began_at + FIRST_STATUS
            return self._greeting(len(candidates), begins_at - now)
        self._status_pause = min(2 * self._status_pause, SLOWEST_STATUS)
        self.next_status = now + self._status_pause
        missing = self._minimum - len(candidates)
        state = f"still waiting for {_peers(missing, 'more')}" if missing > 0 else "no group yet"
        waited = figures.duration(round(now - self._began_at))
        text = f"{self._prefix}: {state} after {waited}: {self._seen(candidates, me)}{self._done()}"
        return Log(text, is_warning=is_late)

    def found(self, now: float, members: int) -> Log | None:
        """The line that says that a group stands, where its user waits for one: without a first line before, it would
        be one in every round.
        """
        if not self._is_first and self._status_pause == FIRST_STATUS:
            return None
        return Log(
            f"{self._prefix}: found a group of {members} after {figures.duration(now - self._began_at)}",
            is_warning=False,
        )

    def explain(self, now: float, candidates: Sequence[Candidate], me: PeerID) -> str:
        """The text of the error when the search has failed."""
        text = (
            f"found no group of {self._sizes} with {self._place} in {figures.duration(now - self._began_at)}: "
            f"{self._seen(candidates, me)}{self._done()}"
        )
        if self._notes:
            text += f"; latest events: {'; '.join(self._notes)}"
        return text

    def _greeting(self, here: int, begins_in: float) -> Log | None:
        missing, target = self._minimum - here, self._target
        if missing > 0:
            text = f"waiting for {_peers(missing, 'more')} with {self._place} (a group has {self._sizes})"
        elif target is None or here < target:
            begins = f"the group begins in {figures.duration(max(begins_in, 0.0))}"
            sooner = "" if target is None else f", or at once with {_peers(target - here, 'more')}"
            text = f"{here} peers with {self._place} are here; {begins}{sooner}"
        else:
            return None  # there are enough for a full group, which is about to form
        return Log(f"{self._prefix}: {text}", tells_how_to_join=True)

    @property
    def _prefix(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def _place(self) -> str:
        """The group key, in a user's words."""
        bits = self.key.rpartition(".")[2].removeprefix("0b")
        text = f"prefix {self._prefix!r}"
        if bits.startswith("auto"):
            return f"{text} (part {bits.removeprefix('auto')} of a large swarm)"
        return f"{text} and group bits {bits!r}" if bits else text

    @property
    def _sizes(self) -> str:
        if self._target is None:
            return f"{self._minimum} or more peers"
        if self._minimum == self._target:
            return figures.count(self._minimum, "peer")
        return f"{self._minimum} to {self._target} peers"

    def _seen(self, candidates: Sequence[Candidate], me: PeerID) -> str:
        if self._polls == 0:
            return "the DHT has not answered who else is there"
        others = sum(candidate.peer_id != me for candidate in candidates)
        found = {0: "no other peer looks", 1: "1 other peer looks"}
        text = found.get(self._looking, f"{self._looking} other peers look")
        text += f" for a group with {self._place}"
        if self._taken > 0:
            text += f"; {_peers(self._taken, 'other')} found one, or stopped looking"
        if others != self._looking:
            text += f"; this one counts on {others}"
        for peer, difference in self._other_schema.items():
            text += f"; {peer} averages something else under this prefix"
            text += f" ({difference})" if difference else ""
        return text

    def _done(self) -> str:
        """What was planned and asked, if there was anybody to plan with."""
        text = f"; {self.plan}" if self._looking or self._answers else ""
        if self._answers:
            text += "; asked " + ", ".join(f"{leader} ({answer})" for leader, answer in self._answers.items())
        return text


def _peers(number: int, which: str) -> str:
    return figures.count(number, f"{which} peer")
