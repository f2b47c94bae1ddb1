"""The real and the simulated network pass the same suite."""

from __future__ import annotations

import asyncio
import random

import pytest
import uvloop

from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import TcpNetwork
from shoal.testing import clock
from shoal.testing.conformance import HostConformance
from shoal.testing.network import SimulatedNetwork
from shoal.testing.peers import make_host, make_identity


class TcpWorld:
    """Hosts on 127.0.0.1."""

    def __init__(self, run):
        self._run = run
        self._hosts: dict[str, Host] = {}

    def run(self, main):
        async def everything():
            try:
                await main()
            finally:
                for host in self._hosts.values():
                    await host.close()
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        self._run(everything())

    async def host(self, name, config=HostConfig()):
        host = self._hosts[name] = Host(make_identity(name), TcpNetwork(), config)
        await host.start([] if config.client_mode else [Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        return host

    async def kill(self, name):
        self._hosts[name].abort()


class SimulatedWorld:
    """Hosts in memory, on virtual time."""

    def __init__(self):
        self.network = SimulatedNetwork(random.Random(7))
        self._hosts: dict[str, Host] = {}

    def run(self, main):
        async def everything():
            try:
                await main()
            finally:
                for host in self._hosts.values():
                    await host.close()

        clock.run(everything)

    async def host(self, name, config=HostConfig()):
        host = self._hosts[name] = await make_host(self.network, name, config)
        return host

    async def kill(self, name):
        self.network.kill(name)


class TestTcpOnUvloop(HostConformance):
    @pytest.fixture
    def world(self):
        return TcpWorld(uvloop.run)


class TestTcpOnAsyncio(HostConformance):
    @pytest.fixture
    def world(self):
        return TcpWorld(asyncio.run)


class TestSimulated(HostConformance):
    @pytest.fixture
    def world(self):
        return SimulatedWorld()
