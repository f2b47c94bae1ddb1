"""Since when something is awaited of each of several members, and who has taken too long. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.sansio.core import NEVER


@dataclass
class PartClocks:
    """One clock for each member, running or not. ``timeout`` None: there is no limit, and nothing is kept."""

    timeout: float | None
    _since: dict[int, float] = field(default_factory=dict)

    def start(self, member: int, now: float) -> None:
        """Something is awaited of ``member`` from now on."""
        if self.timeout is not None:
            self._since[member] = now

    def stop(self, member: int) -> None:
        """Nothing is awaited of ``member``."""
        self._since.pop(member, None)

    def clear(self) -> None:
        self._since.clear()

    def runs(self, member: int) -> bool:
        return member in self._since

    def shift(self, seconds: float) -> None:
        """Time that does not count."""
        for member in self._since:
            self._since[member] += seconds

    def expired(self, now: float) -> list[int]:
        """Members whose time is up, in their order."""
        if self.timeout is None:
            return []
        return sorted(member for member, since in self._since.items() if since + self.timeout <= now)

    @property
    def deadline(self) -> float:
        """When the first clock that runs expires; NEVER if none does."""
        if self.timeout is None or not self._since:
            return NEVER
        return min(self._since.values()) + self.timeout
