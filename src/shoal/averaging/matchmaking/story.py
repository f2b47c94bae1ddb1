"""What a search for a group saw and did, in words: for log lines and for the error of a search that failed. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.averaging.matchmaking.candidate import Candidate
from shoal.p2p.identity import PeerID
from shoal.utils.text import printable

MAX_NOTES = 12
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

    def __init__(self, key: str, target: int | None, minimum: int) -> None:
        self.plan = "nothing was planned yet"
        """The reason of the latest decision."""
        self.key = key
        self._sizes = _sizes(minimum, target)
        self._began_at = 0.0
        self._status_pause = FIRST_STATUS
        self.next_status = math.inf
        """When to say again that the search goes on."""
        self._polls = 0
        self._records = 0
        self._looking = 0
        self._other_schema: dict[PeerID, None] = {}
        self._answers: dict[PeerID, str] = {}
        self._notes: deque[str] = deque(maxlen=MAX_NOTES)

    def begin(self, now: float) -> None:
        self._began_at = now
        self.next_status = now + FIRST_STATUS

    def summary(self, now: float) -> SearchStory:
        """The facts as they are now."""
        asked = tuple((str(leader), answer) for leader, answer in self._answers.items())
        return SearchStory(self.key, self._looking, asked, now - self._began_at)

    def saw(self, records: int, looking: int) -> None:
        """The latest poll: ``looking`` other peers of this schema look for a group, of ``records`` under the key."""
        self._polls += 1
        self._records = records
        self._looking = looking

    def saw_other_schema(self, peer_id: PeerID) -> None:
        if len(self._other_schema) < MAX_PEERS_NAMED:
            self._other_schema[peer_id] = None

    def asked(self, leader: PeerID) -> None:
        self._answers[leader] = "no answer yet"
        while len(self._answers) > MAX_PEERS_NAMED:
            del self._answers[next(iter(self._answers))]

    def answered(self, leader: PeerID, answer: str, now: float) -> None:
        self._answers[leader] = printable(answer)
        self.note(now, f"{leader}: {answer}")

    def note(self, now: float, text: str) -> None:
        self._notes.append(f"{now - self._began_at:.2f} s: {printable(text)}")

    def status(self, now: float, candidates: Sequence[Candidate], me: PeerID) -> str:
        """One line for a search that goes on."""
        self._status_pause = min(2 * self._status_pause, SLOWEST_STATUS)
        self.next_status = now + self._status_pause
        return (
            f"looking for a group under {self.key!r} for {now - self._began_at:.0f} s: "
            f"{self._seen(candidates, me)}; {self.plan}{self._asked()}"
        )

    def explain(self, now: float, candidates: Sequence[Candidate], me: PeerID) -> str:
        """The text of the error when the search has failed."""
        text = (
            f"found no group of {self._sizes} under key {self.key!r} in {now - self._began_at:.1f} s: "
            f"{self._seen(candidates, me)}; {self.plan}{self._asked()}"
        )
        if self._notes:
            text += f"; latest events: {'; '.join(self._notes)}"
        return text

    def _seen(self, candidates: Sequence[Candidate], me: PeerID) -> str:
        if self._polls == 0:
            return "the DHT never answered who else is declared there"
        others = sum(candidate.peer_id != me for candidate in candidates)
        found = {0: "no other peer looks", 1: "1 other peer looks"}
        text = found.get(self._looking, f"{self._looking} other peers look")
        text += f" for a group there ({self._records} records in all, this one's included)"
        if others != self._looking:
            text += f", this one counts on {others} of them"
        if self._other_schema:
            shown = ", ".join(map(str, self._other_schema))
            text += (
                f", peers that average tensors of another schema: {shown}"
                " (shapes, dtypes, compression, part_size_bytes, min_group_size or min_vector_size differ)"
            )
        return text

    def _asked(self) -> str:
        if not self._answers:
            return "; asked nobody"
        return "; asked " + ", ".join(f"{leader} ({answer})" for leader, answer in self._answers.items())


def _sizes(minimum: int, target: int | None) -> str:
    if target is None:
        return f"{minimum} or more"
    return str(minimum) if minimum == target else f"{minimum} to {target}"
