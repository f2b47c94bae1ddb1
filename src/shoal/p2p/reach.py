"""Where a host can be dialed: what it listens on, what helpers found out about it, and so what others are told.

Three states. *Presumed*: nobody was asked yet; a host is dialed by its first peers, so there it is right. *In doubt*:
somebody has to be asked; until then the host counts as one that cannot be dialed, so that nobody relies on it. *Known*:
helpers have answered, and how far away the farthest of them stood is remembered, since a peer in the same network can
dial what others cannot. A peer from farther away brings the host into doubt again, unless it has dialed the host.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from shoal.errors import ShoalError
from shoal.p2p import wire
from shoal.p2p.config import HostConfig
from shoal.p2p.connection import Connection
from shoal.p2p.dialback import (
    Answer,
    DialBackRequest,
    DialBackResponse,
    Reachability,
    check_outcomes,
    dial_back_time,
    judge,
)
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.session import Role
from shoal.p2p.vantage import Interface, Vantage, is_global, vantage_of

logger = logging.getLogger(__name__)

GRACE = 0.5
"""Seconds that helpers still have when one with as wide a view has answered."""
MAX_TOLD = 4
"""Addresses that one line for people lists."""
LOOPBACK = {"ip4": "127.0.0.1", "ip6": "::1"}
INTERFACES_AGE = 2.0
"""Seconds after which the system is asked again for its interfaces."""


class Reach:
    """See the module. ``listening`` and ``config`` are the host's now; ``connect`` and ``ask`` call a helper."""

    def __init__(
        self,
        *,
        config: Callable[[], HostConfig],
        listening: Callable[[], list[Multiaddr]],
        list_interfaces: Callable[[], list[Interface]],
        connections_to: Callable[[PeerID], Sequence[Connection]],
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
        self._is_reachable: bool | None = True
        self._found = Reachability(None)
        self._doubts = 0
        self._told: tuple[bool, tuple[Multiaddr, ...]] | None = None
        self._interfaces: list[Interface] = []
        self._interfaces_at: float | None = None

    # What is known.

    @property
    def can_be_dialed(self) -> bool:
        """Whether others can rely on dialing this host: not in client mode, not in doubt, not found unreachable."""
        return bool(self._listening()) and not self._config().client_mode and self._is_reachable is True

    @property
    def is_in_doubt(self) -> bool:
        """Whether helpers have to be asked before anybody can rely on dialing this host."""
        return self._is_reachable is None

    def candidates(self) -> list[Multiaddr]:
        """Where others may be able to dial the host: ``config.announce``, or else where it listens.

        For a listener on all interfaces these are the interfaces' addresses, the likeliest first. Loopback is among
        them only if there is nothing else.
        """
        config = self._config()
        if config.client_mode or not self._listening():
            return []
        if config.announce:
            return list(config.announce)
        return _without_loopback(self._all_listening())[: wire.MAX_ADDRESSES]

    def announced(self, *, beyond_machine: bool = False) -> list[Multiaddr]:
        """What peers are told: confirmed addresses, then the candidates that were not refuted; nothing if in doubt.

        ``beyond_machine``: those that may mean something to another machine.
        """
        if not self.can_be_dialed:
            return []
        candidates = self.candidates()
        is_given = bool(self._config().announce)
        confirmed = [one for one in self._found.confirmed if one in candidates or not is_given]
        others = [one for one in candidates if one not in self._found.refuted]
        addresses = _without_loopback(list(dict.fromkeys(confirmed + others)))
        if beyond_machine:
            addresses = [address for address in addresses if not address.is_loopback]
        return addresses[: wire.MAX_ADDRESSES]

    def visible(self) -> list[Multiaddr]:
        """What a person may give to others: as :meth:`announced`, and loopback at the end if the host listens there."""
        announced = self.announced()
        if not announced or self._config().announce:
            return announced
        return list(dict.fromkeys([*announced, *(one for one in self._all_listening() if one.is_loopback)]))

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
        if self._is_reachable:
            self._is_reachable = None
        self.on_news()

    def presume(self) -> None:
        """There is nobody to ask, so nobody whom a mistake could hurt: whoever comes has dialed this host."""
        self._is_reachable = True

    def note_connection(self, connection: Connection) -> None:
        """A connection has opened: what it shows of where others see this host."""
        if self.on_news is None or self._config().client_mode or not self._listening():
            return
        vantage, known = self._vantage_of(connection), self._found.vantage
        was_dialed = connection.role is Role.RESPONDER
        if self._is_reachable and (known is None or vantage > known):
            # A peer that has dialed this host shows that it can be; of one that it has dialed, nobody knows yet.
            (self.on_news if was_dialed else self.doubt)()
        elif self.is_in_doubt or (was_dialed and not self._is_reachable and vantage >= (known or vantage)):
            self.on_news()

    async def check(self, helpers: Sequence[PeerID], more: Sequence[PeerID], timeout: float) -> Reachability:
        """Ask ``helpers``, and ``more`` if they do not agree, and draw the conclusions.

        If nobody could tell, nothing changes, but that addresses which a person gave are believed.
        """
        if not self._listening() or self._config().client_mode:
            return Reachability(False)
        doubts = self._doubts
        answers = await self._ask_all(helpers, timeout)
        result = judge(answers, self._trusted())
        has_turned = (
            bool(self._is_reachable) and result.reachable is False and self._found.vantage is not None
        )
        if more and (result.is_contested or has_turned):
            answers += await self._ask_all(more, timeout)
            result = judge(answers, self._trusted())
        was_answered = any(isinstance(answer.response, DialBackResponse) for answer in answers)
        self._conclude(result, was_answered, is_stale=doubts != self._doubts)
        return result

    def _conclude(self, result: Reachability, was_answered: bool, *, is_stale: bool) -> None:
        if result.reachable is None:
            if was_answered and self._config().announce:
                self._is_reachable = True
            return
        self._found = result
        # A doubt that came up meanwhile is about a peer that was not asked.
        self._is_reachable = None if is_stale and result.reachable else result.reachable
        before, self._told = self._told, (result.reachable, result.confirmed)
        if not result.reachable:
            if before is None or before[0]:
                logger.warning("%s", self.explain())
        elif before is not None and not before[0]:
            through = ", ".join(map(str, result.confirmed))
            logger.info("peers can connect to this one now, at %s: it is a client no longer", through)
        elif self._told != before and result.vantage is not Vantage.MACHINE:
            logger.info("other peers can connect to this one at %s", ", ".join(map(str, result.confirmed)))

    def explain(self) -> str:
        """For people: why this host cannot be dialed, and what can be done; empty if it can be."""
        if self.can_be_dialed or self._config().client_mode or not self._listening():
            return ""
        if self.is_in_doubt:
            return "no peer has told yet whether it can connect to this one: until then it takes part as a client"
        return (
            "other peers cannot connect back to this one, so it takes part as a client: it averages over connections "
            f"that it opens itself, and serves nobody. {self.advice()}. client_mode=True says that this is "
            f"intended. Tried: {'; '.join(self.tried())}"
        )

    def tried(self) -> list[str]:
        """For people: where helpers could not dial this host, and why; the first few."""
        failures = list(self._found.failures.items())[:MAX_TOLD]
        return [f"{address}: {reason}" for address, reason in failures]

    def advice(self) -> str:
        """For people: what would make this host one that others can dial."""
        listening = self._listening()
        ports = " and ".join(dict.fromkeys(str(address.port) for address in listening))
        if self._config().announce:
            return (
                f"To be a full peer it must be reached at what announce_maddrs says: see that TCP port {ports} of "
                "this machine (host_maddrs) is open there"
            )
        if all(address.is_loopback for address in listening):
            return (
                "To be a full peer, let it listen where other machines can reach it: "
                "host_maddrs=['/ip4/0.0.0.0/tcp/0'], or announce_maddrs behind a port forwarding"
            )
        if self._found.vantage is Vantage.TRANSLATED:
            return (
                f"It is behind a NAT. To be a full peer, forward TCP port {ports} of the router to this machine, and "
                "if the outer port is another one, name it in announce_maddrs; a fixed port is set in host_maddrs"
            )
        return (
            f"To be a full peer, open TCP port {ports} in the firewall (host_maddrs sets the port), or give the "
            "address at which others reach it in announce_maddrs"
        )

    # ---- inside ----

    def _all_listening(self) -> list[Multiaddr]:
        """Every address at which the host listens: those of its listeners, then those of the interfaces, as they are
        likely, for listeners on all of them.
        """
        listening = self._listening()
        everywhere = [address for address in listening if address.is_unspecified]
        addresses = [address for address in listening if not address.is_unspecified]
        for one in self.interfaces() if everywhere else ():
            protocol = f"ip{one.network.version}"
            addresses += [
                Multiaddr(protocol, one.ip, at.port) for at in everywhere if at.protocol == protocol
            ]
        known = {address.protocol for address in addresses}
        addresses += [
            Multiaddr(at.protocol, LOOPBACK[at.protocol], at.port)
            for at in everywhere
            if at.protocol not in known
        ]
        return list(dict.fromkeys(addresses))

    def _vantage_of(self, connection: Connection) -> Vantage:
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


def _without_loopback(addresses: list[Multiaddr]) -> list[Multiaddr]:
    """Loopback is for lack of anything else: it means nothing to other machines."""
    return [address for address in addresses if not address.is_loopback] or addresses
