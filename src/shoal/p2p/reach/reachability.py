"""How a host is reached by others, as one value: its standing, its addresses, the evidence and the reason. Pure.

Three standings. A host counts as *full* as long as nobody was asked: its first peers dial it, so there it is right. It
is *in doubt* when somebody has to be asked first, and acts as a client meanwhile, so that nobody relies on it. It is a
*client* because it is meant to be one, or because helpers did not get through.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.reach.vantage import Interface, Vantage

MAX_TOLD = 4
"""Failures that are kept for people."""
LOOPBACK = {"ip4": "127.0.0.1", "ip6": "::1"}

_IN_DOUBT = "no peer has told yet whether it can connect to this one: until then it takes part as a client"


class Standing(enum.Enum):
    """What others can rely on."""

    IN_DOUBT = enum.auto()
    """Helpers have to be asked before anybody can rely on dialing this host."""
    CLIENT = enum.auto()
    """Nobody dials it: it is called over the connections that it opens."""
    FULL = enum.auto()
    """Others can dial it."""


class Evidence(enum.Enum):
    """What the standing rests on."""

    INTENT = enum.auto()
    """It is meant as a client: by ``client_mode``, or because it does not listen."""
    PRESUMED = enum.auto()
    """Nobody was asked yet."""
    GIVEN = enum.auto()
    """Helpers could not tell, and a person gave the addresses."""
    HELPERS = enum.auto()
    """Helpers have dialed it, or tried to."""


@dataclass(frozen=True)
class Findings:
    """What helpers found out about a host, all answers together."""

    reachable: bool | None
    """None: nobody could tell, so nothing changes."""
    confirmed: tuple[Multiaddr, ...] = ()
    """Own addresses at which a peer got through, first those that were reached from farthest away."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why the others were not confirmed: address, or the helper that gave no answer, to reason."""
    refuted: frozenset[Multiaddr] = frozenset()
    """Own addresses that helpers dialed in vain, and none with success."""
    vantage: Vantage | None = None
    """How far away the helpers stand whose word decided."""
    is_contested: bool = False
    """Helpers disagree: more of them should be asked."""


@dataclass(frozen=True)
class Means:
    """What a host has to be reached by.

    ``candidates``: where others may be able to dial it; ``is_given``: a person gave these.
    """

    listening: tuple[Multiaddr, ...] = ()
    candidates: tuple[Multiaddr, ...] = ()
    is_given: bool = False

    @classmethod
    def of(
        cls, listening: Sequence[Multiaddr], given: Sequence[Multiaddr], interfaces: Sequence[Interface]
    ) -> Means:
        """The means of a host that listens there. Loopback is a candidate only for lack of anything else."""
        if not listening:
            return cls()
        if given:
            return cls(tuple(listening), tuple(given), True)
        return cls(tuple(listening), tuple(without_loopback(listened_on(listening, interfaces))))


@dataclass(frozen=True)
class Reachability:
    """How a host is reached by others, now.

    ``addresses``: what others are told, the best first; none unless it is full. ``vantage``: how far away the farthest
    helpers stood. ``reason`` and ``advice``: for people, why it is no full peer, and what would make it one. ``tried``:
    where helpers could not dial it, and why.
    """

    standing: Standing
    evidence: Evidence
    addresses: tuple[Multiaddr, ...] = ()
    vantage: Vantage | None = None
    reason: str = ""
    advice: str = ""
    tried: tuple[str, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether others can rely on dialing this host."""
        return self.standing is Standing.FULL

    @property
    def is_in_doubt(self) -> bool:
        """Whether helpers have to be asked before anybody can rely on dialing this host."""
        return self.standing is Standing.IN_DOUBT

    @property
    def is_intended(self) -> bool:
        """Whether the host is meant as a client: then there is nothing to find out."""
        return self.evidence is Evidence.INTENT

    def told(self, *, beyond_machine: bool) -> tuple[Multiaddr, ...]:
        """The addresses for one peer; on another machine, loopback ones mean nothing."""
        return tuple(one for one in self.addresses if not (beyond_machine and one.is_loopback))


def assess(means: Means, standing: Standing, evidence: Evidence, found: Findings, limit: int) -> Reachability:
    """How a host is reached that has these means, after what helpers found; ``limit``: addresses that are told.

    Confirmed addresses come first, then the candidates that were not refuted.
    """
    if not means.listening:
        return Reachability(Standing.CLIENT, Evidence.INTENT)
    if standing is Standing.FULL:
        addresses = _told(means, found)[:limit]
        if addresses:
            return Reachability(standing, evidence, tuple(addresses), found.vantage)
    advice = _advice(means, found.vantage)
    tried = tuple(f"{at}: {why}" for at, why in list(found.failures.items())[:MAX_TOLD])
    reason = _IN_DOUBT if standing is Standing.IN_DOUBT else ""
    if standing is Standing.CLIENT:
        reason = (
            "other peers cannot connect back to this one, so it takes part as a client: it averages over connections "
            f"that it opens itself, and serves nobody. {advice}. client_mode=True says that this is "
            f"intended. Tried: {'; '.join(tried)}"
        )
    return Reachability(standing, evidence, (), found.vantage, reason, advice, tried)


def _told(means: Means, found: Findings) -> list[Multiaddr]:
    confirmed = [one for one in found.confirmed if one in means.candidates or not means.is_given]
    others = [one for one in means.candidates if one not in found.refuted]
    return without_loopback(list(dict.fromkeys(confirmed + others)))


def _advice(means: Means, vantage: Vantage | None) -> str:
    ports = " and ".join(dict.fromkeys(str(address.port) for address in means.listening))
    if means.is_given:
        return (
            f"To be a full peer it must be reached at what announce_maddrs says: see that TCP port {ports} of "
            "this machine (host_maddrs) is open there"
        )
    if all(address.is_loopback for address in means.listening):
        return (
            "To be a full peer, let it listen where other machines can reach it: "
            "host_maddrs=['/ip4/0.0.0.0/tcp/0'], or announce_maddrs behind a port forwarding"
        )
    if vantage is Vantage.TRANSLATED:
        return (
            f"It is behind a NAT. To be a full peer, forward TCP port {ports} of the router to this machine, and "
            "if the outer port is another one, name it in announce_maddrs; a fixed port is set in host_maddrs"
        )
    return (
        f"To be a full peer, open TCP port {ports} in the firewall (host_maddrs sets the port), or give the "
        "address at which others reach it in announce_maddrs"
    )


def listened_on(listening: Iterable[Multiaddr], interfaces: Sequence[Interface]) -> list[Multiaddr]:
    """Every address at which a host listens: those of its listeners, then those of the interfaces, as they are likely,
    for listeners on all of them.
    """
    listening = list(listening)
    everywhere = [address for address in listening if address.is_unspecified]
    addresses = [address for address in listening if not address.is_unspecified]
    for one in interfaces if everywhere else ():
        protocol = f"ip{one.network.version}"
        addresses += [Multiaddr(protocol, one.ip, at.port) for at in everywhere if at.protocol == protocol]
    known = {address.protocol for address in addresses}
    addresses += [
        Multiaddr(at.protocol, LOOPBACK[at.protocol], at.port)
        for at in everywhere
        if at.protocol not in known
    ]
    return list(dict.fromkeys(addresses))


def without_loopback(addresses: Sequence[Multiaddr]) -> list[Multiaddr]:
    """Loopback is for lack of anything else: it means nothing to other machines."""
    return [address for address in addresses if not address.is_loopback] or list(addresses)
