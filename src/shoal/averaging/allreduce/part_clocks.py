"""Since when something is awaited of each of several, members or spans, and which have taken too long. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shoal.sansio.core import NEVER

K = TypeVar("K", bound=tuple[object, ...] | int)


@dataclass
class PartClocks(Generic[K]):
    """One clock for each key, running or not. ``timeout`` None: there is no limit, and nothing is kept.

    :param in_all: for which a key may be awaited in all; None: as often as it likes
    """

    timeout: float | None
    in_all: float | None = None
    _due: dict[K, float] = field(default_factory=dict)
    """When each clock that runs expires."""
    _since: dict[K, float] = field(default_factory=dict)
    """When it was started last."""
    _spent: dict[K, float] = field(default_factory=dict)
    """Seconds for which each key was awaited until it did something."""

    def start(self, key: K, now: float) -> None:
        """Something, or something further, is awaited of ``key`` from now on."""
        if self.timeout is None:
            return
        if self.in_all is not None:
            if key in self._since:
                self._spent[key] = self._spent.get(key, 0.0) + max(0.0, now - self._since[key])
            self._since[key] = now
        self._due[key] = now + self._allowed(key, self.timeout)

    def stop(self, key: K) -> None:
        """Nothing is awaited of ``key``."""
        self._due.pop(key, None)
        self._since.pop(key, None)

    def clear(self) -> None:
        self._due.clear()
        self._since.clear()

    def runs(self, key: K) -> bool:
        return key in self._due

    def shift(self, seconds: float) -> None:
        """Time that does not count."""
        for times in (self._due, self._since):
            for key in times:
                times[key] += seconds

    def expired(self, now: float) -> list[K]:
        """Those whose time is up, in their order."""
        return sorted(key for key, due in self._due.items() if due <= now)

    def is_spent(self, key: K) -> bool:
        """Whether ``key`` has less time left in all than it may take for one thing."""
        return self.timeout is not None and self._allowed(key, self.timeout) < self.timeout

    @property
    def deadline(self) -> float:
        """When the first clock that runs expires; NEVER if none does."""
        return min(self._due.values(), default=NEVER)

    def _allowed(self, key: K, timeout: float) -> float:
        """For how long ``key`` may be awaited this time."""
        return timeout if self.in_all is None else min(timeout, self.in_all - self._spent.get(key, 0.0))
