"""What the user process and the averager's service in the background process say to each other. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shoal.averaging.report import DoubtOutcome, StepReport

# From the user process to the service.


class AveragingStage(Enum):
    """How far a step has come."""

    IDLE = "idle"
    """Still queued behind an earlier step."""
    LOOKING_FOR_GROUP = "looking for group"
    AWAITING_TRIGGER = "awaiting trigger"
    """The group is complete; ``allow_allreduce()`` lets it begin."""
    RUNNING_ALLREDUCE = "running all-reduce"
    FINISHED = "finished"


@dataclass(frozen=True)
class AttachArena:
    """The shared memory of snapshot and average follows as a descriptor; ``nbytes`` is its size.

    ``holds_values``: the user's tensors are the first area, which is never to be written here.
    """

    nbytes: int
    holds_values: bool = False


@dataclass(frozen=True)
class RunStep:
    """Run one step of averaging; answered by a :class:`StepOutcome` after the averages have been written.

    Times are steady ones (:func:`~shoal.utils.timed.steady_time`, the same in both processes), so that no clock
    that is set changes how long a step takes. ``deadline`` ends the search for a group (None: never).
    """

    step: int
    weight: float
    gather: bytes
    scheduled_time: float
    deadline: float | None
    allow_retries: bool
    needs_trigger: bool


@dataclass(frozen=True)
class AllowAllreduce:
    """All-reduce of this step may begin as soon as its group is complete."""

    step: int


@dataclass(frozen=True)
class AwaitEnd:
    """Answered when this step has ended here: nothing reads its arena any more."""

    step: int


@dataclass(frozen=True)
class Reschedule:
    """All-reduce of this step is expected to begin at another time, a steady one."""

    step: int
    scheduled_time: float


@dataclass(frozen=True)
class AverageWritten:
    """The average that waited for the user's call is written, or dropped: the arena is free for the next step."""


@dataclass(frozen=True)
class GetGroupBits:
    """Answered by the current group bits."""


@dataclass(frozen=True)
class SetGroupBits:
    """Look for groups under these bits from now on; empty: choose them automatically."""

    bits: str


@dataclass(frozen=True)
class StepOutcome:
    """How a step ended. ``gathered``: PeerID bytes and data of every member, the leader first; empty on
    failure.
    """

    report: StepReport
    found_group: bool
    gathered: tuple[tuple[bytes, bytes], ...] = ()


# From the service to the user process.


@dataclass(frozen=True)
class ReachStage:
    """The step has come so far."""

    step: int
    stage: AveragingStage


@dataclass(frozen=True)
class BoundByWord:
    """This peer has given its word to commit the step's round, or the round is decided: until the step reaches another
    stage it can't be cancelled any more.
    """

    step: int


@dataclass(frozen=True)
class DoubtSettled:
    """What was learned of a step that has ended in doubt: COMMITTED, FAILED or UNKNOWN. The user process knows whether
    the step was, since it may have given it up itself.
    """

    step: int
    outcome: DoubtOutcome
    reason: str = ""


@dataclass(frozen=True)
class TakeSnapshot:
    """All-reduce begins: copy the user's tensors to the arena (unless auxiliary); answered by the step's weight.

    Raises :class:`AllreduceException` if the lock is not free in time; anything else means that the tensors
    cannot be averaged as they are, in whatever group.
    """

    step: int


@dataclass(frozen=True)
class ApplyAverage:
    """The round has committed: write the average to the user's tensors.

    Answered by True: it was written; or by False: it waits in the arena for the user's call, and
    :class:`AverageWritten` follows. The step is finished all the same.

    Raises :class:`AllreduceException` if the step has been cancelled before the user process knew that it was bound.
    """

    step: int
