"""Finds a group for a step. While the user's process is absent, the peer is in no search: others need not wait for
it.
"""

from __future__ import annotations

import asyncio
import logging

from shoal.averaging.background.resources import Resources
from shoal.averaging.background.step import Step
from shoal.averaging.commands import AveragingStage, ReachStage
from shoal.averaging.group import GroupInfo
from shoal.errors import MatchmakingException
from shoal.runtime.presence import UserProcessAbsent
from shoal.utils.timed import dht_clock

logger = logging.getLogger(__name__)


class GroupSearch:
    """Searches on behalf of one step after the other."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._matchmaker = resources.matchmaker
        self._context = resources.context

    async def find(self, step: Step) -> GroupInfo:
        """The group of the step's next attempt.

        :raises MatchmakingException: none was found until the deadline, or none can be
        """
        if self._resources.config.auxiliary and not self._resources.host.reachability.is_full:
            raise MatchmakingException(
                "found no group: auxiliary=True, but no other peer can dial this one, so that it can't assist them; "
                "see the DHT's host_maddrs and announce_maddrs"
            )
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            while True:
                try:
                    return await self._search(step)
                except UserProcessAbsent:  # others find their groups without this peer
                    logger.info(
                        "%s: step %d: left the search for a group", self._resources.prefix, step.number
                    )
                    await self._user_is_back(step)
        finally:
            step.spend(search=loop.time() - began)

    def reschedule(self, step: Step, start_time: float) -> None:
        """The step's all-reduce is expected to begin at another time (steady seconds)."""
        step.start_time = start_time
        if step.is_searching:
            self._matchmaker.reschedule(dht_clock.from_steady(start_time))

    async def _search(self, step: Step) -> GroupInfo:
        """:raises UserProcessAbsent: the search was left for that, unless a group already stood"""
        user, deadline = self._context.user, step.command.deadline
        looking = ReachStage(step.number, AveragingStage.LOOKING_FOR_GROUP)
        await user.unless_absent(self._context.call_user(looking))
        # From now on a new start time has to reach the search, which begins with the one that stands here.
        step.is_searching = True
        try:
            with user.when_absent(self._matchmaker.leave_search):
                return await self._matchmaker.find_group(
                    start_time=dht_clock.from_steady(step.start_time),
                    deadline=None if deadline is None else dht_clock.from_steady(deadline),
                    gather=step.command.gather,
                    weight=step.command.weight,
                )
        except MatchmakingException:
            if user.absence is None:
                raise
            raise UserProcessAbsent(user.absence) from None
        finally:
            step.is_searching = False

    async def _user_is_back(self, step: Step) -> None:
        user = self._context.user
        try:
            async with asyncio.timeout(step.time_left):
                await user.present()
        except TimeoutError:
            raise MatchmakingException(f"found no group: until the deadline the {user.absence}") from None
        step.postpone(self._resources.config.matchmaking)
