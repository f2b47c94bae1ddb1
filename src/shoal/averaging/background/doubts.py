"""What becomes of a step that ended in doubt: the members of its group are asked, and the user process is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from shoal.averaging.allreduce.inquiry import Inquiry
from shoal.averaging.allreduce.round import Round
from shoal.averaging.commands import DoubtSettled
from shoal.averaging.report import DoubtOutcome
from shoal.errors import InvalidStateError
from shoal.p2p.host import Host
from shoal.runtime.service import ServiceContext
from shoal.utils.tasks import TaskSet

logger = logging.getLogger(__name__)

_NOBODY_KNOWS = "no member that could be reached knows how the round ended"


class Doubts:
    """Of one averager. Only the last doubt is looked into: a later round has taken the tensors anew."""

    def __init__(self, context: ServiceContext, host: Host, prefix: str) -> None:
        self._context = context
        self._host = host
        self._prefix = prefix
        self._tasks = TaskSet()
        self._asking: asyncio.Task[None] | None = None

    def look_into(self, step: int, current: Round) -> None:
        """The round of ``step`` ended in doubt: ask how it ended, until that is known."""
        if self._asking is not None:
            self._asking.cancel()
        inquiry = Inquiry(self._host, self._prefix, current.group, current.core)
        self._asking = self._tasks.start(self._inquire(step, inquiry), f"inquire into step {step}")

    def tell(self, step: int, failure: str | None) -> None:
        """The round of ``step``, which the user process may have given up in doubt, has ended: committed, or failed
        for this reason.
        """
        outcome = DoubtOutcome.COMMITTED if failure is None else DoubtOutcome.FAILED
        self._tasks.start(self._tell(DoubtSettled(step, outcome, failure or "")), f"tell of step {step}")

    async def close(self) -> None:
        """Ask nobody any more."""
        await self._tasks.close()

    async def _inquire(self, step: int, inquiry: Inquiry) -> None:
        has_committed = await inquiry.run()
        if has_committed is None:
            settled = DoubtSettled(step, DoubtOutcome.UNKNOWN, _NOBODY_KNOWS)
        elif has_committed:
            settled = DoubtSettled(step, DoubtOutcome.COMMITTED)
        else:
            settled = DoubtSettled(step, DoubtOutcome.FAILED, inquiry.failure)
        self._asking = None
        await self._tell(settled)

    async def _tell(self, settled: DoubtSettled) -> None:
        logger.debug("%s: step %d was in doubt: %s", self._prefix, settled.step, settled.outcome.value)
        with contextlib.suppress(InvalidStateError):  # the averager was shut down meanwhile
            await self._context.call_user(settled)
