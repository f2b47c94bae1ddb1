"""Keeps a node's clock in agreement with its peers': asks them what time it is, when it joins and ever after.

What to make of the answers is decided in :mod:`shoal.dht.swarm_time`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Sequence

from shoal.dht.swarm_time import ClockChange, ClockSample, choose_change
from shoal.errors import ConnectionLost, DeadlineExceeded, PeerUnreachable, ProtocolViolation, RemoteError
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID
from shoal.p2p.rpc import Method
from shoal.utils import figures
from shoal.utils.structs import CompactStruct
from shoal.utils.timed import DHTClock

logger = logging.getLogger(__name__)

ASKED = 15
"""Peers asked at a time: with fewer than half of the DHT's clocks wrong, their median is seldom one of those."""
PERIOD = 60.0
HURRIED = 1.0
"""Seconds until peers are asked again when one has come whose clock differs, or while this node knows no time but its
own."""
PAUSE = 5.0
"""... but not sooner than this after the last time, whichever peer comes."""
ANSWER_WITHIN = 2.0
GRACE = 0.5
"""Seconds that others still have when more than half of those that were asked have answered: some may be dead, and the
median of most is as good."""
WARN_FROM = 3.0
"""Seconds of difference that people should know of."""
MAX_SUSPECTS = 256


class TimeRequest(CompactStruct, frozen=True):
    """What time is it?"""


class TimeResponse(CompactStruct, frozen=True):
    """The time of the peer that was asked, and whether it is that of a DHT."""

    now: float
    is_settled: bool


TIME = Method("dht.time", TimeRequest, TimeResponse)
_CALL_ERRORS = (ConnectionLost, DeadlineExceeded, PeerUnreachable, ProtocolViolation, RemoteError)


class TimeKeeper:
    """See the module. ``peers`` names those who may be asked."""

    def __init__(
        self, host: Host, clock: DHTClock, peers: Callable[[], Sequence[PeerID]], rng: random.Random
    ) -> None:
        self.is_settled = False
        """This node's clock shows the time of a DHT: it has begun one, or has asked others."""
        self._host = host
        self._clock = clock
        self._peers = peers
        self._rng = rng
        self._hurry = asyncio.Event()
        self._asked_at = -math.inf
        self._suspects: dict[PeerID, bool] = {}
        """Peers whose clocks were far off when they were last asked, and whether that was said."""
        host.serve(TIME, self._answer)
        self._unsubscribe = host.on_clock_difference(self._clock_differs)

    def stop(self) -> None:
        """Answer nobody any more."""
        self._unsubscribe()
        self._host.stop_serving(TIME)

    def be_first(self) -> None:
        """This node is the first of a DHT: others go by its clock."""
        self.is_settled = True

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._pause()
            self._hurry.clear()
            peers = list(self._peers())
            await self.ask(self._rng.sample(peers, min(ASKED, len(peers))))

    async def ask(self, peers: Sequence[PeerID]) -> None:
        """Compare clocks with these peers now, and move the own one if need be."""
        self._asked_at = asyncio.get_running_loop().time()
        samples = await self._measure_all(peers[:ASKED])
        if not samples:
            return
        change = choose_change(samples, is_settled=self.is_settled)
        if change.seconds:
            self._clock.move(change.seconds)
            logger.log(
                logging.WARNING if abs(change.seconds) >= WARN_FROM else logging.DEBUG, "%s", describe(change)
            )
        self.is_settled = True
        for sample in samples:
            self._note_difference(sample, sample.ahead - change.seconds)

    def _clock_differs(self, peer: PeerID, ahead: float) -> None:
        """As a peer's first message shows: one that joins, or one of another DHT, which becomes one with this."""
        logger.debug("the clock of %s is %.1f s ahead as it connects", peer, ahead)
        self._hurry.set()

    async def _measure_all(self, peers: Sequence[PeerID]) -> list[ClockSample]:
        asked = [asyncio.ensure_future(self._measure(peer)) for peer in peers]
        samples: list[ClockSample] = []
        try:
            async with asyncio.timeout(None) as patience:
                for answer in asyncio.as_completed(asked):
                    sample = await answer
                    if sample is None:
                        continue
                    samples.append(sample)
                    if patience.when() is None and 2 * len(samples) > len(asked):
                        patience.reschedule(asyncio.get_running_loop().time() + GRACE)
        except TimeoutError:
            pass  # of those that did not answer nothing is known
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return samples

    async def _measure(self, peer: PeerID) -> ClockSample | None:
        try:
            # A node that has to be dialed first would take longer on the way there than on the way back.
            await self._host.connect(peer, timeout=ANSWER_WITHIN)
            before, moves = self._clock.steady(), self._clock.moves
            answer = await self._host.call(peer, TIME, TimeRequest(), timeout=ANSWER_WITHIN)
        except _CALL_ERRORS as error:
            logger.debug("%s did not say what time it is: %s", peer, error)
            return None
        if self._clock.moves != moves or not abs(answer.now) < 1e12:  # true for NaN too
            return None
        half = (self._clock.steady() - before) / 2
        return ClockSample(peer, answer.now + half - self._clock(), half, answer.is_settled)

    async def _answer(self, peer: PeerID, request: TimeRequest) -> TimeResponse:
        return TimeResponse(self._clock(), self.is_settled)

    def _note_difference(self, sample: ClockSample, ahead: float) -> None:
        """Say once of a peer that it stays far off: the first time it may be about to move."""
        peer = sample.peer
        if not sample.is_settled or abs(ahead) < WARN_FROM + sample.error:
            self._suspects.pop(peer, None)
        elif peer not in self._suspects:
            if len(self._suspects) >= MAX_SUSPECTS:
                del self._suspects[next(iter(self._suspects))]
            self._suspects[peer] = False
            self._hurry.set()
        elif not self._suspects[peer]:
            self._suspects[peer] = True
            logger.warning(
                "the clock of %s is %.1f s %s the other peers': what it stores may expire too early or be refused, "
                "and it may find no group",
                peer,
                abs(ahead),
                "ahead of" if ahead > 0 else "behind",
            )

    async def _pause(self) -> None:
        if not self.is_settled:
            await asyncio.sleep(HURRIED)
            return
        try:
            async with asyncio.timeout(PERIOD * self._rng.uniform(0.75, 1.25)):
                await self._hurry.wait()
        except TimeoutError:
            return
        since = asyncio.get_running_loop().time() - self._asked_at
        await asyncio.sleep(max(HURRIED, PAUSE - since))


def describe(change: ClockChange) -> str:
    """A move of the own clock, in words for the user of this machine."""
    if change.counted_own and change.others == 1:
        return (
            f"the clocks of this peer and the only other one are {2 * abs(change.seconds):.1f} s apart: both go by the "
            "time in the middle now. Set the machines' clocks, e.g. by NTP"
        )
    side = "behind" if change.seconds > 0 else "ahead of"
    return (
        f"the clock of this machine is {abs(change.seconds):.1f} s {side} the other peers' "
        f"(the median of {figures.count(change.others, 'peer')}). Shoal goes by their time; set the "
        "machine's clock, e.g. by NTP"
    )
