"""TCP sockets behind the Network protocol, on both event loops that Shoal runs on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
import uvloop

from shoal.errors import InvalidValueError
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import Listener, Network, TcpNetwork

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run_limited(scenario: Coroutine[Any, Any, None]) -> None:
        request.param(asyncio.wait_for(scenario, 20))

    return run_limited


class Recorder(asyncio.BufferedProtocol):
    """Keeps what it receives."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.connected: asyncio.Future[asyncio.Transport] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.received = bytearray()
        self._buffer = bytearray(1000)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods of asyncio's, but are none of its classes.
        self.connected.set_result(cast("asyncio.Transport", transport))

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self._buffer[:nbytes]

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)


class Acceptor:
    """A protocol factory that hands over the protocols it made."""

    def __init__(self) -> None:
        self.made: asyncio.Queue[Recorder] = asyncio.Queue()

    def __call__(self) -> Recorder:
        protocol = Recorder()
        self.made.put_nowait(protocol)
        return protocol


@pytest.mark.parametrize(
    "text", ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0", "/dns4/localhost/tcp/0", "/ip4/0.0.0.0/tcp/0"]
)
def test_bytes_pass_between_a_dialer_and_a_listener(run: Run, text: str) -> None:
    async def scenario() -> None:
        network = TcpNetwork()
        acceptor = Acceptor()
        listener = await network.listen(acceptor, Multiaddr.parse(text))
        assert isinstance(network, Network)
        assert isinstance(listener, Listener)
        assert listener.address.port != 0
        assert listener.address.with_port(0) == Multiaddr.parse(text)
        transport = await network.connect(Recorder, listener.address)
        accepted = await acceptor.made.get()
        other_end = await accepted.connected
        for end in (transport, other_end):
            sock = end.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert isinstance(end.get_protocol(), Recorder)
        transport.writelines([b"to ", bytearray(b"the "), memoryview(b"listener")])
        transport.close()
        await accepted.ended
        assert accepted.received == b"to the listener"
        listener.close()
        await listener.wait_closed()

    run(scenario())


def test_a_closed_listener_accepts_nobody_and_frees_its_port(run: Run) -> None:
    async def scenario() -> None:
        network = TcpNetwork()
        acceptor = Acceptor()
        listener = await network.listen(acceptor, Multiaddr.parse("/ip4/127.0.0.1/tcp/0"))
        transport = await network.connect(Recorder, listener.address)
        accepted = await acceptor.made.get()
        with pytest.raises(OSError, match="in use"):
            await network.listen(acceptor, listener.address)
        listener.close()
        listener.close()
        await listener.wait_closed()
        with pytest.raises(OSError):
            await network.connect(Recorder, listener.address)
        # The connection stands, and the port can be had again all the same.
        (await accepted.connected).close()
        protocol = transport.get_protocol()
        assert isinstance(protocol, Recorder)
        await protocol.ended
        again = await network.listen(acceptor, listener.address)
        assert again.address == listener.address
        again.close()
        await again.wait_closed()

    run(scenario())


def free_port() -> int:
    """A port that neither family uses, below those that the system gives to whoever asks for any."""
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with (
            socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as one,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other,
            contextlib.suppress(OSError),
        ):
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(("::", port))
            other.bind(("0.0.0.0", port))
            return port
    raise AssertionError("every port is taken")


def test_both_families_listen_on_one_port(run: Run) -> None:
    async def scenario() -> None:
        network, port = TcpNetwork(), free_port()
        async with contextlib.AsyncExitStack() as listeners:  # a uvloop does not close before its servers
            for protocol, host in (("ip6", "::"), ("ip4", "0.0.0.0")):
                listener = await network.listen(Acceptor(), Multiaddr(protocol, host, port))
                listeners.callback(listener.close)

    run(scenario())


def test_names_are_resolved_to_their_family_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        network = TcpNetwork()
        loop = asyncio.get_running_loop()
        families = []

        async def resolve(host: str, port: int, **options: Any) -> list[Any]:
            families.append(options["family"])
            raise socket.gaierror(socket.EAI_NONAME, "unknown name")

        # uvloop's own methods cannot be replaced, nor do they go through this one: plain asyncio shows it.
        if not isinstance(loop, uvloop.Loop):
            monkeypatch.setattr(loop, "getaddrinfo", resolve)
        for text in ("/dns4/name.invalid/tcp/5", "/dns6/name.invalid/tcp/5", "/dns/name.invalid/tcp/5"):
            with pytest.raises(OSError):
                await network.connect(Recorder, Multiaddr.parse(text))
            with pytest.raises(OSError):
                await network.listen(Recorder, Multiaddr.parse(text))
        families_of_names = (socket.AF_INET, socket.AF_INET6, socket.AF_UNSPEC)
        expected = [family for family in families_of_names for _ in ("connect", "listen")]
        assert families == ([] if isinstance(loop, uvloop.Loop) else expected)

    run(scenario())


def test_port_zero_cannot_be_dialed(run: Run) -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidValueError, match="port 0"):
            await TcpNetwork().connect(Recorder, Multiaddr.parse("/ip4/127.0.0.1/tcp/0"))

    run(scenario())
