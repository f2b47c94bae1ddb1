"""When to ask a silent peer for a sign of life, and when to give it up. Pure: ``now`` is an argument, in seconds.

Signs of life are received bytes of any kind, and progress of what we send: on a full, slow link our question waits
behind megabytes in our own buffers, so a peer whose kernel goes on taking them is alive, also while we refill them
as fast. What counts as silence is the time since the last sign, or since the connection came into use if that was
later. While the same peer shows life on another connection, the answer on this one may be in a queue behind that:
it has the longest time allowed.

The round-trip time is smoothed as in RFC 6298 (Jacobson); a peer may take for its answer eight times the
smoothed time plus four deviations, within the limits of :class:`HostConfig`.
"""

from __future__ import annotations

import enum
import math

from shoal.p2p.config import HostConfig

_ANSWER_ROUND_TRIPS = 8


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
        self.rtt: float | None = None
        """Smoothed round-trip time, once measured."""
        self._deviation = 0.0
        self._in_use_since: float | None = None
        self._probe_sent: float | None = None
        self._unsent = 0
        self._taken = 0

    @property
    def answer_time(self) -> float:
        """How long the peer may take for a sign of life."""
        estimate = _ANSWER_ROUND_TRIPS * ((self.rtt or 0.0) + 4 * self._deviation)
        return min(max(estimate, self._config.min_answer_time), self._config.max_answer_time)

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

    def receive_pong(self, now: float) -> None:
        """The answer to the last probe has arrived."""
        if self._probe_sent is None:
            return
        sample = now - self._probe_sent
        self._probe_sent = None
        self.measure(sample)

    def measure(self, sample: float) -> None:
        """Take one measured round-trip time into account."""
        if self.rtt is None:
            self.rtt, self._deviation = sample, sample / 2
        else:
            self._deviation += (abs(self.rtt - sample) - self._deviation) / 4
            self.rtt += (sample - self.rtt) / 8

    @property
    def awaits_pong(self) -> bool:
        """Whether a probe has not been answered."""
        return self._probe_sent is not None

    def check(
        self, now: float, unsent: int, written: int, seen_elsewhere: float = -math.inf
    ) -> tuple[Verdict, float]:
        """What to do now, and when to check again.

        ``unsent``: bytes of ours that the peer has not taken yet, of the ``written`` ones in all so far.
        ``seen_elsewhere``: when the peer last showed life on another connection.
        """
        taken = written - unsent
        # Only what is taken of a backlog while an answer is awaited: then the last look was a moment ago.
        if self._probe_sent is not None and self._unsent and taken > self._taken:
            self.last_sign = now
        self._unsent, self._taken = unsent, taken
        silent_since = max(self.last_sign, self._in_use_since or 0.0)
        if self._probe_sent is not None:
            lives = seen_elsewhere > self._probe_sent
            allowed = self._config.max_answer_time if lives else self.answer_time
            dead_at = max(silent_since, self._probe_sent) + allowed
            # While something waits to be sent, look often enough to see whether it moves.
            again = min(dead_at, now + self._config.probe_after) if unsent else dead_at
            return (Verdict.DEAD, now) if now >= dead_at else (Verdict.WAIT, again)
        pause = self._config.idle_probe_after if self._in_use_since is None else self._config.probe_after
        probe_at = silent_since + pause
        if now < probe_at:
            return Verdict.WAIT, probe_at
        self._probe_sent = now
        # Looking again soon gives the first value to compare the unsent bytes with.
        return Verdict.PROBE, now + min(self._config.probe_after, self.answer_time)
