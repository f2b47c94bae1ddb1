"""The time of one connection: how long its handshake may take, signs of life while it stands, and its last moments.

One timer per connection. When to ask and when to give up is decided by
:class:`~shoal.p2p.protocol.keepalive.KeepAlive`; this asks it, sends the PINGs, and tells the connection.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from shoal.p2p.config import HostConfig
from shoal.p2p.connection_writer import ConnectionWriter
from shoal.p2p.protocol import wire
from shoal.p2p.protocol.frames import FrameKind
from shoal.p2p.protocol.keepalive import LOOK_EVERY, KeepAlive, Verdict

LEAST_PAUSE = 0.01
"""Between two looks at one connection."""


class Watched(Protocol):
    """What a monitor needs of its connection."""

    last_used: float

    @property
    def hears_late(self) -> bool:
        """Whether this side reads slowly, to stay within its rate."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing goes on here."""

    @property
    def seen_elsewhere(self) -> float:
        """When its peer last showed life on another connection, in seconds of the loop; -inf: on none."""

    def close_if_spare(self) -> bool:
        """Close a connection that is not used and can be spared; False if it stays."""

    def ask_elsewhere(self) -> None:
        """The peer is asked for a sign of life here: ask it on its unused connections too."""

    def fall_silent(self, silence: float) -> None:
        """The peer shows no sign of life: end the connection."""


SIGN_EVERY = 3.0
"""Seconds between signs of life to a peer that is heard late."""


class LivenessMonitor:
    """See the module."""

    def __init__(self, connection: Watched, writer: ConnectionWriter, config: HostConfig) -> None:
        self._connection = connection
        self._writer = writer
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._keepalive = KeepAlive(config, self._loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._ping_count = 0
        self._began: float | None = None
        self.heard_at = -math.inf
        """When something last arrived, in seconds of the loop. A peer that is read slowly may show life unheard."""

    @property
    def last_sign(self) -> float:
        """When the peer last showed life here, in seconds of the loop."""
        return self._keepalive.last_sign

    @property
    def rtt(self) -> float | None:
        """Smoothed round-trip time in seconds, once measured."""
        return self._keepalive.rtt

    # The stages of a connection.

    def begin_handshake(self, *, speaks_first: bool, expire: Callable[[], None]) -> None:
        """The transport is connected: ``expire`` is called unless :meth:`begin_watch` comes in time."""
        now = self._loop.time()
        self._call_at(now + self._config.handshake_timeout, expire)
        if speaks_first:
            self._began = now

    def end_handshake(self, kernels_rtt: float | None) -> None:
        """The peer is known. Between our first handshake message and this one lies one round trip, at either side. It
        holds the work of both, which takes long where a machine is busy: what the kernel measured, in seconds, counts
        if it is less.
        """
        now = self._loop.time()
        took = now - (now if self._began is None else self._began)
        self._keepalive.measure(took if kernels_rtt is None else min(took, kernels_rtt))

    def begin_watch(self) -> None:
        """The peer has said HELLO and is let in: look for signs of life from now on."""
        self._call_at(self._loop.time() + self._config.probe_after, self._look)

    def begin_end(self, abort: Callable[[], None]) -> None:
        """The connection closes: ``abort`` is called if the peer does not take in time what is queued."""
        self._call_at(self._loop.time() + self._config.close_timeout, abort)

    def stop(self) -> None:
        """The transport is closed."""
        if self._timer is not None:
            self._timer.cancel()

    # What is seen.

    def receive_bytes(self) -> None:
        """Something has arrived."""
        now = self.heard_at = self._loop.time()
        self._keepalive.receive_bytes(now)
        if self._began is None:
            self._began = now

    def receive_pong(self, body: bytes) -> None:
        """An answer has arrived, perhaps that to the last PING."""
        if self._keepalive.awaits_pong and int.from_bytes(body) == self._ping_count:
            now = self._loop.time()
            if self._keepalive.receive_pong(now):
                self._ask(now)

    def note_use(self) -> None:
        """A stream was opened, by either side: from now on somebody waits for this peer."""
        now = self._loop.time()
        self._connection.last_used = now
        if self._keepalive.set_in_use(True, now):
            due = now + self._config.probe_after
            if due < self._timer_at:
                self._call_at(due, self._look)

    def ask(self) -> None:
        """Ask for a sign of life now: an unused connection is found dead together with those in use."""
        now = self._loop.time()
        if self._keepalive.ask(now):
            self._ask(now)

    def _ask(self, now: float) -> None:
        self._send_ping()
        self._call_at(now + LOOK_EVERY, self._look)

    # The timer.

    def _call_at(self, when: float, act: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, act)

    def _look(self) -> None:
        connection, now = self._connection, self._loop.time()
        if connection.is_idle:
            self._keepalive.set_in_use(False, now)
            if connection.close_if_spare():
                return
        else:
            connection.last_used = now
            self._keepalive.set_in_use(True, now)
        writer = self._writer
        if connection.hears_late:
            # What the peer says is heard late, and its questions, too: it has to be told.
            self._keepalive.receive_bytes(now)
            self._writer.send_frame(FrameKind.PING, 0, self._ping_count.to_bytes(wire.PING_BYTES))
        verdict, again = self._keepalive.check(
            now,
            writer.unsent,
            writer.written,
            connection.seen_elsewhere,
            is_held=not writer.has_place_for_frame,
        )
        if connection.hears_late:
            again = min(again, now + SIGN_EVERY)
        if verdict is Verdict.DEAD:
            connection.fall_silent(now - self._keepalive.last_sign)
            return
        if verdict is Verdict.PROBE:
            self._send_ping()
            connection.ask_elsewhere()
        self._call_at(max(again, now + LEAST_PAUSE), self._look)

    def _send_ping(self) -> None:
        self._ping_count += 1
        self._writer.send_frame(FrameKind.PING, 0, self._ping_count.to_bytes(wire.PING_BYTES))
