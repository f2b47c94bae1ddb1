"""Dialing a peer: its addresses one after the other, staggered; the first that succeeds wins."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence

from shoal.errors import (
    DialFailure,
    DialOutcome,
    InvalidValueError,
    PeerUnreachable,
    ShoalError,
)
from shoal.p2p.connection import Connection
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import Network
from shoal.p2p.protocol.violations import EndKind, NotShoalPeer, OtherIdentity, OtherVersion, TurnedAway
from shoal.p2p.reach.routes import Route
from shoal.p2p.rpc import Lane

MakeConnection = Callable[[PeerID | None, Lane], Connection]


_OUTCOMES: tuple[tuple[type[Exception], DialOutcome], ...] = (
    (NotShoalPeer, DialOutcome.NOT_SHOAL),
    (OtherVersion, DialOutcome.OTHER_VERSION),
    (OtherIdentity, DialOutcome.WRONG_PEER),
    (InvalidValueError, DialOutcome.UNSUPPORTED),
    (TimeoutError, DialOutcome.TIMED_OUT),  # of the system, of asyncio, and DeadlineExceeded
    (ConnectionRefusedError, DialOutcome.REFUSED),
    (socket.gaierror, DialOutcome.UNRESOLVED),
)
_ENDINGS = {
    EndKind.NO_ROOM: DialOutcome.NO_ROOM,
    EndKind.ITSELF: DialOutcome.ITSELF,
    EndKind.SAME_IDENTITY: DialOutcome.SAME_IDENTITY,
}
_NO_ROUTE = (errno.EHOSTUNREACH, errno.ENETUNREACH)


class Dialer:
    """Dials; owns the tasks that do it only while :meth:`dial` runs."""

    def __init__(self, network: Network, make: MakeConnection, *, timeout: float, stagger: float) -> None:
        self._network = network
        self._make = make
        self._timeout = timeout
        self._stagger = stagger

    async def dial(
        self, routes: Sequence[Route], expected: PeerID | None, lane: Lane
    ) -> tuple[Connection, Multiaddr] | PeerUnreachable:
        """An open connection and the address that led to it, or the error that lists why there is none.

        The error is returned, not raised: several callers may wait for one dial, or none any more.
        """
        who = "a peer" if expected is None else str(expected)
        if not routes:
            return PeerUnreachable(f"{who} cannot be dialed: no address is known")
        failures = [
            DialFailure(str(route.address), DialOutcome.UNSUPPORTED, route.obstacle)
            for route in routes
            if route.obstacle
        ]
        attempts: dict[asyncio.Task[Connection | DialFailure], Multiaddr] = {}
        waiting = [route.address for route in routes if not route.obstacle]
        try:
            while waiting or attempts:
                if waiting:
                    address = waiting.pop(0)
                    attempts[asyncio.create_task(self.dial_one(address, expected, lane))] = address
                await asyncio.wait(
                    attempts, timeout=self._stagger if waiting else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task, address in [(task, address) for task, address in attempts.items() if task.done()]:
                    outcome = task.result()
                    if isinstance(outcome, Connection):
                        return outcome, address
                    del attempts[task]
                    failures.append(outcome)
        finally:
            await _abandon(attempts)
        return PeerUnreachable(f"{who} cannot be dialed: {'; '.join(map(str, failures))}", failures)

    async def dial_one(
        self, address: Multiaddr, expected: PeerID | None, lane: Lane
    ) -> Connection | DialFailure:
        """An open connection to ``address``, or how the dial ended instead."""
        connection = self._make(expected, lane)
        try:
            async with asyncio.timeout(self._timeout):
                await self._network.connect(lambda: connection, address)
                await asyncio.shield(connection.opened)
        except asyncio.CancelledError:
            connection.abort("not needed any more")
            raise
        except (OSError, ShoalError) as error:
            reason = describe(error)
            connection.abort(reason)
            return DialFailure(str(address), outcome_of(error), reason)
        return connection


async def _abandon(attempts: dict[asyncio.Task[Connection | DialFailure], Multiaddr]) -> None:
    """Cancel what still dials, and close what came second; the winner's task stays as it is."""
    winner_seen = False
    for task in attempts:
        if task.done() and not task.cancelled() and isinstance(task.result(), Connection):
            if winner_seen:
                task.result().close("another address was faster")  # type: ignore[union-attr]
            winner_seen = True
        task.cancel()
    await asyncio.gather(*attempts, return_exceptions=True)


def outcome_of(error: OSError | ShoalError) -> DialOutcome:
    """The kind of end that this error is to a dial."""
    if isinstance(error, TurnedAway):
        return _ENDINGS.get(error.kind, DialOutcome.TURNED_AWAY)
    for kind, outcome in _OUTCOMES:
        if isinstance(error, kind):
            return outcome
    is_no_route = isinstance(error, OSError) and error.errno in _NO_ROUTE
    return DialOutcome.UNREACHABLE if is_no_route else DialOutcome.FAILED


def describe(error: OSError | ShoalError) -> str:
    """One short reason, in the same words on every platform."""
    if isinstance(error, ShoalError):
        return str(error)
    match outcome_of(error):
        case DialOutcome.TIMED_OUT | DialOutcome.REFUSED as outcome:
            return str(outcome.value)
        case DialOutcome.UNRESOLVED:
            return f"the name cannot be resolved: {error.strerror}"
        case DialOutcome.UNREACHABLE:
            return "no route to the host"
    said: str | None = error.strerror
    return said or str(error)
