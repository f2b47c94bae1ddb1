"""What becomes of a member, as :mod:`.decision` says, and what that has to know of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from shoal.averaging.allreduce.effects import Effect
from shoal.averaging.allreduce.events import Phase
from shoal.averaging.allreduce.ledger import Ledger
from shoal.averaging.allreduce.messages import Outcome


@dataclass(frozen=True)
class Concluded:
    """The decision is known."""

    outcome: Outcome


@dataclass(frozen=True)
class GivenUp:
    """There will be no decision with this member."""

    reason: str


@dataclass(frozen=True)
class Doubted:
    """This member was ready, and cannot learn the decision."""

    reason: str


Verdict: TypeAlias = Concluded | GivenUp | Doubted
Step: TypeAlias = Effect | Verdict


class Member(Protocol):
    """What is known of the member itself."""

    @property
    def phase(self) -> Phase: ...
    @property
    def outcome(self) -> Outcome | None: ...
    @property
    def failure(self) -> str | None: ...
    @property
    def ledger(self) -> Ledger: ...
