"""Runs the steps of one averager, one after the other: each searches for a group and tries a round in it, until one
commits or its time is up.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, replace

from shoal.averaging.background.attempt import Attempt
from shoal.averaging.background.group_search import GroupSearch
from shoal.averaging.background.resources import Resources
from shoal.averaging.background.step import Step, StepFailed
from shoal.averaging.commands import RunStep, StepOutcome
from shoal.averaging.config import retry_pause
from shoal.averaging.matchmaking.story import SearchStory
from shoal.errors import AllreduceException, InDoubt, MatchmakingException
from shoal.runtime.memory import trim

logger = logging.getLogger(__name__)

WARN_AFTER_ATTEMPTS = 3
"""From as many failed groups in one step on, each failure is a warning."""

LARGE_ROUND = 32 << 20
"""Bytes that a round has received from which on its buffers, when they are freed, are worth giving back."""

_NOT_RUN = "found no group: until the deadline an earlier step still ran"
_NOT_APPLIED = (
    "found no group: until the deadline the average of an earlier step was not applied; call apply_average()"
)


class StepRunner:
    """Takes any number of steps at once, and lets one at a time have its turn: first come, first served."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._search = GroupSearch(resources)
        self._turn = asyncio.Lock()
        self._steps: dict[int, Step] = {}

    async def run(self, command: RunStep) -> StepOutcome:
        """Back when the step has ended; cancelling it withdraws from its search or round."""
        step = self._steps[command.step] = Step(command)
        try:
            return await self._wait_and_run(step)
        finally:
            del self._steps[command.step]
            step.ended.set()
            if step.report.bytes_received >= LARGE_ROUND:
                asyncio.get_running_loop().call_soon(trim)  # when the user process has its answer

    async def ended(self, number: int) -> None:
        """Wait until this step has ended, whatever became of it."""
        if number in self._steps:
            await self._steps[number].ended.wait()

    def trigger(self, number: int) -> None:
        """All-reduce of this step may begin, if it has not ended in the meantime."""
        if number in self._steps:
            self._steps[number].triggered.set()

    def reschedule(self, number: int, start_time: float) -> None:
        """All-reduce of this step is expected to begin at another time (steady seconds)."""
        if number in self._steps:
            self._search.reschedule(self._steps[number], start_time)

    async def _wait_and_run(self, step: Step) -> StepOutcome:
        try:
            async with asyncio.timeout(step.time_left):
                await self._turn.acquire()
        except TimeoutError:
            return self._finish(step, False, _NOT_RUN)
        try:
            # Before the search: the members of a group should not have to wait for this peer's user.
            async with asyncio.timeout(step.time_left):
                await self._resources.arena.is_free.wait()
        except TimeoutError:
            return self._finish(step, False, _NOT_APPLIED)
        else:
            return await self._try_until_deadline(step)
        finally:
            self._turn.release()

    async def _try_until_deadline(self, step: Step) -> StepOutcome:
        found = False
        while True:
            try:
                group = await self._search.find(step)
                found = True
                await Attempt(self._resources, step, group).run()
            except MatchmakingException as e:
                # what ended the groups that were found says more than that no further one came
                reason = f"{step.report.failure}; then {e}" if found else str(e)
                if isinstance(e.story, SearchStory):
                    step.note(search=asdict(e.story))
                return self._finish(step, found, reason)
            except AllreduceException as e:
                step.note(failure=str(e))
                if not self._is_worth_another(step, e):
                    return self._finish(step, found, str(e))
                await self._pause(step, e)
                continue
            gathered = tuple((member.peer_id, member.gather) for member in group.members)
            return replace(self._finish(step, found, None), gathered=gathered)

    def _is_worth_another(self, step: Step, failure: AllreduceException) -> bool:
        time_is_up = step.time_left is not None and step.time_left <= 0
        # A step in doubt is not tried again: its average may have been counted elsewhere.
        is_final = isinstance(failure, StepFailed | InDoubt)
        return step.command.allow_retries and not time_is_up and not is_final

    async def _pause(self, step: Step, failure: AllreduceException) -> None:
        attempts = step.report.attempts
        logger.log(
            logging.INFO if attempts < WARN_AFTER_ATTEMPTS else logging.WARNING,
            "%s: step %d: attempt %d failed: %s",
            self._resources.prefix,
            step.number,
            attempts,
            failure,
        )
        await asyncio.sleep(retry_pause(attempts, step.time_left))
        step.postpone(self._resources.config.matchmaking)

    def _finish(self, step: Step, found_group: bool, failure: str | None) -> StepOutcome:
        step.note(failure=failure)
        # The user process warns of failures, or hands them out.
        level = logging.INFO if failure is None else logging.DEBUG
        # Soon: the user, who waits for the outcome, gets it before the log does.
        asyncio.get_running_loop().call_soon(logger.log, level, "%s: %s", self._resources.prefix, step.report)
        return StepOutcome(step.report, found_group)
