"""A peer whose process is ended from outside says goodbye to the others: nobody waits until it was silent for long."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from shoal.p2p.host import Host
from shoal.p2p.identity import Identity
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import TcpNetwork
from shoal.p2p.protocol.violations import Ending, EndKind

LIMIT = 60  # seconds, against hanging only

PEER = """
    import sys, torch, shoal
    from shoal.averaging.commands import AveragingStage

    dht = shoal.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    averager = shoal.DecentralizedAverager(
        [torch.zeros(10)], dht, prefix="goodbye", target_group_size=2, min_matchmaking_time=60.0, start=True
    )
    control = averager.step(wait=False)
    while control.stage is AveragingStage.IDLE:
        pass
    print(dht.background.pid, dht.get_visible_maddrs()[0], flush=True)
    sys.stdin.readline()
    raise RuntimeError("a mistake in the user's code")
"""


class Peer(NamedTuple):
    """A script that looks for a group, and its background process."""

    script: subprocess.Popen[str]
    background: int
    address: Multiaddr

    def end(self, how: str) -> None:
        """End it from outside, or let it fail."""
        if how == "the user's process fails":
            assert self.script.stdin is not None
            self.script.stdin.write("\n")
            self.script.stdin.flush()
            return
        which, number = ENDS[how]
        os.kill(self.script.pid if which == "user" else self.background, number)


ENDS = {
    "the user's process is killed": ("user", signal.SIGKILL),
    "the user's process is terminated": ("user", signal.SIGTERM),
    "the background process is terminated": ("background", signal.SIGTERM),
    "the background process is killed": ("background", signal.SIGKILL),
}


@pytest.fixture
def peer() -> Iterator[Peer]:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PEER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as script:
        assert script.stdout is not None
        try:
            pid, address = script.stdout.readline().split()
            yield Peer(script, int(pid), Multiaddr.parse(address))
        finally:
            script.kill()


async def watch_the_end(peer: Peer, how: str) -> Ending:
    """How the connection of another peer to this one ends."""
    observer = Host(Identity.generate(), TcpNetwork())
    await observer.start()
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Ending] = loop.create_future()
    observer.on_disconnect(lambda _, ending: ended.set_result(ending))
    try:
        await observer.connect(peer.address, timeout=LIMIT)
        peer.end(how)
        async with asyncio.timeout(LIMIT):
            return await ended
    finally:
        await observer.close()


@pytest.mark.parametrize(
    "how",
    [
        "the user's process is killed",
        pytest.param("the background process is terminated", marks=pytest.mark.sweep),
        pytest.param("the user's process is terminated", marks=pytest.mark.sweep),
        pytest.param("the user's process fails", marks=pytest.mark.sweep),
    ],
)
def test_a_peer_that_is_ended_says_goodbye(peer: Peer, how: str):
    ending = asyncio.run(watch_the_end(peer, how))
    assert ending.kind is EndKind.LEAVING
    assert ending.peer_has_left


@pytest.mark.sweep
def test_a_peer_that_cannot_say_goodbye_is_missed_at_once(peer: Peer):
    """Its system closes the connection for it; no keep-alive is needed."""
    ending = asyncio.run(watch_the_end(peer, "the background process is killed"))
    assert ending.kind is EndKind.LOST
