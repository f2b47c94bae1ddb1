"""The part of a process in its peer: :class:`OneRank` of one, or :class:`Speaker` and :class:`Listener` among several.

All ranks call the same methods at the same steps. Rank 0, the speaker, does the work that needs the swarm. The others,
the listeners, wait for its result, and take over what it has changed. Methods are documented in :class:`Ranks`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch

from shoal.errors import InvalidStateError, InvalidValueError, RankError
from shoal.optim.ranks.group import GlooGroup, RankGroup, find_members
from shoal.optim.ranks.messages import (
    Arrival,
    Batch,
    Done,
    Failure,
    Hold,
    Outcome,
    check_facts,
    contents,
    prints,
    reason_of,
    together,
)
from shoal.optim.ranks.parts import RankState
from shoal.optim.ranks.state import SpokenState
from shoal.optim.report import number_of
from shoal.utils.checks import check_number

if TYPE_CHECKING:
    from shoal.optim.state.averager import TrainingStateAverager

Result = TypeVar("Result")

RANK_GRACE = 300.0
"""Seconds that a rank may be behind the others for reasons of its own, such as an evaluation at rank 0."""
ROUNDS_IN_A_STEP = 4
"""Rounds that rank 0 may wait for in one step: two that were delayed, and one each of gradients and of parameters."""


class Ranks(Protocol):
    """What an optimizer calls at each rank of its peer."""

    rank: int
    size: int

    @property
    def parted(self) -> bool:
        """Whether the ranks can't reach each other any more."""

    def make(self, own: Callable[[], dict[str, Any]]) -> None:
        """Make the part of this rank; an error at one rank is one at all.

        :param own: returns what must be the same at all ranks, by the parameter that decides it; it calls
          :meth:`share`
        """

    def share(self, state: TrainingStateAverager | RankState, local_updates: bool) -> None:
        """Say what this rank holds. With ``local_updates`` all ranks take the steps of the inner optimizer."""

    def lead(self, call: str, work: Callable[[], Result]) -> Result:
        """Let rank 0 do some work. All ranks are as rank 0 then, and get its result, or its error."""

    def step(
        self, samples: int, loss: Any, parameters: Sequence[torch.Tensor], work: Callable[[Batch], Outcome]
    ) -> Outcome:
        """As :meth:`lead`, for the batches of all ranks, which are one."""

    def hold(self) -> None:
        """Called in such work: it will take as long once more."""

    def check_timeout(self, timeout: float, limit: float) -> None:
        """Whether others wait for ``timeout`` seconds; ``limit`` is what they were told at first.

        :raises InvalidValueError: they don't
        """

    def mark(self) -> dict[str, int]:
        """What a saved state says of this rank, if it is not all of the peer's."""

    def part_of(self, saved: dict[Any, Any]) -> dict[Any, Any]:
        """What this rank loads of the "state" of a saved state.

        :raises InvalidValueError: it was saved at another rank than 0, and lacks what this one needs
        """

    def leave(self) -> None:
        """End. Ranks that wait for this one fail."""


def join(process_group: Any, averaging_timeout: Any, load_state_timeout: Any) -> Ranks:
    """The part of this process.

    :param process_group: the ranks that are one peer; None: all of a job
    """
    members, size = find_members(process_group)
    if size == 1:
        return OneRank()
    rounds = ROUNDS_IN_A_STEP * check_number("averaging_timeout", averaging_timeout, above=0)
    loading = check_number("load_state_timeout", load_state_timeout, above=0)
    group = GlooGroup(members, rounds + loading + RANK_GRACE)
    return Speaker(group) if group.rank == 0 else Listener(group)


class OneRank:
    """A peer of one process: there is nobody to tell."""

    rank, size, parted = 0, 1, False

    def make(self, own: Callable[[], dict[str, Any]]) -> None:
        own()

    def share(self, state: TrainingStateAverager | RankState, local_updates: bool) -> None:
        pass

    def lead(self, call: str, work: Callable[[], Result]) -> Result:
        return work()

    def step(
        self, samples: int, loss: Any, parameters: Sequence[torch.Tensor], work: Callable[[Batch], Outcome]
    ) -> Outcome:
        return work(Batch(samples, number_of(loss)))

    def hold(self) -> None:
        pass

    def check_timeout(self, timeout: float, limit: float) -> None:
        pass

    def mark(self) -> dict[str, int]:
        return {}

    def part_of(self, saved: dict[Any, Any]) -> dict[Any, Any]:
        return _complete(saved)

    def leave(self) -> None:
        pass


class _SeveralRanks(ABC):
    """What speaker and listeners do alike."""

    def __init__(self, group: RankGroup) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group

    @property
    def parted(self) -> bool:
        return self._group.ended

    def make(self, own: Callable[[], dict[str, Any]]) -> None:
        call = "the constructor of shoal.Optimizer"
        try:
            try:
                facts = own()
            except Exception as e:
                with contextlib.suppress(RankError):  # this error is what the user has to know
                    self._group.gather(Failure(call, reason_of(e)))
                raise
            check_facts(self._meet(call, facts))
            self._rank_zero(call, lambda: None)
        except BaseException:
            self.leave()
            raise

    def lead(self, call: str, work: Callable[[], Result]) -> Result:
        self._meet(call, None)
        return self._rank_zero(call, work)

    def step(
        self, samples: int, loss: Any, parameters: Sequence[torch.Tensor], work: Callable[[Batch], Outcome]
    ) -> Outcome:
        batch = together(self._meet("step()", Batch(samples, number_of(loss), prints(parameters))))
        return self._rank_zero("step()", lambda: work(batch))

    def check_timeout(self, timeout: float, limit: float) -> None:
        if timeout > limit:
            raise InvalidValueError(
                f"timeout must be at most load_state_timeout ({limit:g} s) with several ranks, since the others wait "
                f"for rank 0 no longer, got {timeout:g}"
            )

    def leave(self) -> None:
        self._group.leave()

    def _meet(self, call: str, content: Any) -> list[Any]:
        return contents(self._group.gather(Arrival(call, content)), self.rank)

    @abstractmethod
    def _rank_zero(self, call: str, work: Callable[[], Result]) -> Result:
        """All ranks have met: rank 0 works, and the others hear of it."""


class Speaker(_SeveralRanks):
    """Rank 0 of several."""

    _spoken: SpokenState

    def share(self, state: TrainingStateAverager | RankState, local_updates: bool) -> None:
        self._spoken = SpokenState(cast("TrainingStateAverager", state), local_updates)

    def hold(self) -> None:
        self._group.tell(Hold())

    def mark(self) -> dict[str, int]:
        return {}

    def part_of(self, saved: dict[Any, Any]) -> dict[Any, Any]:
        return _complete(saved)

    def _rank_zero(self, call: str, work: Callable[[], Result]) -> Result:
        try:
            result = work()
            changes, tensors = self._spoken.changes()
        except BaseException as e:
            if not self._group.ended:
                with contextlib.suppress(RankError):
                    self._group.tell(Failure(call, reason_of(e)))
            raise
        self._group.tell(Done(result, changes))
        if changes is not None:
            self._group.copy(tensors)
        return result


class Listener(_SeveralRanks):
    """A rank other than 0."""

    _state: RankState
    _local_updates = False

    def share(self, state: TrainingStateAverager | RankState, local_updates: bool) -> None:
        self._state, self._local_updates = cast("RankState", state), local_updates

    def hold(self) -> None:
        raise InvalidStateError("only rank 0 holds the others")

    def mark(self) -> dict[str, int]:
        return {} if self._local_updates else {"rank": self.rank}

    def part_of(self, saved: dict[Any, Any]) -> dict[Any, Any]:
        return _complete(saved) if self._local_updates else {}

    def _rank_zero(self, call: str, work: Callable[[], Result]) -> Result:
        while isinstance(told := self._group.tell(), Hold):
            pass
        if isinstance(told, Failure):
            raise RankError(f"rank 0 failed in {told.call}: {told.reason}")
        assert isinstance(told, Done)
        try:
            if told.changes is not None:
                self._state.take(told.changes, self._group.copy)
            if isinstance(told.result, Outcome):
                self._state.follow(told.result, fresh=told.changes is not None)
        except BaseException:
            self.leave()  # it is no longer as rank 0 is
            raise
        return cast("Result", told.result)


def _complete(saved: dict[Any, Any]) -> dict[Any, Any]:
    if "rank" in saved:
        raise InvalidValueError(
            f"state_dict must be that of rank 0, got that of rank {saved['rank']}, which has no statistics"
        )
    return saved
