"""Dialing a peer: its addresses one after the other, staggered; the first that succeeds wins."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence

from shoal.errors import DeadlineExceeded, PeerUnreachable, ShoalError
from shoal.p2p.connection import Connection
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import Network
from shoal.p2p.rpc import Lane

REFUSED = "refused"
"""The reason in :attr:`.PeerUnreachable.failures` where nobody listens at an address."""

_UNDIALABLE = "cannot be dialed"

MakeConnection = Callable[[PeerID | None, Lane], Connection]


def is_refused(error: ShoalError) -> bool:
    """Whether a peer cannot be reached because nobody listens at any address that is known of it."""
    return isinstance(error, PeerUnreachable) and all(why == REFUSED for why in error.failures.values())


class Dialer:
    """Dials; owns the tasks that do it only while :meth:`dial` runs."""

    def __init__(self, network: Network, make: MakeConnection, *, timeout: float, stagger: float) -> None:
        self._network = network
        self._make = make
        self._timeout = timeout
        self._stagger = stagger

    async def dial(
        self, addresses: Sequence[Multiaddr], expected: PeerID | None, lane: Lane
    ) -> tuple[Connection, Multiaddr] | PeerUnreachable:
        """An open connection and the address that led to it, or the error that lists why there is none.

        The error is returned, not raised: several callers may wait for one dial, or none any more.
        """
        who = "a peer" if expected is None else str(expected)
        if not addresses:
            return PeerUnreachable(f"{who} {_UNDIALABLE}: no address is known", {})
        failures: dict[str, str] = {}
        attempts: dict[asyncio.Task[Connection | str], Multiaddr] = {}
        waiting = list(addresses)
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
                    failures[str(address)] = outcome
        finally:
            await _abandon(attempts)
        listed = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
        return PeerUnreachable(f"{who} {_UNDIALABLE}: {listed}", failures)

    async def dial_one(self, address: Multiaddr, expected: PeerID | None, lane: Lane) -> Connection | str:
        """An open connection to ``address``, or the reason why there is none."""
        connection = self._make(expected, lane)
        try:
            async with asyncio.timeout(self._timeout):
                await self._network.connect(lambda: connection, address)
                await asyncio.shield(connection.opened)
        except asyncio.CancelledError:
            connection.abort("not needed any more")
            raise
        except (OSError, ShoalError) as error:
            reason = describe_failure(error)
            connection.abort(reason)
            return reason
        return connection


async def _abandon(attempts: dict[asyncio.Task[Connection | str], Multiaddr]) -> None:
    """Cancel what still dials, and close what came second; the winner's task stays as it is."""
    winner_seen = False
    for task in attempts:
        if task.done() and not task.cancelled() and isinstance(task.result(), Connection):
            if winner_seen:
                task.result().close("another address was faster")  # type: ignore[union-attr]
            winner_seen = True
        task.cancel()
    await asyncio.gather(*attempts, return_exceptions=True)


def describe_failure(error: OSError | ShoalError) -> str:
    """One short reason, in the same words on every platform."""
    if isinstance(error, DeadlineExceeded):
        return str(error)
    if isinstance(error, ShoalError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved: {error.strerror}"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "no route to the host"
    return error.strerror or str(error)


def says_undialable(story: str, peer: PeerID) -> bool:
    """Whether a story of a failure, in the words of :class:`PeerUnreachable`, is that ``peer`` could not be dialed."""
    return f"{peer} {_UNDIALABLE}" in story
