"""Which initial peers are called when, and how long the first is waited for."""

from __future__ import annotations

import pytest

from shoal.dht.bootstrap_core import (
    FIRST_DELAY,
    MAX_DELAY,
    MAX_DELAY_BEFORE_FIRST,
    AddressAnswered,
    AddressFailed,
    AddressLedHere,
    BootstrapBegan,
    BootstrapCore,
    BootstrapState,
    CallAddress,
    Effect,
    EndWait,
    Event,
    RetryWanted,
    RivalFound,
    TellFound,
    WatchAddress,
    WatchedInVain,
    WatchEnded,
    why_alone,
)
from shoal.dht.ids import node_id
from shoal.dht.routing import RoutingTable
from shoal.p2p.identity import PeerID
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import IllegalTransition

A, B, OWN = "a", "b", "own"
PEERS = [PeerID.from_public_key(number.to_bytes(32, "big")) for number in range(3)]
TIMEOUT = 20.0


class Node:
    """A core with its clock and table."""

    def __init__(self, *addresses: str, own: list[str] | None = None) -> None:
        self.table = RoutingTable(node_id(PEERS[0]), 20, 30.0)
        self.now = 100.0
        own = own or []
        self.core = BootstrapCore(
            [*addresses, *own], own=own, watched=own, table=self.table, jitter=lambda: 1.0
        )

    def handle(self, event: Event) -> list[Effect]:
        return self.core.handle(event, self.now)

    def begin(self) -> list[Effect]:
        return self.handle(BootstrapBegan(TIMEOUT))

    def wait(self) -> list[Effect]:
        """Until its deadline."""
        self.now = self.core.deadline
        return self.handle(TimePassed())

    def meet(self, number: int) -> None:
        self.table.answered(PEERS[number], self.now)


def test_all_are_called_at_once_and_the_first_answer_ends_the_wait():
    node = Node(A, B)
    assert node.begin() == [CallAddress(A), CallAddress(B)]
    assert node.handle(AddressFailed(A, "refused")) == []
    assert node.core.failures == {A: "refused"}
    assert node.handle(AddressAnswered(B, PEERS[1])) == [
        TellFound(PEERS[1]),
        EndWait(True, "an initial peer answered"),
    ]
    assert node.core.found == {B: PEERS[1]}


def test_pauses_double_and_are_short_while_nobody_is_known():
    node = Node(A)
    node.begin()
    pauses = []
    for _ in range(7):
        node.handle(AddressFailed(A, "refused"))
        before = node.now
        assert node.wait() == [CallAddress(A)]
        pauses.append(node.now - before)
    expected = [min(FIRST_DELAY * 2**n, MAX_DELAY_BEFORE_FIRST) for n in range(7)]
    assert pauses == pytest.approx(expected)
    node.meet(1)
    for _ in range(10):
        node.handle(AddressFailed(A, "refused"))
        before, due = node.now, node.core._calls[A].due
        node.now = due
        node.handle(TimePassed())
    assert node.now - before == pytest.approx(MAX_DELAY)


def test_a_peer_is_called_again_when_it_has_left_the_table():
    node = Node(A)
    node.begin()
    node.handle(AddressAnswered(A, PEERS[1]))
    node.meet(1)
    assert node.core.deadline == node.now + MAX_DELAY
    assert node.wait() == []
    node.table.failed(PEERS[1])
    assert node.wait() == [CallAddress(A)]
    assert node.core.deadline == NEVER
    assert node.handle(AddressAnswered(A, PEERS[1])) == [TellFound(PEERS[1])], "told again"


def test_what_is_wanted_soon_is_called_at_once_but_not_twice():
    node = Node(A, B)
    node.begin()
    node.handle(AddressFailed(A, "refused"))
    assert node.handle(RetryWanted()) == [CallAddress(A)]
    assert node.handle(RetryWanted()) == []


def test_a_node_is_alone_when_nobody_has_answered_in_time_and_goes_on():
    node = Node(A)
    node.begin()
    assert node.core.deadline == node.now + TIMEOUT
    assert node.wait() == [EndWait(False, "no initial peer answered in time")]
    assert node.core.state is BootstrapState.ALONE
    assert node.handle(AddressAnswered(A, PEERS[1])) == [TellFound(PEERS[1])]
    assert node.core.state is BootstrapState.FOUND


def test_an_initial_peer_waits_until_all_others_were_called_once():
    node = Node(A, B, own=[OWN])
    assert node.begin() == [CallAddress(A), CallAddress(B), WatchAddress(OWN)]
    assert node.handle(AddressFailed(A, "refused")) == []
    (end,) = node.handle(AddressFailed(B, "refused"))
    assert isinstance(end, EndWait)
    assert not end.is_found


def test_an_address_that_leads_here_is_this_nodes_own_and_called_no_more():
    node = Node(A)
    node.begin()
    assert node.handle(AddressLedHere(A)) == [EndWait(False, "no other peer is an initial one")]
    assert node.core.includes_self
    assert node.core.others == []
    assert node.core.deadline == NEVER


def test_an_own_address_is_watched_until_it_leads_here():
    node = Node(own=[OWN])
    assert node.begin() == [WatchAddress(OWN), EndWait(False, "no other peer is an initial one")]
    node.handle(WatchedInVain(OWN))
    assert node.core.deadline == node.now + MAX_DELAY
    assert node.wait() == [WatchAddress(OWN)]
    node.handle(WatchEnded(OWN))
    assert node.core.deadline == NEVER


def test_a_node_whose_identity_is_in_use_waits_no_longer():
    node = Node(A)
    node.begin()
    assert node.handle(RivalFound()) == [EndWait(False, "another process has this node's identity")]


@pytest.mark.parametrize(
    ("others", "failures", "flags", "reason"),
    [
        ([], [], "", "no other peer is an initial one"),
        ([A], [], "has_rival", "identity"),
        ([A, B], [A, B], "includes_self", "itself"),
        ([A, B], [A], "includes_self", None),
        ([A], [A], "", None),
        ([A], [], "is_late", "in time"),
    ],
)
def test_why_a_node_is_alone(others, failures, flags, reason):
    names = ("includes_self", "has_rival", "is_late")
    told = why_alone(others, failures, **{name: name in flags for name in names})
    assert told is reason is None or reason in told


LATER: list[Event] = [
    *(
        AddressAnswered(A, PEERS[1]),
        AddressFailed(A, "no"),
        AddressLedHere(A),
        RivalFound(),
        WatchedInVain(OWN),
        WatchEnded(OWN),
    ),
    *(RetryWanted(), TimePassed()),
]
TO: dict[BootstrapState, list[Event]] = {
    BootstrapState.WAITING: [],
    BootstrapState.ALONE: [RivalFound()],
    BootstrapState.FOUND: [AddressAnswered(B, PEERS[2])],
}


@pytest.mark.parametrize("event", LATER, ids=lambda event: type(event).__name__)
def test_nothing_happens_before_the_beginning(event: Event):
    node = Node(A, B, own=[OWN])
    if isinstance(event, RetryWanted):
        assert node.handle(event) == []
        return
    with pytest.raises(IllegalTransition, match=f"NEW: {type(event).__name__}") as caught:
        node.handle(event)
    assert [entry.event for entry in caught.value.history] == [event]


@pytest.mark.parametrize("event", [*LATER, BootstrapBegan(1.0)], ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", TO)
def test_it_begins_once_and_hears_of_everything_else_ever_after(state: BootstrapState, event: Event):
    node = Node(A, B, own=[OWN])
    for before in [BootstrapBegan(TIMEOUT), *TO[state]]:
        node.handle(before)
    assert node.core.state is state
    if isinstance(event, BootstrapBegan):
        with pytest.raises(IllegalTransition, match=f"{state.name}: BootstrapBegan"):
            node.handle(event)
    else:
        node.handle(event)
