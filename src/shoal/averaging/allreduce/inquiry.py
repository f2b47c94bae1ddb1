"""Asks the members of a round that ended in doubt how it has ended, for as long as they may remember it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from shoal.averaging.allreduce.commit import ASK_TIMEOUT, read_answer
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.events import DECIDED, MemberAnswered, Phase
from shoal.averaging.allreduce.messages import VOTE, Answer, AskOutcome, Knows, Undecided
from shoal.averaging.group import GroupInfo
from shoal.errors import ShoalError
from shoal.p2p.host import Host
from shoal.p2p.identity import PeerID

logger = logging.getLogger(__name__)

FIRST_PAUSE = 1.0
LAST_PAUSE = 10.0
"""Seconds between two rounds of questions; they double from the first to the last."""
INQUIRY_TIMEOUT = 600.0
"""Seconds after which nobody is asked any more: members forget a round after 200 s, if they had 64 others since."""


class Inquiry:
    """One inquiry into one round.

    :param core: of this member, which is in doubt; what is learned moves it on
    """

    def __init__(self, host: Host, prefix: str, group: GroupInfo, core: AllReduce) -> None:
        self._host = host
        self._question = AskOutcome(prefix, group.group_id)
        self._peers = group.peer_ids
        self._core = core
        self.failure = ""
        """Why the round has not committed for this member, once that is known."""

    async def run(self) -> bool | None:
        """Whether the round has committed, with this member among those that it counts on; None: nobody can tell."""
        loop = asyncio.get_running_loop()
        ends, pause = loop.time() + INQUIRY_TIMEOUT, FIRST_PAUSE
        while loop.time() < ends:
            others = self._core.roles.others
            answers = await asyncio.gather(*(self._ask(self._peers[member]) for member in others))
            for member, answer in zip(others, answers, strict=True):
                if isinstance(answer, Knows):
                    self._core.handle(MemberAnswered(member, None, answer), loop.time())
            if self._core.phase in DECIDED:
                self.failure = self._core.failure or ""
                return self._core.phase is Phase.COMMITTED
            if nobody_can_commit(answers):
                self.failure = "no member has committed, and none can any more"
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)
        return None

    async def _ask(self, peer: PeerID) -> Answer | None:
        try:
            async with self._host.open_stream(peer, VOTE, timeout=ASK_TIMEOUT) as stream:
                await stream.send(self._question)
                return read_answer(await stream.receive(), self._core.roles.size)
        except (ShoalError, EOFError) as e:
            logger.debug("%s does not answer: %s", peer, e)
            return None


def nobody_can_commit(answers: Collection[Answer | None]) -> bool:
    """Whether all other members say that the round is over for them and that they know of no decision.

    Then none of them has committed, and none proposes anything any more. A process that does not know the round says
    nothing: the one before it may have committed.
    """
    ended = (Phase.FAILED.name, Phase.IN_DOUBT.name)
    return all(isinstance(answer, Undecided) and answer.phase in ended for answer in answers)
