"""``shoal peer``: a DHT node that others use to find each other, until it gets SIGINT or SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from shoal.cli.addresses import listen_address
from shoal.dht.dht import DHT
from shoal.errors import DeadlineExceeded, InvalidValueError
from shoal.p2p.multiaddr import Multiaddr

if TYPE_CHECKING:
    from shoal.dht.node import DHTNode

POLL_SECONDS = 0.2


def run_peer(
    *,
    host: str,
    port: int,
    identity: Path | None,
    initial_peers: Sequence[str],
    announce: Sequence[str],
    bootstrap_timeout: float,
    interval: float,
    console: Console,
) -> int:
    """Run a peer until a signal; returns the exit status.

    :param bootstrap_timeout: seconds for which the initial peers are retried
    :param interval: seconds between the lines that tell how many peers and keys there are
    :raises UsageError: an argument is not allowed
    :raises ShoalError: no initial peer can be reached, or the peer's process died
    """
    if not interval > 0:
        raise InvalidValueError(f"--interval {interval:g}: more than 0 seconds are allowed")
    listen = listen_address(host, port)
    with _stop_on_signals() as stop:
        dht = DHT(
            list(initial_peers),
            start=True,
            await_ready=False,
            host_maddrs=[listen],
            announce_maddrs=list(announce) or None,
            identity_path=identity,
            bootstrap_timeout=bootstrap_timeout,
        )
        with dht:
            if _wait_until_ready(dht, stop):
                _print_addresses(dht.get_visible_maddrs(), console)
                _print_line("Ctrl+C or SIGTERM stops this peer.", console)
                while not stop.wait(interval):
                    peers, keys = dht.run_coroutine(_count)
                    _print_line(f"peers: {peers}, keys: {keys}", console)
    _print_line("stopped", console)
    return 0


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the handlers of before are put back in the end."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _wait_until_ready(dht: DHT, stop: threading.Event) -> bool:
    """Wait until the peer has joined; False if it is to stop before."""
    while not stop.is_set():
        try:
            dht.wait_until_ready(POLL_SECONDS)
        except DeadlineExceeded:
            continue
        return True
    return False


async def _count(dht: Any, node: DHTNode) -> tuple[int, int]:
    """In the background process: how many peers the node knows, and how many keys it stores."""
    return len(node.neighbours), node.num_records


def _print_addresses(addresses: Sequence[Multiaddr], console: Console) -> None:
    if not addresses:
        _print_line("No other peer can dial this one: it takes part as a client, under no address.", console)
        return
    is_local = all(address.is_loopback for address in addresses)
    whence = "from this machine only (see --host), " if is_local else ""
    _print_line(f"This peer can be reached {whence}at", console)
    for address in addresses:
        _print_line(f"  {address}", console)


def _print_line(text: str, console: Console) -> None:
    """As it is, in one line: addresses are there to be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
