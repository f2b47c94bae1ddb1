"""Who can be reached: a host asks peers to dial back the addresses that it announces, and helps others so.

A helper dials only literal IP addresses that are the asker's own, as the helper sees them, so that nobody can be
made to dial third parties; it dials a few at a time and not too often. Of the others it says so without dialing: an
address that is not the asker's from here, as behind a NAT, leads nowhere from here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from shoal.errors import InvalidValueError, ProtocolViolation, RemoteError
from shoal.p2p import wire
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reachability import Findings
from shoal.p2p.rpc import Method
from shoal.p2p.vantage import Vantage, is_global
from shoal.utils.text import printable

logger = logging.getLogger(__name__)

MAX_DIALED = 4
"""Addresses that a helper dials for one request."""
DIAL_BACK_TIME, MAX_DIAL_BACK_TIME = 1.5, 5.0
"""Seconds that a helper takes for an address, beside some round trips: a lost packet costs one of them."""
MAX_AT_ONCE = 64
"""Requests for which a helper dials at the same time; others wait."""
PER_PEER_PAUSE = 2.0
PER_MINUTE = 1200

_Address = Annotated[str, msgspec.Meta(max_length=wire.MAX_ADDRESS)]
_Reason = Annotated[str, msgspec.Meta(max_length=wire.MAX_REASON)]


class DialBackRequest(msgspec.Struct, array_like=True, frozen=True):
    """Please dial these addresses of mine."""

    addresses: Annotated[list[_Address], msgspec.Meta(max_length=wire.MAX_ADDRESSES)]


class DialBackResponse(msgspec.Struct, array_like=True, frozen=True):
    """What came of it, per address that was dialed: an empty reason is success.

    ``foreign``: addresses that were not dialed, since they are not the asker's as the helper sees it, with the reason.
    """

    outcomes: dict[_Address, _Reason]
    foreign: dict[_Address, _Reason] = {}


DIAL_BACK = Method("shoal.host.dial_back", DialBackRequest, DialBackResponse)


class Announcement(msgspec.Struct, array_like=True, frozen=True):
    """What HELLO said of the sender has changed: this holds now."""

    client_mode: bool
    addresses: Annotated[list[_Address], msgspec.Meta(max_length=wire.MAX_ADDRESSES)]


class AnnouncementHeard(msgspec.Struct, array_like=True, frozen=True):
    """It was."""


ANNOUNCE = Method("shoal.host.announce", Announcement, AnnouncementHeard)


@dataclass(frozen=True)
class Answer:
    """What one helper answered; a text is the reason why it gave no answer."""

    helper: PeerID
    vantage: Vantage
    response: DialBackResponse | str


@dataclass
class _Vote:
    """What one helper's answer says about this host as a whole."""

    vantage: Vantage
    got_through: bool


def judge(answers: Sequence[Answer], trusted: Collection[Multiaddr] = ()) -> Findings:
    """The verdict on what helpers answered. Pure.

    The helpers with the widest view decide, by majority; with as many for as against, the answer is no: it costs less
    to serve nobody than to be waited for in vain. A helper that got through to a public IP address from elsewhere has
    the widest view there is. Of ``trusted`` addresses a helper that did not dial them knows nothing.
    """
    confirmed: dict[Multiaddr, Vantage] = {}
    failures: dict[str, str] = {}
    dialed_in_vain: set[Multiaddr] = set()
    votes: list[_Vote] = []
    for answer in answers:
        response = answer.response
        if isinstance(response, str):
            failures[str(answer.helper)] = response
            continue
        reached = [Multiaddr.parse(text) for text, reason in response.outcomes.items() if not reason]
        for text, reason in {**response.foreign, **response.outcomes}.items():
            if reason:
                failures[text] = printable(reason, wire.MAX_REASON)
        dialed_in_vain |= {Multiaddr.parse(text) for text, reason in response.outcomes.items() if reason}
        vantage = answer.vantage
        if vantage >= Vantage.ROUTED and any(is_global(address.host) for address in reached):
            vantage = Vantage.TRANSLATED
        for address in reached:
            confirmed[address] = max(vantage, confirmed.get(address, vantage))
        is_unknown = any(Multiaddr.parse(text) in trusted for text in response.foreign)
        if reached or (not is_unknown and (response.outcomes or response.foreign)):
            votes.append(_Vote(vantage, bool(reached)))
    for address in confirmed:
        failures.pop(str(address), None)
    ordered = tuple(sorted(confirmed, key=lambda address: -confirmed[address]))
    refuted = frozenset(dialed_in_vain - set(confirmed))
    if not votes:
        return Findings(None, ordered, failures, refuted)
    widest = max(vote.vantage for vote in votes)
    deciding = [vote.got_through for vote in votes if vote.vantage is widest]
    yes = sum(deciding)
    is_contested = len({vote.got_through for vote in votes}) > 1
    return Findings(2 * yes > len(deciding), ordered, failures, refuted, widest, is_contested)


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
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    async def handle(self, asker: PeerID, request: DialBackRequest) -> DialBackResponse:
        """Dial the asker's own addresses; ``RemoteError("rate_limited")`` when asked too often."""
        try:
            addresses = [Multiaddr.parse(text) for text in request.addresses]
        except InvalidValueError as error:
            raise RemoteError("bad_address", str(error)) from error
        own = self._ips_of(asker)
        is_mine = {address: address.host in own and not address.unspoken for address in addresses}
        mine = [address.without_peer_id() for address in addresses if is_mine[address]][:MAX_DIALED]
        foreign = {
            str(address.without_peer_id()): _why_foreign(address, own)[: wire.MAX_REASON]
            for address in addresses
            if own and not is_mine[address]
        }
        if not mine:
            return DialBackResponse({}, foreign)
        self._count(asker)
        async with self._places:
            reasons = await asyncio.gather(*(self._probe(asker, address) for address in mine))
        outcomes = {
            str(address): reason[: wire.MAX_REASON] for address, reason in zip(mine, reasons, strict=True)
        }
        return DialBackResponse(outcomes, foreign)

    def _count(self, asker: PeerID) -> None:
        now = self._now()
        while self._recent and self._recent[0][0] <= now - 60.0:
            self._recent.popleft()
        if len(self._recent) >= PER_MINUTE:
            raise RemoteError("rate_limited", f"more than {PER_MINUTE} dial-backs a minute")
        if any(peer == asker and when > now - PER_PEER_PAUSE for when, peer in self._recent):
            raise RemoteError("rate_limited", f"asked twice within {PER_PEER_PAUSE:g} s")
        self._recent.append((now, asker))


def _why_foreign(address: Multiaddr, own: Sequence[str]) -> str:
    if address.unspoken:
        return address.unspoken
    if address.is_loopback and not any(ipaddress.ip_address(ip).is_loopback for ip in own):
        return f"a loopback address, which does not lead to {own[0]} from another machine"
    if address.protocol.startswith("dns"):
        return "a name, which helpers do not look up"
    return f"others see this peer at {own[0]}"


def dial_back_time(round_trip: float) -> float:
    """Seconds that a helper tries an address of a peer at this distance: connecting takes three round trips."""
    return min(DIAL_BACK_TIME + 4 * round_trip, MAX_DIAL_BACK_TIME)


def check_outcomes(asked: Sequence[Multiaddr], response: DialBackResponse) -> None:
    """:class:`ProtocolViolation` if a helper speaks of addresses that it was not asked about."""
    known = {str(address) for address in asked}
    for text in [*response.outcomes, *response.foreign]:
        if text not in known:
            raise ProtocolViolation(f"a dial-back of {text!r}, which was not asked for")
