"""Since when something is awaited of each of several, members or spans, and which have taken too long. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shoal.sansio.core import NEVER

K = TypeVar("K", bound=tuple[object, ...] | int)


@dataclass
class PartClocks(Generic[K]):
    """One clock for each key, running or not. ``timeout`` None: there is no limit, and nothing is kept."""

    timeout: float | None
    _since: dict[K, float] = field(default_factory=dict)

    def start(self, key: K, now: float) -> None:
        """Something is awaited of ``key`` from now on."""
        if self.timeout is not None:
            self._since[key] = now

    def stop(self, key: K) -> None:
        """Nothing is awaited of ``key``."""
        self._since.pop(key, None)

    def clear(self) -> None:
        self._since.clear()

    def runs(self, key: K) -> bool:
        return key in self._since

    def shift(self, seconds: float) -> None:
        """Time that does not count."""
        for key in self._since:
            self._since[key] += seconds

    def expired(self, now: float) -> list[K]:
        """Those whose time is up, in their order."""
        if self.timeout is None:
            return []
        return sorted(key for key, since in self._since.items() if since + self.timeout <= now)

    @property
    def deadline(self) -> float:
        """When the first clock that runs expires; NEVER if none does."""
        if self.timeout is None or not self._since:
            return NEVER
        return min(self._since.values()) + self.timeout
