"""The stream of one request to join, as both of its ends read it: what may come, and what is refused.

:mod:`.leaders` is the end of the peer that asks, :mod:`.followers` that of the peer that leads.
"""

from __future__ import annotations

import asyncio

from shoal.averaging.group import MAX_GROUP_GATHER_BYTES, MAX_GROUP_SIZE, SignedMemberInfo
from shoal.averaging.matchmaking.messages import GroupMember
from shoal.errors import ProtocolViolation
from shoal.p2p.rpc import EndOfStream, Stream

END_TIMEOUT = 60.0
"""Seconds for which a stream is kept when all has been said."""


async def expect_end(stream: Stream) -> None:
    """Wait until the other side has finished, but not for ever: whether a member takes part shows in its round too.

    :raises ProtocolViolation: it sends something else
    """
    try:
        async with asyncio.timeout(END_TIMEOUT):
            message = await stream.receive()
    except (EndOfStream, TimeoutError):
        return
    raise ProtocolViolation(f"{stream.remote} sends {type(message).__name__} after a group began")


async def receive_members(stream: Stream, size: int, terms: bytes) -> list[SignedMemberInfo]:
    """The members of a group that begins, as its leader names them: not verified yet.

    :param terms: of this member (:func:`~shoal.averaging.group.terms_of`)

    :raises ProtocolViolation: a group, or all that its members gathered, is larger than allowed
    """
    if not 1 <= size <= MAX_GROUP_SIZE:
        raise ProtocolViolation(f"{stream.remote} begins a group of {size}")
    members: list[SignedMemberInfo] = []
    total = 0
    for _ in range(size):
        message = await stream.receive()
        if not isinstance(message, GroupMember):
            raise ProtocolViolation(f"{stream.remote} sends {type(message).__name__} among the members")
        member = message.whole(terms)
        total += len(member.info)
        if total > MAX_GROUP_GATHER_BYTES:
            raise ProtocolViolation(
                f"{stream.remote} sends members of more than {MAX_GROUP_GATHER_BYTES} bytes"
            )
        members.append(member)
    return members


def check_delay(seconds: float) -> float:
    """:raises ProtocolViolation: not a time to wait; false for NaN, too"""
    if not 0 <= seconds < 1e9:
        raise ProtocolViolation(f"a group begins in {seconds} seconds")
    return seconds
