"""What the tests of the suite need: a world of hosts, messages, handlers, and the errors that must come."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec

from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.protocol.violations import Ending
from shoal.p2p.rpc import Method

ErrorT = TypeVar("ErrorT", bound=BaseException)


class World(Protocol):
    """Makes hosts that can reach each other, and ends them."""

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run ``main`` on an event loop of this world, then close the hosts that were made."""

    async def host(self, name: str, config: HostConfig = HostConfig()) -> Host:
        """A started host; it listens unless it is in client mode."""

    async def kill(self, name: str) -> None:
        """End a host as the death of its process would: without a word."""


class Number(msgspec.Struct):
    """A message."""

    value: int


class Text(msgspec.Struct):
    """Another message, which no Number decodes to."""

    text: str


ECHO = Method("test.echo", Number, Number)
STREAM = Method("test.stream", Number, Number)


def on_world(check: Callable[[Any, World], Awaitable[None]]) -> Callable[[Any, World], None]:
    """Make a test method of a coroutine function."""

    @functools.wraps(check)
    def test(self: Any, world: World) -> None:
        world.run(lambda: asyncio.wait_for(check(self, world), 60))

    del test.__wrapped__  # or pytest would look at the parameters of ``check``
    return test


async def failure_of(awaitable: Awaitable[Any], kind: type[ErrorT]) -> ErrorT:
    """The error of ``kind`` that ``awaitable`` must raise."""
    try:
        result = await awaitable
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {result!r}")


async def pair(world: World, config: HostConfig = HostConfig()) -> tuple[Host, Host]:
    """A server that listens, and a client that is connected to it."""
    server, client = await world.host("server", config), await world.host("client", config)
    client.add_addresses(server.peer_id, server.listen_addresses)
    await client.connect(server.peer_id, timeout=10)
    return server, client


async def double(peer: PeerID, request: Number) -> Number:
    """A handler."""
    return Number(request.value * 2)


class Waiting:
    """A handler that waits until it is cancelled, and tells about it."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, *args: Any) -> Any:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError


def lost_by(host: Host) -> asyncio.Future[tuple[PeerID, Ending]]:
    """Resolved when ``host`` has lost its last connection to some peer."""
    future: asyncio.Future[tuple[PeerID, Ending]] = asyncio.get_running_loop().create_future()

    def note(peer: PeerID, ending: Ending) -> None:
        if not future.done():
            future.set_result((peer, ending))

    host.on_disconnect(note)
    return future
