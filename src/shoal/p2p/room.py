"""How many connections there may be, from whom, and which one makes room for a new one.

Limits of one peer and of one address are kept among its own connections, so that nobody drives out others.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable

from shoal.p2p.config import HostConfig
from shoal.p2p.connection import Connection
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.session import Role
from shoal.p2p.protocol.violations import EndKind
from shoal.p2p.rpc import Lane

NO_ROOM = "too many connections"
FILES_FOR_LANES = 4
"""Lanes for pieces take at most one open file of so many that the process may have."""


class Room:
    """The limits of :class:`~shoal.p2p.config.HostConfig`, kept.

    ``connections`` are all that there are, in whatever state; a live view. ``can_be_had_again`` tells whether a
    connection can be spared, since it could be opened once more, and ``is_unused`` whether nothing goes on on it.
    """

    def __init__(
        self,
        connections: dict[Connection, None],
        config: HostConfig,
        can_be_had_again: Callable[[Connection], bool],
        is_unused: Callable[[Connection], bool],
    ) -> None:
        self._connections = connections
        self._config = config
        self._can_be_had_again = can_be_had_again
        self._is_unused = is_unused

    def refuse_dialer(self, connection: Connection) -> wire.Refusal | None:
        """Why a connection may not begin its handshake, if it may not."""
        if connection.role is not Role.RESPONDER:
            return None
        config, origin = self._config, connection.origin
        if len(self._connections) > config.max_connections + config.max_handshakes:
            return _no_room(NO_ROOM)
        unproven = [one for one in self._from(origin) if not one.is_admitted]
        if len(unproven) > config.max_handshakes_per_ip:
            return _no_room(f"{NO_ROOM} from {origin} at once")
        return None

    def make(self, new: Connection) -> wire.Refusal | None:
        """Close one that can be spared if there are too many with ``new``; why it is refused if there is none."""
        config = self._config
        opened = [connection for connection in self._connections if connection.is_open]
        if new.lane is Lane.STRIPE:
            stripes = [connection for connection in opened if connection.lane is Lane.STRIPE]
            # What carries calls and streams has the other half.
            most = min(config.max_connections // 2, files_for_lanes())
            if len(stripes) > most and not self._close_oldest(stripes, new):
                return _no_room("too many lanes")
            opened = [connection for connection in opened if connection.is_open]
        of_peer = [connection for connection in opened if connection.remote == new.remote]
        if len(of_peer) > config.max_connections_per_peer and not self._close_oldest(of_peer, new):
            return _no_room(f"{NO_ROOM} to one peer")
        if new.role is Role.RESPONDER:
            of_ip = [connection for connection in self._from(new.origin) if connection.is_open]
            if len(of_ip) > config.max_connections_per_ip and not self._close_spare(of_ip, new):
                return _no_room(f"{NO_ROOM} from {new.origin}")
        opened = [connection for connection in opened if connection.is_open]
        if len(opened) <= config.max_connections or self._close_spare(opened, new):
            return None
        # What this side dials, it needs: else strangers that cannot be dialed could cut it off from everybody.
        if new.role is Role.INITIATOR and self._close_oldest(opened, new):
            return None
        return _no_room(NO_ROOM)

    def _close_spare(self, connections: Iterable[Connection], new: Connection) -> bool:
        return self._close_oldest([one for one in connections if self._can_be_had_again(one)], new)

    def _close_oldest(self, connections: Iterable[Connection], new: Connection) -> bool:
        """Close the one that was not used for longest, a lane for pieces before any other; False if all are in use."""
        unused = [one for one in connections if one is not new and self._is_unused(one)]
        if new.lane is Lane.STRIPE:
            # The other kinds are of more use than one lane more.
            unused = [one for one in unused if one.lane is Lane.STRIPE]
        if unused:
            oldest = min(
                unused, key=lambda one: (one.lane is not Lane.STRIPE, max(one.last_used, one.last_piece))
            )
            oldest.close(NO_ROOM, EndKind.NO_ROOM)
        return bool(unused)

    def _from(self, origin: str | None) -> list[Connection]:
        """The incoming connections from elsewhere that limits per address count together."""
        return [
            one
            for one in self._connections
            if origin is not None and one.origin == origin and one.role is Role.RESPONDER
        ]


def files_for_lanes() -> int:
    """How many open files of this process may be lanes for pieces."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 20 if soft == resource.RLIM_INFINITY else soft) // FILES_FOR_LANES


def _no_room(reason: str) -> wire.Refusal:
    return wire.Refusal(reason, kind=EndKind.NO_ROOM)
