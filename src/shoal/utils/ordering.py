"""Times that have to be in some order: tables of rules, and what is said when a program gives them otherwise. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """``shorter`` has to be smaller than ``longer``; ``otherwise``: what happens if it is not, for people."""

    shorter: str
    longer: str
    otherwise: str


def contradictions(given: Mapping[str, float | None], orders: Iterable[Order]) -> list[str]:
    """What to tell a user about each rule that the times given break. Only pairs of given times (not None) count:
    defaults are chosen so that they fit.
    """
    found = []
    for order in orders:
        shorter, longer = given.get(order.shorter), given.get(order.longer)
        if shorter is not None and longer is not None and shorter >= longer:
            names = f"{order.shorter}={shorter:g} should be smaller than {order.longer}={longer:g}"
            found.append(f"{names}: otherwise {order.otherwise}")
    return found


class DefaultSeconds(float):
    """The usual value of a time that was not given. It may turn out smaller or larger, to fit what was given."""
