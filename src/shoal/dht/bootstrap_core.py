"""Which initial peer a node calls when, and when it stops waiting for the first of them. Pure.

Each address is called until it answers, and again whenever its peer has left the routing table, with pauses that
double. An address that leads back to this node is its own, and is called no more. An address with this node's own
PeerID is *watched* until it leads here: until then another peer may start there.

A node waits for its first initial peer. It is *alone* when :func:`why_alone` says so, and goes on calling.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from shoal.dht.routing import RoutingTable
from shoal.p2p.identity import PeerID
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.machine import Machine

FIRST_DELAY = 0.2
MAX_DELAY_BEFORE_FIRST = 2.0
"""Pause between tries while the node knows nobody at all."""
MAX_DELAY = 30.0
"""Pause between tries of one address while the node has other neighbours."""


@dataclass(frozen=True)
class BootstrapBegan:
    """The node joins, and waits so many seconds for the first initial peer."""

    timeout: float


@dataclass(frozen=True)
class AddressAnswered:
    """A node of the DHT answered at this address."""

    address: str
    peer: PeerID


@dataclass(frozen=True)
class AddressFailed:
    """No node of the DHT answered at this address."""

    address: str
    reason: str


@dataclass(frozen=True)
class AddressLedHere:
    """This node answered at this address itself."""

    address: str


@dataclass(frozen=True)
class RivalFound:
    """Another process has this node's identity."""


@dataclass(frozen=True)
class WatchedInVain:
    """Nobody was found at an address with this node's own PeerID, not even this node."""

    address: str


@dataclass(frozen=True)
class WatchEnded:
    """An address with this node's own PeerID leads here, or to a rival."""

    address: str


@dataclass(frozen=True)
class RetryWanted:
    """The network may be back, or is needed badly."""


Event: TypeAlias = (
    BootstrapBegan
    | AddressAnswered
    | AddressFailed
    | AddressLedHere
    | RivalFound
    | WatchedInVain
    | WatchEnded
    | RetryWanted
    | TimePassed
)


@dataclass(frozen=True)
class CallAddress:
    """Call the peer at this address; answered by AddressAnswered, AddressFailed or AddressLedHere."""

    address: str


@dataclass(frozen=True)
class WatchAddress:
    """See where an address with this node's own PeerID leads; answered by WatchedInVain or WatchEnded."""

    address: str


@dataclass(frozen=True)
class TellFound:
    """An initial peer has answered that was not in the routing table."""

    peer: PeerID


@dataclass(frozen=True)
class EndWait:
    """The node need not wait for the first initial peer any longer."""

    is_found: bool
    reason: str


Effect: TypeAlias = CallAddress | WatchAddress | TellFound | EndWait


class BootstrapState(enum.Enum):
    NEW = "new"
    WAITING = "waiting"
    """For the first initial peer."""
    ALONE = "alone"
    """The node goes on without one, and goes on calling."""
    FOUND = "found"
    """An initial peer has answered, once."""


TRANSITIONS: dict[BootstrapState, set[BootstrapState]] = {
    BootstrapState.NEW: {BootstrapState.WAITING},
    BootstrapState.WAITING: {BootstrapState.FOUND, BootstrapState.ALONE},
    BootstrapState.ALONE: {BootstrapState.FOUND},
    BootstrapState.FOUND: set(),
}

_LATER = frozenset(
    {
        AddressAnswered,
        AddressFailed,
        AddressLedHere,
        RivalFound,
        WatchedInVain,
        WatchEnded,
        RetryWanted,
        TimePassed,
    }
)

HEARD: dict[BootstrapState, frozenset[type]] = {
    BootstrapState.NEW: frozenset({BootstrapBegan, RetryWanted}),
    BootstrapState.WAITING: _LATER,
    BootstrapState.ALONE: _LATER,
    BootstrapState.FOUND: _LATER,
}
"""The events that may come in each state. Any other one is illegal."""


@dataclass
class _Call:
    """An address that is called, or watched, time and again."""

    is_watched: bool
    delay: float
    due: float = NEVER
    """When it is called again; never: it is being called now."""


def why_alone(
    others: Collection[str], failures: Collection[str], *, includes_self: bool, has_rival: bool, is_late: bool
) -> str | None:
    """Why a node need not wait for its first initial peer, though none has answered; None: it is to wait.

    :param others: the initial addresses that are not this node's own
    :param failures: those at which nobody answered when they were last called
    """
    if not others:
        return "no other peer is an initial one"
    if has_rival:
        return "another process has this node's identity"
    if includes_self and all(address in failures for address in others):
        # Then it may have to be the first.
        return "this node is an initial peer itself, and all others were called"
    return "no initial peer answered in time" if is_late else None


class BootstrapCore:
    """See the module.

    :param addresses: the initial ones
    :param own: those of them that are known to be this node's own
    :param watched: those of its own that name its PeerID
    :param table: is read only
    :param jitter: draws a factor for a pause
    """

    def __init__(
        self,
        addresses: Iterable[str],
        *,
        own: Iterable[str],
        watched: Iterable[str],
        table: RoutingTable,
        jitter: Callable[[], float],
    ) -> None:
        self.failures: dict[str, str] = {}
        """Why each address did not answer when it was last called."""
        self.found: dict[str, PeerID] = {}
        """Who answered at each address."""
        self._addresses = list(addresses)
        self._own = set(own)
        self._watched = list(watched)
        self._table = table
        self._jitter = jitter
        self._machine = Machine(BootstrapState.NEW, TRANSITIONS, HEARD)
        self._calls: dict[str, _Call] = {}
        self._waits_until = NEVER
        self._has_rival = False

    @property
    def state(self) -> BootstrapState:
        """What the node is doing."""
        return self._machine.state

    @property
    def includes_self(self) -> bool:
        """Whether this node is one of the initial peers."""
        return bool(self._own)

    @property
    def others(self) -> list[str]:
        """The addresses that are not this node's own."""
        return [address for address in self._addresses if address not in self._own]

    @property
    def deadline(self) -> float:
        """When an address is to be called again, or the first initial peer is waited for no longer."""
        waits_until = self._waits_until if self.state is BootstrapState.WAITING else NEVER
        return min([waits_until, *(call.due for call in self._calls.values())])

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in what has happened, and say what to do now.

        :raises IllegalTransition: the event cannot come now
        """
        self._machine.hear(event, now)
        effects: list[Effect] = []
        match event:
            case BootstrapBegan(timeout):
                effects += self._call_all(timeout, now)
            case AddressAnswered(address, peer):
                effects += self._find(address, peer, now)
            case AddressFailed(address, reason):
                self.failures[address] = reason
                self._pause(address, now)
            case AddressLedHere(address):
                self._own.add(address)
                del self._calls[address]
            case RivalFound():
                self._has_rival = True
            case WatchedInVain() | WatchEnded():
                self._on_watch(event, now)
            case RetryWanted():
                effects += self._call_due(NEVER, now)
            case TimePassed():
                effects += self._call_due(now, now)
        return effects + self._end_wait(now)

    def _call_all(self, timeout: float, now: float) -> list[Effect]:
        self._machine.move(BootstrapState.WAITING)
        self._waits_until = now + timeout
        others = self.others
        self._calls = {address: _Call(False, FIRST_DELAY) for address in others}
        self._calls |= {address: _Call(True, MAX_DELAY) for address in self._watched}
        return [*map(CallAddress, others), *map(WatchAddress, self._watched)]

    def _find(self, address: str, peer: PeerID, now: float) -> list[Effect]:
        self.failures.pop(address, None)
        self.found[address] = peer
        self._calls[address].delay = MAX_DELAY
        self._pause(address, now)
        return [TellFound(peer)]

    def _on_watch(self, event: WatchedInVain | WatchEnded, now: float) -> None:
        if isinstance(event, WatchEnded):
            del self._calls[event.address]
        else:
            self._pause(event.address, now)

    def _pause(self, address: str, now: float) -> None:
        call = self._calls[address]
        call.due = now + call.delay * self._jitter()

    def _call_due(self, until: float, now: float) -> list[Effect]:
        """Call each address again whose pause is over at ``until``, unless its peer is in the table."""
        effects: list[Effect] = []
        for address, call in self._calls.items():
            if call.due == NEVER or call.due > until:
                continue
            limit = MAX_DELAY if call.is_watched or len(self._table) else MAX_DELAY_BEFORE_FIRST
            call.delay = min(2 * call.delay, limit)
            peer = self.found.get(address)
            if call.is_watched:
                effects.append(WatchAddress(address))
            elif peer is None or peer not in self._table:
                effects.append(CallAddress(address))
            else:
                call.delay = MAX_DELAY
                self._pause(address, now)
                continue
            call.due = NEVER
        return effects

    def _end_wait(self, now: float) -> list[Effect]:
        if self.found and self.state in (BootstrapState.WAITING, BootstrapState.ALONE):
            was_waiting = self.state is BootstrapState.WAITING
            self._machine.move(BootstrapState.FOUND)
            return [EndWait(True, "an initial peer answered")] if was_waiting else []
        if self.state is not BootstrapState.WAITING:
            return []
        reason = why_alone(
            self.others,
            self.failures,
            includes_self=self.includes_self,
            has_rival=self._has_rival,
            is_late=now >= self._waits_until,
        )
        if reason is None:
            return []
        self._machine.move(BootstrapState.ALONE)
        return [EndWait(False, reason)]
