"""Members, and streams between them, in simulated time: what :mod:`.allreduce_cores` runs on. No I/O.

Members are killed, frozen and cut off at any moment. Messages of one stream keep their order. Each side of a stream
sees its end by itself: at once where the other one was killed, and by a keep-alive where it is silent.
"""

from __future__ import annotations

import heapq
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from shoal.averaging.allreduce.assignment import SpanId
from shoal.averaging.allreduce.rounds import ARRIVAL_TIMEOUT

DETECTION = 5.0
"""Seconds after which a connection that carries nothing is found dead, about."""
ASK_TIMEOUT = 5.0
"""Seconds after which a member that does not answer is not waited for."""


@dataclass(eq=False)
class SimulatedStream:
    """A stream between two members, which ``opener`` opened. ``span`` and ``term`` are its users' affair."""

    opener: int
    server: int
    kind: str
    span: SpanId | None = None
    term: int = 0
    due: dict[int, float] = field(default_factory=dict)
    """When the last message to each side arrives: they keep their order."""
    closed: set[int] = field(default_factory=set)
    """Sides that have ended it, or seen its end."""

    def other(self, member: int) -> int:
        return self.server if member == self.opener else self.opener


class Node:
    """What the links know of a member."""

    def __init__(self) -> None:
        self.is_alive = True
        self.frozen_until = 0.0
        self.has_begun = False
        """Whether it knows of the group: streams to it wait until then."""
        self.is_back = False
        """It is dead, and another process has its identity."""
        self.inbox: list[Callable[[], None]] = []
        """What came while it was frozen, or did not know of the group."""


N = TypeVar("N", bound=Node)


class Links(ABC, Generic[N]):
    """Members in simulated time, and what is on its way between them.

    :param serves: whether each member can be dialed
    :param latency: seconds that a message takes, about
    """

    def __init__(self, rng: random.Random, members: list[N], serves: list[bool], latency: float) -> None:
        self.rng = rng
        self.members = members
        self.serves = serves
        self.size = len(members)
        self.latency = latency
        self.now = 0.0
        self.log: list[str] = []
        """The faults that happened, and when."""
        self.streams: list[SimulatedStream] = []
        """In the order in which they were opened, so that a seed replays exactly."""
        self.cuts: dict[tuple[int, int], int] = {}
        """Directions in which nothing arrives, and by how many cuts."""
        self.lags: dict[tuple[int, int], float] = {}
        """Directions in which messages take longer, and by how many seconds."""
        self.refusals: dict[tuple[int, int], int] = {}
        """Directions in which nobody seems to listen, and by how many firewalls."""
        self._held: dict[tuple[int, int], list[tuple[SimulatedStream, Any]]] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    @abstractmethod
    def hear(self, stream: SimulatedStream, me: int, message: Any) -> None:
        """A message has arrived."""

    @abstractmethod
    def see_end(self, stream: SimulatedStream, me: int, reason: str) -> None:
        """A side of a stream sees that it has ended, or sees it once more."""

    @abstractmethod
    def see_goodbye(self, me: int, other: int) -> None:
        """A member hears that the process of another one ends."""

    @abstractmethod
    def wake(self, me: int) -> None:
        """A member that was frozen runs again, and has read what came meanwhile."""

    # time

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Have something happen at a time."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._count), what))

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        """Have something happen some seconds from now."""
        self.at(self.now + seconds, what)

    def delay(self, source: int | None = None, target: int | None = None) -> float:
        """Seconds that the next message takes: to no member in particular, or from one to another one."""
        lag = 0.0 if source is None or target is None else self.lags.get((source, target), 0.0)
        return lag + self.latency * (0.5 + self.rng.expovariate(2.0))

    def transfer_time(self, source: int, target: int, message: Any) -> float:
        """Seconds for which a message keeps its stream busy: what comes after it arrives so much later."""
        return 0.0

    def run_until(self, is_so: Callable[[], bool]) -> bool:
        """Go on until something is so; False: it never was."""
        while self._queue:
            if is_so():
                return True
            self.now, _, what = heapq.heappop(self._queue)
            what()
        return is_so()

    # faults

    def kill(self, member: int, *, machine: bool = False) -> None:
        """End a member's process; with ``machine``, in silence, as when a cable is pulled."""
        one = self.members[member]
        if not one.is_alive:
            return
        self.log.append(f"{self.now:.3f} kill {member}{' silently' if machine else ''}")
        one.is_alive = False
        one.inbox.clear()
        patience = self._patience() if machine else [self.delay() for _ in self.members]
        for stream in [s for s in self.streams if member in (s.opener, s.server)]:
            other = stream.other(member)
            stream.closed.add(member)
            self.later(patience[other], lambda s=stream, o=other: self.end(s, o, "killed"))  # type: ignore[misc]
        if machine:
            for other in range(self.size):
                self._cut(member, other, None)

    def leave(self, member: int) -> None:
        """A member's process ends in order: it says goodbye to all that it can reach."""
        if not self.members[member].is_alive:
            return
        self.log.append(f"{self.now:.3f} {member} says goodbye")
        self.kill(member)
        for other in range(self.size):
            if other != member and not self.is_cut(member, other):
                what = lambda other=other: self.see_goodbye(other, member)  # noqa: E731
                self.later(self.delay(member, other), lambda other=other, what=what: self.do(other, what))  # type: ignore[misc]

    def slow_down(self, source: int, target: int, lag: float, seconds: float) -> None:
        """Have messages in one direction take longer for a while."""
        self.log.append(f"{self.now:.3f} {source} to {target} takes {lag:.1f} longer for {seconds:.1f}")
        self.lags[source, target] = lag
        self.later(seconds, lambda: self._speed_up(source, target))

    def _speed_up(self, source: int, target: int) -> None:
        self.lags.pop((source, target), None)

    def refuse(self, a: int, b: int, seconds: float | None, *, one_way: bool = False) -> None:
        """Have a firewall end what is between two members, and refuse new connections, as the death of one would."""
        self.log.append(f"{self.now:.3f} firewall {a}-{b} for {seconds} {'one way' if one_way else ''}")
        for key in [(a, b)] if one_way else [(a, b), (b, a)]:
            self.refusals[key] = self.refusals.get(key, 0) + 1
            if seconds is not None:
                self.later(seconds, lambda key=key: self._admit(key))  # type: ignore[misc]
        self.reset(a, b)

    def _admit(self, key: tuple[int, int]) -> None:
        self.refusals[key] -= 1
        if not self.refusals[key]:
            del self.refusals[key]

    def refuses(self, me: int, other: int) -> bool:
        """Whether a dial of one member finds that nobody listens at the other one."""
        one = self.members[other]
        return not (one.is_alive or one.is_back) or (me, other) in self.refusals

    def freeze(self, member: int, seconds: float) -> None:
        """Stop a member's process for a while."""
        one = self.members[member]
        self.log.append(f"{self.now:.3f} freeze {member} for {seconds:.1f}")
        one.frozen_until = max(one.frozen_until, self.now + seconds)
        self.at(one.frozen_until, lambda: self._thaw(member))
        patience = self._patience()
        for stream in [s for s in self.streams if member in (s.opener, s.server)]:
            other = stream.other(member)
            self.later(patience[other], lambda s=stream, o=other: self._suspect(s, o))  # type: ignore[misc]

    def cut_off(self, a: int, b: int, seconds: float | None = None, *, one_way: bool = False) -> None:
        """Let nothing arrive between two members for a while; None: for good."""
        self.log.append(f"{self.now:.3f} cut {a}-{b} for {seconds} {'one way' if one_way else ''}")
        self._cut(a, b, seconds)
        if not one_way:
            self._cut(b, a, seconds)
        patience = self._patience()
        for stream in [s for s in self.streams if {a, b} == {s.opener, s.server}]:
            for end in (a, b):
                self.later(patience[end], lambda s=stream, e=end: self._suspect(s, e))  # type: ignore[misc]

    def reset(self, a: int, b: int) -> None:
        """End all streams between two members; they may open others at once."""
        self.log.append(f"{self.now:.3f} reset {a}-{b}")
        for stream in [s for s in self.streams if {a, b} == {s.opener, s.server}]:
            for end in (a, b):
                self.later(self.delay(), lambda s=stream, e=end: self.end(s, e, "reset"))  # type: ignore[misc]

    def is_cut(self, a: int, b: int) -> bool:
        """Whether nothing arrives between two members, in one direction at least."""
        return (a, b) in self.cuts or (b, a) in self.cuts

    def _patience(self) -> list[float]:
        """For each member, when it finds a connection dead that falls silent now."""
        return [DETECTION * self.rng.uniform(0.8, 1.2) for _ in self.members]

    def _cut(self, source: int, target: int, seconds: float | None) -> None:
        key = (source, target)
        self.cuts[key] = self.cuts.get(key, 0) + 1
        if seconds is not None:
            self.later(seconds, lambda: self._heal(key))

    def _heal(self, key: tuple[int, int]) -> None:
        self.cuts[key] -= 1
        if not self.cuts[key]:
            del self.cuts[key]
            for stream, message in self._held.pop(key, []):
                self._arrive(stream, key[1], message)

    def _suspect(self, stream: SimulatedStream, member: int) -> None:
        """The keep-alive of a side has heard nothing for too long, if the other side still says nothing."""
        other = stream.other(member)
        is_silent = (other, member) in self.cuts or (member, other) in self.cuts
        if is_silent or self.members[other].frozen_until > self.now:
            self.end(stream, member, "it is silent")
            # the other side learns it when it can be reached, or by its own keep-alive
            self.later(self.delay(), lambda: self._end_if_reached(stream, member, other))

    def _end_if_reached(self, stream: SimulatedStream, source: int, member: int) -> None:
        if other_cut := (source, member) in self.cuts:
            self.later(1.0, lambda: self._end_if_reached(stream, source, member))
        if not other_cut:
            self.end(stream, member, "the connection was closed")

    def _thaw(self, member: int) -> None:
        one = self.members[member]
        if self.now >= one.frozen_until and one.is_alive:
            waiting, one.inbox = one.inbox, []
            for what in waiting:
                self.do(member, what)
            self.wake(member)

    # streams

    def do(self, member: int, what: Callable[[], None]) -> None:
        """Have a member do something, as soon as it runs."""
        one = self.members[member]
        if not one.is_alive:
            return
        if one.frozen_until > self.now or not one.has_begun:
            one.inbox.append(what)
        else:
            what()

    def connect(
        self, me: int, other: int, kind: str, *, span: SpanId | None = None, term: int = 0
    ) -> SimulatedStream:
        """Open a stream; the other side hears ``("open",)``, or this one sees its end."""
        stream = SimulatedStream(me, other, kind, span, term)
        self.streams.append(stream)
        can_reach = self.serves[other] or (self.serves[me] and other != me)
        if (me, other) in self.cuts or (other, me) in self.cuts:
            self.later(ASK_TIMEOUT, lambda: self.end(stream, me, "no answer"))
            stream.closed.add(other)
        elif self.refuses(me, other) or not self.members[other].is_alive or not can_reach:
            stream.closed.add(other)
            self.later(self.delay(), lambda: self.end(stream, me, "refused"))
        else:
            self.send(stream, me, ("open",))
            if self.members[other].frozen_until > self.now:
                self.later(DETECTION, lambda: self._suspect(stream, me))
            self.later(ARRIVAL_TIMEOUT, lambda: self._forgo(stream))
        return stream

    def _forgo(self, stream: SimulatedStream) -> None:
        """A stream has waited for its group to become known, in vain."""
        other = self.members[stream.server]
        if other.is_alive and not other.has_begun:
            stream.closed.add(stream.server)
            self.end(stream, stream.opener, "its group is not known there")

    def send(self, stream: SimulatedStream, me: int, message: Any) -> None:
        """Send the other side of a stream something, if this side has not ended it."""
        if me in stream.closed:
            return
        target = stream.other(me)
        due = max(stream.due.get(target, 0.0) + 1e-9, self.now + self.delay(me, target))
        due += self.transfer_time(me, target, message)
        stream.due[target] = due
        self.at(due, lambda: self._arrive(stream, target, message))

    def close(self, stream: SimulatedStream, me: int) -> None:
        """Tell the other side that the stream ends, after all that was sent."""
        if me not in stream.closed:
            self.send(stream, me, ("end",))
            stream.closed.add(me)

    def end(self, stream: SimulatedStream, me: int, reason: str) -> None:
        """One side sees the end of a stream."""
        self.do(me, lambda: self.see_end(stream, me, reason))

    def _arrive(self, stream: SimulatedStream, me: int, message: Any) -> None:
        key = (stream.other(me), me)
        if key in self.cuts:
            self._held.setdefault(key, []).append((stream, message))
        elif me not in stream.closed:
            self.do(me, lambda: self.hear(stream, me, message) if me not in stream.closed else None)
