"""What every network must let hosts do: one suite that the real and the simulated network both pass.

Derive a test class from :class:`HostConformance` and give it a ``world`` fixture that returns a :class:`World`.
"""

from __future__ import annotations

from shoal.testing.conformance.calls import CallConformance
from shoal.testing.conformance.connections import ConnectionConformance
from shoal.testing.conformance.streams import StreamConformance
from shoal.testing.conformance.world import World

__all__ = ["HostConformance", "World"]


class HostConformance(CallConformance, StreamConformance, ConnectionConformance):
    """The whole suite; every test runs on a fresh world."""
