"""The average of a step that ended in doubt, and turns out to have been committed by the others.

It stays in the arena, where the next snapshot overwrites it. So at most one average waits, and it takes no memory. Of
tensors that are their own snapshot (:mod:`.in_place`) none waits: their owner may write to them when a step has ended.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from shoal.averaging.commands import DoubtSettled
from shoal.averaging.report import DoubtOutcome, DoubtReport
from shoal.averaging.trainer.arena import TensorArena
from shoal.errors import InvalidStateError

logger = logging.getLogger(__name__)


class LateAverage:
    """Knows the last step that ended in doubt. Methods may be called on any thread.

    The average is written at a time that the user chooses, and only if no later snapshot was taken: the one that it
    is merged with is overwritten then. What the trainer has changed meanwhile is kept, as with any average.

    :param name: of the averager, for people
    """

    def __init__(self, arena: TensorArena, name: str) -> None:
        self._arena = arena
        self._name = name
        self._lock = threading.RLock()
        """Guards what follows; never held while another lock of the averager is waited for."""
        self._snapshot_of: int | None = None
        """The step whose snapshot is in the arena."""
        self._dropped_for = ""
        """Why an average of this snapshot must not be written any more; empty: it may be."""
        self._last: DoubtReport | None = None
        self._early: DoubtSettled | None = None
        """What was said last of a step that was not in doubt here: its own end may still be on its way."""
        self._is_news = False

    @property
    def last(self) -> DoubtReport | None:
        """What is known of the last step that ended in doubt; None: none has."""
        return self._last

    def take_news(self) -> DoubtReport | None:
        """What was learned since the last call; None: nothing."""
        with self._lock:
            news = self._last if self._is_news else None
            self._is_news = False
            return news

    def note_snapshot(self, step: int) -> None:
        """The tensors are about to be copied for ``step``: an average that waits is dropped."""
        with self._lock:
            self._drop("a later round has taken the tensors")
            self._snapshot_of, self._dropped_for = step, ""

    def drop(self, reason: str) -> None:
        """The average of the snapshot that was taken last is not to be written late."""
        with self._lock:
            self._drop(reason)

    def doubt(self, step: int, reason: str) -> None:
        """``step`` has ended in doubt."""
        with self._lock:
            if self._last is not None and self.is_open(self._last.step):
                self._tell(DoubtOutcome.UNKNOWN, "a later step is in doubt, too", logging.WARNING)
            self._last, self._is_news = DoubtReport(step, DoubtOutcome.OPEN, reason), False
            early, self._early = self._early, None
            if early is not None and early.step == step:
                self._settle(early)

    def is_open(self, step: int) -> bool:
        """Whether ``step`` is in doubt."""
        last = self._last
        return last is not None and last.step == step and last.outcome is DoubtOutcome.OPEN

    def settle(self, settled: DoubtSettled) -> None:
        """It was learned how the round of a step has ended, which may be in doubt."""
        with self._lock:
            if self.is_open(settled.step):
                self._settle(settled)
            else:
                self._early = settled

    def write(self) -> bool:
        """Write the average that has come late, if there is one; returns whether there was.

        :raises InvalidStateError: it can't be written: a tensor has another shape now, for instance. It is dropped.
        """
        if not self._waits():
            return False
        with self._arena.store.lock(None, lambda: self._arena.is_ending):
            with self._lock:
                if not self._waits():
                    return False
                self._tell(DoubtOutcome.WRITTEN, "", logging.INFO)
            self._arena.store.mark_stream()
            try:
                self._arena.write_visibly()
            except InvalidStateError as e:
                with self._lock:
                    self._tell(DoubtOutcome.DROPPED, str(e), logging.WARNING)
                assert self._last is not None
                raise InvalidStateError(
                    f"the late average of step {self._last.step} could not be written: {e}"
                ) from e
            return True

    def _waits(self) -> bool:
        return self._last is not None and self._last.outcome is DoubtOutcome.COMMITTED

    def _settle(self, settled: DoubtSettled) -> None:
        level = logging.INFO if settled.outcome is DoubtOutcome.FAILED else logging.WARNING
        outcome, reason = settled.outcome, settled.reason
        if outcome is DoubtOutcome.COMMITTED and (lacks := self._lacks_snapshot_of(settled.step)):
            outcome, reason = DoubtOutcome.DROPPED, lacks
        elif outcome is DoubtOutcome.COMMITTED:
            reason = "the next step() or apply_late_average() writes its average"
        self._tell(outcome, reason, level)

    def _lacks_snapshot_of(self, step: int) -> str:
        """Why the average of ``step`` can't be merged with what its round began with; empty: it can be."""
        if self._arena.transfer.why_not_late:
            return self._arena.transfer.why_not_late
        return self._dropped_for if self._snapshot_of == step else "a later round has taken the tensors"

    def _drop(self, reason: str) -> None:
        self._dropped_for = self._dropped_for or reason
        if self._waits():
            self._tell(DoubtOutcome.DROPPED, reason, logging.WARNING)

    def _tell(self, outcome: DoubtOutcome, reason: str, level: int) -> None:
        assert self._last is not None, "no step was in doubt"
        self._last = replace(self._last, outcome=outcome, reason=reason)
        self._is_news = True
        logger.log(level, "%s: %s", self._name, self._last)
