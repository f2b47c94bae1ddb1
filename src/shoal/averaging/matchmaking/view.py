"""What a search knows of other peers, and how sure it may be that it knows them all. Pure: ``now`` is an argument."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from shoal.averaging.grid import UNKNOWN_ROUND
from shoal.averaging.matchmaking.candidate import Candidate, in_order
from shoal.averaging.matchmaking.latecomers import is_stale, still_missing
from shoal.averaging.matchmaking.left_out import NOBODY, LeftOut
from shoal.averaging.matchmaking.messages import (
    Declaration,
    DeclaredState,
    SearchId,
    search_marks,
)
from shoal.p2p.identity import PeerID

FASTEST_POLL = 0.01
SLOWEST_POLL = 0.5
"""Seconds between polls: the period doubles from the first to the second, and starts anew when somebody appears."""
SETTLE_AFTER_START = 2.5
"""A view is not settled before this many declaration times after this search started: peers that start in one
instant are all visible then, unless the DHT takes several times longer for them than for this peer."""
MANY_VISIBLE_AFTER = 1.0
"""The number of all is not known before this many seconds: the DHT is slower for some."""
SETTLE_AFTER_NEWCOMER = 1.0
"""... nor before this many declaration times after somebody appeared: peers seldom come alone."""
LATENCY_DECAY = 0.8
"""The longest time that the DHT took counts, but not for ever: with each later answer it counts this much less."""
GONE_WITHIN = 5.0
"""A peer that wanted to start earlier than this one by more seconds is of an earlier round."""


@dataclass(frozen=True)
class Known:
    """What a search leaves to the next search of its peer."""

    start_times: Mapping[PeerID, float]
    """Of the last search of every peer that was declared at the latest poll, over or not."""
    absent: frozenset[PeerID] = frozenset()
    """Those of them that did not search again while this search went on. They may have died, or be far slower. So
    later searches do not wait for them: the record of a killed peer stays for a minute, and would slow down each
    round of the others for so long."""


NOTHING_KNOWN = Known(MappingProxyType({}))


class Look(enum.Enum):
    """When to poll next, for the sake of a decision."""

    AS_PLANNED = enum.auto()
    NOW = enum.auto()
    WHEN_STARTERS_VISIBLE = enum.auto()
    """As soon as a poll shows every peer that started in the same instant."""
    WHEN_SETTLED = enum.auto()
    """As soon as a poll can show that nobody else has come."""
    WHEN_ALL_VISIBLE = enum.auto()
    """As soon as a poll can show how many peers there are, though the DHT is slow for some."""


class View:
    """The peers of this search's key and schema, as far as they are visible, and when to look again."""

    def __init__(
        self,
        me: Candidate,
        schema_hash: bytes,
        *,
        opens_at: float = -math.inf,
        before: View | None = None,
        known: Known = NOTHING_KNOWN,
        is_seated: bool = False,
    ) -> None:
        """``opens_at``: before that time plan without peers in another round of the grid; ``before``: the view of the
        same search at another place; ``known``: what the search before has left; ``is_seated``: whether its peers were
        dealt to its key, and count their rounds.
        """
        self.followers: dict[int, Candidate] = {}
        """By the token of their request, in the order in which they came."""
        self.latency: float = 0.0 if before is None else before.latency
        """The longest time, lately, that the DHT took for a declaration or a poll, in seconds."""
        self.records: dict[PeerID, float] = {}
        """As :attr:`Known.start_times`."""
        self.next_poll = math.inf
        self.is_polling = False
        self._me = me
        self._known = known
        self._opens_at = opens_at
        self._is_seated = is_seated
        self._begun_before: Counter[int] | None = None
        """How many had a group when this peer began to look, by their rounds of the grid; None: that is not known."""
        self._schema_hash = schema_hash
        self._declared: dict[PeerID, tuple[Candidate, Declaration]] = {}
        self._busy: list[Candidate] = []
        """Who had a group, or had given up, at the latest poll."""
        self._grouped: set[PeerID] = set()
        """Who was in a group at the latest poll, by its own word."""
        self._out: LeftOut = LeftOut(NOBODY if before is None else before._out.stalled)
        self._last_seen: dict[PeerID, float] = {}
        """The latest start time with which a peer was seen."""
        self._ever: dict[PeerID, Candidate] = {}
        """Everybody who was seen looking for a group, as it was seen last."""
        self._polls_every = FASTEST_POLL
        self._started_at = -math.inf
        self._last_newcomer = -math.inf
        self._last_poll_began = -math.inf
        self._outdated_at = -math.inf
        self._looked_at = -math.inf

    def start(self, now: float) -> None:
        self._started_at = self._last_newcomer = self._looked_at = now

    # ---- who is there

    def take_in(
        self,
        peers: Iterable[tuple[PeerID, Declaration]],
        began_at: float,
        now: float,
        seconds: float | None = None,
    ) -> list[PeerID]:
        """Replace what was declared before by the result of a poll; return the peers of another schema.

        :param seconds: that the DHT took to answer, if not the whole poll
        """
        self.note_latency(now - began_at if seconds is None else seconds)
        self._last_poll_began = began_at
        self.schedule_poll(now)
        # What is not declared any more has expired: its peer is gone.
        self._declared.clear()
        self._busy.clear()
        self._grouped.clear()
        self.records.clear()
        other_schema = []
        groups = []
        for peer_id, declaration in peers:
            if peer_id == self._me.peer_id:
                continue
            if declaration.schema_hash != self._schema_hash:
                other_schema.append(peer_id)
                continue
            self.records[peer_id] = declaration.start_time
            if declaration.state is DeclaredState.TAKEN:
                self.leave_out(peer_id, math.inf, declaration.start_time)
                groups.append(declaration.group)
                candidate = _candidate(peer_id, declaration)
                self._busy.append(candidate)
                if declaration.group:
                    self._grouped.add(peer_id)
                if self._was_here(peer_id, declaration):
                    self._ever[peer_id] = candidate
            else:
                candidate = _candidate(peer_id, declaration)
                self._declared[peer_id] = (candidate, declaration)
                self.note_seen(candidate, now)
        for group in groups:
            self._leave_out_marked(group, math.inf, now)
        if self._begun_before is None:
            grouped = [one for one in self._busy if one.peer_id in self._grouped]
            self._begun_before = Counter(one.swarm_round for one in grouped)
        return other_schema

    def _was_here(self, peer_id: PeerID, taken: Declaration) -> bool:
        """Whether a peer that has a group looked for it beside this one, although that was over too soon to be seen."""
        if taken.swarm_round != self._me.swarm_round:
            return False  # the key was that of another group of the grid then
        is_recent = taken.start_time > self._me.start_time - GONE_WITHIN
        return is_recent and taken.start_time > self._known.start_times.get(peer_id, -math.inf)

    def note_seen(self, candidate: Candidate, now: float) -> None:
        self._ever[candidate.peer_id] = candidate
        if self._last_seen.get(candidate.peer_id, -math.inf) < candidate.start_time:
            self._last_seen[candidate.peer_id] = candidate.start_time
            self._last_newcomer = now
            self._polls_every = FASTEST_POLL

    @property
    def others_looking(self) -> int:
        """How many others were declared as looking at the last poll."""
        return len(self._declared)

    @property
    def yet_to_come(self) -> int:
        """How many of the peers that were there before have not begun another search yet, but are likely to."""
        return len(self._not_back() - self._known.absent)

    @property
    def known(self) -> Known:
        """For the next search."""
        return Known(dict(self.records), frozenset(self._not_back()))

    def _not_back(self) -> set[PeerID]:
        before = self._known.start_times
        return {peer_id for peer_id, time in before.items() if self.records.get(peer_id, math.inf) <= time}

    def missing_of(self, expected: Collection[PeerID]) -> list[PeerID]:
        """Who of these has not been seen in a search since this peer's last one."""
        latest = {}
        for peer in expected:  # one that asked to join may not be declared yet
            latest[peer] = max(self.records.get(peer, -math.inf), self._last_seen.get(peer, -math.inf))
        return still_missing(expected, latest, self._known.start_times)

    @property
    def count_seen(self) -> int:
        """How many peers have looked for a group since this search began, this one included."""
        if not self._is_seated:
            return 1 + len(self._ever)
        return 1 + sum(map(self._is_in_step, self._ever.values()))

    @property
    def members(self) -> list[PeerID]:
        """This peer and its followers."""
        return [self._me.peer_id, *(follower.peer_id for follower in self.followers.values())]

    @property
    def searches(self) -> tuple[SearchId, ...]:
        """As :attr:`members`, for messages and records."""
        members = (self._me, *self.followers.values())
        return tuple(SearchId(member.peer_id.to_bytes(), member.start_time) for member in members)

    def drop_followers(self, peer_id: PeerID) -> list[int]:
        """A peer that asks again has given up its earlier requests: their tokens."""
        tokens = [token for token, follower in self.followers.items() if follower.peer_id == peer_id]
        for token in tokens:
            del self.followers[token]
        return tokens

    def candidates(
        self, now: float, asker: Candidate | None = None, *, with_full_groups: bool = False
    ) -> list[Candidate]:
        """Everybody to plan with, in order: declared and not left out, followers, this peer.

        ``with_full_groups``: also those who were left out because their group is full, as long as it has not
        begun.
        """
        found = {}
        for peer_id, (candidate, _) in self._declared.items():
            if not self.is_open_to(candidate, now):
                continue
            reason = self._out.why(peer_id, candidate.start_time, now)
            if reason is None or (with_full_groups and reason.is_looking):
                found[peer_id] = candidate
        found.update((follower.peer_id, follower) for follower in self.followers.values())
        if asker is not None:
            found[asker.peer_id] = asker
        found[self._me.peer_id] = self._me
        return sorted(found.values(), key=in_order)

    def declared(self) -> list[Candidate]:
        """This peer and all that were declared at the latest poll, with a group or without."""
        return [self._me, *self._busy, *(candidate for candidate, _ in self._declared.values())]

    def everybody(self, now: float) -> list[Candidate]:
        """The candidates, and who is busy now and may look for a group again."""
        return sorted(
            {candidate.peer_id: candidate for candidate in (*self._busy, *self.candidates(now))}.values()
        )

    def gone(self, candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        """Who was seen looking for a group and is not among these ``candidates`` any more, in order."""
        present = {candidate.peer_id for candidate in candidates}
        return sorted(
            candidate
            for candidate in self._ever.values()
            if candidate.peer_id not in present and self.is_open_to(candidate, now)
        )

    @property
    def count_ungrouped(self) -> int:
        """How many peers :meth:`ungrouped` has."""
        return 1 + len(self._ever.keys() - self._grouped)

    def ungrouped(self) -> list[Candidate]:
        """All that have looked for a group since this search began, this peer included, in order; without those that
        have one. Those that have left for another key are among them.
        """
        others = (candidate for candidate in self._ever.values() if candidate.peer_id not in self._grouped)
        return sorted((self._me, *others), key=in_order)

    def is_open_to(self, other: Candidate, now: float) -> bool:
        """Whether ``other`` may be in this peer's group already: they are in the same round of the grid, or one of them
        has waited for its own round until its start time in vain. Its round has gone on without it, and full groups of
        later ones would do so for ever.
        """
        return self._is_in_step(other) or now >= min(self._opens_at, other.start_time)

    def _is_in_step(self, other: Candidate) -> bool:
        if other.grid_round != self._me.grid_round:
            return False
        mine, theirs = self._me.swarm_round, other.swarm_round
        return not self._is_seated or mine == theirs or UNKNOWN_ROUND in (mine, theirs)

    @property
    def rounds_ahead(self) -> list[int]:
        """The rounds of the grid of those that were declared at the latest poll and are further than this peer. There
        are none if it does not know its own.
        """
        mine = self._me.swarm_round
        if mine == UNKNOWN_ROUND:
            return []
        declared = (*(candidate for candidate, _ in self._declared.values()), *self._busy)
        return [one.swarm_round for one in declared if one.swarm_round > mine]

    @property
    def begun_before(self) -> Mapping[int, int]:
        """How many peers had a group when this one began to look, by their rounds of the grid."""
        return self._begun_before or {}

    def addresses_of(self, peer_id: PeerID) -> tuple[str, ...]:
        known = self._declared.get(peer_id)
        return known[1].addresses if known else ()

    # ---- who is left out of plans

    def leave_out(
        self, peer_id: PeerID, until: float, start_time: float | None = None, *, is_looking: bool = False
    ) -> None:
        """Plan without the searches of ``peer_id`` up to ``start_time`` (default: the latest one seen)."""
        if start_time is None:
            start_time = self._last_seen.get(peer_id, -math.inf)
        self._out.add(peer_id, start_time, until, is_looking=is_looking)

    def leave_out_stalled(self, leader: PeerID, until: float) -> None:
        """Plan without a leader that has kept this search waiting, whatever it begins anew."""
        self._out.stalled[leader] = until

    def leave_out_group(
        self, members: tuple[SearchId, ...], until: float, now: float, *, is_looking: bool = False
    ) -> None:
        """Plan without the members of a group that has begun, or is full (``is_looking``).

        That is what one of them says of the others. Its word counts once for each search that it names, until the
        others' own can be seen: a member that never heard of the beginning, because the leader died in it, goes on
        looking; and who lies can hide nobody for long, nor fill memory.
        """
        self._leave_out_marked(search_marks(members), until, now, is_looking=is_looking)

    def _leave_out_marked(self, marks: bytes, until: float, now: float, *, is_looking: bool = False) -> None:
        self._out.hear(marks, until, now, self.latency, self._last_seen, is_looking=is_looking)

    def take_back(self, candidate: Candidate) -> None:
        """Plan with ``candidate`` again: it has shown that it lives and looks for a group."""
        self._out.take_back(candidate.peer_id, candidate.start_time)

    def may_ask(self, leader: PeerID, now: float) -> bool:
        """Whether to follow somebody's advice to ask ``leader``, who need not be visible here."""
        if leader in self.members or leader.to_bytes() in self._me.lost:
            return False
        return self._out.why(leader, self._last_seen.get(leader, -math.inf), now) is None

    # ---- how sure

    def note_latency(self, seconds: float) -> None:
        self.latency = max(seconds, LATENCY_DECAY * self.latency)

    @property
    def is_settled(self) -> bool:
        """The last poll began so late that it showed everybody who became visible about when the others did."""
        return self._last_poll_began >= self._settles_at()

    @property
    def shows_start(self) -> bool:
        """The last poll began so late that it showed everybody who started in the same instant as this peer."""
        return self._last_poll_began >= self._starters_visible_at()

    @property
    def counts_all(self) -> bool:
        """Whether the last poll showed how many peers there are, as surely as a grid for them needs it."""
        return self.is_settled and self._last_poll_began >= self._started_at + MANY_VISIBLE_AFTER

    def _starters_visible_at(self) -> float:
        return self._started_at + SETTLE_AFTER_START * self.latency

    def _settles_at(self) -> float:
        newcomers_visible_at = self._last_newcomer + SETTLE_AFTER_NEWCOMER * self.latency
        return max(self._starters_visible_at(), newcomers_visible_at, self._outdated_at)

    def outdate(self, now: float) -> None:
        """The view is not settled before a poll that begins from now on."""
        self._outdated_at = now

    def is_stale(self, now: float) -> bool:
        """Whether no poll has ended for long: what has changed since then is not known."""
        return is_stale(self._looked_at, now, self.latency)

    # ---- polls

    def look(self, when: Look, now: float) -> None:
        """Poll at a time that a decision asks for."""
        match when:
            case Look.NOW:
                self.look_again(now)
            case Look.WHEN_STARTERS_VISIBLE:
                self.poll_when_starters_visible(now)
            case Look.WHEN_SETTLED:
                self.poll_when_settled(now)
            case Look.WHEN_ALL_VISIBLE:
                self.poll_when_all_visible(now)

    def look_again(self, now: float) -> None:
        if not self.is_polling:
            self.next_poll = now

    def schedule_poll(self, now: float) -> None:
        """After a poll, successful or not: when to look again."""
        self.is_polling = False
        self._looked_at = now
        self.next_poll = now + max(self._polls_every, min(self.latency, SLOWEST_POLL))
        self._polls_every = min(2 * self._polls_every, SLOWEST_POLL)

    def poll_when_settled(self, now: float) -> None:
        """The next poll is to be one that can make the view settled."""
        if not self.is_polling:
            self.next_poll = max(now, self._settles_at())

    def poll_when_all_visible(self, now: float) -> None:
        """The next poll is to be one that can show how many peers there are."""
        if not self.is_polling:
            self.next_poll = max(now, self._settles_at(), self._started_at + MANY_VISIBLE_AFTER)

    def poll_when_starters_visible(self, now: float) -> None:
        if not self.is_polling:
            self.next_poll = max(now, self._starters_visible_at())


def _candidate(peer_id: PeerID, declaration: Declaration) -> Candidate:
    return Candidate(
        declaration.start_time,
        peer_id,
        declaration.mode.can_lead,
        declaration.grid_round,
        declaration.lineage,
        declaration.mode.contributes,
        declaration.lost,
        declaration.swarm_round,
    )
