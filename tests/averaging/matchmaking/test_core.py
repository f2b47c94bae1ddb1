"""The core of matchmaking, one search at a time: what it does about single events."""

from __future__ import annotations

import pytest

from shoal.averaging.grid import NO_GRID, UNKNOWN_ROUND, Grid, Layout
from shoal.averaging.group import SCHEMA_HASH_BYTES, MemberInfo, PeerMode
from shoal.averaging.matchmaking.asking import AVOID_AFTER_LOSS
from shoal.averaging.matchmaking.core import SearchCore
from shoal.averaging.matchmaking.events import (
    AnswerRequest,
    AskSchema,
    AskToJoin,
    BeginGroup,
    Cancelled,
    Declare,
    Declared,
    DismissFollower,
    FinishWithout,
    FollowerLost,
    JoinRequested,
    LeaderAccepted,
    LeaderDismissed,
    LeaderLost,
    LeaderPostponed,
    LeaderRedirected,
    LeaderRejected,
    LeaveLeader,
    Log,
    MissedRounds,
    PeerGone,
    Place,
    Poll,
    Polled,
    PostponeFollower,
    Restarted,
    SchemaCompared,
    SearchStarted,
)
from shoal.averaging.matchmaking.messages import (
    Accepted,
    Declaration,
    DeclaredState,
    Dismissed,
    DismissReason,
    Redirect,
    Rejected,
    RejectReason,
    SearchId,
    search_marks,
)
from shoal.averaging.matchmaking.missed import Missed
from shoal.averaging.matchmaking.policy import members_to_name
from shoal.averaging.matchmaking.states import SearchState
from shoal.averaging.matchmaking.story import StoryTeller
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import Identity, PeerID
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import IllegalTransition

SCHEMA = b"s" * SCHEMA_HASH_BYTES
START = 105.0
IDS = sorted(Identity.generate(bytes([number]) * 32).peer_id for number in range(8))


class Driver:
    """One search, of peer ``number``, at a time of its own; the DHT answers instantly."""

    def __init__(
        self,
        number: int = 3,
        target: int | None = 3,
        minimum: int = 2,
        mode: PeerMode = PeerMode.FULL,
        *,
        is_first: bool = False,
        expected: tuple[PeerID, ...] = (),
        swarm_round: int = 0,
        expects: int = 0,
    ):
        self.core = SearchCore(
            MatchmakingConfig(target, minimum),
            peer_id=IDS[number],
            mode=mode,
            schema_hash=SCHEMA,
            key="swarm.0b",
            start_time=START,
            deadline=150.0,
            expected=expected,
            is_first=is_first,
            swarm_round=swarm_round,
            expects=expects,
        )
        self.now = 100.0
        self.seen: tuple[tuple[PeerID, Declaration], ...] = ()
        self.effects = self.core.handle(SearchStarted(), self.now)
        self.send(Declared(0.0))

    def send(self, event):
        self.effects = self.core.handle(event, self.now)
        return self.effects

    def see(self, *others: tuple[PeerID, Declaration]):
        self.seen = others
        return self.send(Polled(self.now, others))

    def only(self, kind):
        found = [effect for effect in self.effects if isinstance(effect, kind)]
        assert len(found) <= 1
        return found[0] if found else None

    def at(self, now: float, *, was_stopped: bool = False):
        """Later, when the view is as it was; ``was_stopped``: this process has seen nothing since."""
        if not was_stopped:
            just_before = now - 1e-3
            self.core.handle(Polled(just_before, self.seen), just_before)
        self.now = now
        return self.send(TimePassed())

    def join(self, number: int, token: int, **changes) -> object:
        self.send(JoinRequested(token, info(number, **changes)))
        return self.only(AnswerRequest).answer


def declared(
    number: int,
    *,
    state=DeclaredState.LOOKING,
    schema=SCHEMA,
    mode=PeerMode.FULL,
    group=(),
    start=START,
    swarm_round=0,
):
    addresses, marks = (f"address {number}",), search_marks(group)
    return IDS[number], Declaration(start, state, schema, mode, addresses, marks, swarm_round=swarm_round)


def search(number: int, start: float = START) -> SearchId:
    return SearchId(IDS[number].to_bytes(), start)


def info(
    number: int,
    *,
    schema=SCHEMA,
    key="swarm.0b",
    mode=PeerMode.FULL,
    start=START,
    leader=3,
    lost=(),
    swarm_round=0,
) -> MemberInfo:
    return MemberInfo(
        IDS[number].to_bytes(),
        IDS[leader].to_bytes(),
        key,
        schema,
        mode,
        None,
        (),
        b"",
        start,
        100.0,
        bytes(16),
        lost=tuple(IDS[other].to_bytes() for other in lost),
        grid=Grid(Layout(4, 4), swarm_round, 16.0) if swarm_round else NO_GRID,
    )


def test_a_search_declares_itself_looks_around_and_sets_a_timer():
    driver = Driver()
    fresh = SearchCore(
        MatchmakingConfig(),
        peer_id=IDS[0],
        mode=PeerMode.FULL,
        schema_hash=SCHEMA,
        key="swarm.0b",
        start_time=START,
        deadline=None,
    )
    kinds = [type(effect) for effect in fresh.handle(SearchStarted(), 100.0)]
    assert kinds == [Declare, Poll]
    assert 100.0 < fresh.deadline <= START
    assert driver.core.state is SearchState.LOOKING


def test_it_asks_the_earliest_that_can_lead():
    driver = Driver(target=4)
    driver.see(declared(0, mode=PeerMode.CLIENT), declared(1), declared(2))
    assert driver.only(AskToJoin) == AskToJoin(1, IDS[1], ("address 1",))
    assert driver.core.state is SearchState.ASKING


def test_nobody_is_asked_twice_at_once():
    driver = Driver()
    driver.see(declared(1))
    driver.see(declared(0), declared(1))
    assert driver.only(AskToJoin) is None


def test_who_is_taken_is_left_out_with_its_whole_group():
    driver = Driver()
    group = (search(0), search(1), search(2))
    driver.see(declared(0), declared(1), declared(2, state=DeclaredState.TAKEN, group=group))
    assert driver.only(AskToJoin) is None
    driver.see(declared(0, start=START + 1), declared(1))
    assert driver.only(AskToJoin) is None  # later than this peer, which leads
    assert isinstance(driver.join(0, 1, start=START + 1), Accepted)


def test_an_accepted_peer_sends_its_followers_to_its_leader():
    driver = Driver(target=5)
    assert isinstance(driver.join(4, token=7), Accepted)
    driver.see(declared(0), declared(4))
    driver.send(LeaderAccepted(1, 5.0))
    expected = Dismissed(DismissReason.JOINED_ANOTHER, IDS[0].to_bytes(), ("address 0",))
    assert driver.only(DismissFollower) == DismissFollower(7, expected)
    assert driver.core.state is SearchState.FOLLOWING
    assert driver.join(5, token=8) == Redirect(IDS[0].to_bytes(), ("address 0",))


def test_a_redirect_is_followed():
    driver = Driver()
    driver.see(declared(1))
    driver.send(LeaderRedirected(1, IDS[0], ("elsewhere",)))
    assert driver.only(AskToJoin) == AskToJoin(2, IDS[0], ("elsewhere",), is_hearsay=True)


@pytest.mark.parametrize(("partner", "is_taken_in"), [(4, True), (3, False)])
def test_a_peer_without_a_place_joins_a_group_of_one_it_is_apart_from(partner: int, is_taken_in: bool):
    """The round spares the route to a follower; to the leader there must be one."""
    driver = Driver(target=3, minimum=3)
    driver.see(declared(4), declared(5))
    assert isinstance(driver.join(4, token=1), Accepted)
    assert isinstance(driver.join(6, token=2, lost=(partner,)), Accepted) is is_taken_in


def test_a_peer_that_has_another_place_does_not_join_one_it_is_apart_from():
    driver = Driver(target=3)
    driver.see(declared(4), declared(5), declared(6))
    assert isinstance(driver.join(4, token=1), Accepted)
    assert driver.join(6, token=2, lost=(4,)) == Redirect(IDS[5].to_bytes(), ("address 5",))


def test_a_full_group_is_left_out_of_the_plan_as_a_whole():
    driver = Driver(minimum=3)
    driver.see(declared(0), declared(1))
    assert driver.only(AskToJoin).leader == IDS[0]
    driver.send(LeaderRejected(1, Rejected(RejectReason.FULL, (search(0), search(1), search(2)))))
    assert driver.only(AskToJoin) is None
    assert isinstance(driver.join(4, token=1), Accepted)
    driver.now += 1.0  # the group has not begun: perhaps it has room now
    driver.see(declared(0), declared(1), declared(4))
    assert driver.only(AskToJoin).leader == IDS[0]


def test_a_lost_leader_is_avoided_for_a_while():
    driver = Driver()
    driver.see(declared(0))
    driver.send(LeaderLost(1, "refused"))
    assert driver.core.state is SearchState.LOOKING
    driver.see(declared(0))
    assert driver.only(AskToJoin) is None
    driver.now += AVOID_AFTER_LOSS
    driver.see(declared(0))
    assert driver.only(AskToJoin).leader == IDS[0]


def test_a_leader_whose_group_has_begun_is_asked_again_when_it_looks_for_another_though_for_an_earlier_time():
    driver = Driver()
    driver.see(declared(0))
    driver.send(LeaderRejected(1, Rejected(RejectReason.BEGUN, (search(0), search(1)))))
    driver.see(declared(0))
    assert driver.only(AskToJoin) is None
    driver.now += AVOID_AFTER_LOSS
    driver.see(declared(0, start=START - 1.0))
    assert driver.only(AskToJoin).leader == IDS[0]


def test_a_dismissed_peer_asks_whom_it_is_sent_to():
    driver = Driver()
    driver.see(declared(0))
    driver.send(LeaderAccepted(1, 5.0))
    dismissed = Dismissed(DismissReason.BETTER_CUT, IDS[2].to_bytes(), ("there",), (search(0), search(1)))
    driver.send(LeaderDismissed(1, dismissed))
    assert driver.only(AskToJoin) == AskToJoin(2, IDS[2], ("there",), is_hearsay=True)


def test_no_answer_in_time_means_a_lost_leader():
    driver = Driver()
    driver.see(declared(0))
    driver.at(102.9)
    assert driver.core.state is SearchState.ASKING
    driver.at(103.0)
    assert driver.only(LeaveLeader) == LeaveLeader(1)
    assert driver.core.state is SearchState.LOOKING


def test_a_search_that_begins_anew_keeps_to_what_it_says_of_its_routes():
    driver = Driver(number=3, target=4)
    driver.see(declared(0), declared(1), declared(2))
    assert driver.only(AskToJoin).leader == IDS[0]
    place = Place("swarm.0b", START, START, lost=(IDS[0].to_bytes(),))
    driver.send(Restarted(place, PeerMode.FULL))
    driver.see(declared(0), declared(1), declared(2))
    assert driver.only(AskToJoin).leader != IDS[0]


def test_a_leader_that_cannot_be_reached_is_asked_on_nobodys_advice():
    driver = Driver()
    place = Place("swarm.0b", START, START, lost=(IDS[0].to_bytes(),))
    driver.send(Restarted(place, PeerMode.FULL))
    driver.see(declared(1))
    driver.send(LeaderRedirected(1, IDS[0], ("elsewhere",)))
    assert driver.only(AskToJoin) is None


@pytest.mark.parametrize("says", [LeaderAccepted, LeaderPostponed])
def test_a_leader_that_says_it_begins_in_31_years_is_left_soon_after_this_peers_own_start_time(says):
    driver = Driver()
    driver.see(declared(0))
    driver.send(LeaderAccepted(1, 1e9))
    driver.send(says(1, 1e9))
    config = driver.core.config
    patience_ends = START + config.min_matchmaking_time + config.request_timeout
    driver.at(patience_ends - 0.1)
    assert driver.core.state is SearchState.FOLLOWING
    driver.at(patience_ends)
    assert driver.only(LeaveLeader) == LeaveLeader(1)


def test_answers_of_a_leader_that_was_left_are_ignored():
    driver = Driver()
    driver.see(declared(0))
    driver.at(103.0)
    for late in (LeaderAccepted(1, 1.0), LeaderRedirected(1, IDS[1], ()), LeaderLost(1, "gone")):
        driver.send(late)
        assert driver.core.state is SearchState.LOOKING


def test_a_full_group_begins_once_its_leader_knows_that_there_is_nobody_else():
    driver = Driver(number=0, target=2)
    driver.send(Declared(0.1))
    driver.join(1, token=1)
    assert driver.only(BeginGroup) is None
    driver.now += 0.3
    driver.send(Polled(driver.now, (declared(1),)))
    assert driver.only(BeginGroup) == BeginGroup((1,), seen=2)
    assert driver.only(Declare) == Declare(DeclaredState.TAKEN, (search(0), search(1)))
    answer = driver.join(2, token=2)
    assert answer == Rejected(RejectReason.BEGUN, (search(0), search(1)))


def test_at_the_start_time_a_leader_begins_with_what_it_has():
    driver = Driver(number=0, target=4)
    driver.join(1, token=1)
    driver.see(declared(1))
    driver.at(START - 0.01)
    assert driver.only(BeginGroup) is None
    driver.at(START)
    assert driver.only(BeginGroup) == BeginGroup((1,), seen=2)


def test_with_too_few_the_start_is_postponed_until_the_deadline():
    driver = Driver(number=0, target=4, minimum=3)
    driver.join(1, token=1)
    driver.see(declared(1))
    driver.at(START)
    assert driver.only(PostponeFollower) == PostponeFollower(1, 5.0)
    driver.at(149.0)
    assert driver.core.state is SearchState.LOOKING
    driver.at(150.0)
    assert driver.core.state is SearchState.ENDED
    assert driver.only(DismissFollower).message.reason is DismissReason.SEARCH_ENDED
    explanation = driver.only(FinishWithout).explanation
    assert "found no group of 3 to 4 peers with prefix 'swarm' in 50 s: " in explanation
    assert "2 of at least 3 members at the start time: postponed" in explanation
    assert driver.only(Declare) == Declare(DeclaredState.TAKEN)


def test_a_leader_lets_those_go_who_make_its_group_larger_than_planned():
    driver = Driver(number=0, target=4)
    for number in (1, 2, 3):
        driver.join(number, token=number)
    driver.see(*(declared(number) for number in (1, 2, 3, 4)))  # five: 3 + 2
    dismissed = driver.only(DismissFollower)
    assert dismissed.token == 3
    assert dismissed.message.leader is None  # it is to lead peer 4
    assert {SearchId(*member).peer_id for member in map(tuple_of, dismissed.message.members)} == {
        IDS[number].to_bytes() for number in (0, 1, 2)
    }
    driver.at(START)
    assert driver.only(BeginGroup) == BeginGroup((1, 2), seen=5)


def tuple_of(member: SearchId) -> tuple[bytes, float]:
    return member.peer_id, member.start_time


def test_who_asks_again_has_given_up_its_earlier_request():
    driver = Driver(number=0, target=4)
    driver.join(1, token=1)
    driver.join(1, token=2)
    assert driver.only(DismissFollower).message.reason is DismissReason.REPLACED
    driver.send(FollowerLost(1, "left"))
    driver.at(START)
    assert driver.only(BeginGroup) == BeginGroup((2,), seen=2)


def test_a_follower_that_is_gone_is_in_no_group():
    driver = Driver(number=0, target=4)
    driver.join(1, token=1)
    driver.join(2, token=2)
    driver.send(FollowerLost(1, "connection lost"))
    driver.at(START)
    assert driver.only(BeginGroup) == BeginGroup((2,), seen=3)


def test_cancelling_lets_everybody_go():
    driver = Driver(target=5)
    driver.join(4, token=1)
    driver.see(declared(0), declared(4))
    driver.send(Cancelled())
    assert driver.only(LeaveLeader) == LeaveLeader(1)
    assert driver.only(DismissFollower).token == 1
    assert driver.core.deadline == NEVER
    assert driver.core.state is SearchState.ENDED
    assert driver.join(5, token=2) == Rejected(RejectReason.NOT_LOOKING)


def test_a_client_never_leads():
    driver = Driver(mode=PeerMode.CLIENT)
    assert driver.join(4, token=1) == Rejected(RejectReason.CANNOT_LEAD)
    driver.see(declared(4, start=START + 100))  # even one that starts much later leads it
    assert driver.only(AskToJoin).leader == IDS[4]


def test_an_illegal_event_raises_with_the_story_that_led_there():
    driver = Driver()
    driver.see(declared(0))
    with pytest.raises(IllegalTransition, match=r"SearchStarted cannot happen now") as caught:
        driver.send(SearchStarted())
    assert "Polled" in str(caught.value)
    with pytest.raises(IllegalTransition, match=r"TimePassed cannot happen now"):
        SearchCore(
            MatchmakingConfig(),
            peer_id=IDS[0],
            mode=PeerMode.FULL,
            schema_hash=SCHEMA,
            key="k",
            start_time=0.0,
            deadline=None,
        ).handle(TimePassed(), 0.0)


def test_the_story_names_what_was_seen_and_answered():
    driver = Driver()
    driver.see(declared(0), declared(5, schema=b"t" * SCHEMA_HASH_BYTES))
    assert driver.only(AskSchema) == AskSchema(IDS[5], ("address 5",), b"t" * SCHEMA_HASH_BYTES)
    driver.send(SchemaCompared(IDS[5], "the shape of averaged_tensors[0] is 2 here, 3 there"))
    driver.send(LeaderRejected(1, Rejected(RejectReason.OTHER_SCHEMA)))
    driver.see(
        declared(0), declared(4, state=DeclaredState.TAKEN), declared(5, schema=b"t" * SCHEMA_HASH_BYTES)
    )
    assert driver.only(AskSchema) is None
    driver.send(Cancelled())
    text = driver.only(FinishWithout).explanation
    assert (
        "1 other peer looks for a group with prefix 'swarm'; 1 other peer found one, or stopped looking"
        in text
    )
    differs = "the shape of averaged_tensors[0] is 2 here, 3 there"
    assert f"; {IDS[5]} averages something else under this prefix ({differs})" in text
    assert f"asked {IDS[0]} (rejected: it averages something else)" in text


def test_the_first_search_says_at_once_for_how_many_it_waits():
    driver = Driver(number=0, target=4, minimum=3, is_first=True)
    driver.see()
    driver.at(100.5)
    text = "swarm: waiting for 2 more peers with prefix 'swarm' (a group has 3 to 4 peers)"
    assert driver.only(Log) == Log(text, tells_how_to_join=True)
    driver.at(129.0)
    assert driver.only(Log) is None
    driver.at(130.0)
    text = "swarm: still waiting for 2 more peers after 30 s: no other peer looks for a group with prefix 'swarm'"
    assert driver.only(Log) == Log(text, is_warning=True)


def test_the_first_search_says_when_a_group_that_is_not_full_begins():
    driver = Driver(number=0, target=4, minimum=2, is_first=True)
    driver.see(declared(1))
    driver.at(100.5)
    text = (
        f"swarm: 2 peers with prefix 'swarm' are here; the group begins in {START - 100.5:.3g} s, or at once "
    )
    assert driver.only(Log) == Log(f"{text}with 2 more peers", tells_how_to_join=True)


def test_the_first_search_says_nothing_while_the_dht_is_silent_or_the_group_is_about_to_form():
    driver = Driver(number=0, target=2, is_first=True)
    driver.at(100.5, was_stopped=True)
    assert driver.only(Log) is None
    driver.see(declared(1))
    driver.at(101.0)
    assert driver.only(Log) is None


@pytest.mark.parametrize("is_first", [True, False])
def test_a_group_is_announced_where_its_user_waits_for_it(is_first: bool):
    driver = Driver(number=0, target=2, is_first=is_first)
    driver.now = 101.5
    driver.join(1, token=1)
    driver.see(declared(1))
    assert driver.core.state is SearchState.GROUPED
    expected = Log("swarm: found a group of 2 after 1.5 s") if is_first else None
    assert driver.only(Log) == expected


def test_a_group_is_announced_after_a_long_wait():
    driver = Driver(number=0, target=2)
    driver.see()
    driver.at(131.0)
    assert driver.only(Log) is not None
    driver.join(1, token=1)
    assert driver.core.state is SearchState.GROUPED
    assert driver.only(Log) == Log("swarm: found a group of 2 after 31 s")


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("run.0b", "prefix 'run'"),
        ("Qwen2.5.0b", "prefix 'Qwen2.5'"),
        ("run.0b01", "prefix 'run' and group bits '01'"),
        ("run.auto10", "prefix 'run' (part 10 of a large swarm)"),
    ],
)
def test_a_group_key_is_shown_in_a_users_words(key: str, place: str):
    story = StoryTeller(key, 2, 2)
    story.saw(0, 0, 0)
    assert f"no other peer looks for a group with {place}" in story.explain(1.0, [], IDS[0])


def test_every_reason_of_a_leader_has_words():
    for reason in (*RejectReason, *DismissReason):
        assert reason.words


def test_a_settled_timer_is_never_in_the_past():
    driver = Driver(number=0, target=4)
    for now in (100.5, 101.0, 104.0, 111.0):
        driver.at(now)
        assert now <= driver.core.deadline < NEVER


def test_a_leader_that_was_stopped_looks_again_before_it_begins():
    """A follower may have given it up meanwhile, and be alone if it begins without."""
    driver = Driver(number=0, target=4)
    driver.join(1, token=1)
    driver.see(declared(1))
    driver.at(START + 1.0, was_stopped=True)
    assert driver.only(BeginGroup) is None
    assert driver.only(Poll) == Poll()
    assert driver.core.deadline > driver.now
    driver.join(2, token=2)
    driver.see(declared(1), declared(2))
    assert driver.only(BeginGroup) == BeginGroup((1, 2), seen=3)


def test_a_group_waits_once_and_for_some_time_for_a_member_of_the_last_one():
    driver = Driver(number=0, target=4, expected=(IDS[1], IDS[2]))
    driver.join(1, token=1)
    driver.see(declared(1))
    driver.at(START)
    assert driver.only(BeginGroup) is None
    assert driver.only(PostponeFollower) == PostponeFollower(1, 5.0)
    driver.at(START + 4.9)
    assert driver.only(BeginGroup) is None
    driver.at(START + 5.0)
    assert driver.only(BeginGroup) == BeginGroup((1,), seen=2)


def test_a_group_that_waits_for_a_member_begins_when_it_has_come():
    driver = Driver(number=0, target=4, expected=(IDS[1], IDS[2]))
    driver.join(1, token=1)
    driver.see(declared(1))
    driver.at(START)
    driver.now = START + 1.0
    driver.see(declared(1), declared(2, start=START + 3.0))
    assert driver.only(BeginGroup) is None  # it is on its way here
    driver.join(2, token=2, start=START + 3.0)
    assert driver.only(BeginGroup) == BeginGroup((1, 2), seen=3)


def test_nobody_waits_for_a_member_of_the_last_group_whose_connection_is_gone():
    driver = Driver(number=0, target=4, expected=(IDS[1], IDS[2]))
    driver.join(1, token=1)
    driver.send(PeerGone(IDS[2]))
    driver.at(START)
    assert driver.only(BeginGroup) == BeginGroup((1,), seen=2)


def test_a_leader_that_gave_no_answer_is_asked_again_soon():
    """It may only have been stopped for a moment, and nobody else may be there."""
    driver = Driver()
    driver.see(declared(0))
    assert driver.only(AskToJoin).leader == IDS[0]
    driver.at(103.0)
    assert driver.only(LeaveLeader) is not None
    driver.at(105.9)
    assert driver.only(AskToJoin) is None
    driver.at(106.1, was_stopped=True)
    assert driver.only(AskToJoin).leader == IDS[0]


def test_clients_alone_are_warned_of_unless_a_leader_is_only_busy():
    """A full peer that has a group just now will look for another one."""
    driver = Driver(0, mode=PeerMode.CLIENT)
    client = declared(1, mode=PeerMode.CLIENT)
    driver.now += 1.0
    driver.see(client, declared(2, state=DeclaredState.TAKEN))
    assert driver.only(Log) is None
    only_clients = client, declared(2, state=DeclaredState.TAKEN, mode=PeerMode.CLIENT)
    driver.see(*only_clients)
    assert driver.only(Log) is None, "others may be about to come"
    driver.now += 2.0
    driver.see(*only_clients)
    assert "no average is possible yet: all 3 peers are clients" in driver.only(Log).text


# ---- at a seat of a grid


def test_a_peer_at_its_seat_plans_with_those_of_its_own_round_until_its_start_time():
    driver = Driver(target=4, swarm_round=5, expects=4)
    driver.see(declared(0, swarm_round=6), declared(1, swarm_round=5), declared(2, swarm_round=4))
    assert driver.only(AskToJoin).leader == IDS[1]
    refused = Driver(0, target=4, minimum=3, swarm_round=5, expects=4)
    assert refused.join(1, 1, swarm_round=6, leader=0) == Rejected(RejectReason.OTHER_ROUND)
    assert isinstance(refused.join(2, 2, swarm_round=5, leader=0), Accepted)
    refused.at(START + 0.1)
    assert isinstance(refused.join(3, 3, swarm_round=6, leader=0), Accepted)


def test_a_newcomer_to_a_grid_is_in_step_with_all_and_takes_none_for_further():
    others = [declared(number, swarm_round=6) for number in (0, 1, 2)]
    newcomer = Driver(target=4, swarm_round=UNKNOWN_ROUND, expects=4)
    newcomer.see(*others)
    assert newcomer.only(AskToJoin).leader == IDS[0]
    assert newcomer.only(MissedRounds) is None
    leader = Driver(0, target=4, swarm_round=5, expects=4)
    assert isinstance(leader.join(1, 1, swarm_round=UNKNOWN_ROUND, leader=0), Accepted)


def test_a_group_that_lacks_a_member_begins_when_others_have_gone_on_to_the_next_round():
    others = [declared(number, swarm_round=6) for number in (4, 5)]
    for ahead in ([], others):
        driver = Driver(0, target=4, swarm_round=5, expects=4)
        driver.see(declared(1, swarm_round=5), *ahead)
        driver.join(1, 1, swarm_round=5, leader=0)
        driver.now = 102.0
        driver.see(*driver.seen)
        begun = driver.only(BeginGroup)
        assert (begun is not None) == bool(ahead)
        if begun is not None:
            assert (begun.seen, begun.before) == (2, 0)


def test_a_peer_whose_group_began_before_it_came_says_that_it_missed_a_round():
    group = tuple(search(number, 90.0) for number in (0, 1, 2))
    driver = Driver(target=4, swarm_round=5, expects=4)
    driver.see(
        *(
            declared(number, state=DeclaredState.TAKEN, group=group, start=90.0, swarm_round=5)
            for number in (0, 1, 2)
        )
    )
    assert driver.only(MissedRounds) == MissedRounds(Missed(6, 3))
    driver.at(101.0)
    assert driver.only(MissedRounds) is None  # once


def test_a_group_that_begins_while_a_peer_looks_is_no_round_that_it_missed():
    group = tuple(search(number) for number in (0, 1, 2))
    driver = Driver(target=4, swarm_round=5, expects=4)
    driver.see()
    driver.see(
        *(declared(number, state=DeclaredState.TAKEN, group=group, swarm_round=5) for number in (0, 1, 2))
    )
    assert driver.only(MissedRounds) is None


@pytest.mark.parametrize(("place", "count"), [(0, 6), (3, 6), (4, 1), (5, 1)])
def test_the_first_few_members_name_the_whole_group_and_the_others_themselves(place, count):
    group = tuple(search(number) for number in range(6))
    assert len(members_to_name(group, IDS[place])) == count
    assert group[place] in members_to_name(group, IDS[place])
