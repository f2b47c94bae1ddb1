"""What a connection needs of the host that owns it."""

from __future__ import annotations

import asyncio
from typing import Protocol, TypeVar

from shoal.p2p.calls import Served
from shoal.p2p.config import HostConfig
from shoal.p2p.identity import Identity
from shoal.p2p.lanes.bundle import Bundle
from shoal.p2p.pacing import ReadingTurns
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.frames import Piece
from shoal.p2p.protocol.streams import Multiplexer
from shoal.p2p.turns import SendingTurns

ConnectionT_contra = TypeVar("ConnectionT_contra", contravariant=True)


class ConnectionOwner(Protocol[ConnectionT_contra]):
    """See the module."""

    identity: Identity
    config: HostConfig
    upload_turns: SendingTurns
    download_turns: ReadingTurns

    def make_hello(self, connection: ConnectionT_contra) -> wire.Hello:
        """What this host says of itself."""

    def find_served(self, method: str) -> Served | None:
        """What answers calls of ``method``."""

    def connection_made(self, connection: ConnectionT_contra) -> wire.Refusal | None:
        """The transport is connected; what is returned refuses the connection."""

    def contest(self, connection: ConnectionT_contra) -> asyncio.Task[wire.Refusal | None] | None:
        """The verdict that a connection has to wait for before it is opened, if another one proves its identity."""

    def hear_refusal(self, reason: str, proof: bytes) -> None:
        """A peer has refused this host because another one holds its identity."""

    def connection_opened(self, connection: ConnectionT_contra) -> wire.Refusal | None:
        """A peer is known and has said HELLO; what is returned refuses the connection."""

    def connection_ended(self, connection: ConnectionT_contra) -> None:
        """It carries nothing more; called once for every connection."""

    def connection_closed(self, connection: ConnectionT_contra) -> None:
        """The transport is closed; called once for every connection that was made."""

    def may_close_idle(self, connection: ConnectionT_contra) -> bool:
        """Whether an unused connection can be spared."""

    def peer_left(self, connection: ConnectionT_contra) -> None:
        """The peer has said on it that its process ends."""

    def ask_others(self, connection: ConnectionT_contra) -> None:
        """Its peer is silent: ask it for a sign of life on its unused connections too."""

    def seen_elsewhere(self, connection: ConnectionT_contra) -> float:
        """When its peer last showed life on another connection, in seconds of the loop; -inf: on none."""

    def bundle_of(self, connection: ConnectionT_contra) -> Bundle:
        """The bulk lanes to its peer's process."""

    def home_of(self, connection: ConnectionT_contra, piece: Piece) -> Multiplexer | None:
        """The streams to which a piece belongs that has come on ``connection``; None if they are gone."""
