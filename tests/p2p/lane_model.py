"""Lanes as TCP connections of a long, lossy link, in virtual time: segments, windows (cubic), losses and back-offs.

Two peers average a vector: each sends the other its parts, and an average for each part that came. It is the scheduler
of the lanes that decides here; the rest is as simple as it may be for its decisions to matter as they do on a link.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.averaging.flow_window import FlowWindow, first_size
from shoal.p2p.connection_writer import unsent_bound
from shoal.p2p.lanes.bundle import TICK
from shoal.p2p.lanes.forecast import Flow
from shoal.p2p.lanes.scheduler import Outgoing, Scheduler

SEGMENT = 1448
PART = 512 << 10
INITIAL_SEGMENTS = 10.0
LEAST_TIMEOUT = 0.2
"""Seconds after which a connection that hears nothing sends again, beside its round trip; then twice as many."""


class World:
    """The clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (when, self._count, what))

    def run(self, is_over: Callable[[], bool], limit: float) -> None:
        while not is_over():
            self.now, _, what = heapq.heappop(self._due)
            assert self.now < limit, "it does not end"
            what()


@dataclass
class Link:
    """One direction: bytes a second, seconds one way, a part of the segments that is lost, seconds of its queue."""

    world: World
    rng: random.Random
    rate: float
    delay: float
    loss: float
    queue: float = 0.1
    free_at: float = 0.0
    carried: int = 0

    def send(self, arrive: Callable[[], None]) -> None:
        now = self.world.now
        if self.rng.random() < self.loss or self.free_at - now > self.queue:
            return
        self.free_at = max(self.free_at, now) + SEGMENT / self.rate
        self.carried += SEGMENT
        self.world.at(self.free_at + self.delay, arrive)


@dataclass(eq=False)
class _Segment:
    number: int
    end: int
    """Bytes of the connection up to its last one."""
    order: int = 0
    is_acked: bool = False
    is_lost: bool = False


class Connection:
    """A TCP connection that sends: selective acknowledgements, cubic, and time-outs."""

    def __init__(self, world: World, link: Link, on_bytes: Callable[[int], None]) -> None:
        self.world, self.link, self.on_bytes = world, link, on_bytes
        self.on_room: Callable[[], None] = lambda: None
        self.written = self.acked = 0
        self.in_buffer = 0
        """Bytes that the kernel has not taken: of the piece that was written last."""
        self.window, self.threshold = INITIAL_SEGMENTS, float("inf")
        self.segments: dict[int, _Segment] = {}
        self.next_number = self.first = self.orders = self.flying = 0
        self.lost: deque[_Segment] = deque()
        self.recovers_until = -1
        self.highest, self.epoch, self.friendly = 0.0, -1.0, 0.0
        self.cut = 0
        """Bytes that were cut into segments."""
        self.arrived: dict[int, int] = {}
        self.arrived_all = 0
        self.timer_from = self.last_heard = 0.0
        self.timeouts = 0
        self.may_hold = unsent_bound(0.0)
        self.is_dead = self.is_armed = self.timed_out = False
        self.sent = self.again = 0

    @property
    def rtt(self) -> float:
        return 2 * self.link.delay + max(0.0, self.link.free_at - self.world.now)

    @property
    def unsent_in_kernel(self) -> int:
        return self.written - self.in_buffer - self.cut

    def begin_anew(self) -> None:
        """After an idle while."""
        self.threshold = max(self.threshold, 0.75 * self.window) if self.threshold < 1e9 else self.threshold
        self.window = min(self.window, INITIAL_SEGMENTS)
        self.epoch = -1.0

    @property
    def is_writable(self) -> bool:
        return self.in_buffer == 0

    def write(self, size: int) -> None:
        self.written += size
        self.in_buffer += size
        self._take()
        self._send()

    def _take(self) -> None:
        """The kernel takes what it has room for."""
        room = self.may_hold - self.unsent_in_kernel
        self.in_buffer -= max(0, min(self.in_buffer, room))

    def _send(self) -> None:
        before = self.in_buffer
        while self.flying < int(self.window):
            if self.lost:
                segment = self.lost.popleft()
                if segment.is_acked or not segment.is_lost:
                    continue
                segment.is_lost = False
                self.again += 1
            else:
                waiting = self.unsent_in_kernel
                if waiting <= 0 or (waiting < SEGMENT and self.in_buffer):
                    break
                self.cut += min(waiting, SEGMENT)
                segment = self.segments[self.next_number] = _Segment(self.next_number, self.cut)
                self.next_number += 1
            self._transmit(segment)
        if self.in_buffer and self.unsent_in_kernel * 2 < self.may_hold:
            self._take()
            if self.flying < int(self.window):
                self._send()
        if before and not self.in_buffer:
            self.world.at(self.world.now, self.on_room)

    def _transmit(self, segment: _Segment) -> None:
        self.orders += 1
        self.sent += 1
        segment.order = order = self.orders
        self.flying += 1
        if self.flying == 1:
            self.timer_from = self.world.now
        if not self.is_dead:
            self.link.send(lambda: self._arrive(segment, order))
        self._arm()

    @property
    def timeout(self) -> float:
        return (self.rtt + LEAST_TIMEOUT) * 2.0**self.timeouts

    def _arrive(self, segment: _Segment, order: int) -> None:
        """At the other side; what comes behind a gap waits there."""
        if segment.number >= self.arrived_all:
            self.arrived[segment.number] = segment.end
            end = 0
            while self.arrived_all in self.arrived:
                end = self.arrived.pop(self.arrived_all)
                self.arrived_all += 1
            if end:
                self.on_bytes(end)
        self.world.at(self.world.now + self.link.delay, lambda: self._hear(segment, order))

    def _hear(self, segment: _Segment, order: int) -> None:
        self.timer_from = self.last_heard = self.world.now
        self.timeouts = 0
        if not segment.is_acked:
            segment.is_acked = True
            if not segment.is_lost:
                self.flying -= 1
            segment.is_lost = False
        while self.first in self.segments and self.segments[self.first].is_acked:
            self.acked = self.segments.pop(self.first).end
            self.first += 1
        for number in range(self.first, min(segment.number, self.first + 200)):
            one = self.segments.get(number)
            if one is not None and not one.is_acked and not one.is_lost and one.order < order - 2:
                self._lose(one)
        is_free = segment.number > self.recovers_until or self.timed_out
        if is_free and self.flying + 1 >= self.window / 2:
            self._grow()
        self.timed_out = self.timed_out and self.first <= self.recovers_until
        self._send()

    def _lose(self, segment: _Segment) -> None:
        segment.is_lost = True
        self.flying -= 1
        self.lost.append(segment)
        if segment.number > self.recovers_until:
            self.recovers_until = self.next_number
            self.highest = self.window * (0.85 if self.window < self.highest else 1.0)
            self.window = self.threshold = max(2.0, 0.7 * self.window)
            self.epoch = -1.0

    def _grow(self) -> None:
        if self.window < self.threshold:
            self.window += 1
            return
        if self.epoch < 0:
            self.epoch, self.friendly = self.world.now, self.window
            self.highest = max(self.highest, self.window)
        since = self.world.now - self.epoch
        k = ((self.highest - self.window if since == 0 else self.highest * 0.3) / 0.4) ** (1 / 3)
        target = 0.4 * (since + self.rtt - k) ** 3 + self.highest
        self.friendly += 0.53 / self.window
        target = max(target, self.friendly)
        self.window += max(0.01, min(0.5, (target - self.window) / self.window))

    def _arm(self) -> None:
        if not self.is_armed:
            self.is_armed = True
            self.world.at(self.timer_from + self.timeout, self._look_at_timer)

    def _look_at_timer(self) -> None:
        self.is_armed = False
        if self.flying == 0:
            return
        if self.world.now < self.timer_from + self.timeout - 1e-9:
            self._arm()
        else:
            self._time_out()

    def _time_out(self) -> None:
        """Nothing was heard since: everything that flies counts as lost."""
        for segment in self.segments.values():
            if not segment.is_acked and not segment.is_lost:
                segment.is_lost = True
                self.lost.append(segment)
        self.lost = deque(sorted((one for one in self.lost if not one.is_acked), key=lambda one: one.number))
        self.flying = 0
        self.timed_out = True
        self.recovers_until = self.next_number
        self.highest = max(self.window, 2.0)
        self.threshold, self.window = max(2.0, 0.7 * self.window), 1.0
        self.epoch = -1.0
        self.timeouts += 1
        self.timer_from = self.world.now
        self._send()


@dataclass(eq=False)
class Incoming:
    """A stream at its receiver: takes payloads in order, and gives credit back."""

    window: FlowWindow
    on_taken: Callable[[int], None]
    taken: int = 0
    complete: set[int] = field(default_factory=set)


@dataclass(eq=False)
class OutgoingStream:
    id: int
    count: int
    credit: int
    ready: int
    """So many payloads may be sent, as far as their sender has them."""
    begun: int = 0
    now_sending: Outgoing | None = None


class Sender:
    """One peer's way out: streams, scheduler, connections."""

    def __init__(self, world: World, link: Link, lanes: int, scheduler: Callable[[], Scheduler]) -> None:
        self.world, self.link = world, link
        self.scheduler = scheduler()
        self.queues: list[deque[tuple[int, Outgoing, int]]] = [deque() for _ in range(lanes)]
        self.lanes = [
            Connection(world, link, lambda n, index=index: self._receive(index, n)) for index in range(lanes)
        ]
        for index, lane in enumerate(self.lanes):
            lane.on_room = lambda index=index: self.fill(index)
        self.streams: list[OutgoingStream] = []
        self.incoming: list[Incoming] = []
        self.missing: dict[Outgoing, set[int]] = {}
        self.last_piece = 0.0
        self.is_running = False
        self.starved = self.looks = 0

    def begin(self, streams: list[tuple[int, int]], on_taken: list[Callable[[int], None]]) -> None:
        """Payloads in each stream, and how many of them are there already; who is told of what was taken."""
        offset = len(self.streams)
        for index, ((count, ready), taken) in enumerate(zip(streams, on_taken, strict=True)):
            first = first_size(2 * self.link.delay, WINDOW, 64 << 20)
            window = FlowWindow(first, WINDOW, 64 << 20)
            self.streams.append(OutgoingStream(offset + index, count, first, ready))
            self.incoming.append(Incoming(window, taken))
        for lane in self.lanes:
            lane.begin_anew()
        for index, lane in enumerate(self.lanes):
            if index in self.scheduler.lanes:
                self.scheduler.resume(index, lane.written, lane.acked, self.world.now)
        self.is_running = True
        self.pump_streams()
        self.world.at(self.world.now + TICK, self.look)

    def look(self) -> None:
        if not self.is_running:
            return
        now = self.world.now
        for index, lane in enumerate(self.lanes):
            self.note(index, lane)
        self.looks += 1
        self.starved += self.scheduler.is_starved
        self.scheduler.look_for_late(now)
        for index in range(len(self.lanes)):
            self.fill(index)
        self.world.at(now + TICK, self.look)

    def note(self, index: int, lane: Connection) -> None:
        now = self.world.now
        flow = Flow(
            lane.rtt,
            int(lane.window) * SEGMENT,
            int(min(lane.threshold, 1e6)) * SEGMENT,
            lane.timeout,
            lane.timeouts,
        )
        self.scheduler.note_progress(
            index, lane.rtt, lane.written, lane.acked, now, flow, now - lane.last_heard
        )
        lane.may_hold = unsent_bound(self.scheduler.lanes[index].rate)

    def pump_streams(self) -> None:
        moved = True
        while moved:
            moved = False
            for stream in self.streams:
                if stream.now_sending is not None and not stream.now_sending.is_taken:
                    continue
                if stream.begun >= min(stream.count, stream.ready) or stream.credit < PART:
                    continue
                payload = Outgoing(
                    0, stream.id, stream.begun, 0, DATA, is_wanted=lambda: True, on_taken=self.pump_later
                )
                stream.begun += 1
                stream.credit -= PART
                stream.now_sending = payload
                self.missing[payload] = set(range(0, PART, payload.piece(0).size))
                self.scheduler.add(payload)
                moved = True
            if moved:
                for index in range(len(self.lanes)):
                    self.fill(index)

    def pump_later(self) -> None:
        self.world.at(self.world.now, self.pump_streams)

    def fill(self, index: int) -> None:
        lane = self.lanes[index]
        if index not in self.scheduler.lanes:
            self.note(index, lane)
        while lane.is_writable:
            found = self.scheduler.next_piece(index)
            if found is None:
                return
            payload, offset = found
            size = payload.piece(offset).size
            self.queues[index].append((lane.written + size, payload, offset))
            lane.write(size)
            self.scheduler.note_sent(index, payload, offset, lane.written, self.world.now)
            if payload.is_taken:
                payload.on_taken()

    # At the receiver.

    def _receive(self, index: int, count: int) -> None:
        queue = self.queues[index]
        while queue and queue[0][0] <= count:
            _, payload, offset = queue.popleft()
            missing = self.missing.get(payload)
            if missing is None or offset not in missing:
                continue
            missing.remove(offset)
            if not missing:
                del self.missing[payload]
                self._complete(payload)

    def _complete(self, payload: Outgoing) -> None:
        world, stream = self.world, self.incoming[payload.stream_id]
        self.last_piece = world.now
        world.at(
            world.now + self.link.delay,
            lambda: self.scheduler.receive_confirmation(0, payload.stream_id, payload.number),
        )
        stream.complete.add(payload.number)
        while stream.taken in stream.complete:
            stream.complete.remove(stream.taken)
            stream.taken += 1
            before = stream.window.size
            stream.window.receive(PART, world.now, 2 * self.link.delay)
            grant = PART + stream.window.size - before
            world.at(world.now + self.link.delay, lambda grant=grant: self._grant(payload.stream_id, grant))
            stream.on_taken(stream.taken)

    def _grant(self, stream: int, count: int) -> None:
        self.streams[stream].credit += count
        self.pump_streams()

    def make_ready(self, stream: int, count: int) -> None:
        self.streams[stream].ready = max(self.streams[stream].ready, count)
        self.pump_streams()


DATA = memoryview(bytes(PART))
WINDOW = 4 << 20


@dataclass(frozen=True)
class Outcome:
    seconds: float
    """From the first byte to the last piece."""
    again: float
    """Part of the bytes that was sent twice by the scheduler."""
    starved: float
    """Part of the time in which nothing waited to be sent."""


def average(
    seed: int,
    *,
    lanes: int = 32,
    megabytes: float = 32.0,
    rate: float = 200e6 / 8,
    delay: float = 0.05,
    loss: float = 0.001,
    rounds: int = 3,
    scheduler: Callable[[], Scheduler] = Scheduler,
    disturb: Callable[[World, list[Sender]], None] | None = None,
) -> list[Outcome]:
    """Rounds of two peers, one after the other."""
    world, rng = World(), random.Random(seed)
    peers = [Sender(world, Link(world, rng, rate, delay, loss), lanes, scheduler) for _ in range(2)]
    count = int(megabytes * 1e6 / 2 / PART)
    if disturb is not None:
        disturb(world, peers)
    outcomes = []
    for index in range(rounds):
        began, before = world.now, [(one.scheduler.resent, one.starved, one.looks) for one in peers]
        base = 2 * index
        done = [0, 0]

        def finish(which: int, taken: int, done: list[int] = done) -> None:
            done[which] = taken

        for which, peer in enumerate(peers):
            other = peers[1 - which]
            peer.begin(
                [(count, count), (count, 0)],
                [
                    # a part that came makes an average ready
                    lambda taken, other=other, base=base: other.make_ready(base + 1, taken),
                    lambda taken, which=which, finish=finish: finish(which, taken),
                ],
            )
        world.run(lambda done=done: min(done) >= count, limit=began + 300.0)  # type: ignore[misc]
        moved = sum(one.scheduler.resent - b[0] for one, b in zip(peers, before, strict=True))
        starved = sum(one.starved - b[1] for one, b in zip(peers, before, strict=True))
        looks = sum(one.looks - b[2] for one, b in zip(peers, before, strict=True))
        outcomes.append(
            Outcome(
                max(one.last_piece for one in peers) - began,
                moved / (4 * count * PART),
                starved / max(1, looks),
            )
        )
        for peer in peers:
            peer.is_running = False
        pause = world.now + 1.0
        world.at(pause, lambda: None)
        world.run(lambda pause=pause: world.now >= pause, limit=pause + 1)  # type: ignore[misc]
    return outcomes
