"""Which peers of a run have ended, though their records in the DHT still stand.

A peer that is killed leaves its record behind, for a minute as a rule. Its samples count, since others count them, too.
But nobody has to wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from shoal.errors import PeerUnreachable, ShoalError
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol.violations import Ending, EndKind
from shoal.utils.tasks import TaskSet

AWAY = 15.0
"""Seconds after which a peer counts as gone whose connection broke, and that was neither reached nor came back."""
BROKEN = frozenset({EndKind.LOST, EndKind.SILENCE})


class Departures:
    """See the module.

    :param is_awaited: whether it matters that a peer has ended
    """

    def __init__(self, host: Host, tasks: TaskSet, is_awaited: Callable[[PeerID], bool]) -> None:
        self._host = host
        self._tasks = tasks
        self._is_awaited = is_awaited
        self._gone: set[PeerID] = set()
        self._looked_for: set[PeerID] = set()
        self._unsubscribe = host.on_disconnect(self._note)

    def gone(self) -> Collection[PeerID]:
        """The peers that have ended. One that is there again, or tells something new, has not."""
        self._gone -= {peer for peer in self._gone if self._host.is_connected(peer)}
        return self._gone

    def note_life(self, peer: PeerID) -> None:
        """The peer has told of something new."""
        self._gone.discard(peer)

    def close(self) -> None:
        """Take notice of nothing more. Idempotent."""
        self._unsubscribe()

    def _note(self, peer: PeerID, ending: Ending) -> None:
        if not self._is_awaited(peer):
            return
        if ending.peer_has_left:
            self._gone.add(peer)
        elif ending.kind in BROKEN and peer not in self._looked_for:
            self._looked_for.add(peer)
            self._tasks.start(self._look_for(peer), f"look for {peer}")

    async def _look_for(self, peer: PeerID) -> None:
        """Its connection broke: its process has ended if nobody listens where it did, or if it stays away."""
        try:
            async with asyncio.timeout(AWAY):
                if await self._refuses(peer):
                    self._gone.add(peer)
                    return
                await asyncio.sleep(AWAY)
        except TimeoutError:
            if not self._host.is_connected(peer):
                self._gone.add(peer)
        finally:
            self._looked_for.discard(peer)

    async def _refuses(self, peer: PeerID) -> bool:
        try:
            await self._host.connect(peer, timeout=AWAY)
        except PeerUnreachable as error:
            return bool(error.dials) and error.is_refused
        except ShoalError:
            pass
        return False
