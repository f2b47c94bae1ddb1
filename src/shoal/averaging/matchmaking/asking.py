"""The one leader that a search asks or follows: which it is, what it has answered, and how long to be patient. Pure.

It is a part of :class:`.core.SearchCore`, which owns the state of the search. What leaders answer is told here, and
comes back as the leader to ask next, or None: then the search goes on looking.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from shoal.averaging.matchmaking.events import (
    DistrustLeader,
    LeaderAccepted,
    LeaderDismissed,
    LeaderLost,
    LeaderPostponed,
    LeaderRedirected,
    LeaderRejected,
    LeaveLeader,
)
from shoal.averaging.matchmaking.latecomers import avoid_for
from shoal.averaging.matchmaking.memory import AVOIDED_FOR, FORGIVEN_ONCE, Fault
from shoal.averaging.matchmaking.messages import DismissReason, Redirect, RejectReason
from shoal.averaging.matchmaking.patience import Patience
from shoal.averaging.matchmaking.policy import BEGIN_GRACE, Situation, could_do_without
from shoal.averaging.matchmaking.story import StoryTeller
from shoal.averaging.matchmaking.view import View
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import PeerID

RETRY_AFTER = 0.2
"""Seconds, at least, for which a leader that turned this peer down is left out of its plans."""
AVOID_AFTER_LOSS = 10.0
"""Seconds for which a leader that could not be reached or was lost is left out."""
MAX_REDIRECTS = 5
_STILL_LOOKING = (DismissReason.BETTER_CUT, DismissReason.JOINED_ANOTHER)
"""A leader that lets a follower go for these has no group that has begun: it is to be counted."""

Refusal = LeaderRedirected | LeaderRejected | LeaderDismissed | LeaderLost
"""What ends a request without a group."""


@dataclass(frozen=True)
class Ask:
    """One request to join. Answers to an earlier one are recognised by its number."""

    number: int
    leader: PeerID
    addresses: tuple[str, ...]
    asked_at: float
    redirects: int


class NextLeader(NamedTuple):
    """A leader to ask."""

    leader: PeerID
    addresses: tuple[str, ...]
    redirects: int = 0
    """How many leaders in a row have sent this peer on."""
    is_hearsay: bool = False
    """Another leader has named these addresses, not the leader itself."""


class Asking:
    """The request that is under way, if there is one."""

    def __init__(self, config: MatchmakingConfig, story: StoryTeller) -> None:
        self.current: Ask | None = None
        self._config = config
        self._story = story
        self._count = 0
        self._begins_at = math.inf
        """When the leader begins, as it says; infinite: it has not accepted this peer."""
        self._is_beginning = False
        self._is_shunned = False
        """Most others have seen the leader fail."""
        self._unanswered: Counter[PeerID] = Counter()
        self._silent: set[PeerID] = set()
        """Leaders that said nothing more when their start time had come."""
        self._patience = Patience(config)

    def ask(self, leader: NextLeader, now: float) -> Ask:
        """Make a request."""
        self._count += 1
        self._begins_at = math.inf
        self._is_beginning = self._is_shunned = False
        self._patience.next_leader()
        self.current = Ask(self._count, leader.leader, leader.addresses, now, leader.redirects)
        self._story.asked(leader.leader)
        return self.current

    def end(self) -> Ask | None:
        """Forget the request; it is returned, so that its leader can be left."""
        ask, self.current = self.current, None
        self._begins_at = math.inf
        self._is_beginning = self._is_shunned = False
        return ask

    def expects(self, number: int) -> bool:
        """Whether an answer to this request still counts: answers may cross with this peer's leaving."""
        return self.current is not None and self.current.number == number

    def redirect(self) -> Redirect:
        """What a follower answers to a peer that asks to be led by it."""
        return Redirect(self._leader.leader.to_bytes(), self._leader.addresses)

    # ---- what the leader answers

    def accepted(self, event: LeaderAccepted | LeaderPostponed, now: float, own_start: float) -> None:
        """The leader says when it begins. What no leader does that is earlier in the order is not believed.

        :param own_start: when this peer's own group would begin
        """
        limit = max(now, own_start) + self._config.min_matchmaking_time
        self._begins_at = min(now + event.begins_in, limit)
        self._is_beginning = isinstance(event, LeaderPostponed) and event.is_beginning
        if isinstance(event, LeaderAccepted):
            self._story.answered(self._leader.leader, "accepted", now)

    def refused(self, event: Refusal, view: View, now: float) -> NextLeader | None:
        """The leader does not take this peer, or not any more: whom to ask instead."""
        match event:
            case LeaderRedirected(_, leader, addresses):
                return self._redirected(leader, addresses, view, now)
            case LeaderDismissed():
                return self._dismissed(event, view, now)
            case LeaderRejected():
                self._rejected(event, view, now)
            case LeaderLost(_, reason):
                self.lost(reason, view, now)
        return None

    def lost(self, reason: str, view: View, now: float, avoid: float = AVOID_AFTER_LOSS) -> None:
        """The leader cannot be relied on: leave it out for ``avoid`` seconds."""
        self._story.answered(self._leader.leader, f"lost ({reason})", now)
        view.leave_out(self._leader.leader, now + avoid)

    def _redirected(
        self, leader: PeerID, addresses: tuple[str, ...], view: View, now: float
    ) -> NextLeader | None:
        ask = self._leader
        if leader == ask.leader:
            self.lost("redirected to itself", view, now)
            return None
        self._story.answered(ask.leader, f"redirected to {leader}", now)
        # Two followers with old views may send this peer to and fro.
        if ask.redirects < MAX_REDIRECTS and view.may_ask(leader, now):
            return NextLeader(leader, addresses, ask.redirects + 1, is_hearsay=True)
        view.leave_out(ask.leader, now + retry_time(view))
        return None

    def _rejected(self, event: LeaderRejected, view: View, now: float) -> None:
        leader, reason = self._leader.leader, event.answer.reason
        self._story.answered(leader, f"rejected: {reason.words}", now)
        until = now + retry_time(view)
        if reason in (RejectReason.BEGUN, RejectReason.NOT_LOOKING):
            # It says so itself before long, and its next search may be earlier in the order.
            until = now + AVOID_AFTER_LOSS
        elif reason is RejectReason.OTHER_SCHEMA:
            until = math.inf
        is_looking = reason is RejectReason.FULL
        view.leave_out(leader, until, is_looking=is_looking)
        view.leave_out_group(event.answer.members, until, now, is_looking=is_looking)

    def _dismissed(self, event: LeaderDismissed, view: View, now: float) -> NextLeader | None:
        # Unlike one that is lost, it is there and honest: it may be asked again as soon as the views agree.
        leader, answer = self._leader.leader, event.answer
        self._story.answered(leader, f"dismissed: {answer.reason.words}", now)
        until = now + retry_time(view)
        view.leave_out(leader, until, is_looking=answer.reason in _STILL_LOOKING)
        view.leave_out_group(answer.members, until, now, is_looking=True)
        suggested = PeerID.from_bytes(answer.leader) if answer.leader else None
        if suggested is not None and view.may_ask(suggested, now):
            return NextLeader(suggested, answer.addresses, is_hearsay=True)
        return None

    # ---- patience

    @property
    def _is_accepted(self) -> bool:
        return self._begins_at < math.inf

    def deadline(self, view: View) -> float:
        """When this peer's patience with the leader ends."""
        if self.current is None:
            return math.inf
        if not self._is_accepted:
            return self.current.asked_at + self._config.request_timeout
        silent = self._begins_at + self._config.request_timeout + BEGIN_GRACE * view.latency
        if self._is_beginning:
            return silent
        return -math.inf if self._is_shunned else min(silent, self._patience.ends_at(view.latency))

    def watch(self, situation: Situation) -> None:
        """Look whether the leader that this peer follows keeps it from another group, now that its own turn has come.
        What it does not know does not count against the leader.
        """
        turn = situation.times.own_turn(situation.me.start_time)
        if situation.now >= turn and not situation.view.is_stale(situation.now):
            leader = self._leader.leader
            self._is_shunned = leader in situation.cut.shunned
            could = could_do_without(situation, leader)
            self._patience.look(situation.now, could_be_elsewhere=could)

    def lose_patience(self, view: View, now: float) -> list[LeaveLeader | DistrustLeader]:
        """That time has come: the leader counts as lost, and is to be left."""
        ask = self._leader
        if not self._is_accepted:
            timeout = self._config.request_timeout
            self._unanswered[ask.leader] += 1
            avoid = avoid_for(self._unanswered[ask.leader], timeout, AVOID_AFTER_LOSS)
            self.lost(f"no answer in {timeout:g} s", view, now, avoid)
            return [LeaveLeader(ask.number), DistrustLeader(ask.leader, Fault.UNANSWERED)]
        if self._is_shunned:
            # That is the others' word: this peer does not repeat it as its own.
            self.lost("most others have seen it fail", view, now)
            return [LeaveLeader(ask.number)]
        if not self._is_beginning and now >= self._patience.ends_at(view.latency):
            self._patience.spend()
        fault, avoid = self._how_it_held_this_peer(now)
        self.lost(fault.words, view, now)
        view.leave_out_stalled(ask.leader, now + avoid)
        return [LeaveLeader(ask.number), DistrustLeader(ask.leader, fault)]

    def _how_it_held_this_peer(self, now: float) -> tuple[Fault, float]:
        """What the leader did, and for how many seconds this search does without it."""
        leader = self._leader.leader
        if now < self._begins_at:
            return Fault.STALLED, AVOIDED_FOR[Fault.STALLED]
        is_first = leader not in self._silent
        self._silent.add(leader)
        return Fault.SILENT, (FORGIVEN_ONCE if is_first else AVOIDED_FOR)[Fault.SILENT]

    @property
    def _leader(self) -> Ask:
        assert self.current is not None, "answers are told only while a request is under way"
        return self.current


def retry_time(view: View) -> float:
    """Seconds after which a peer may be asked, or planned with, again."""
    return max(RETRY_AFTER, 2 * view.latency)
