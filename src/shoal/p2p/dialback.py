"""Who can be reached: a host asks peers to dial back the addresses that it announces, and helps others so.

A helper dials only literal IP addresses that are the asker's own, as the helper sees them, so that nobody can be
made to dial third parties; it dials a few at a time and not too often. That a loopback address
leads nowhere from here it says without dialing, unless the asker is on its machine.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from shoal.errors import InvalidValueError, ProtocolViolation, RemoteError
from shoal.p2p import wire
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.rpc import Method
from shoal.utils.text import printable

logger = logging.getLogger(__name__)

MAX_DIALED = 4
PER_PEER_PAUSE = 5.0
PER_MINUTE = 60

_Address = Annotated[str, msgspec.Meta(max_length=wire.MAX_ADDRESS)]


class DialBackRequest(msgspec.Struct, array_like=True, frozen=True):
    """Please dial these addresses of mine."""

    addresses: Annotated[list[_Address], msgspec.Meta(max_length=wire.MAX_ADDRESSES)]


class DialBackResponse(msgspec.Struct, array_like=True, frozen=True):
    """What came of it, per address that was dialed: an empty reason is success."""

    outcomes: dict[_Address, Annotated[str, msgspec.Meta(max_length=wire.MAX_REASON)]]


DIAL_BACK = Method("shoal.host.dial_back", DialBackRequest, DialBackResponse)


class Announcement(msgspec.Struct, array_like=True, frozen=True):
    """What HELLO said of the sender has changed: this holds now."""

    client_mode: bool
    addresses: Annotated[list[_Address], msgspec.Meta(max_length=wire.MAX_ADDRESSES)]


class AnnouncementHeard(msgspec.Struct, array_like=True, frozen=True):
    """It was."""


ANNOUNCE = Method("shoal.host.announce", Announcement, AnnouncementHeard)


@dataclass(frozen=True)
class Reachability:
    """What :meth:`Host.check_reachability` found."""

    reachable: bool | None
    """None: nobody could tell, so nothing changes."""
    confirmed: tuple[Multiaddr, ...] = ()
    """Own addresses at which a peer got through."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why the others were not confirmed: address, or the helper that gave no answer, to reason."""


def judge(answers: Sequence[tuple[PeerID, DialBackResponse | str]]) -> Reachability:
    """The verdict on what helpers answered; a text is the reason why one gave no answer. Pure."""
    confirmed: dict[Multiaddr, None] = {}
    failures: dict[str, str] = {}
    tried = False
    for helper, answer in answers:
        if isinstance(answer, str):
            failures[str(helper)] = answer
            continue
        for text, reason in answer.outcomes.items():
            tried = True
            if reason:
                failures[text] = printable(reason, wire.MAX_REASON)
            else:
                confirmed[Multiaddr.parse(text)] = None
    for address in confirmed:
        failures.pop(str(address), None)
    verdict = True if confirmed else (False if tried else None)
    return Reachability(verdict, tuple(confirmed), failures)


class DialBackHelper:
    """Answers :data:`DIAL_BACK` for others, within its limits."""

    def __init__(
        self,
        *,
        ips_of: Callable[[PeerID], Sequence[str]],
        probe: Callable[[PeerID, Multiaddr], Awaitable[str]],
        now: Callable[[], float],
    ) -> None:
        self._ips_of = ips_of
        self._probe = probe
        self._now = now
        self._recent: deque[tuple[float, PeerID]] = deque()

    async def handle(self, asker: PeerID, request: DialBackRequest) -> DialBackResponse:
        """Dial the asker's own addresses; ``RemoteError("rate_limited")`` when asked too often."""
        try:
            addresses = [Multiaddr.parse(text) for text in request.addresses]
        except InvalidValueError as error:
            raise RemoteError("bad_address", str(error)) from error
        own = self._ips_of(asker)
        mine = [address for address in addresses if address.host in own][:MAX_DIALED]
        outcomes: dict[str, str] = {}
        if own and not any(ipaddress.ip_address(ip).is_loopback for ip in own):
            elsewhere = f"a loopback address, which does not lead to {own[0]} from another machine"
            outcomes = {str(one.without_peer_id()): elsewhere for one in addresses if one.is_loopback}
        if mine:
            self._count(asker)
        for address in mine:
            outcomes[str(address.without_peer_id())] = (await self._probe(asker, address))[: wire.MAX_REASON]
        return DialBackResponse(outcomes)

    def _count(self, asker: PeerID) -> None:
        now = self._now()
        while self._recent and self._recent[0][0] <= now - 60.0:
            self._recent.popleft()
        if len(self._recent) >= PER_MINUTE:
            raise RemoteError("rate_limited", f"more than {PER_MINUTE} dial-backs a minute")
        if any(peer == asker and when > now - PER_PEER_PAUSE for when, peer in self._recent):
            raise RemoteError("rate_limited", f"asked twice within {PER_PEER_PAUSE:g} s")
        self._recent.append((now, asker))


def check_outcomes(asked: Sequence[Multiaddr], response: DialBackResponse) -> None:
    """:class:`ProtocolViolation` if a helper speaks of addresses that it was not asked about."""
    known = {str(address) for address in asked}
    for text in response.outcomes:
        if text not in known:
            raise ProtocolViolation(f"a dial-back of {text!r}, which was not asked for")
