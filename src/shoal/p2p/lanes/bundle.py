"""The lanes to one process of a peer, as one way out for payloads: the shell around the scheduler.

A bulk stream lives on one connection, its *home*. On a short path its payloads go out there. Else they are striped over
lanes that carry nothing but pieces, so that the home stays free for what says where they belong, for credit, and for
messages. While bulk streams are open, the path is measured, the number of lanes is chosen, and missing ones are opened.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Sequence

from shoal.p2p.lanes.count import SHORT_RTT, Path, choose, first_choice
from shoal.p2p.lanes.forecast import Flow
from shoal.p2p.lanes.lane import BulkLane, LaneReport
from shoal.p2p.lanes.memory import Ends, PathMemory
from shoal.p2p.lanes.meter import Interval, Meter
from shoal.p2p.lanes.scheduler import Outgoing, Scheduler
from shoal.p2p.lanes.upload_rate import UploadRate
from shoal.p2p.protocol.frames import CHUNK_BYTES
from shoal.p2p.protocol.stream_state import StreamState
from shoal.p2p.tcp_info import TcpInfo
from shoal.p2p.turns import SendingTurns

TICK = 0.05
"""Seconds between two looks at the lanes while data is under way."""
SHORT_PATH_TICK = 0.25
"""The same over a short path, where one lane is enough: many peers in one room would cost much otherwise."""
QUIET_TICK = 0.5
"""Seconds between two looks while streams are open, and nothing has moved for as long."""
CHOICE_SECONDS = 0.25
"""The number of lanes is chosen anew after this time at the earliest,"""
CHOICE_ROUND_TRIPS = 4
"""and after so many round trips."""
SETTLED_SECONDS = 2.0
"""So long after there came to be more lanes it is looked whether they carry more."""
PEAK_DECAY = 0.98
"""What is left of a highest rate when the number of lanes is next chosen."""
WITH_SPARES = 2
"""A long path has so many lanes open at least. Those that are too many for the path carry only what is late."""
MOSTLY = 0.6
"""A path is full if in this part of the looks data waited."""


class Bundle:
    """See the module.

    :param memory_of: what was learnt of the path between two addresses
    :param homes: the connections on which bulk streams live
    :param lanes: the lanes for pieces that are open, in the order in which they are used
    :param open_more: begins to open so many lanes
    :param limit: the most that there may be now
    :param turns: to send payloads, of all connections of the host
    :param uplink: what all paths of the host take together
    :param fixed: how many there are, if that is not to be chosen
    """

    def __init__(
        self,
        *,
        memory_of: Callable[[Ends], PathMemory],
        homes: Callable[[], Sequence[BulkLane]],
        lanes: Callable[[], Sequence[BulkLane]],
        open_more: Callable[[int], None],
        limit: Callable[[], int],
        turns: SendingTurns,
        uplink: UploadRate,
        fixed: int | None,
    ) -> None:
        self._memory_of = memory_of
        self._ends: Ends | None = None
        """Between which addresses the path is of which something was learnt."""
        self._memory = PathMemory()
        self._homes = homes
        self._lanes = lanes
        self._open_more = open_more
        self._limit = limit
        self._turns = turns
        self._uplink = uplink
        self._key = object()
        """What the uplink knows this by: it remembers it for longer than this may live."""
        self._waits_for_turn = self._has_turn = False
        self._fixed = fixed
        self._loop = asyncio.get_running_loop()
        self._scheduler = Scheduler()
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = 0.0
        self._written = 0
        """What the carriers had written at the last look."""
        self._moved_at = 0.0
        """When data was last under way."""
        self._meter = Meter()
        self._highest_rtt = 0.0
        """Of the lanes' medians, between the last choice of their number and the one before."""
        self._infos: dict[BulkLane, TcpInfo] = {}
        """Of the lanes that carry data, as of the last look."""
        self._rate = 0.0
        self._resent = 0
        """What had been sent again when streams were opened after a pause."""
        self._is_pumping = False
        self._carrying: dict[BulkLane, bool] = {}
        """The lanes that carry pieces, as of the last look, and whether each is a spare one."""
        self._is_stuck = False
        """Whether those that are not spare waited for time-outs."""
        self.wanted = fixed or 1
        """How many lanes are to carry data."""

    @property
    def is_busy(self) -> bool:
        """Whether bulk streams are open."""
        return self._timer is not None

    def report(self) -> LaneReport:
        """What it has come to."""
        choice, lanes = self._memory.choice, self._carriers()
        rtt = self._memory.min_rtt
        if self.is_busy:
            self._read(lanes)
            self._count_others(lanes)
        return LaneReport(
            lanes=len(self._active()) or 1,
            reason="it was set" if self._fixed else ("" if choice is None else choice.reason),
            congestion_control=lanes[0].congestion_control if lanes else "",
            rtt=None if rtt == float("inf") else rtt,
            rate=self._rate,
            segments_sent=self._meter.total.sent,
            retransmitted=self._meter.total.retransmitted,
            resent=self._scheduler.resent - self._resent,
        )

    # From the connections.

    def prepare(self) -> None:
        """Bulk data is about to be sent: open what lanes are missing, and watch the path."""
        self._remember()
        home = next(iter(self._homes()), None)
        # The kernel's own figures: what this process measures is long where it is busy.
        info = None if home is None else home.measure()
        if self._memory.choice is None and home is not None:
            self._memory.choice = first_choice(info and (info.min_rtt or info.rtt), self._limit())
        if info is not None and self._memory.min_rtt == math.inf:
            self._memory.note_rtt(info.min_rtt or info.rtt, self._loop.time())
        self._want()
        self._open_missing()
        if self._timer is None and (info is not None or self._fixed):
            self._begin_count()
            self._skip_pause()
            self._look_after(TICK)

    def lane_ended(self, lane: BulkLane) -> None:
        """A lane is gone: what it carried goes out on others."""
        if self.is_busy and (info := lane.measure()) is not None:
            self._meter.count(lane, info)
        self._infos.pop(lane, None)
        self._meter.forget(lane)
        self._carrying.pop(lane, None)
        self._scheduler.remove_lane(lane)
        self.pump()

    def receive_confirmation(self, home: int, stream_id: int, number: int) -> None:
        """The peer has all of a striped payload."""
        self._scheduler.receive_confirmation(home, stream_id, number)

    def stripe(self, home: int, state: StreamState, tag: int, data: memoryview) -> Outgoing | None:
        """Begin to send a payload over all lanes; None if it is to go out on its stream's connection, ``home``."""
        if len(data) <= CHUNK_BYTES or not state.may_stripe:
            return None
        if self._timer is None:
            self.prepare()  # the peer has opened the stream
        if not self._active():
            return None
        number = state.begin_striped(tag, len(data))
        payload = Outgoing(
            home,
            state.id,
            number,
            tag,
            data,
            is_wanted=lambda: state.failure is None,
            on_taken=lambda: state.on_change(),
        )
        self._scheduler.add(payload)
        self.pump()
        if self._timer is not None and self._looks_at > self._loop.time() + TICK:
            self._look_after(TICK)
        return payload

    def pump(self) -> None:
        """Give each lane that has room what it can take."""
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            now = self._loop.time()
            self._carrying = {}
            if not self._scheduler.is_idle:
                carriers, spares = self._carriers(), self._spares()
                self._carrying = dict.fromkeys(carriers, False) | dict.fromkeys(spares, True)
                self._is_stuck = bool(spares) and self._scheduler.is_stuck(carriers)
            for lane in list(self._carrying):
                self._fill(lane, now)
        finally:
            self._is_pumping = False

    # Inside.

    def _want(self) -> None:
        """Find out how many lanes are to carry data: other paths may have begun to take their share of the limit."""
        choice = self._memory.choice
        chosen = self._fixed or (1 if choice is None else choice.count)
        self.wanted = max(1, min(chosen, self._limit())) if chosen > 1 else 1

    def _active(self) -> list[BulkLane]:
        """The lanes over which a payload is striped that begins now: none, or several. One if the path is long, and
        more were too many: its window is open, and that of the home is not.
        """
        lanes = [lane for lane in self._lanes() if lane.is_open][: self.wanted]
        return lanes if len(lanes) > 1 or self._is_long else []

    @property
    def _is_long(self) -> bool:
        """Whether the path is known, and not short."""
        return SHORT_RTT <= self._memory.min_rtt < float("inf")

    def _carriers(self) -> list[BulkLane]:
        """What carries payloads now. Those that were begun are ended on any lane that is left, or on their home."""
        lanes = self._active()
        if not lanes and not self._scheduler.is_idle:
            lanes = [lane for lane in self._lanes() if lane.is_open]
        return lanes or [home for home in self._homes() if home.is_open]

    def _spares(self) -> list[BulkLane]:
        """Lanes for what others hold up, and nothing else: a single one that has lost much would hold up the last bytes
        of all, and all of a small payload.
        """
        active = self._active()
        spare = [lane for lane in self._lanes() if lane.is_open and lane not in active]
        return spare[: max(0, WITH_SPARES - len(active))] if active else []

    def _fill(self, lane: BulkLane, now: float) -> None:
        writer, scheduler = lane.writer, self._scheduler
        if lane not in scheduler.lanes:
            writer.stripe(lambda: self._refill(lane))
            self._note_progress(lane, now)
        while writer.is_writable and not self._must_wait():
            if self._carrying.get(lane) and not (scheduler.is_starved or self._is_stuck):
                return
            found = scheduler.next_piece(lane)
            if found is None:
                return
            payload, offset = found
            piece = payload.piece(offset)
            writer.send_piece(piece, payload.data[offset : offset + piece.size])
            lane.last_piece = now
            self._has_turn = False
            self._turns.spend(piece.size)
            scheduler.note_sent(lane, payload, offset, writer.written, now)
            if payload.is_taken:
                payload.on_taken()

    def _must_wait(self) -> bool:
        """Whether the host has sent as much as it may for now, or others are first; then this has a turn later."""
        if self._has_turn or not self._turns.is_limited or self._turns.is_free:
            return False
        if not self._waits_for_turn:
            self._waits_for_turn = True
            self._turns.ask(self._take_turn)
        return True

    def _take_turn(self) -> None:
        """Send one piece, if there is one and a lane that takes it."""
        self._waits_for_turn, self._has_turn = False, True
        if not self._scheduler.is_idle:
            self.pump()
        self._has_turn = False

    def _refill(self, lane: BulkLane) -> None:
        """The lane has room again."""
        if not self._is_pumping and lane in self._carrying:
            self._fill(lane, self._loop.time())

    def _note_progress(self, lane: BulkLane, now: float) -> None:
        writer, info = lane.writer, self._infos.get(lane)
        flow, silence = None, 0.0
        if info is not None and info.window:
            flow = Flow(info.rtt, info.window, info.threshold, info.timeout, info.timeouts)
            silence = info.silence
        rtt, acknowledged = lane.rtt if info is None else info.rtt, writer.written - writer.unsent
        self._scheduler.note_progress(lane, rtt or 0.0, writer.written, acknowledged, now, flow, silence)
        writer.fit_to(self._scheduler.lanes[lane].rate)

    def _remember(self) -> None:
        """Go on from what was learnt of this path. While one home is where it was, it is the same path."""
        homes = [(home.local_ip, home.remote_ip) for home in self._homes()]
        if homes and self._ends not in homes:
            self._ends = homes[0]
            self._memory = self._memory_of(self._ends)

    def _look(self) -> None:
        now = self._loop.time()
        self._scheduler.forget_done()
        is_used = any(not home.is_idle for home in self._homes()) or not self._scheduler.is_idle
        self._timer = None
        carriers = self._carriers()
        if not is_used:
            self._read(carriers)
            self._count_others(carriers)
            return
        unsent = {lane: lane.writer.unsent for lane in carriers}
        written = sum(lane.writer.written for lane in carriers)
        if written != self._written or any(unsent.values()):
            self._written, self._moved_at = written, now
        is_quiet = self._scheduler.is_idle and now - self._moved_at >= QUIET_TICK
        is_short = self._memory.min_rtt < SHORT_RTT and self._fixed is None
        self._look_after(QUIET_TICK if is_quiet else SHORT_PATH_TICK if is_short else TICK)
        self._want()
        if is_quiet:
            self._read(carriers)
            # The number of lanes is chosen by what happens while data moves.
            self._meter.interval, self._highest_rtt = None, 0.0
            self._skip_pause()
            return
        self._measure(carriers, is_waiting=not self._scheduler.is_starved or any(unsent.values()), now=now)
        for lane in dict.fromkeys([*self._lanes(), *carriers]):
            if lane not in carriers:
                self._infos.pop(lane, None)  # it is read no more
            if lane in self._scheduler.lanes:
                self._note_progress(lane, now)
        self._end_dead(now)
        self._scheduler.look_for_late(now)
        self._open_missing()
        self.pump()

    def _end_dead(self, now: float) -> None:
        """End the lanes of which all packets vanish, though the peer's machine is heard of elsewhere."""
        heard = max((home.heard_at for home in self._homes() if home.is_open), default=-math.inf)
        dead = self._scheduler.dead_lanes(now, heard)
        for lane in self._lanes():
            if lane in dead:  # a home is never ended here: streams live on it
                lane.abort("its packets vanish, and those of other connections do not")

    def _begin_count(self) -> None:
        self._infos.clear()
        self._resent, self._highest_rtt = self._scheduler.resent, 0.0
        lanes = dict.fromkeys([*self._lanes(), *self._homes()])
        self._meter.begin({lane: info for lane in lanes if (info := lane.measure()) is not None})

    def _skip_pause(self) -> None:
        """What lanes did until now says nothing of their rates: nothing moved."""
        now = self._loop.time()
        for lane in self._lanes():
            if lane in self._scheduler.lanes:
                writer = lane.writer
                self._scheduler.resume(lane, writer.written, writer.written - writer.unsent, now)

    def _look_after(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks_at = self._loop.time() + seconds
        self._timer = self._loop.call_at(self._looks_at, self._look)

    def _open_missing(self) -> None:
        wanted = self.wanted
        if wanted == 1 and self._is_long and self._fixed is None:
            wanted = min(WITH_SPARES, self._limit())
        missing = wanted - len(self._lanes())
        if missing > 0 and wanted > 1:
            self._open_more(missing)

    def _measure(self, lanes: list[BulkLane], *, is_waiting: bool, now: float) -> None:
        """Read the kernel's counts, and choose the number of lanes if it is time.

        :param is_waiting: whether there is more to send than the kernel took
        """
        if self._meter.interval is None:
            self._meter.interval = Interval(now)
        interval, memory = self._meter.interval, self._memory
        moving = self._read(lanes)
        if moving:
            memory.note_rtt(min(info.min_rtt or info.rtt for info in moving), now)
            interval.highest_rtt = max(interval.highest_rtt, statistics.median(info.rtt for info in moving))
        interval.looks += 1
        interval.busy_looks += is_waiting
        rtts = [
            info.rtt
            for lane in lanes
            if (info := self._infos.get(lane)) and info.segments_sent and info.min_rtt
        ]
        seconds, delivered = now - interval.began_at, interval.counts.delivered
        if not rtts or seconds < max(CHOICE_SECONDS, CHOICE_ROUND_TRIPS * memory.min_rtt) or not delivered:
            return
        self._rate = delivered / seconds
        self._meter.interval = Interval(now)
        memory.seconds += seconds
        memory.tried_for += seconds
        self._choose(lanes, statistics.median(rtts), interval)
        self._highest_rtt = interval.highest_rtt

    def _read(self, lanes: list[BulkLane]) -> list[TcpInfo]:
        """Read the kernel's counts of these lanes; those of the lanes that move."""
        read = {lane: info for lane in lanes if (info := lane.measure()) is not None}
        self._infos |= read
        return self._meter.read(read)  # the round-trip time of a lane that stands still is an old one

    def _count_others(self, lanes: list[BulkLane]) -> None:
        """Count what others than these have sent: the home, and lanes that carry only what is late, or no more."""
        for lane in dict.fromkeys([*self._lanes(), *self._homes()]):
            if lane not in lanes and (info := lane.measure()) is not None:
                self._meter.count(lane, info)

    def _choose(self, lanes: list[BulkLane], rtt: float, interval: Interval) -> None:
        memory = self._memory
        count = len(lanes) if self._active() else 1
        is_growing = count < self.wanted
        is_full = interval.busy_looks >= MOSTLY * interval.looks
        peak = max(self._rate, memory.peaks.get(count, 0.0) * PEAK_DECAY)
        if not is_growing:
            memory.peaks[count] = peak
            if memory.min_rtt >= SHORT_RTT:
                self._uplink.note(self._key, self._rate, self._loop.time(), is_full=is_full)
        path = Path(
            min_rtt=memory.min_rtt,
            rtt=rtt,
            highest_rtt=max(interval.highest_rtt, self._highest_rtt),
            sent=interval.counts.sent,
            retransmitted=interval.counts.retransmitted,
            rate=peak,
            is_full=is_full,
            congestion_control=lanes[0].congestion_control,
        )
        before = None
        if memory.fewer is not None and memory.seconds >= SETTLED_SECONDS:
            before = memory.fewer, memory.peaks.get(memory.fewer, 0.0)
        memory.note_rate(count, self._rate)
        choice = choose(count, path, self._limit(), before, memory.enough_for(self._rate), memory.best)
        if is_growing and choice.count >= count:
            return  # some are still being opened, or cannot be
        if choice.is_tried:
            memory.enough, memory.tried_for, memory.tried_rate = choice.count, 0.0, peak
        if choice.count > count:
            memory.fewer = count
        if choice.count != count:
            memory.seconds = 0.0
        memory.choice = choice
        self._want()
