"""Who leads, who follows, and when a group is complete: one search for a group as a pure state machine.

Theory of operation. Every peer that searches declares itself under the group key and reads who else is
declared there. Sorted by (start time, peer id) and cut by :func:`~shoal.averaging.matchmaking.grouping.cut_groups`, the
same view gives the same plan at everybody: who leads, and whom the others ask. A peer asks only leaders that
are earlier than itself in this order, which does not change during a search, and leaders accept only later
ones: no two peers wait for each other.

Views differ, for a while. Therefore leaders accept all that ask while there is room; a peer that finds an
earlier leader joins it and sends its own followers there; a leader that turns out to have more followers than
its slice of the plan dismisses some; and one that is full tells who its members are, so that the asker plans
without them. A follower does not plan: its leader does, until the group begins, the leader dismisses it or
the leader is gone.

A full group begins at once if no newcomer could change the plan. Otherwise its leader first makes sure that
its view is settled: a poll that began a few declaration times after the last newcomer appeared has shown
nobody else. When its start time comes, a leader begins with what it has, or postpones the start if that is
less than the minimum size.

:meth:`SearchCore.handle` is the only way to change a search: an event and the time in, effects out. What a
state lets happen is a table; anything else is an IllegalTransition with the history of events. What to do is decided
by :mod:`.policy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import ClassVar

from shoal.averaging.group import MemberInfo, PeerMode
from shoal.averaging.lineage import NO_LINEAGE, Lineage
from shoal.averaging.matchmaking import events as ev
from shoal.averaging.matchmaking import messages as msg
from shoal.averaging.matchmaking import policy, states
from shoal.averaging.matchmaking.asking import Ask, Asking, NextLeader, Refusal, retry_time
from shoal.averaging.matchmaking.candidate import Candidate, candidate_of
from shoal.averaging.matchmaking.events import Effect, Event, brief
from shoal.averaging.matchmaking.helping import why_no_average
from shoal.averaging.matchmaking.policy import Dismissal, Situation, Verdict
from shoal.averaging.matchmaking.spreading import Spreading
from shoal.averaging.matchmaking.states import SearchState, Times
from shoal.averaging.matchmaking.story import StoryTeller
from shoal.averaging.matchmaking.view import NOTHING_KNOWN, Known, Look, View
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import PeerID
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import Machine
from shoal.utils import figures


class SearchCore:
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
        swarm_round: int = 0,
        expects: int = 0,
        may_spread: bool = False,
    ) -> None:
        """``start_time``: when to begin if not full; ``order_time``: the place in the order, if not the same;
        ``known``: what the search before has left; ``is_first``: there was none before; ``expected``: who is
        likely to look for a group now, too; ``lost``: whom this peer could not reach lately; ``swarm_round``: of the
        grid of a large swarm; ``expects``: how many peers were dealt to its key, this one included; ``may_spread``:
        whether peers that are too many for one key make a grid.
        """
        self._machine = Machine(SearchState.NEW, states.TRANSITIONS)
        self.config = config
        self.key = key
        order_time = start_time if order_time is None else order_time
        self.me = Candidate(
            order_time, peer_id, mode.can_lead, grid_round, lineage, mode.contributes, lost, swarm_round
        )
        self.story = StoryTeller(key, config.target_group_size, config.min_group_size, is_first=is_first)
        self._schema_hash = schema_hash
        self._view = View(self.me, schema_hash, opens_at=start_time, known=known, is_seated=expects > 0)
        ends_at = math.inf if deadline is None else deadline
        self._times = Times(begins_at=start_time, deadline=ends_at, expected_at=start_time)
        self._asking = Asking(config, self.story)
        self._group: tuple[msg.SearchId, ...] = ()
        self._has_mixed_peers = False
        """Whether plans of this search were mixed ones, even if they are not any more."""
        self._expects = expects
        self._spreading = Spreading(may_spread)
        self._expected = set(expected)
        self._is_put_off = False
        """Whether the start was put off for expected peers that are missing; once in a search."""
        self._caught_up_with = 0
        """The latest round of the grid for which it was said that this peer has missed those before."""
        self._said: str | None = None
        """Why no average is possible, as it was logged last."""
        self._hopeless_since = math.inf
        self._effects: list[Effect] = []
        self.deadline = NEVER
        """When :class:`TimePassed` is due, in DHT time."""

    @property
    def count_seen(self) -> int:
        """How many peers have looked for a group under the key during this search, this one included."""
        return self._view.count_seen

    @property
    def known(self) -> Known:
        """What the next search of this peer is to know."""
        return self._view.known

    @property
    def state(self) -> SearchState:
        """What the search is doing."""
        return self._machine.state

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at time ``now``; return what the shell has to do, in order."""
        self._machine.note(brief(event), now)
        kind, was_over = type(event), self.state is SearchState.GROUPED
        if kind in states.HEARD[self.state]:
            self._ON[kind](self, event, now)
        elif kind not in states.OVERHEARD[self.state]:
            self._machine.refuse(f"{kind.__name__} cannot happen now")
        self._act(now)
        if self.state is SearchState.GROUPED and not was_over:
            self._log(self.story.found(now, len(self._group)))
        effects, self._effects = self._effects, []
        return effects

    # ---- events of this peer's own search

    def _on_started(self, event: ev.SearchStarted, now: float) -> None:
        self._move(SearchState.LOOKING)
        self.story.search_began(now)
        self._view.start(now)
        self._times.mix(now)
        self._declare(now)
        self._poll()

    def _on_declared(self, event: ev.Declared, now: float) -> None:
        self._view.note_latency(event.seconds)

    def _on_declare_failed(self, event: ev.DeclareFailed, now: float) -> None:
        self.story.note(now, f"could not declare itself: {event.reason}")
        self._times.declare_again = now + states.DECLARE_RETRY

    def _on_polled(self, event: ev.Polled, now: float) -> None:
        other_schema = self._view.take_in(event.peers, event.began_at, now, event.seconds)
        declared = dict(event.peers)
        for peer_id in other_schema:
            if self.story.saw_other_schema(peer_id):
                other = declared[peer_id]
                self._effects.append(ev.AskSchema(peer_id, other.addresses, other.schema_hash))
        others = len(declared.keys() - {self.me.peer_id})
        self._spreading.look(self.me, self._view, self.config)
        self.story.saw(others, self._view.others_looking, len(other_schema))
        self._warn_if_hopeless(now)

    def _warn_if_hopeless(self, now: float) -> None:
        why = why_no_average(self._view.everybody(now)) if self._view.shows_start else None
        self._hopeless_since = math.inf if why is None else min(self._hopeless_since, now)
        if why is not None and why != self._said and now - self._hopeless_since >= states.HOPELESS_FOR:
            self._said = why
            self._effects.append(ev.Log(f"{self.key}: no average is possible yet: {why}", is_warning=True))

    def _on_compared(self, event: ev.SchemaCompared, now: float) -> None:
        self.story.learned_difference(event.peer, event.difference)

    def _on_poll_failed(self, event: ev.PollFailed, now: float) -> None:
        self.story.note(now, f"could not read who is declared: {event.reason}")
        self._view.schedule_poll(now)

    def _on_timer(self, event: TimePassed, now: float) -> None:
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
        if now >= self._asking.deadline(self._view):
            self._effects += self._asking.lose_patience(self._view, now)
            self._go_on_looking()

    def _on_restarted(self, event: ev.Restarted, now: float) -> None:
        self._leave(self._asking.end())
        self._dismiss_all(msg.Dismissed(msg.DismissReason.SEARCH_ENDED))
        place = event.place
        if place.key != self.key:
            self._effects.append(ev.Declare(msg.DeclaredState.TAKEN))
        self.key = self.story.key = place.key
        self.me = self.me._replace(
            start_time=place.order_time,
            can_lead=event.mode.can_lead,
            grid_round=place.grid_round,
            lineage=place.lineage,
            lost=place.lost,
            swarm_round=place.grid.round,
        )
        self._expects, self._spreading = place.expects, Spreading(place.may_spread)
        self._effects.append(ev.MoveTo(place))
        self._view = View(
            self.me,
            self._schema_hash,
            opens_at=place.start_time,
            before=self._view,
            is_seated=place.expects > 0,
        )
        self._view.start(now)
        if now < self._times.expected_at:
            self._times.expected_at = place.start_time
        self._times.begins_at = place.start_time
        self._times.mix(now)
        self.story.note(
            now, f"began anew under {place.key!r}, to start in {figures.duration(place.start_time - now)}"
        )
        self._declare(now)
        self._go_on_looking()

    def _on_peer_gone(self, event: ev.PeerGone, now: float) -> None:
        self._expected.discard(event.peer_id)

    def _on_cancelled(self, event: ev.Cancelled, now: float) -> None:
        self._end(now)

    # ---- others ask this peer to lead them

    def _on_request(self, event: ev.JoinRequested, now: float) -> None:
        asker = candidate_of(event.info)
        answer = self._answer(asker, event.info, now)
        self._effects.append(ev.AnswerRequest(event.token, answer))
        if isinstance(answer, msg.Accepted):
            self._effects += [
                ev.DismissFollower(token, msg.Dismissed(msg.DismissReason.REPLACED))
                for token in self._view.drop_followers(asker.peer_id)
            ]
            self._view.followers[event.token] = asker
            if self._has_mixed_peers:
                # Groups come together in another order than the plan's: who is still there counts, not who was.
                self._view.outdate(now)
            self.story.note(now, f"{asker.peer_id} joined")

    def _answer(self, asker: Candidate, info: MemberInfo, now: float) -> msg.Answer:
        if self._machine.is_final:
            return policy.too_late(self._group)
        if info.schema_hash != self._schema_hash:
            self.story.saw_other_schema(asker.peer_id)
        refusal = policy.refuse(self._situation(now), asker, info, self.key, self._schema_hash)
        if refusal is not None:
            return refusal
        if self.state is SearchState.FOLLOWING:
            return self._asking.redirect()
        self._view.take_back(asker)  # it lives
        self._view.note_seen(asker, now)
        return policy.offer_place(self._situation(now), asker)

    def _on_follower_lost(self, event: ev.FollowerLost, now: float) -> None:
        follower = self._view.followers.pop(event.token, None)
        if follower is not None:
            self.story.note(now, f"lost follower {follower.peer_id}: {event.reason}")
            # It may live and ask again, which puts it back; what is declared of it until then is not to be
            # relied on.
            self._view.leave_out(follower.peer_id, now + retry_time(self._view))

    # ---- what leaders answer

    def _on_accepted(self, event: ev.LeaderAccepted, now: float) -> None:
        ask = self._asking.current
        if ask is None or not self._asking.expects(event.ask):
            return
        self._move(SearchState.FOLLOWING)
        self._asking.accepted(event, now, self._times.begins_at)
        self._dismiss_all(
            msg.Dismissed(msg.DismissReason.JOINED_ANOTHER, ask.leader.to_bytes(), ask.addresses)
        )

    def _on_postponed(self, event: ev.LeaderPostponed, now: float) -> None:
        if self._asking.expects(event.ask):
            self._asking.accepted(event, now, self._times.begins_at)

    def _on_refused(self, event: Refusal, now: float) -> None:
        if not self._asking.expects(event.ask):
            return
        instead = self._asking.refused(event, self._view, now)
        if instead is None:
            self._go_on_looking()
        else:
            self._ask_to_join(instead, now)

    def _on_began(self, event: ev.LeaderBegan, now: float) -> None:
        if not self._asking.expects(event.ask):
            return
        self._group = tuple(msg.SearchId(member.peer_id, member.start_time) for member in event.group.members)
        self._move(SearchState.GROUPED)
        named = policy.members_to_name(self._group, self.me.peer_id)
        self._effects.append(ev.Declare(msg.DeclaredState.TAKEN, named))
        self._effects.append(ev.FinishWithGroup(event.group))

    def _log(self, line: ev.Log | None) -> None:
        if line is not None:
            self._effects.append(line)

    # ---- decisions

    def _act(self, now: float) -> None:
        """After every event: do what the view and the time now ask for, and say when to look at them again."""
        if self.state is SearchState.LOOKING and self._is_spreading(now):
            return
        if self.state is SearchState.LOOKING:
            self._catch_up(now)
        if self.state in (SearchState.LOOKING, SearchState.ASKING):
            self._follow_plan(now)
        if self.state in (SearchState.LOOKING, SearchState.ASKING) and self.me.can_lead:
            self._consider_beginning(now)
        if self.state is SearchState.LOOKING and not self.me.can_lead:
            self._consider_leaving_seat(now)
        if self.state is SearchState.FOLLOWING:
            self._asking.watch(self._situation(now))
        self.deadline = NEVER if self._machine.is_final else self._next_deadline(now)

    def _plain_situation(self, now: float) -> Situation:
        mixed = self._has_mixed_peers
        return Situation(self.me, self.config, self._view, self._times, now, mixed, self._expects)

    def _situation(self, now: float) -> Situation:
        situation = self._plain_situation(now)
        if situation.is_mixing and not self._has_mixed_peers:
            self._has_mixed_peers = True
            return replace(situation, has_mixed=True)
        return situation

    def _is_spreading(self, now: float) -> bool:
        """Whether this peer is about to make a grid with others, rather than follow a plan for one key."""
        crowd = self._spreading.crowd
        if not crowd or now >= self._times.begins_at:
            return False
        self.story.plan = f"{len(crowd)} peers are about to make a grid"
        if not self._view.counts_all:
            self._view.look(Look.WHEN_ALL_VISIBLE, now)
        elif not self._spreading.has_begun:
            self._spreading.has_begun = True
            self._effects.append(ev.TooMany(len(crowd), crowd.index(self.me)))
        situation = self._plain_situation(now)
        self.deadline = policy.next_deadline(situation, (self.story.next_status,), follows=False)
        return True

    def _catch_up(self, now: float) -> None:
        """The others that were dealt to this key may have gone on without this peer: it goes to the place they left."""
        missed = policy.missed_rounds(self._situation(now))
        if missed is not None and missed.round > self._caught_up_with:
            self._caught_up_with = missed.round
            self._effects.append(ev.MissedRounds(missed))

    def _consider_leaving_seat(self, now: float) -> None:
        """A client that follows nobody at its start time may do better where others are left over."""
        if self._expects and now >= self._times.begins_at:
            self._times.begins_at = now + self.config.min_matchmaking_time
            self._effects.append(ev.TooFew(self._view.count_seen))

    def _follow_plan(self, now: float) -> None:
        decision = policy.follow_plan(self._situation(now))
        self.story.plan = decision.reason
        if self.state is SearchState.LOOKING:
            self._view.look(decision.look, now)
            if decision.leader is not None:
                addresses = self._view.addresses_of(decision.leader)
                self._ask_to_join(NextLeader(decision.leader, addresses), now)
        for dismissal in decision.dismissals:
            self._dismiss_to_plan(dismissal)

    def _dismiss_to_plan(self, dismissal: Dismissal) -> None:
        del self._view.followers[dismissal.token]
        suggested = dismissal.suggested
        message = msg.Dismissed(
            msg.DismissReason.BETTER_CUT,
            suggested.to_bytes() if suggested else None,
            self._view.addresses_of(suggested) if suggested else (),
            self._view.searches,
        )
        self._effects.append(ev.DismissFollower(dismissal.token, message))

    def _consider_beginning(self, now: float) -> None:
        situation = self._situation(now)
        has_come = self._is_put_off and not self._view.missing_of(self._expected)
        if now >= self._times.begins_at or has_come:
            decision = policy.begin_at_start_time(situation, self._expected, is_put_off=self._is_put_off)
            if decision.verdict in (Verdict.PUT_OFF, Verdict.POSTPONE):
                self.story.note(now, decision.reason)
        elif self.state is SearchState.LOOKING:
            decision = policy.begin_early(situation)
            self.story.plan = decision.reason
        else:
            return
        self._view.look(decision.look, now)
        match decision.verdict:
            case Verdict.BEGIN:
                self._begin_group(now)
            case Verdict.PUT_OFF:
                self._is_put_off = True
                self._times.begins_at = now + decision.later
                self._effects += [
                    ev.PostponeFollower(token, decision.later) for token in self._view.followers
                ]
            case Verdict.POSTPONE:
                self._postpone(now, decision.later)

    def _postpone(self, now: float, later: float) -> None:
        self._times.begins_at = now + later
        self._effects.append(ev.TooFew(self._view.count_seen))
        elsewhere = policy.dismissals_when_postponed(self._situation(now))
        for token in list(self._view.followers):
            if token in elsewhere:
                self._dismiss_to_plan(elsewhere[token])
            else:
                self._effects.append(ev.PostponeFollower(token, later))

    def _begin_group(self, now: float) -> None:
        self._leave(self._asking.end())
        self._group = self._view.searches
        seen, before = self._view.count_seen, policy.count_before(self._situation(now))
        self._move(SearchState.GROUPED)
        self._effects.append(ev.BeginGroup(tuple(self._view.followers), seen, before))
        self._effects.append(ev.Declare(msg.DeclaredState.TAKEN, self._group))

    def _end(self, now: float) -> None:
        self._leave(self._asking.end())
        self._dismiss_all(msg.Dismissed(msg.DismissReason.SEARCH_ENDED))
        # Planning without those that another group holds hides that no group of all is of use.
        self.story.plan = why_no_average(self._view.declared()) or self.story.plan
        explanation = self.story.explain(now, self._view.candidates(now), self.me.peer_id)
        self._move(SearchState.ENDED)
        self._effects.append(ev.Declare(msg.DeclaredState.TAKEN))
        self._effects.append(ev.FinishWithout(explanation))

    # ---- leaders and followers

    def _ask_to_join(self, leader: NextLeader, now: float) -> None:
        ask = self._asking.ask(leader, now)
        self._move(SearchState.ASKING)
        self._effects.append(ev.AskToJoin(ask.number, ask.leader, ask.addresses, leader.is_hearsay))

    def _leave(self, ask: Ask | None) -> None:
        if ask is not None:
            self._effects.append(ev.LeaveLeader(ask.number))

    def _go_on_looking(self) -> None:
        self._asking.end()
        self._move(SearchState.LOOKING)
        self._poll()

    def _dismiss_all(self, message: msg.Dismissed) -> None:
        for token in self._view.followers:
            self._effects.append(ev.DismissFollower(token, message))
        self._view.followers.clear()

    # ---- time

    def _declare(self, now: float) -> None:
        self._times.declare_again = now + states.DECLARATION_PERIOD
        self._effects.append(ev.Declare(msg.DeclaredState.LOOKING))

    def _poll(self) -> None:
        self._view.next_poll = math.inf
        if not self._view.is_polling:
            self._view.is_polling = True
            self._effects.append(ev.Poll())

    def _next_deadline(self, now: float) -> float:
        due = (self.story.next_status, self._asking.deadline(self._view))
        follows = self.state is SearchState.FOLLOWING
        return policy.next_deadline(self._situation(now), due, follows=follows)

    # ---- states

    def _move(self, to: SearchState) -> None:
        self._machine.move(to)
        if self._machine.is_final:
            self._asking.end()

    _ON: ClassVar[dict[type, Callable[..., None]]] = {
        ev.SearchStarted: _on_started,
        ev.Restarted: _on_restarted,
        ev.Cancelled: _on_cancelled,
        ev.Declared: _on_declared,
        ev.DeclareFailed: _on_declare_failed,
        ev.Polled: _on_polled,
        ev.PollFailed: _on_poll_failed,
        ev.SchemaCompared: _on_compared,
        ev.JoinRequested: _on_request,
        ev.FollowerLost: _on_follower_lost,
        ev.PeerGone: _on_peer_gone,
        ev.LeaderAccepted: _on_accepted,
        ev.LeaderPostponed: _on_postponed,
        ev.LeaderBegan: _on_began,
        **dict.fromkeys(
            (ev.LeaderRedirected, ev.LeaderRejected, ev.LeaderDismissed, ev.LeaderLost), _on_refused
        ),
        TimePassed: _on_timer,
    }
