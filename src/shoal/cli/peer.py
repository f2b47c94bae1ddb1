"""``shoal peer``: a DHT node that others use to find each other, until it gets SIGINT or SIGTERM."""

from __future__ import annotations

import logging
import os
import queue
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
LOOK_SECONDS = 1.0
"""How often the peer is asked whether others can still dial it."""
OPTIONS = (
    ("host_maddrs=['/ip4/0.0.0.0/tcp/0']", "--host 0.0.0.0"),
    ("host_maddrs", "--host and --port"),
    ("announce_maddrs", "--announce"),
)
"""What the library's advice calls parameters, and what they are called here."""


@dataclass(frozen=True)
class PeerState:
    """What a running peer tells of itself."""

    peers: int
    keys: int
    addresses: tuple[Multiaddr, ...]
    """Where others can dial it; none: it is a client."""
    is_in_doubt: bool
    """Whether that is being found out."""
    advice: str
    tried: tuple[str, ...]
    """Where others could not dial it, and why."""


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
        raise InvalidValueError(f"--interval must be more than 0 s, got {interval:g}")
    listen = listen_address(host, port)
    with stop_on_signals() as stop, _said_by_this_command("shoal.p2p.reach.inquiry"):
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
                _report(dht, stop, interval, console)
    _print_line("stopped", console)
    return 0


def _report(dht: DHT, stop: StopRequest, interval: float, console: Console) -> None:
    """Say where others can dial the peer, again when that changes, and how many there are every ``interval``."""
    state = dht.run_coroutine(_describe)
    shown = state.addresses
    _print_addresses(state, console)
    _print_line("Ctrl+C or SIGTERM stops this peer.", console)
    next_count = time.monotonic() + interval
    while not stop.wait(max(min(next_count - time.monotonic(), LOOK_SECONDS), 0.0)):
        state = dht.run_coroutine(_describe)
        if not state.is_in_doubt and set(state.addresses) != set(shown):
            shown = state.addresses
            _print_addresses(state, console)
        if time.monotonic() >= next_count:
            next_count = time.monotonic() + interval
            _print_line(f"peers: {state.peers}, keys: {state.keys}", console)


class StopRequest:
    """An event that a signal handler may set, which runs in the middle of the thread that waits for it.

    A :class:`threading.Event` would hang there now and then: that thread may hold its lock.
    """

    def __init__(self) -> None:
        self._wanted = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        self._wanted = True
        self._wake.put(None)

    def is_set(self) -> bool:
        return self._wanted

    def wait(self, timeout: float) -> bool:
        """Whether it is set, within ``timeout`` seconds."""
        if not self._wanted:
            with suppress(queue.Empty):
                self._wake.get(timeout=timeout)
        return self._wanted


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """What SIGINT and SIGTERM set; the handlers of before are put back in the end."""
    stop = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _said_by_this_command(name: str) -> Iterator[None]:
    """Mute a log whose warnings this command prints by the names of its options; not if the user chose a level."""
    log = logging.getLogger(name)
    before = log.level
    if "SHOAL_LOGLEVEL" not in os.environ:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _wait_until_ready(dht: DHT, stop: StopRequest) -> bool:
    """Wait until the peer has joined; False if it is to stop before."""
    while not stop.is_set():
        try:
            dht.wait_until_ready(POLL_SECONDS)
        except DeadlineExceeded:
            continue
        return True
    return False


async def _describe(dht: Any, node: DHTNode) -> PeerState:
    """In the background process: what the node tells of itself."""
    reachability = node.host.reachability
    return PeerState(
        len(node.neighbours),
        node.num_records,
        tuple(dht.get_visible_maddrs()),
        reachability.is_in_doubt,
        reachability.advice,
        reachability.tried,
    )


def _print_addresses(state: PeerState, console: Console) -> None:
    if not state.addresses:
        why = ", as far as is known yet" if state.is_in_doubt else ""
        _print_line(
            f"No other peer can dial this one{why}: it takes part as a client, under no address.", console
        )
        _print_line(f"{_in_options(state.advice)}.", console)
        for attempt in state.tried:
            _print_line(f"  tried {attempt}", console)
        return
    is_local = all(address.is_loopback for address in state.addresses)
    whence = "from this machine only (see --host), " if is_local else ""
    _print_line(f"This peer can be reached {whence}at", console)
    for address in state.addresses:
        _print_line(f"  {address}", console)


def _in_options(advice: str) -> str:
    for parameter, option in OPTIONS:
        advice = advice.replace(parameter, option)
    return advice


def _print_line(text: str, console: Console) -> None:
    """As it is, in one line: addresses are there to be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
