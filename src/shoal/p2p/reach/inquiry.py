"""Where a host can be dialed: the shell that asks helpers and keeps what they found (:mod:`.reachability`).

How far away the farthest helper stood is remembered, since a peer in the same network can dial what others cannot. A
peer from farther away brings the host into doubt again, unless it has dialed the host.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from shoal.errors import ShoalError
from shoal.p2p.config import HostConfig
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.session import Role
from shoal.p2p.reach.dialback import (
    Answer,
    DialBackRequest,
    DialBackResponse,
    check_outcomes,
    dial_back_time,
    judge,
)
from shoal.p2p.reach.reachability import (
    Evidence,
    Findings,
    Means,
    Reachability,
    Standing,
    assess,
    listened_on,
)
from shoal.p2p.reach.vantage import Interface, Vantage, is_global, vantage_of

logger = logging.getLogger(__name__)

GRACE = 0.5
"""Seconds that helpers still have when one with as wide a view has answered."""
INTERFACES_AGE = 2.0
"""Seconds after which the system is asked again for its interfaces."""


_NOTHING = Means()


class Link(Protocol):
    """What a connection shows of how its two ends see each other."""

    @property
    def role(self) -> Role:
        """Which side has dialed."""

    @property
    def origin(self) -> str | None:
        """See :attr:`shoal.p2p.connection.Connection.origin`."""

    @property
    def local_ip(self) -> str | None:
        """This end, as this machine sees it."""

    @property
    def remote_ip(self) -> str | None:
        """The other end, as this machine sees it."""

    @property
    def seen(self) -> Multiaddr | None:
        """This end, as the peer sees it."""

    @property
    def rtt(self) -> float | None:
        """The round-trip time in seconds, once measured."""


class Reach:
    """See the module. ``listening`` and ``config`` are the host's now; ``connect`` and ``ask`` call a helper."""

    def __init__(
        self,
        *,
        config: Callable[[], HostConfig],
        listening: Callable[[], list[Multiaddr]],
        list_interfaces: Callable[[], list[Interface]],
        connections_to: Callable[[PeerID], Sequence[Link]],
        connect: Callable[[PeerID, float], Awaitable[object]],
        ask: Callable[[PeerID, DialBackRequest, float], Awaitable[DialBackResponse]],
    ) -> None:
        self.on_news: Callable[[], None] | None = None
        """Called when helpers should be asked again, soon. Without it nobody would, so nothing is doubted."""
        self._config = config
        self._listening = listening
        self._list_interfaces = list_interfaces
        self._connections_to = connections_to
        self._connect = connect
        self._ask = ask
        self._standing = Standing.FULL
        self._evidence = Evidence.PRESUMED
        self._found = Findings(None)
        self._assessed: tuple[tuple[Means, Standing, Evidence, Findings], Reachability] | None = None
        self._means_basis: tuple[list[Multiaddr], Sequence[Multiaddr], list[Interface]] | None = None
        self._known_means = _NOTHING
        self._is_wide = False
        self._doubts = 0
        self._told: tuple[bool, tuple[Multiaddr, ...]] | None = None
        self._interfaces: list[Interface] = []
        self._interfaces_at: float | None = None

    # What is known.

    @property
    def reachability(self) -> Reachability:
        """How others reach this host now, as far as it knows."""
        # Each request in the DHT asks for it, and it seldom changes: it is made anew only then.
        basis = (self._means(), self._standing, self._evidence, self._found)
        if self._assessed is None or any(
            one is not before for one, before in zip(basis, self._assessed[0], strict=True)
        ):
            self._assessed = basis, assess(*basis, wire.MAX_ADDRESSES)
        return self._assessed[1]

    def candidates(self) -> list[Multiaddr]:
        """Where others may be able to dial the host: ``config.announce``, or else where it listens.

        For a listener on all interfaces these are the interfaces' addresses, the likeliest first. Loopback is among
        them only if there is nothing else.
        """
        return list(self._means().candidates[: wire.MAX_ADDRESSES])

    def visible(self) -> list[Multiaddr]:
        """What a person may give to others: what others are told, and loopback at the end if the host listens there."""
        told = list(self.reachability.addresses)
        if not told or self._config().announce:
            return told
        everywhere = listened_on(self._listening(), self.interfaces())
        return list(dict.fromkeys([*told, *(one for one in everywhere if one.is_loopback)]))

    def interfaces(self) -> list[Interface]:
        """The interfaces of this machine, the likeliest first; a moment old."""
        now = asyncio.get_running_loop().time()
        if self._interfaces_at is None or now >= self._interfaces_at + INTERFACES_AGE:
            self._interfaces, self._interfaces_at = self._list_interfaces(), now
        return self._interfaces

    def vantage(self, peer: PeerID) -> Vantage | None:
        """How far away ``peer`` stands, if it is connected."""
        return max((self._vantage_of(one) for one in self._connections_to(peer)), default=None)

    def has_heard_of_widest(self, peers: Iterable[PeerID]) -> bool:
        """Whether the last verdict is of helpers with as wide a view as any of these connected peers has."""
        known = self._found.vantage
        return known is not None and all((self.vantage(peer) or known) <= known for peer in peers)

    # What changes it.

    def doubt(self) -> None:
        """From now on nobody relies on dialing this host, until helpers have been asked."""
        if self.on_news is None:
            return
        self._doubts += 1
        if self._standing is Standing.FULL:
            self._standing = Standing.IN_DOUBT
        self.on_news()

    def presume(self) -> None:
        """There is nobody to ask, so nobody whom a mistake could hurt: a peer that comes has dialed this host."""
        self._standing, self._evidence = Standing.FULL, Evidence.PRESUMED

    def note_connection(self, connection: Link) -> None:
        """A connection has opened: what it shows of where others see this host."""
        if self.on_news is None or not self._means().listening:
            return
        vantage, known = self._vantage_of(connection), self._found.vantage
        was_dialed = connection.role is Role.RESPONDER
        is_full, is_in_doubt = self._standing is Standing.FULL, self._standing is Standing.IN_DOUBT
        if is_full and (known is None or vantage > known):
            # A peer that has dialed this host shows that it can be; of one that it has dialed, nobody knows yet.
            (self.on_news if was_dialed else self.doubt)()
        elif is_in_doubt or (was_dialed and not is_full and vantage >= (known or vantage)):
            self.on_news()

    async def check(self, helpers: Sequence[PeerID], more: Sequence[PeerID], timeout: float) -> Findings:
        """Ask ``helpers``, and ``more`` if they do not agree, and draw the conclusions.

        If nobody could tell, nothing changes, but that addresses which a person gave are believed.
        """
        if not self._means().listening:
            return Findings(False)
        doubts = self._doubts
        answers = await self._ask_all(helpers, timeout)
        result = judge(answers, self._trusted())
        was_known = self._found.vantage is not None
        has_turned = self._standing is Standing.FULL and result.reachable is False and was_known
        if more and (result.is_contested or has_turned):
            answers += await self._ask_all(more, timeout)
            result = judge(answers, self._trusted())
        was_answered = any(isinstance(answer.response, DialBackResponse) for answer in answers)
        self._conclude(result, was_answered, is_stale=doubts != self._doubts)
        return result

    def _conclude(self, result: Findings, was_answered: bool, *, is_stale: bool) -> None:
        if result.reachable is None:
            if was_answered and self._config().announce:
                self._standing, self._evidence = Standing.FULL, Evidence.GIVEN
            return
        self._found, self._evidence = result, Evidence.HELPERS
        # A doubt that came up meanwhile is about a peer that was not asked.
        full = Standing.IN_DOUBT if is_stale else Standing.FULL
        self._standing = full if result.reachable else Standing.CLIENT
        before, self._told = self._told, (result.reachable, result.confirmed)
        if not result.reachable:
            if before is None or before[0]:
                logger.warning("%s", self.reachability.reason)
        elif before is not None and not before[0]:
            through = ", ".join(map(str, result.confirmed))
            logger.info("peers can connect to this one now, at %s: it is a client no longer", through)
        elif self._told != before and result.vantage is not Vantage.MACHINE:
            logger.info("other peers can connect to this one at %s", ", ".join(map(str, result.confirmed)))

    # ---- inside ----

    def _means(self) -> Means:
        config, listening = self._config(), self._listening()
        if config.client_mode or not listening:
            return _NOTHING
        if self._known_means.listening != tuple(listening):
            self._is_wide = any(address.is_unspecified for address in listening)
        basis = (listening, config.announce, self.interfaces() if self._is_wide else [])
        if basis != self._means_basis:
            self._means_basis, self._known_means = basis, Means.of(*basis)
        return self._known_means

    def _vantage_of(self, connection: Link) -> Vantage:
        if connection.origin is None:
            return Vantage.MACHINE
        seen = connection.seen
        return vantage_of(
            self.interfaces(),
            local_ip=connection.local_ip,
            remote_ip=connection.remote_ip,
            seen_ip=None if seen is None else seen.host,
        )

    def _trusted(self) -> list[Multiaddr]:
        """What a person gave, and a helper that sees another address of this host cannot judge."""
        announce = self._config().announce
        return [one for one in announce if one.protocol.startswith("dns") or is_global(one.host)]

    async def _ask_all(self, helpers: Iterable[PeerID], timeout: float) -> list[Answer]:
        """What the helpers answer: when one has, those that see no more than it have a moment left."""
        loop = asyncio.get_running_loop()
        asked = {asyncio.ensure_future(self._ask_one(helper, timeout)): helper for helper in helpers}
        waiting, until = set(asked), loop.time() + timeout
        while waiting:
            left = max(until - loop.time(), 0.0)
            done, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            views = [task.result().vantage for task in done if not isinstance(task.result().response, str)]
            wider = [self.vantage(asked[task]) or Vantage.ROUTED for task in waiting]
            if views and max(views) >= max(wider, default=Vantage.MACHINE):
                until = min(until, loop.time() + GRACE)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return [task.result() for task in asked if not task.cancelled()]

    async def _ask_one(self, helper: PeerID, timeout: float) -> Answer:
        response: DialBackResponse | str
        try:
            # First of all, since only a connection tells where the helper sees this host.
            await self._connect(helper, dial_back_time(0.0))
            addresses = self._to_ask(helper)
            request = DialBackRequest([str(address) for address in addresses])
            round_trip = max((one.rtt or 0.0 for one in self._connections_to(helper)), default=0.0)
            response = await self._ask(helper, request, min(dial_back_time(round_trip) + 1.0, timeout))
            check_outcomes(addresses, response)
        except ShoalError as error:
            response = str(error)
        return Answer(helper, self.vantage(helper) or Vantage.ROUTED, response)

    def _to_ask(self, helper: PeerID) -> list[Multiaddr]:
        """The candidates, and before them where this helper sees the host, with each port on which it listens."""
        candidates = self.candidates()
        if self._config().announce:
            return candidates
        seen: list[Multiaddr] = []
        for connection in self._connections_to(helper):
            at = connection.seen
            if at is None or connection.origin is None:
                continue
            if connection.role is Role.RESPONDER:
                seen.append(at)  # what it has dialed
            ports = [one.port for one in self._listening() if one.protocol[-1] == at.protocol[-1]]
            seen += [at.with_port(port) for port in ports]
        return list(dict.fromkeys([*seen, *candidates]))[: wire.MAX_ADDRESSES]
