"""How a host holds its identity, and how it judges two peers that both prove one identity.

The rule is in :mod:`shoal.p2p.protocol.claims`. There are three places where two such peers are noticed:

* one dials the other: each reads the other's claim in HELLO, and the lesser one stops;
* both are connected to a third peer, which asks the one that it knew first. If that one answers, with a claim that
  outranks the newcomer's, the newcomer is refused, with the signed answer as its proof. If not, the newcomer stays and
  the connections of the other one are closed: it comes back, as the newcomer, and is refused in its turn;
* a newcomer hears where its PeerID has been known, and dials there (:meth:`Tenancy.rival` tells what came of it).

Third peers never speak with two holders of one identity at a time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable

from shoal.errors import IdentityInUse, ProtocolViolation, RemoteError, ShoalError
from shoal.p2p.connection import Connection
from shoal.p2p.identity import Identity, PeerID
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.claims import (
    RECOVERING,
    SILENCE,
    UNKNOWN,
    UNSETTLED,
    Claim,
    ClaimRequest,
    SignedClaim,
    is_genuine,
    sign_claim,
)
from shoal.p2p.protocol.session import Role
from shoal.p2p.protocol.violations import EndKind
from shoal.p2p.rpc import Method

logger = logging.getLogger(__name__)

CLAIM = Method("shoal.host.claim", ClaimRequest, SignedClaim)
TICK = 1.0
"""How often a host notes that it lives. What is noted late, by SILENCE or more, was a time without an answer."""


class Tenancy:
    """See the module. ``connections_to`` gives the open connections to a peer."""

    def __init__(
        self,
        identity: Identity,
        *,
        connections_to: Callable[[PeerID], list[Connection]],
        forget_addresses: Callable[[PeerID], None],
        clock: Callable[[], float],
        incarnation: int | None = None,
    ) -> None:
        # One bit is set always, so that all numbers are encoded in equally many bytes.
        self.incarnation = secrets.randbits(62) | 1 << 62 if incarnation is None else incarnation
        self.rival: IdentityInUse | None = None
        """Why this host has to stop, if another one holds its identity."""
        self.on_lost: list[Callable[[IdentityInUse], None]] = []
        self._identity = identity
        self._connections_to = connections_to
        self._forget_addresses = forget_addresses
        self._clock = clock
        self._since: float | None = None
        self._alive_at = (-math.inf, -math.inf)
        self._ticking: asyncio.TimerHandle | None = None
        self._contests: dict[tuple[PeerID, int], asyncio.Task[wire.Refusal | None]] = {}

    # One's own identity.

    def settle(self) -> None:
        """This host has made sure that nobody else holds its identity."""
        if self._since is None:
            self._since = self._now()
            self._tick()

    def claim(self) -> Claim:
        """This host's claim at this moment."""
        if self._since is None:
            return Claim(self.incarnation, UNSETTLED)
        self._note_silence()
        tenure = self._now() - self._since
        return Claim(self.incarnation, tenure if tenure >= 0 else RECOVERING)

    async def handle_claim(self, peer: PeerID, request: ClaimRequest) -> SignedClaim:
        """Answers :data:`CLAIM`."""
        return sign_claim(self._identity, self.claim(), request.challenge)

    def meet(self, connection: Connection) -> wire.Refusal:
        """The other end of ``connection`` proves this host's own identity: why the connection ends.

        Both ends read each other's claim, so that exactly one of them stops.
        """
        hello, sent = connection.hello, connection.hello_sent
        assert hello is not None
        if hello.incarnation in (UNKNOWN, self.incarnation):
            return wire.Refusal("this host itself answers there", kind=EndKind.ITSELF)
        mine = self.claim() if sent is None else Claim(sent.incarnation, sent.tenure)
        if Claim(hello.incarnation, hello.tenure).outranks(mine):
            self._lose(where(connection))
            return _same_identity("another peer holds this identity there")
        return _same_identity(f"{self._identity.peer_id} is held by another peer, which answers: it stays")

    def hear_refusal(self, reason: str, proof: bytes) -> None:
        """A peer refuses this host because of another one with its identity; ``proof`` is what that one signed.

        Without a valid proof it is only the end of one connection: a peer that lies must not stop anybody.
        """
        try:
            signed = wire.decode(proof, SignedClaim, "the proof of a claim")
        except ProtocolViolation as error:
            logger.debug("%s", error)
            return
        if signed.incarnation == self.incarnation or not signed.claim.outranks(self.claim()):
            return
        if is_genuine(signed, self._identity.peer_id, self.incarnation):
            self._lose(reason)

    def _lose(self, address: str) -> None:
        if self.rival is None:
            self.rival = IdentityInUse(str(self._identity.peer_id), address)
            self._stop_ticking()
            for callback in list(self.on_lost):
                callback(self.rival)

    # The identities of others.

    def contest(self, connection: Connection) -> asyncio.Task[wire.Refusal | None] | None:
        """The verdict on a new connection of a peer, if another incarnation of that peer is connected already.

        The task returns a refusal, or None if the newcomer is to be let in.
        """
        hello = connection.hello
        assert hello is not None
        peer, number = connection.peer, hello.incarnation
        if number == UNKNOWN or peer == self._identity.peer_id or not self._holders(peer, number):
            return None
        task = self._contests.get((peer, number))
        if task is None:
            newcomer = Claim(number, hello.tenure)
            task = asyncio.get_running_loop().create_task(self._judge(peer, newcomer, where(connection)))
            self._contests[peer, number] = task
            task.add_done_callback(lambda _: self._contests.pop((peer, number), None))
        return task

    async def _judge(self, peer: PeerID, newcomer: Claim, newcomer_where: str) -> wire.Refusal | None:
        deadline = self._now() + SILENCE
        while holders := self._holders(peer, newcomer.incarnation):
            holder = max(holders, key=lambda one: one.liveness.last_sign)
            reason = where(holder)
            answer = await self._ask(holder, newcomer.incarnation, deadline)
            if isinstance(answer, SignedClaim) and answer.claim.outranks(newcomer):
                logger.debug("refused a second peer with the identity %s: %s holds it", peer, reason)
                return _same_identity(reason, wire.encode(answer))
            if isinstance(answer, RemoteError):  # it answers, but cannot say more
                return _same_identity(reason)
            if holder.is_open:  # else it was lost: its other connections may be, too
                logger.info("%s is held by another peer now, at %s", peer, newcomer_where)
                for connection in self._holders(peer, newcomer.incarnation):
                    connection.close("another peer with this identity has taken over", EndKind.SAME_IDENTITY)
        if self._now() > deadline - SILENCE / 2:  # it was silent: the newcomer need not wait for it once more
            self._forget_addresses(peer)
        return None

    async def _ask(
        self, holder: Connection, challenge: int, deadline: float
    ) -> SignedClaim | RemoteError | None:
        hello = holder.hello
        assert hello is not None
        body = wire.encode(ClaimRequest(challenge))
        try:
            answer: SignedClaim = await holder.calls.call(CLAIM, body, deadline, SILENCE)
        except RemoteError as error:
            return error
        except ShoalError as error:
            logger.debug("%s does not say whether it holds its identity: %s", holder.peer, error)
            return None
        genuine = answer.incarnation == hello.incarnation and is_genuine(answer, holder.peer, challenge)
        return answer if genuine else None

    def _holders(self, peer: PeerID, newcomer: int) -> list[Connection]:
        hellos = [(one, one.hello) for one in self._connections_to(peer) if one.is_open]
        return [
            one for one, hello in hellos if hello is not None and hello.incarnation not in (UNKNOWN, newcomer)
        ]

    # Time.

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _tick(self) -> None:
        self._note_silence()
        self._ticking = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _note_silence(self) -> None:
        """Give up the tenure after a time in which this host could not answer.

        A process that was stopped shows on the loop's clock, a machine that slept on the wall clock alone.
        """
        now, (loop_before, wall_before) = (self._now(), self._clock()), self._alive_at
        self._alive_at = now
        silence = max(now[0] - loop_before, now[1] - wall_before)
        if self._since is not None and SILENCE <= silence < math.inf:
            logger.info("this peer did not answer for %.0f s", silence)
            self._since = now[0] + SILENCE

    def _stop_ticking(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def close(self) -> list[Awaitable[object]]:
        """Stop; what is returned is to be awaited."""
        self._stop_ticking()
        contests = list(self._contests.values())
        for contest in contests:
            contest.cancel()
        return list(contests)


def _same_identity(reason: str, proof: bytes = b"") -> wire.Refusal:
    return wire.Refusal(reason, proof, EndKind.SAME_IDENTITY)


def where(connection: Connection) -> str:
    """Where the peer at the other end is, for people: an address of its own, or the one that is seen."""
    hello = connection.hello
    announced = [] if hello is None else list(hello.addresses)
    if connection.role is Role.RESPONDER and not announced:
        return f"{connection.remote_ip} (it is a client there)"
    seen = str(connection.remote_ip)
    return next((text for text in announced if seen in text.split("/")), (announced or [seen])[0])
