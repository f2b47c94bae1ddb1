"""What a search decides, and why: pure functions of the situation. They change nothing.

The core (:mod:`.core`) keeps the state of a search and carries out what is decided here. Each decision comes with its
reason, which becomes a line of the search's history.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from shoal.averaging.grid import UNKNOWN_ROUND
from shoal.averaging.group import MAX_GROUP_SIZE, MemberInfo
from shoal.averaging.matchmaking.apart import are_apart, is_apart
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.grouping import (
    Cut,
    EarlyBegin,
    PlannedGroup,
    cut_groups,
    have_mixed,
    may_begin_early,
    takes_too_many_leaders,
)
from shoal.averaging.matchmaking.helping import count_contributors, makes_room, why_no_average
from shoal.averaging.matchmaking.latecomers import STALE_AFTER, longer_wait
from shoal.averaging.matchmaking.messages import Accepted, Answer, Redirect, Rejected, RejectReason, SearchId
from shoal.averaging.matchmaking.missed import Missed, find_missed, have_gone_on
from shoal.averaging.matchmaking.states import Times
from shoal.averaging.matchmaking.view import Look, View
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import PeerID

BEGIN_GRACE = 3.0
"""A leader waits this many declaration times longer at its start time, if peers may be on the way to it."""
NAME_ALL = 4
"""So many members of a group, the leader first, name all of it in their records."""
MANY_MISSING = 2
"""As many are missing as were seen, divided by this: a group waits rather than be the last one again."""


@dataclass(frozen=True)
class Situation:
    """What a search knows at one moment. Made anew whenever something has changed."""

    me: Candidate
    config: MatchmakingConfig
    view: View
    times: Times
    now: float
    has_mixed: bool
    """Whether plans of this search were mixed ones, even if they are not any more."""
    expects: int = 0
    """How many peers were dealt to this key, this one included; 0: that is not known."""

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All peers to plan with, this one included, in order."""
        return self.view.candidates(self.now)

    @cached_property
    def members(self) -> tuple[Candidate, ...]:
        """This peer and its followers."""
        return (self.me, *self.view.followers.values())

    @cached_property
    def cut(self) -> Cut:
        """The plan."""
        return self.cut_with(None)

    def cut_with(self, asker: Candidate | None) -> Cut:
        """The plan if ``asker`` is counted, too."""
        candidates = self.view.candidates(self.now, asker)
        gone = self.view.gone(candidates, self.now) if self.is_mixing else None
        return cut_groups(candidates, self._full_size(len(candidates)), self.config.min_group_size, gone)

    def _full_size(self, peers: int) -> int | None:
        """The size of full groups. Peers that were dealt to one group and are too many for it make even ones: one that
        is much smaller than the others would hardly mix.
        """
        target = self.config.target_group_size
        if target is None or not self.expects or peers <= target:
            return target
        return -(-peers // -(-peers // target))

    @cached_property
    def full_group_lets_go(self) -> bool:
        """Whether a full group of an earlier leader, which this peer plans without, has not begun and becomes smaller
        first: with its members there are more peers than full groups hold, and all groups are to be even.
        """
        everybody = self.view.candidates(self.now, with_full_groups=True)
        if len(everybody) == len(self.candidates) or next(filter(_can_lead, everybody)) == self.me:
            return False
        return self._full_size(len(everybody)) != self.config.target_group_size

    @cached_property
    def is_mixing(self) -> bool:
        """Whether to mix peers: there are more of them than one group holds, and some have mixed already.

        Views that stay different can keep mixed groups from becoming full. So in the last of the time only the number
        of peers counts, as it does in a swarm that begins.
        """
        target = self.config.target_group_size
        if target is None or self.now >= self.times.mixes_until:
            return False
        if len(self.candidates) + self.view.yet_to_come <= target:
            return False
        return any(candidate.lineage.groups for candidate in self.candidates)

    @property
    def begins_at_latest(self) -> float:
        """When this peer's group begins if somebody may still be on the way to it.

        Followers wait for as long as their own DHT takes, and ``request_timeout``. Where that of the leader alone is
        slow, to wait longer would be to lose them.
        """
        return self.times.begins_at + min(BEGIN_GRACE * self.view.latency, self.config.request_timeout)

    @property
    def is_final(self) -> bool:
        """Whether the plan of now is the one to keep to: nobody else has to be waited for, or can be."""
        return self.view.is_settled or self.now >= self.begins_at_latest

    def room(self, cut: Cut) -> int:
        """How many members this peer may have now, itself included: as many as the target while more peers may appear,
        then as many as its slice of the plan.
        """
        room = self.config.target_group_size or MAX_GROUP_SIZE
        planned = cut.group_of(self.me.peer_id)
        if planned and planned.leader == self.me.peer_id and planned.is_complete and self.is_final:
            room = min(room, len(planned.members))
        return room

    def belongs_elsewhere(self, peer_id: PeerID, cut: Cut) -> bool:
        """Whether the plan has another leader for ``peer_id``, for the sake of mixing, and is to be relied on."""
        group, mine = cut.group_of(peer_id), cut.group_of(self.me.peer_id)
        if group is None or mine is None or group is mine or not group.is_complete:
            return False
        is_leader = mine.leader == self.me.peer_id and group.leader != peer_id
        return is_leader and self.view.is_settled and self.is_mixing

    def is_needed_elsewhere(self, peer_id: PeerID, cut: Cut, members: Collection[PeerID]) -> bool:
        """Whether ``peer_id`` has to lead another group than the one of these ``members``, since too few others could.

        Matters where most peers are in client mode: sizes alone do not show that a group takes away the leaders.
        """
        group, planned = cut.group_of(peer_id), cut.group_of(self.me.peer_id)
        if group is None or group.leader != peer_id or not group.is_complete or not self.is_final:
            return False
        if planned is None or planned.leader != self.me.peer_id:
            return False
        return takes_too_many_leaders(self.candidates, {*members, peer_id}, planned)


def _can_lead(peer: Candidate) -> bool:
    return peer.can_lead


# ---- whom to follow, and which followers to let go


class Dismissal(NamedTuple):
    token: int
    suggested: PeerID | None
    """The leader that the plan has for this follower."""


class Following(NamedTuple):
    """What the plan asks of this peer now."""

    leader: PeerID | None
    """Whom to ask, if it is not following anybody yet."""
    dismissals: tuple[Dismissal, ...]
    look: Look
    reason: str


def follow_plan(situation: Situation) -> Following:
    """Whom this peer asks to lead it by the plan, or which of its followers belong elsewhere."""
    view, cut, me = situation.view, situation.cut, situation.me.peer_id
    reason = why_no_average(situation.candidates) or cut.reason
    planned = cut.group_of(me)
    if planned is None:
        return Following(None, (), Look.AS_PLANNED, reason)
    if planned.leader != me:
        # It would find a group without that, too, but one of peers that happen to be near, which may well be those of
        # its last group.
        if situation.is_mixing and not view.shows_start:
            return Following(None, (), Look.WHEN_STARTERS_VISIBLE, reason)
        return Following(planned.leader, (), Look.AS_PLANNED, reason)
    places = {member.peer_id for member in planned.members}
    outside = sorted(
        (token for token, peer in view.followers.items() if peer.peer_id not in places),
        key=lambda token: view.followers[token],
        reverse=True,
    )
    surplus = outside[: max(0, len(view.members) - situation.room(cut))]
    dismissals, staying = [], set(view.members)
    for token in outside:
        peer_id = view.followers[token].peer_id
        if (
            token in surplus
            or situation.belongs_elsewhere(peer_id, cut)
            or situation.is_needed_elsewhere(peer_id, cut, staying)
        ):
            dismissals.append(_dismissal(situation, token))
            staying.discard(peer_id)
    return Following(None, tuple(dismissals), Look.AS_PLANNED, reason)


def _dismissal(situation: Situation, token: int) -> Dismissal:
    follower = situation.view.followers[token].peer_id
    group = situation.cut.group_of(follower)
    mine = situation.me.peer_id
    return Dismissal(token, group.leader if group and group.leader not in (follower, mine) else None)


def could_do_without(situation: Situation, leader: PeerID) -> bool:
    """Whether a follower would be in a complete group if its ``leader`` were not there."""
    config = situation.config
    others = [candidate for candidate in situation.candidates if candidate.peer_id != leader]
    cut = cut_groups(others, config.target_group_size, config.min_group_size)
    group = cut.group_of(situation.me.peer_id)
    return group is not None and group.is_complete


# ---- when to begin


class Verdict(enum.Enum):
    BEGIN = enum.auto()
    WAIT = enum.auto()
    PUT_OFF = enum.auto()
    """Begin later, since peers of the last group are yet to come; once in a search."""
    POSTPONE = enum.auto()
    """Too few are there: begin a whole ``min_matchmaking_time`` later."""


class Beginning(NamedTuple):
    """Whether this peer's group begins."""

    verdict: Verdict
    reason: str
    look: Look = Look.AS_PLANNED
    later: float = 0.0
    """Seconds by which the beginning is put off."""


def begin_early(situation: Situation) -> Beginning:
    """Whether a leader's group begins before its start time."""
    view, config = situation.view, situation.config
    if situation.expects and len(view.members) < (config.target_group_size or MAX_GROUP_SIZE):
        return _begin_as_expected(situation)
    decision = may_begin_early(
        situation.candidates,
        view.members,
        situation.me.peer_id,
        config.target_group_size,
        config.min_group_size,
        view.candidates(situation.now, with_full_groups=True),
        situation.cut,
    )
    if decision.verdict is EarlyBegin.NO:
        return Beginning(Verdict.WAIT, decision.reason)
    if _is_last_group_again(situation):
        reason = f"the last group again, and {view.yet_to_come} others are yet to come"
        return Beginning(Verdict.WAIT, reason)
    # Newcomers may come without end, but those that started in the same instant as this peer do not.
    if decision.verdict is EarlyBegin.YES and not situation.has_mixed:
        is_sure, look = view.shows_start, Look.WHEN_STARTERS_VISIBLE
    else:
        is_sure, look = view.is_settled, Look.WHEN_SETTLED
    return Beginning(Verdict.BEGIN if is_sure else Verdict.WAIT, decision.reason, look)


def _begin_as_expected(situation: Situation) -> Beginning:
    """A group that is not full begins once as many peers as were dealt to its key have come, or others have gone on to
    the next round, and those that the plan gives to this leader have joined it.
    """
    view, cut = situation.view, situation.cut
    if view.count_seen < situation.expects and not have_gone_on(view.rounds_ahead, situation.expects):
        return Beginning(
            Verdict.WAIT, f"{view.count_seen} of {situation.expects} that are expected have come"
        )
    planned = cut.group_of(situation.me.peer_id)
    if planned is None or not planned.is_complete or planned.leader != situation.me.peer_id:
        return Beginning(Verdict.WAIT, f"the plan has this peer follow another: {cut.reason}")
    # One that is not planned here may be in the place of one that is.
    if len(view.members) != len(planned.members):
        return Beginning(Verdict.WAIT, f"planned members are still to come: {cut.reason}")
    if takes_too_many_leaders(situation.candidates, view.members, planned):
        return Beginning(Verdict.WAIT, f"others need its members as leaders: {cut.reason}")
    if not count_contributors(situation.members):
        return Beginning(Verdict.WAIT, f"none of the members contributes: {cut.reason}")
    if situation.full_group_lets_go:
        return Beginning(Verdict.WAIT, "a full group is to let some of its members go to this one")
    verdict = Verdict.BEGIN if view.counts_all else Verdict.WAIT
    reason = f"{view.count_seen} of {situation.expects} that are expected have come, or others have gone on"
    return Beginning(verdict, reason, Look.WHEN_ALL_VISIBLE)


def _is_last_group_again(situation: Situation) -> bool:
    """Whether two members were in one group last time, though many others are not back yet.

    Peers whose round was one are back in the same instant, and would be by themselves for ever. Few that are missing
    may have died.
    """
    many_missing = MANY_MISSING * situation.view.yet_to_come >= situation.view.count_seen
    return many_missing and situation.is_mixing and have_mixed(situation.members)


def missed_rounds(situation: Situation) -> Missed | None:
    """Whether the others that were dealt to this peer's key have gone on without it."""
    view, mine = situation.view, situation.me.swarm_round
    if not situation.expects or mine == UNKNOWN_ROUND or situation.now >= situation.times.begins_at:
        return None
    return find_missed(
        mine, situation.expects, len(situation.candidates), view.rounds_ahead, view.begun_before
    )


def count_before(situation: Situation) -> int:
    """How many of the peers at this leader's seat have begun a group already, or are planned before its own."""
    if not situation.expects:
        return 0
    sizes = [len(group.members) for group in situation.cut.groups]
    planned = situation.cut.group_of(situation.me.peer_id)
    earlier = sum(sizes[: situation.cut.groups.index(planned)]) if planned is not None else 0
    return max(0, situation.view.count_seen - sum(sizes) + earlier)


def members_to_name(group: tuple[SearchId, ...], me: PeerID) -> tuple[SearchId, ...]:
    """Which searches of its ``group`` a member names in its record: the leader and the next few all, others their own.

    One record that is seen takes all whom it names out of the plans of others. If each named all, a group's records
    would grow with the square of its size.
    """
    own = me.to_bytes()
    place = next(index for index, search in enumerate(group) if search.peer_id == own)
    return group if place < NAME_ALL else (group[place],)


def begin_at_start_time(situation: Situation, expected: Collection[PeerID], *, is_put_off: bool) -> Beginning:
    """Whether a leader's group begins, now that its start time has come.

    :param expected: peers of the last group that are likely to look for a group now, too
    :param is_put_off: whether the start was put off for them already
    """
    view, config = situation.view, situation.config
    count = len(view.members)
    if situation.now < situation.begins_at_latest and _expects_somebody(situation):
        return Beginning(Verdict.WAIT, "peers may be on the way here", Look.WHEN_SETTLED)
    if view.is_stale(situation.now):
        return Beginning(Verdict.WAIT, "what this peer knows of the others is old", Look.NOW)
    missing = len(view.missing_of(expected))
    wait = longer_wait(count, missing, config.target_group_size, config.min_matchmaking_time)
    if wait and not is_put_off and count >= config.min_group_size:
        reason = f"{missing} of the last group are yet to come: begins up to {wait:.1f} s later"
        return Beginning(Verdict.PUT_OFF, reason, later=wait)
    contributors = count_contributors(situation.members)
    if contributors and count >= config.min_group_size:
        return Beginning(Verdict.BEGIN, "the start time has come")
    what = f"{count} of at least {config.min_group_size} members"
    if not contributors:
        what += ", none of which contributes,"
    return Beginning(
        Verdict.POSTPONE, f"{what} at the start time: postponed", later=config.min_matchmaking_time
    )


def dismissals_when_postponed(situation: Situation) -> dict[int, Dismissal]:
    """Followers that can be in a complete group elsewhere, by their tokens."""
    found = {}
    for token, follower in situation.view.followers.items():
        planned = situation.cut.group_of(follower.peer_id)
        if planned and planned.is_complete and planned.leader != situation.me.peer_id:
            found[token] = _dismissal(situation, token)
    return found


def _expects_somebody(situation: Situation) -> bool:
    """Whether a peer may be on the way here: it has just appeared, or is planned here and elsewhere until now."""
    planned = situation.cut.group_of(situation.me.peer_id)
    is_missing = planned is not None and len(situation.view.members) < len(planned.members)
    return is_missing or not situation.view.is_settled


# ---- who may join


def offer_place(situation: Situation, asker: Candidate) -> Answer:
    """What a leader that may be asked at all answers to ``asker``; the reason is part of the answer."""
    view, me = situation.view, situation.me.peer_id
    cut = situation.cut_with(asker)
    room = situation.room(cut)
    members = len({*view.members, asker.peer_id})
    mine, theirs = cut.group_of(me), cut.group_of(asker.peer_id)
    has_room = members <= room or (
        mine is not None and makes_room(asker, view.followers.values(), mine.members, members, room)
    )
    is_wanted_elsewhere = (
        situation.is_needed_elsewhere(asker.peer_id, cut, view.members)
        or situation.belongs_elsewhere(asker.peer_id, cut)
        or (mine is not theirs and _is_kept_away(situation, asker, theirs))
    )
    if has_room and not is_wanted_elsewhere:
        return Accepted(begins_in=max(0.0, situation.times.begins_at - situation.now))
    if theirs and theirs.leader not in (asker.peer_id, *view.members):
        return Redirect(theirs.leader.to_bytes(), view.addresses_of(theirs.leader))
    return Rejected(RejectReason.FULL, view.searches)


def _is_kept_away(situation: Situation, asker: Candidate, planned: PlannedGroup | None) -> bool:
    """Whether ``asker``, which is ``planned`` elsewhere, is apart from this peer, or from a member and need not be."""
    if are_apart(asker, situation.me):
        return True
    has_place = planned is not None and planned.is_complete
    return has_place and is_apart(asker, situation.members)


def refuse(
    situation: Situation, asker: Candidate, info: MemberInfo, key: str, schema_hash: bytes
) -> Rejected | None:
    """Why ``asker`` cannot be led by this peer, whatever the plan; None: it can."""
    if info.schema_hash != schema_hash:
        return Rejected(RejectReason.OTHER_SCHEMA)
    if info.key != key:
        return Rejected(RejectReason.OTHER_KEY)
    if not situation.me.can_lead:
        return Rejected(RejectReason.CANNOT_LEAD)
    if asker.can_lead and asker[:2] <= situation.me[:2]:
        return Rejected(RejectReason.WRONG_ORDER)
    if not situation.view.is_open_to(asker, situation.now):
        return Rejected(RejectReason.OTHER_ROUND)
    return None


def too_late(group: tuple[SearchId, ...]) -> Rejected:
    """The answer to a peer that asks when the search is over; ``group``: what it has found."""
    return Rejected(RejectReason.BEGUN, group) if group else Rejected(RejectReason.NOT_LOOKING)


# ---- when to look at all this again


def next_deadline(situation: Situation, due: Sequence[float], *, follows: bool) -> float:
    """When time alone changes something next.

    :param due: other times that are due
    :param follows: whether this peer has a leader, so that it does not begin, and polls only to watch the leader
    """
    times, now = situation.times, situation.now
    later = [*due, times.deadline, times.declare_again]
    if times.mixes_until > now:
        later.append(times.mixes_until)
    if follows:
        # Up to then its leader has every right to keep it waiting, and need not be watched.
        later.append(max(situation.view.next_poll, times.own_turn(situation.me.start_time)))
    else:
        later.append(situation.view.next_poll)
        if situation.me.can_lead:
            later.append(_begins_next(situation))
        elif situation.expects:
            later.append(max(now, times.begins_at))
    return max(now, min(later))


def _begins_next(situation: Situation) -> float:
    """When to consider the beginning of this peer's own group next."""
    now = situation.now
    if now < situation.times.begins_at:
        return situation.times.begins_at
    stale = now + STALE_AFTER if situation.view.is_stale(now) else -math.inf
    return max(stale, situation.begins_at_latest)
