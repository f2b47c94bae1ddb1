"""Calls of a tracker to the DHT's background process, for ``dht.run_coroutine``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shoal.optim.progress.forecast import Forecast, Periods
from shoal.optim.progress.values import ProgressRecord
from shoal.utils.timed import steady_time

if TYPE_CHECKING:  # the trainer's process needs nothing of the node
    from shoal.dht.node import DHTNode


@dataclass(frozen=True)
class Exchange:
    """Tell of the own progress, or look at that of others, or both; for ``dht.run_coroutine``."""

    prefix: str
    tracker: str
    """Tells trackers of one prefix apart."""
    own: ProgressRecord
    created: float
    """Steady time, which all processes of a machine share, of the report in ``own``."""
    target: int
    lifetime: float
    periods: Periods
    tell: bool
    look: bool

    async def __call__(self, _: object, node: DHTNode) -> Forecast | None:
        """:raises ShoalError: the DHT could not be asked"""
        from shoal.optim.progress.records import ProgressRecords, records_of

        trackers = records_of(node)
        place = (self.prefix, self.tracker)
        if place not in trackers:
            trackers[place] = ProgressRecords(node, self.prefix, lifetime=self.lifetime)
            node.before_shutdown.append(trackers[place].close)  # Ctrl+C ends the DHT before its trackers
        records = trackers[place]
        own = replace(self.own, age=max(0.0, steady_time() - self.created))
        if self.tell:
            records.tell(own)
        return await records.look(own, target=self.target, periods=self.periods) if self.look else None


@dataclass(frozen=True)
class Withdraw:
    """End what :class:`Exchange` began."""

    prefix: str
    tracker: str

    async def __call__(self, _: object, node: DHTNode) -> None:
        from shoal.optim.progress.records import records_of

        records = records_of(node).pop((self.prefix, self.tracker), None)
        if records is not None:
            node.before_shutdown.remove(records.close)
            await records.close()
