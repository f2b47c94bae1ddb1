"""When to ask a silent peer for a sign of life, and when to give it up. Pure: ``now`` is an argument, in seconds.

Signs of life are received bytes of any kind, and progress of what we send: on a full, slow link our question waits
behind megabytes in our own buffers, so a peer whose kernel goes on taking them is alive, also while we refill them
as fast. What counts as silence is the time since the last sign, or since the connection came into use if that was
later. While the same peer shows life on another connection, the answer on this one may be in a queue behind that:
it has the longest time allowed.

How long to wait follows the round-trip time, smoothed as in RFC 6298 (Jacobson): see :func:`patience`. A time so long
that it would make us wait longer may be that of a link that was cut for a moment, and not of the way. The peer is asked
once more, at once: if it answers much sooner, the long time is forgotten.

Only time in which this side's own loop ran counts. While a peer is asked, it is looked at every :data:`LOOK_EVERY`
seconds. A look that comes late shows that this process was suspended, or its loop busy: the peer gets that time too.
A look that comes very late gives nobody up. What the peer sent meanwhile may lie in this machine's buffers, and is read
before the next look.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

from shoal.p2p.config import HostConfig

LOOK_EVERY = 0.25
"""Seconds between two looks at a peer that was asked for a sign of life."""
VERY_LATE = 0.5
"""A look that is late by this many seconds gives nobody up."""

_ANSWER_ROUND_TRIPS = 8
_OUTAGE = 2
"""A round trip that took this many times as long as the next one measured an outage."""


class Patience(NamedTuple):
    """How long a silent peer is waited for, in seconds."""

    ask_after: float
    """Silence after which it is asked for a sign of life, on a connection in use."""
    answer_within: float
    """How long its answer may take."""


def patience(rtt: float | None, deviation: float, config: HostConfig) -> Patience:
    """How long to wait for a peer at this round-trip time (None: not measured), with this mean deviation.

    A peer is asked after the time that an answer of its own would usually take, and has eight times as long for its
    answer; both within the limits of ``config``.
    """
    usual = (rtt or 0.0) + 4 * deviation
    return Patience(
        max(min(usual, config.max_probe_after), config.probe_after),
        min(max(_ANSWER_ROUND_TRIPS * usual, config.min_answer_time), config.max_answer_time),
    )


class RoundTrips:
    """The smoothed round-trip time of one connection, and how far single ones are from it."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._smoothed: float | None = None
        self._deviation = 0.0
        self._doubted: tuple[float, float | None, float] | None = None
        """A sample that is to be confirmed, and what was known before it."""

    @property
    def smoothed(self) -> float | None:
        """In seconds, once measured."""
        return self._smoothed

    @property
    def patience(self) -> Patience:
        """How long the peer is waited for."""
        return patience(self._smoothed, self._deviation, self._config)

    @property
    def is_doubtful(self) -> bool:
        """Whether the peer has to be asked once more."""
        return self._doubted is not None

    def add(self, sample: float) -> None:
        """Take a measured time into account."""
        doubted, self._doubted = self._doubted, None
        if doubted is not None and doubted[0] >= _OUTAGE * sample:
            _, self._smoothed, self._deviation = doubted
        before = (sample, self._smoothed, self._deviation)
        known = self.patience
        self._smooth(sample)
        if doubted is None and self.patience > known:
            self._doubted = before

    def _smooth(self, sample: float) -> None:
        if self._smoothed is None:
            self._smoothed, self._deviation = sample, sample / 2
        else:
            self._deviation += (abs(self._smoothed - sample) - self._deviation) / 4
            self._smoothed += (sample - self._smoothed) / 8


class Verdict(enum.Enum):
    """What to do now."""

    WAIT = enum.auto()
    PROBE = enum.auto()
    """Send a PING."""
    DEAD = enum.auto()
    """Give the connection up."""


class KeepAlive:
    """The life signs of one connection."""

    def __init__(self, config: HostConfig, now: float) -> None:
        self._config = config
        self.last_sign = now
        self._round_trips = RoundTrips(config)
        self._in_use_since: float | None = None
        self._probe_sent: float | None = None
        self._unsent = 0
        self._taken = 0
        self._look_due = math.inf
        self._excused = 0.0
        self._was_blind = False

    @property
    def patience(self) -> Patience:
        """How long this peer is waited for now."""
        return self._round_trips.patience

    @property
    def rtt(self) -> float | None:
        """Smoothed round-trip time, once measured."""
        return self._round_trips.smoothed

    def set_in_use(self, in_use: bool, now: float) -> bool:
        """Note whether somebody waits for something; True if :meth:`check` is due earlier than it said."""
        if not in_use:
            self._in_use_since = None
            return False
        if self._in_use_since is None:
            self._in_use_since = now
            return True
        return False

    def receive_bytes(self, now: float) -> None:
        """Something has arrived."""
        self.last_sign = now
        self._excused = 0.0

    def receive_pong(self, now: float) -> bool:
        """The answer to the last probe has arrived; True: send another PING now."""
        if self._probe_sent is None:
            return False
        sample = now - self._probe_sent
        self._probe_sent = None
        if (
            not self._was_blind and now - self._look_due < VERY_LATE
        ):  # else it measures this side's own absence
            self.measure(sample)
        if not self._round_trips.is_doubtful:
            return False
        self._begin_probe(now)
        self._look_due = now + LOOK_EVERY
        return True

    def measure(self, sample: float) -> None:
        """Take one measured round-trip time into account."""
        self._round_trips.add(sample)

    @property
    def awaits_pong(self) -> bool:
        """Whether a probe has not been answered."""
        return self._probe_sent is not None

    def check(
        self, now: float, unsent: int, written: int, seen_elsewhere: float = -math.inf, is_held: bool = False
    ) -> tuple[Verdict, float]:
        """What to do now, and when to check again.

        ``unsent``: bytes of ours that the peer has not taken yet, of the ``written`` ones in all so far.
        ``seen_elsewhere``: when the peer last showed life on another connection.
        ``is_held``: a PING waits for the end of a payload that is under way.
        """
        late = max(now - self._look_due, 0.0)
        verdict, self._look_due = self._judge(now, late, unsent, written, seen_elsewhere, is_held)
        return verdict, self._look_due

    def ask(self, now: float) -> bool:
        """Whether to send a PING now, though nothing waits for the peer here: it is silent on another connection.

        A connection in use asks by itself, soon enough.
        """
        if self._probe_sent is not None or self._in_use_since is not None:
            return False
        self._begin_probe(now)
        self._look_due = now + LOOK_EVERY
        return True

    def _judge(
        self, now: float, late: float, unsent: int, written: int, seen_elsewhere: float, is_held: bool
    ) -> tuple[Verdict, float]:
        taken = written - unsent
        # Only what is taken of a backlog while an answer is awaited: then the last look was a moment ago. Where a rate
        # is kept there is no backlog, and the PING has not left.
        if self._probe_sent is not None and (self._unsent or is_held) and taken > self._taken:
            self.receive_bytes(now)
        self._unsent, self._taken = unsent, taken
        ask_after, answer_within = self.patience
        silent_since = max(self.last_sign, self._in_use_since or 0.0)
        if self._probe_sent is None:
            probe_at = silent_since + (
                self._config.idle_probe_after if self._in_use_since is None else ask_after
            )
            if now < probe_at and not self._round_trips.is_doubtful:
                return Verdict.WAIT, probe_at
            self._begin_probe(now)
            return Verdict.PROBE, now + LOOK_EVERY
        self._excused += late
        self._was_blind |= late >= VERY_LATE
        lives = seen_elsewhere > self._probe_sent
        allowed = self._config.max_answer_time if lives else answer_within
        dead_at = max(silent_since, self._probe_sent) + allowed + self._excused
        if now < dead_at:
            return Verdict.WAIT, min(dead_at, now + LOOK_EVERY)
        return (Verdict.WAIT, now + LOOK_EVERY) if late >= VERY_LATE else (Verdict.DEAD, now)

    def _begin_probe(self, now: float) -> None:
        self._probe_sent = now
        self._excused = 0.0
        self._was_blind = False
