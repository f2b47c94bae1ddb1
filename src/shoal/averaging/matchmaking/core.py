"""Who leads, who follows, and when a group is complete: one search for a group as a pure state machine.

Theory of operation. Every peer that searches declares itself under the group key and reads who else is
declared there. Sorted by (start time, peer id) and cut by :func:`~shoal.averaging.matchmaking.grouping.cut_groups`, the
same view gives the same plan at everybody: who leads, and whom the others ask. A peer asks only leaders that
are earlier than itself in this order, which does not change during a search, and leaders accept only later
ones: no two peers wait for each other.

Views differ, for a while. Therefore leaders accept whoever asks while there is room; a peer that finds an
earlier leader joins it and sends its own followers there; a leader that turns out to have more followers than
its slice of the plan dismisses some; and one that is full tells who its members are, so that the asker plans
without them. A follower does not plan: its leader does, until the group begins, the leader dismisses it or
the leader is gone.

A full group begins at once if no newcomer could change the plan. Otherwise its leader first makes sure that
its view is settled: a poll that began a few declaration times after the last newcomer appeared has shown
nobody else. When its start time comes, a leader begins with what it has, or postpones the start if that is
less than the minimum size.

:meth:`Matchmaking.handle` is the only way to change a search: an event and the time in, effects out. What a
state lets happen is a table; anything else raises :class:`IllegalTransition` with the history of events.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, NoReturn

from shoal.averaging.group import MAX_GROUP_SIZE, MemberInfo, PeerMode
from shoal.averaging.lineage import NO_LINEAGE, Lineage
from shoal.averaging.matchmaking.apart import is_apart
from shoal.averaging.matchmaking.candidate import Candidate
from shoal.averaging.matchmaking.events import (
    AnswerRequest,
    AskSchema,
    AskToJoin,
    BeginGroup,
    Cancelled,
    Declare,
    Declared,
    DeclareFailed,
    DismissFollower,
    Effect,
    Event,
    FinishWithGroup,
    FinishWithout,
    FollowerLost,
    JoinRequested,
    LeaderAccepted,
    LeaderBegan,
    LeaderDismissed,
    LeaderLost,
    LeaderPostponed,
    LeaderRedirected,
    LeaderRejected,
    LeaveLeader,
    Log,
    MoveTo,
    PeerGone,
    Poll,
    Polled,
    PollFailed,
    PostponeFollower,
    Restarted,
    SchemaCompared,
    SearchStarted,
    SetTimer,
    TimerFired,
    TooFew,
    brief,
)
from shoal.averaging.matchmaking.grouping import (
    Cut,
    EarlyBegin,
    cut_groups,
    have_mixed,
    may_begin_early,
    takes_too_many_leaders,
)
from shoal.averaging.matchmaking.helping import count_contributors, makes_room, why_no_average
from shoal.averaging.matchmaking.latecomers import STALE_AFTER, avoid_for, longer_wait
from shoal.averaging.matchmaking.messages import (
    Accepted,
    DeclaredState,
    Dismissed,
    DismissReason,
    Redirect,
    Rejected,
    RejectReason,
    Search,
)
from shoal.averaging.matchmaking.states import MOVES, Ask, IllegalTransition, State, Times
from shoal.averaging.matchmaking.story import StoryTeller
from shoal.averaging.matchmaking.view import NOTHING_KNOWN, Known, View
from shoal.errors import InvalidValueError
from shoal.p2p.identity import PeerID
from shoal.utils import figures

BEGIN_GRACE = 3.0
"""A leader waits this many declaration times longer at its start time, if somebody may be on the way to it."""
DECLARATION_PERIOD = 10.0
"""Seconds after which a declaration is renewed; the shell lets it expire after three of these."""
DECLARE_RETRY = 0.5
"""Seconds after which a declaration that failed is tried again."""
RETRY_AFTER = 0.2
"""Seconds, at least, for which a leader that turned this peer down is left out of its plans."""
MIX_FOR = 0.6
"""The part of the time until the start in which peers are mixed; see :meth:`Matchmaking._is_mixing`."""
MANY_MISSING = 2
"""As many are missing as were seen, divided by this: a group waits rather than be the last one again."""
LEAST_REQUEST_TIMEOUT = 1.0
"""Seconds for a leader's first answer, however short the search."""
AVOID_AFTER_LOSS = 10.0
"""Seconds for which a leader that could not be reached or was lost is left out."""
MAX_REDIRECTS = 5
HISTORY_LENGTH = 40


@dataclass(frozen=True)
class MatchmakingConfig:
    """Sizes of groups and times (seconds) of a search; validated when made."""

    target_group_size: int | None = None
    """A group of this size begins at once; None: groups of any size begin when the time has come."""
    min_group_size: int = 2
    min_matchmaking_time: float = 5.0
    """How much later a leader starts when too few followers came until its start time."""
    request_timeout: float = 3.0
    """How long to wait for a leader's first answer."""

    def __post_init__(self) -> None:
        target, minimum = self.target_group_size, self.min_group_size
        if not 1 <= minimum <= MAX_GROUP_SIZE:
            raise InvalidValueError(f"min_group_size={minimum}: 1 to {MAX_GROUP_SIZE} are allowed")
        if target is not None and not minimum <= target <= MAX_GROUP_SIZE:
            allowed = f"None or {minimum} (min_group_size) to {MAX_GROUP_SIZE}"
            raise InvalidValueError(f"target_group_size={target}: {allowed} are allowed")
        for name in ("min_matchmaking_time", "request_timeout"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise InvalidValueError(f"{name}={seconds}: a positive number of seconds is allowed")

    def within(self, seconds: float | None) -> MatchmakingConfig:
        """For a search of so many seconds: a leader that does not answer shall not cost all of them."""
        if seconds is None:
            return self
        return replace(
            self, request_timeout=min(self.request_timeout, max(seconds / 2, LEAST_REQUEST_TIMEOUT))
        )


class Matchmaking:
    """One search of one peer. Times are DHT time, in seconds."""

    def __init__(
        self,
        config: MatchmakingConfig,
        *,
        peer_id: PeerID,
        mode: PeerMode,
        schema_hash: bytes,
        key: str,
        start_time: float,
        order_time: float | None = None,
        deadline: float | None,
        grid_round: int = 0,
        lineage: Lineage = NO_LINEAGE,
        known: Known = NOTHING_KNOWN,
        is_first: bool = False,
        expected: Iterable[PeerID] = (),
        lost: tuple[bytes, ...] = (),
    ) -> None:
        """``start_time``: when to begin if not full; ``order_time``: the place in the order, if not the same;
        ``known``: what the search before has left; ``is_first``: there was none before; ``expected``: who is
        likely to look for a group now, too; ``lost``: whom this peer could not reach lately.
        """
        self.state = State.NEW
        self.config = config
        self.key = key
        order_time = start_time if order_time is None else order_time
        self.me = Candidate(order_time, peer_id, mode.can_lead, grid_round, lineage, mode.contributes, lost)
        self.story = StoryTeller(key, config.target_group_size, config.min_group_size, is_first=is_first)
        self._schema_hash = schema_hash
        self._view = View(self.me, schema_hash, opens_at=start_time, known=known)
        ends_at = math.inf if deadline is None else deadline
        self._times = Times(begins_at=start_time, deadline=ends_at, expected_at=start_time)
        self._ask: Ask | None = None
        self._asks = 0
        self._group: tuple[Search, ...] = ()
        self._has_mixed_peers = False
        """Whether plans of this search were mixed ones, even if they are not any more."""
        self._expected = set(expected)
        self._is_put_off = False
        """Whether the start was put off for expected peers that are missing; once in a search."""
        self._unanswered: Counter[PeerID] = Counter()
        self._said: str | None = None
        """Why no average is possible, as it was logged last."""
        self._effects: list[Effect] = []
        self._history: deque[tuple[float, State, Event]] = deque(maxlen=HISTORY_LENGTH)

    @property
    def count_seen(self) -> int:
        """How many peers have looked for a group under the key during this search, this one included."""
        return self._view.count_seen

    @property
    def known(self) -> Known:
        """What the next search of this peer is to know."""
        return self._view.known

    @property
    def _members(self) -> tuple[Candidate, ...]:
        return (self.me, *self._view.followers.values())

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at time ``now``; return what the shell has to do, in order."""
        self._history.append((now, self.state, brief(event)))
        handler = self._HANDLERS[self.state].get(type(event))
        if handler is None:
            self._raise_illegal(f"{type(event).__name__} cannot happen while {self.state.value}")
        was_over = self.state is State.GROUPED
        handler(self, event, now)
        self._act(now)
        if self.state is State.GROUPED and not was_over:
            self._log(self.story.found(now, len(self._group)))
        effects, self._effects = self._effects, []
        return effects

    # ---- events of this peer's own search

    def _on_started(self, event: SearchStarted, now: float) -> None:
        self._move(State.LOOKING)
        self.story.begin(now)
        self._view.start(now)
        self._times.mixes_until = now + MIX_FOR * (self._times.begins_at - now)
        self._declare(now)
        self._poll()

    def _on_declared(self, event: Declared, now: float) -> None:
        self._view.note_latency(event.seconds)

    def _on_declare_failed(self, event: DeclareFailed, now: float) -> None:
        self.story.note(now, f"could not declare itself: {event.reason}")
        self._times.declare_again = now + DECLARE_RETRY

    def _on_polled(self, event: Polled, now: float) -> None:
        other_schema = self._view.take_in(event.peers, event.began_at, now)
        declared = dict(event.peers)
        for peer_id in other_schema:
            if self.story.saw_other_schema(peer_id):
                other = declared[peer_id]
                self._effects.append(AskSchema(peer_id, other.addresses, other.schema_hash))
        others = len(declared.keys() - {self.me.peer_id})
        self.story.saw(others, self._view.others_looking, len(other_schema))
        why = why_no_average(self._view.everybody(now)) if self._view.shows_start else None
        if why is not None and why != self._said:
            self._said = why
            self._effects.append(Log(f"{self.key}: no average is possible yet: {why}", is_warning=True))

    def _on_compared(self, event: SchemaCompared, now: float) -> None:
        self.story.learned_difference(event.peer, event.difference)

    def _on_poll_failed(self, event: PollFailed, now: float) -> None:
        self.story.note(now, f"could not read who is declared: {event.reason}")
        self._view.schedule_poll(now)

    def _on_timer(self, event: TimerFired, now: float) -> None:
        time = self._times
        if now >= time.deadline:
            self._end(now)
            return
        if now >= self.story.next_status:
            candidates, is_late = self._view.candidates(now), now >= time.expected_at
            me = self.me.peer_id
            self._log(self.story.status(now, candidates, me, begins_at=time.begins_at, is_late=is_late))
        if now >= time.declare_again:
            self._declare(now)
        if now >= self._view.next_poll:
            self._poll()
        ask = self._ask
        if self.state is State.ASKING and ask and now >= ask.asked_at + self.config.request_timeout:
            self._effects.append(LeaveLeader(ask.number, overdue=ask.leader))
            self._unanswered[ask.leader] += 1
            wait = avoid_for(self._unanswered[ask.leader], self.config.request_timeout, AVOID_AFTER_LOSS)
            self._drop_leader(f"no answer in {self.config.request_timeout:g} s", now, wait)
        elif self.state is State.FOLLOWING and ask and now >= self._patience_ends():
            self._effects.append(LeaveLeader(ask.number))
            self._drop_leader("neither began nor postponed when its start time had come", now)

    def _on_restarted(self, event: Restarted, now: float) -> None:
        if self._ask is not None:
            self._effects.append(LeaveLeader(self._ask.number))
        self._dismiss_all(Dismissed(DismissReason.SEARCH_ENDED))
        place = event.place
        if place.key != self.key:
            self._effects.append(Declare(DeclaredState.TAKEN))
        self.key = self.story.key = place.key
        self.me = self.me._replace(
            start_time=place.order_time,
            can_lead=event.mode.can_lead,
            grid_round=place.grid_round,
            lineage=place.lineage,
            lost=place.lost,
        )
        self._effects.append(MoveTo(place))
        self._view = View(self.me, self._schema_hash, opens_at=place.start_time, latency=self._view.latency)
        self._view.start(now)
        if now < self._times.expected_at:
            self._times.expected_at = place.start_time
        self._times.begins_at = place.start_time
        self._times.mixes_until = now + MIX_FOR * (place.start_time - now)
        self.story.note(
            now, f"began anew under {place.key!r}, to start in {figures.duration(place.start_time - now)}"
        )
        self._declare(now)
        self._go_on_looking()

    def _on_peer_gone(self, event: PeerGone, now: float) -> None:
        self._expected.discard(event.peer_id)

    def _on_cancelled(self, event: Cancelled, now: float) -> None:
        self._end(now)

    # ---- others ask this peer to lead them

    def _on_request(self, event: JoinRequested, now: float) -> None:
        info = event.info
        asker = Candidate(
            info.start_time,
            PeerID.from_bytes(info.peer_id),
            info.mode.can_lead,
            info.grid_round,
            info.lineage,
            info.mode.contributes,
            info.lost,
        )
        answer = self._answer(asker, info, now)
        self._effects.append(AnswerRequest(event.token, answer))
        if isinstance(answer, Accepted):
            self._drop_follower_of(asker.peer_id)
            self._view.followers[event.token] = asker
            if self._has_mixed_peers:
                # Groups come together in another order than the plan's: who is still there counts, not who was.
                self._view.outdate(now)
            self.story.note(now, f"{asker.peer_id} joined")

    def _answer(self, asker: Candidate, info: MemberInfo, now: float) -> Accepted | Redirect | Rejected:
        if info.schema_hash != self._schema_hash:
            self.story.saw_other_schema(asker.peer_id)
            return Rejected(RejectReason.OTHER_SCHEMA)
        if info.key != self.key:
            return Rejected(RejectReason.OTHER_KEY)
        if not self.me.can_lead:
            return Rejected(RejectReason.CANNOT_LEAD)
        if asker.can_lead and asker[:2] <= self.me[:2]:
            return Rejected(RejectReason.WRONG_ORDER)
        if not self._view.is_open_to(asker, now):
            return Rejected(RejectReason.OTHER_ROUND)
        if self.state is State.FOLLOWING:
            assert self._ask is not None
            return Redirect(self._ask.leader.to_bytes(), self._ask.addresses)
        self._view.take_back(asker)  # it lives
        self._view.note_seen(asker, now)
        return self._offer_place(asker, now)

    def _offer_place(self, asker: Candidate, now: float) -> Accepted | Redirect | Rejected:
        room, cut = self._room(now, asker)
        members = len({*self._view.members, asker.peer_id})
        mine = cut.group_of(self.me.peer_id)
        has_room = members <= room or (
            mine is not None and makes_room(asker, self._view.followers.values(), mine.members, members, room)
        )
        is_wanted_elsewhere = self._is_needed_elsewhere(asker.peer_id, cut, now) or self._belongs_elsewhere(
            asker.peer_id, cut, now
        )
        is_wanted_elsewhere |= mine is not cut.group_of(asker.peer_id) and is_apart(asker, self._members)
        if has_room and not is_wanted_elsewhere:
            return Accepted(begins_in=max(0.0, self._times.begins_at - now))
        planned = cut.group_of(asker.peer_id)
        if planned and planned.leader not in (asker.peer_id, *self._view.members):
            return Redirect(planned.leader.to_bytes(), self._view.addresses_of(planned.leader))
        return Rejected(RejectReason.FULL, self._view.searches)

    def _room(self, now: float, asker: Candidate | None = None) -> tuple[int, Cut]:
        """How many members this peer may have now, itself included, and the plan that says so.

        As long as more peers may appear, as many as the target; then as many as its slice of the plan.
        """
        cut = self._cut(now, asker)
        room = self.config.target_group_size or MAX_GROUP_SIZE
        planned = cut.group_of(self.me.peer_id)
        leads = planned is not None and planned.leader == self.me.peer_id and planned.is_complete
        if planned and leads and self._is_final(now):
            room = min(room, len(planned.members))
        return room, cut

    def _on_request_too_late(self, event: JoinRequested, now: float) -> None:
        if self.state is State.GROUPED:
            answer = Rejected(RejectReason.BEGUN, self._group)
        else:
            answer = Rejected(RejectReason.NOT_LOOKING)
        self._effects.append(AnswerRequest(event.token, answer))

    def _on_follower_lost(self, event: FollowerLost, now: float) -> None:
        follower = self._view.followers.pop(event.token, None)
        if follower is not None:
            self.story.note(now, f"lost follower {follower.peer_id}: {event.reason}")
            # It may live and ask again, which puts it back; what is declared of it until then is not to be
            # relied on.
            self._view.leave_out(follower.peer_id, now + self._retry_time())

    # ---- what leaders answer

    def _on_accepted(self, event: LeaderAccepted, now: float) -> None:
        ask = self._current(event.ask)
        if ask is None:
            return
        self._move(State.FOLLOWING)
        self.story.answered(ask.leader, "accepted", now)
        self._times.leader_begins_at = self._believed_begin(event.begins_in, now)
        message = Dismissed(DismissReason.JOINED_ANOTHER, ask.leader.to_bytes(), ask.addresses)
        self._dismiss_all(message)

    def _on_redirected(self, event: LeaderRedirected, now: float) -> None:
        ask = self._current(event.ask)
        if ask is None:
            return
        if event.leader == ask.leader:
            self._drop_leader("redirected to itself", now)
            return
        self.story.answered(ask.leader, f"redirected to {event.leader}", now)
        if ask.redirects < MAX_REDIRECTS and self._view.may_ask(event.leader, now):
            self._ask_to_join(
                event.leader, event.addresses, now, redirects=ask.redirects + 1, is_hearsay=True
            )
        else:
            self._view.leave_out(ask.leader, now + self._retry_time())
            self._go_on_looking()

    def _on_rejected(self, event: LeaderRejected, now: float) -> None:
        ask = self._current(event.ask)
        if ask is None:
            return
        reason = event.answer.reason
        self.story.answered(ask.leader, f"rejected: {reason.words}", now)
        until = now + self._retry_time()
        if reason in (RejectReason.BEGUN, RejectReason.NOT_LOOKING):
            # It says so itself before long, and its next search may be earlier in the order.
            until = now + AVOID_AFTER_LOSS
        elif reason is RejectReason.OTHER_SCHEMA:
            until = math.inf
        is_looking = reason is RejectReason.FULL
        self._view.leave_out(ask.leader, until, is_looking=is_looking)
        self._view.leave_out_group(event.answer.members, until, now, is_looking=is_looking)
        self._go_on_looking()

    def _on_dismissed(self, event: LeaderDismissed, now: float) -> None:
        ask = self._current(event.ask)
        if ask is None:
            return
        answer = event.answer
        self.story.answered(ask.leader, f"dismissed: {answer.reason.words}", now)
        is_looking = answer.reason is DismissReason.BETTER_CUT
        self._view.leave_out(ask.leader, now + self._retry_time(), is_looking=is_looking)
        self._view.leave_out_group(answer.members, now + self._retry_time(), now, is_looking=True)
        suggested = PeerID.from_bytes(answer.leader) if answer.leader else None
        if suggested is not None and self._view.may_ask(suggested, now):
            self._ask_to_join(suggested, answer.addresses, now, redirects=0, is_hearsay=True)
        else:
            self._go_on_looking()

    def _on_postponed(self, event: LeaderPostponed, now: float) -> None:
        if self._current(event.ask):
            self._times.leader_begins_at = self._believed_begin(event.begins_in, now)

    def _on_began(self, event: LeaderBegan, now: float) -> None:
        if self._current(event.ask) is None:
            return
        self._group = tuple(Search(member.peer_id, member.start_time) for member in event.group.members)
        self._move(State.GROUPED)
        self._effects.append(Declare(DeclaredState.TAKEN, self._group))
        self._effects.append(FinishWithGroup(event.group))

    def _on_leader_lost(self, event: LeaderLost, now: float) -> None:
        if self._current(event.ask):
            self._drop_leader(event.reason, now)

    def _ignore(self, event: Event, now: float) -> None:
        """The event belongs to something that is over."""

    def _log(self, line: Log | None) -> None:
        if line is not None:
            self._effects.append(line)

    # ---- decisions

    def _act(self, now: float) -> None:
        """After every event: do what the view and the time now ask for, then set the timer."""
        if self.state in (State.LOOKING, State.ASKING):
            self._follow_plan(now)
        if self.state in (State.LOOKING, State.ASKING):
            self._consider_beginning(now)
        if self.state not in (State.GROUPED, State.ENDED):
            self._effects.append(SetTimer(self._next_timer(now)))

    def _follow_plan(self, now: float) -> None:
        room, cut = self._room(now)
        planned = cut.group_of(self.me.peer_id)
        self.story.plan = why_no_average(self._view.candidates(now)) or cut.reason
        if planned is None:
            return
        if planned.leader != self.me.peer_id:
            if self.state is State.LOOKING and self._is_plan_ready(now):
                self._ask_to_join(planned.leader, self._view.addresses_of(planned.leader), now, redirects=0)
            return
        places = {member.peer_id for member in planned.members}
        outside = sorted(
            (token for token, peer in self._view.followers.items() if peer.peer_id not in places),
            key=lambda token: self._view.followers[token],
            reverse=True,
        )
        surplus = outside[: max(0, len(self._view.members) - room)]
        for token in outside:
            if (
                token in surplus
                or self._belongs_elsewhere(self._view.followers[token].peer_id, cut, now)
                or self._is_needed_elsewhere(self._view.followers[token].peer_id, cut, now)
            ):
                self._dismiss_to_plan(token, cut)

    def _is_plan_ready(self, now: float) -> bool:
        """Whether to go by the plan already: at once, unless there is somebody to be kept apart.

        Then a peer first waits until it can see everybody who started in the same instant. It would find a group
        without that too, but one of peers that happen to be near, who may well be those of its last group.
        """
        if self._view.shows_start or not self._is_mixing(now):
            return True
        self._view.poll_when_starters_visible(now)
        return False

    def _is_mixing(self, now: float) -> bool:
        """Whether to mix peers: there are more of them than one group holds, and some have mixed already.

        Views that stay different can keep mixed groups from becoming full, so in the last of the time only the number
        of peers counts, as it does in a swarm that begins.
        """
        target = self.config.target_group_size
        if target is None or now >= self._times.mixes_until:
            return False
        candidates = self._view.candidates(now)
        if len(candidates) + self._view.yet_to_come <= target:
            return False
        is_mixing = any(candidate.lineage.groups for candidate in candidates)
        self._has_mixed_peers |= is_mixing
        return is_mixing

    def _belongs_elsewhere(self, peer_id: PeerID, cut: Cut, now: float) -> bool:
        """Whether the plan has another leader for ``peer_id``, for the sake of mixing, and is to be relied on."""
        group = cut.group_of(peer_id)
        mine = cut.group_of(self.me.peer_id)
        if group is None or mine is None or group is mine or not group.is_complete:
            return False
        is_leader = mine.leader == self.me.peer_id and group.leader != peer_id
        return is_leader and self._view.is_settled and self._is_mixing(now)

    def _is_last_group_again(self, now: float) -> bool:
        """Whether two members were in one group last time, though many others are not back yet.

        Peers whose round was one are back in the same instant, and would be by themselves for ever. Few that are
        missing may have died.
        """
        many_missing = MANY_MISSING * self._view.yet_to_come >= self._view.count_seen
        return many_missing and self._is_mixing(now) and have_mixed(self._members)

    def _is_needed_elsewhere(self, peer_id: PeerID, cut: Cut, now: float) -> bool:
        """Whether ``peer_id`` has to lead another group, because too few others there could.

        Matters where most peers are in client mode: sizes alone do not show that a group takes away the
        leaders.
        """
        group = cut.group_of(peer_id)
        if group is None or group.leader != peer_id or not group.is_complete or not self._is_final(now):
            return False
        planned = cut.group_of(self.me.peer_id)
        if planned is None or planned.leader != self.me.peer_id:
            return False
        members = {*self._view.members, peer_id}
        return takes_too_many_leaders(self._view.candidates(now), members, planned)

    def _dismiss_to_plan(self, token: int, cut: Cut) -> None:
        follower = self._view.followers.pop(token)
        group = cut.group_of(follower.peer_id)
        suggested = (
            group.leader if group and group.leader not in (follower.peer_id, self.me.peer_id) else None
        )
        message = Dismissed(
            DismissReason.BETTER_CUT,
            suggested.to_bytes() if suggested else None,
            self._view.addresses_of(suggested) if suggested else (),
            self._view.searches,
        )
        self._effects.append(DismissFollower(token, message))

    def _consider_beginning(self, now: float) -> None:
        members = self._view.members
        if not self.me.can_lead:
            return
        if now >= self._times.begins_at or (self._is_put_off and not self._view.missing_of(self._expected)):
            self._begin_or_postpone(now)
            return
        if self.state is not State.LOOKING:
            return
        decision = may_begin_early(
            self._view.candidates(now),
            members,
            self.me.peer_id,
            self.config.target_group_size,
            self.config.min_group_size,
            self._view.candidates(now, with_full_groups=True),
            self._cut(now),
        )
        self.story.plan = decision.reason
        if decision.verdict is EarlyBegin.NO:
            return
        if self._is_last_group_again(now):
            self.story.plan = f"the last group again, and {self._view.yet_to_come} others are yet to come"
            return
        # Newcomers may come without end, but those that started in the same instant as this peer do not.
        if decision.verdict is EarlyBegin.YES and not self._has_mixed_peers:
            is_sure = self._view.shows_start
            self._view.poll_when_starters_visible(now)
        else:
            is_sure = self._view.is_settled
            self._view.poll_when_settled(now)
        if is_sure:
            self._begin()

    def _begin_or_postpone(self, now: float) -> None:
        if now < self._begins_at_latest() and self._expects_somebody(now):
            self._view.poll_when_settled(now)
            return
        if self._view.is_stale(now):
            self._view.look_again(now)
            return
        if not self._is_put_off and self._put_off(now):
            return
        contributors = count_contributors(self._members)
        if contributors and len(self._view.members) >= self.config.min_group_size:
            self._begin()
            return
        self._times.begins_at = now + self.config.min_matchmaking_time
        members = f"{len(self._view.members)} of at least {self.config.min_group_size} members"
        if not contributors:
            members += ", none of which contributes,"
        self.story.note(now, f"{members} at the start time: postponed")
        self._effects.append(TooFew(self._view.count_seen))
        cut = self._cut(now)
        for token, follower in list(self._view.followers.items()):
            planned = cut.group_of(follower.peer_id)
            if planned and planned.is_complete and planned.leader != self.me.peer_id:
                self._dismiss_to_plan(token, cut)  # it can be in a group elsewhere
            else:
                self._effects.append(PostponeFollower(token, self.config.min_matchmaking_time))

    def _put_off(self, now: float) -> bool:
        """Whether to begin later than at the start time, since peers of the last group are yet to come."""
        config = self.config
        members, missing = len(self._view.members), len(self._view.missing_of(self._expected))
        wait = longer_wait(members, missing, config.target_group_size, config.min_matchmaking_time)
        if not wait or members < config.min_group_size:
            return False
        self._is_put_off = True
        self._times.begins_at = now + wait
        self.story.note(now, f"{missing} of the last group are yet to come: begins up to {wait:.1f} s later")
        self._effects += [PostponeFollower(token, wait) for token in self._view.followers]
        return True

    def _begin(self) -> None:
        if self._ask is not None:
            self._effects.append(LeaveLeader(self._ask.number))
        self._group = self._view.searches
        self._move(State.GROUPED)
        self._effects.append(BeginGroup(tuple(self._view.followers)))
        self._effects.append(Declare(DeclaredState.TAKEN, self._group))

    def _end(self, now: float) -> None:
        if self._ask is not None:
            self._effects.append(LeaveLeader(self._ask.number))
        self._dismiss_all(Dismissed(DismissReason.SEARCH_ENDED))
        explanation = self.story.explain(now, self._view.candidates(now), self.me.peer_id)
        self._move(State.ENDED)
        self._effects.append(Declare(DeclaredState.TAKEN))
        self._effects.append(FinishWithout(explanation))

    def _cut(self, now: float, asker: Candidate | None = None) -> Cut:
        candidates = self._view.candidates(now, asker)
        gone = self._view.gone(candidates, now) if self._is_mixing(now) else None
        return cut_groups(candidates, self.config.target_group_size, self.config.min_group_size, gone)

    def _expects_somebody(self, now: float) -> bool:
        """Whether somebody may be on the way here: has just appeared, or is planned here and elsewhere until now."""
        planned = self._cut(now).group_of(self.me.peer_id)
        is_missing = planned is not None and len(self._view.members) < len(planned.members)
        return is_missing or not self._view.is_settled

    def _is_final(self, now: float) -> bool:
        """Whether the plan of the view now is the one to keep to: nobody else has to be waited for, or can be."""
        return self._view.is_settled or now >= self._begins_at_latest()

    def _begins_at_latest(self) -> float:
        return self._times.begins_at + BEGIN_GRACE * self._view.latency

    # ---- leaders and followers

    def _ask_to_join(
        self,
        leader: PeerID,
        addresses: tuple[str, ...],
        now: float,
        redirects: int,
        *,
        is_hearsay: bool = False,
    ) -> None:
        self._asks += 1
        self._ask = Ask(self._asks, leader, addresses, now, redirects)
        self._move(State.ASKING)
        self._effects.append(AskToJoin(self._ask.number, leader, addresses, is_hearsay))
        self.story.asked(leader)

    def _current(self, ask: int) -> Ask | None:
        """The request ``ask`` if it still counts: answers may cross with our leaving."""
        return self._ask if self._ask is not None and self._ask.number == ask else None

    def _go_on_looking(self) -> None:
        self._ask = None
        self._times.leader_begins_at = math.inf
        self._move(State.LOOKING)
        self._poll()

    def _drop_leader(self, reason: str, now: float, avoid: float = AVOID_AFTER_LOSS) -> None:
        assert self._ask is not None
        self.story.answered(self._ask.leader, f"lost ({reason})", now)
        self._view.leave_out(self._ask.leader, now + avoid)
        self._go_on_looking()

    def _drop_follower_of(self, peer_id: PeerID) -> None:
        """A peer that asks again has given up its earlier request."""
        for token, follower in list(self._view.followers.items()):
            if follower.peer_id == peer_id:
                del self._view.followers[token]
                self._effects.append(DismissFollower(token, Dismissed(DismissReason.REPLACED)))

    def _dismiss_all(self, message: Dismissed) -> None:
        for token in self._view.followers:
            self._effects.append(DismissFollower(token, message))
        self._view.followers.clear()

    # ---- time

    def _declare(self, now: float) -> None:
        self._times.declare_again = now + DECLARATION_PERIOD
        self._effects.append(Declare(DeclaredState.LOOKING))

    def _poll(self) -> None:
        self._view.next_poll = math.inf
        if not self._view.is_polling:
            self._view.is_polling = True
            self._effects.append(Poll())

    def _retry_time(self) -> float:
        return max(RETRY_AFTER, 2 * self._view.latency)

    def _believed_begin(self, begins_in: float, now: float) -> float:
        """When a leader begins that says so; what no leader does that is earlier in the order is not believed."""
        return min(now + begins_in, max(now, self._times.begins_at) + self.config.min_matchmaking_time)

    def _patience_ends(self) -> float:
        return self._times.leader_begins_at + self.config.request_timeout + BEGIN_GRACE * self._view.latency

    def _next_timer(self, now: float) -> float:
        time = self._times
        due = [time.deadline, self.story.next_status, time.declare_again]
        if time.mixes_until > now:
            due.append(time.mixes_until)
        if self.state is State.FOLLOWING:
            due.append(self._patience_ends())
        else:
            due.append(self._view.next_poll)
            if self.me.can_lead:
                stale = now + STALE_AFTER if self._view.is_stale(now) else -math.inf
                due.append(time.begins_at if now < time.begins_at else max(stale, self._begins_at_latest()))
            if self._ask is not None:
                due.append(self._ask.asked_at + self.config.request_timeout)
        return max(now, min(due))

    # ---- states

    def _move(self, to: State) -> None:
        if to not in MOVES[self.state]:
            self._raise_illegal(f"a search that is {self.state.value} cannot become {to.value}")
        self.state = to
        if to in (State.GROUPED, State.ENDED):
            self._ask = None

    def _raise_illegal(self, what: str) -> NoReturn:
        history = "\n  ".join(f"{at:.3f} {state.value}: {event}" for at, state, event in self._history)
        raise IllegalTransition(f"{what}; what led there:\n  {history}")

    _ALWAYS: ClassVar[dict[type, Callable[..., None]]] = {
        Declared: _on_declared,
        DeclareFailed: _on_declare_failed,
        Polled: _on_polled,
        SchemaCompared: _on_compared,
        PollFailed: _on_poll_failed,
        JoinRequested: _on_request,
        FollowerLost: _on_follower_lost,
        PeerGone: _on_peer_gone,
        TimerFired: _on_timer,
        Restarted: _on_restarted,
        Cancelled: _on_cancelled,
    }
    # Answers of leaders that this peer has left meanwhile.
    _LATE_ANSWERS: ClassVar[dict[type, Callable[..., None]]] = dict.fromkeys(
        (
            LeaderAccepted,
            LeaderRedirected,
            LeaderRejected,
            LeaderPostponed,
            LeaderDismissed,
            LeaderBegan,
            LeaderLost,
        ),
        _ignore,
    )
    _OVER: ClassVar[dict[type, Callable[..., None]]] = {
        **dict.fromkeys(
            (Declared, DeclareFailed, Polled, PollFailed, SchemaCompared, FollowerLost, PeerGone, TimerFired),
            _ignore,
        ),
        **_LATE_ANSWERS,
        JoinRequested: _on_request_too_late,
        Restarted: _ignore,
        Cancelled: _ignore,
    }
    _HANDLERS: ClassVar[dict[State, dict[type, Callable[..., None]]]] = {
        State.NEW: {SearchStarted: _on_started},
        State.LOOKING: {**_ALWAYS, **_LATE_ANSWERS},
        State.ASKING: {
            **_ALWAYS,
            **_LATE_ANSWERS,
            LeaderAccepted: _on_accepted,
            LeaderRedirected: _on_redirected,
            LeaderRejected: _on_rejected,
            LeaderLost: _on_leader_lost,
        },
        State.FOLLOWING: {
            **_ALWAYS,
            **_LATE_ANSWERS,
            LeaderPostponed: _on_postponed,
            LeaderDismissed: _on_dismissed,
            LeaderBegan: _on_began,
            LeaderLost: _on_leader_lost,
        },
        State.GROUPED: _OVER,
        State.ENDED: _OVER,
    }
