"""What a host asks of helpers, what they answer, and the verdict on it. Pure.

A host asks peers to dial back the addresses at which it may be reached (:mod:`.inquiry`), and helps others so
(:mod:`.helper`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from shoal.errors import ProtocolViolation
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol import wire
from shoal.p2p.reach.reachability import Findings
from shoal.p2p.reach.vantage import Vantage, is_global
from shoal.p2p.rpc import Method
from shoal.utils.structs import CompactStruct
from shoal.utils.text import printable

DIAL_BACK_TIME, MAX_DIAL_BACK_TIME = 1.5, 5.0
"""Seconds that a helper takes for an address, beside some round trips: a lost packet costs one of them."""

_Address = Annotated[str, msgspec.Meta(max_length=wire.MAX_ADDRESS)]
_Reason = Annotated[str, msgspec.Meta(max_length=wire.MAX_REASON)]


class DialBackRequest(CompactStruct, frozen=True):
    """Please dial these addresses of mine."""

    addresses: Annotated[list[_Address], msgspec.Meta(max_length=wire.MAX_ADDRESSES)]


class DialBackResponse(CompactStruct, frozen=True):
    """What came of it, per address that was dialed: None, or why the helper did not get through.

    ``foreign``: addresses that were not dialed, since they are not the asker's as the helper sees it, with the reason.
    """

    outcomes: dict[_Address, _Reason | None]
    foreign: dict[_Address, _Reason] = msgspec.field(default_factory=dict)


DIAL_BACK = Method("shoal.host.dial_back", DialBackRequest, DialBackResponse)


class Announcement(CompactStruct, frozen=True):
    """What HELLO said of the sender has changed: this holds now."""

    is_client: bool
    addresses: Annotated[list[_Address], msgspec.Meta(max_length=wire.MAX_ADDRESSES)]


class AnnouncementHeard(CompactStruct, frozen=True):
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
        reached = [Multiaddr.parse(text) for text, reason in response.outcomes.items() if reason is None]
        for text, reason in {**response.foreign, **response.outcomes}.items():
            if reason is not None:
                failures[text] = printable(reason, wire.MAX_REASON)
        dialed_in_vain |= {
            Multiaddr.parse(text) for text, reason in response.outcomes.items() if reason is not None
        }
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


def dial_back_time(round_trip: float) -> float:
    """Seconds that a helper tries an address of a peer at this distance: connecting takes three round trips."""
    return min(DIAL_BACK_TIME + 4 * round_trip, MAX_DIAL_BACK_TIME)


def check_outcomes(asked: Sequence[Multiaddr], response: DialBackResponse) -> None:
    """:class:`ProtocolViolation` if a helper speaks of addresses that it was not asked about."""
    known = {str(address) for address in asked}
    for text in [*response.outcomes, *response.foreign]:
        if text not in known:
            raise ProtocolViolation(f"a dial-back of {text!r}, which was not asked for")
