"""The messages of one round, between the members of its group. Tensor bytes travel as payloads, not in here."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from shoal.averaging.allreduce import Phase
from shoal.p2p.rpc import Method

MAX_REASON_CHARS = 1000


class Contribute(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A member opens the exchange with an owner: its parts of the owner's span will follow as payloads.

    A payload's tag is the number of its part in the owner's span, in both directions.
    """

    prefix: str
    group_id: bytes


class ReadyForParts(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The owner has memory for the parts; averages will follow as payloads."""


class JoinRound(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A member tells the leader that it takes part; its report will follow."""

    prefix: str
    group_id: bytes


class MemberReport(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The member is ready to commit (``reason`` None), or why it gives up."""

    reason: str | None


class Outcome(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The leader's decision: committed (``reason`` None), or why the round failed."""

    reason: str | None


class AskOutcome(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """An orphan asks in which phase another member is."""

    prefix: str
    group_id: bytes


class OutcomeAnswer(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The phase of the member that was asked, by name; None: it does not know the round."""

    phase: str | None
    reason: str


LeaderBound: TypeAlias = JoinRound | MemberReport

EXCHANGE: Method[Contribute, ReadyForParts] = Method("averaging.exchange", Contribute, ReadyForParts)
COMMIT: Method[LeaderBound, Outcome] = Method("averaging.commit", LeaderBound, Outcome)  # type: ignore[arg-type]  # a union is no type
OUTCOME: Method[AskOutcome, OutcomeAnswer] = Method("averaging.outcome", AskOutcome, OutcomeAnswer)


def phase_of(answer: OutcomeAnswer) -> Phase | None:
    """The phase that an answer names; one that this version does not know counts as no answer."""
    return Phase.__members__.get(answer.phase) if answer.phase is not None else None
