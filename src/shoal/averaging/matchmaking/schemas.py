"""Peers of the same prefix that average something else: what differs is asked of them, and said once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from shoal.averaging.agreement import MAX_TENSORS_TEXT, Agreement, find_differences
from shoal.averaging.router import Router
from shoal.dht.node import DHTNode
from shoal.errors import InvalidValueError, RemoteError, ShoalError
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol.codes import ResetCode
from shoal.p2p.rpc import Method, Stream
from shoal.utils.structs import Message

logger = logging.getLogger(__name__)

ASK_TIMEOUT = 3.0
MAX_KNOWN = 64
"""Other schemas that are kept, with what differs; as many as peers of a prefix will ever have at a time."""
UNKNOWN = "shapes, dtypes, compression, part_size_bytes, min_group_size or min_vector_size differ"


class AgreementRequest(Message, frozen=True):
    """What do you average under this prefix?"""

    prefix: str


AGREEMENT: Method[AgreementRequest, Agreement] = Method("averaging.agreement", AgreementRequest, Agreement)


class OtherSchemas:
    """Compares one averager's agreement with those of others, and lets others compare theirs."""

    def __init__(self, node: DHTNode, router: Router, prefix: str, own: Agreement | None) -> None:
        """``own`` None: nothing is known of it but its hash, and nothing is said."""
        self._node = node
        self._router = router
        self._prefix = prefix
        self._own = own
        self._differences: dict[bytes, asyncio.Task[str | None]] = {}
        """By hash: many peers may have the same other schema, and one of them is asked."""
        if own is not None:
            router.register(AGREEMENT, prefix, self._describe)

    async def close(self) -> None:
        """Ask and answer no more."""
        if self._own is not None:
            self._router.unregister(AGREEMENT, self._prefix)
        tasks = list(self._differences.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def compare(self, peer: PeerID, addresses: Sequence[str], schema_hash: bytes) -> str:
        """In what the agreement with this hash, which ``peer`` declares, differs from the own one, in words."""
        task = self._differences.get(schema_hash)
        if task is None or (task.done() and (task.cancelled() or task.result() is None)):
            self._differences.pop(schema_hash, None)
            task = asyncio.ensure_future(self._ask(peer, addresses, schema_hash))
            self._differences[schema_hash] = task
            while len(self._differences) > MAX_KNOWN:
                self._differences.pop(next(iter(self._differences))).cancel()
        # Not awaited itself: a search that is cancelled must not take the answer away from the others.
        await asyncio.wait([task])
        return UNKNOWN if task.cancelled() else task.result() or UNKNOWN

    async def _ask(self, peer: PeerID, addresses: Sequence[str], schema_hash: bytes) -> str | None:
        """None if it cannot be found out."""
        own, host = self._own, self._node.host
        if own is None:
            return None
        try:
            host.add_hearsay(peer, [Multiaddr.parse(address) for address in addresses])
            async with host.open_stream(peer, AGREEMENT, timeout=ASK_TIMEOUT) as stream:
                await stream.send(AgreementRequest(self._prefix))
                other = await stream.receive()
        except (ShoalError, InvalidValueError) as error:
            logger.debug("%s: %s does not say what it averages: %s", self._prefix, peer, error)
            return None
        if not isinstance(other, Agreement) or other.digest() != schema_hash:
            return None  # it does not average what it says, or by now something else
        differences = "; ".join(find_differences(own, other))
        logger.warning(
            "%s: %s averages something else under this prefix, and is never in a group with this peer: %s",
            self._prefix,
            peer,
            differences,
        )
        return differences

    async def _describe(self, stream: Stream, request: AgreementRequest) -> None:
        own = self._own
        if own is None or len(own.tensors) > MAX_TENSORS_TEXT:
            raise RemoteError(ResetCode.FAILED, "its tensors are too many to be described")
        await stream.send(own)
