"""Two sessions that talk in memory: for tests of what is between the sockets and the calls.

Nothing here is random unless the caller makes it so, and no byte moves by itself, so that a test can change, repeat
or hold back any of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from shoal.p2p.identity import Identity
from shoal.p2p.protocol.session import Event, HandshakeCompleted, Role, Session


def deliver(
    session: Session, data: bytes | bytearray | memoryview, pieces: Iterable[int] = ()
) -> list[Event]:
    """Give ``data`` to a session as a transport would, and return what it meant.

    ``pieces`` are the sizes of the first reads; what they leave comes in reads as large as the session allows.
    """
    events: list[Event] = []
    rest = memoryview(data)
    sizes = iter(pieces)
    while rest.nbytes:
        space = session.get_buffer()
        count = min(len(space), len(rest), max(1, next(sizes, len(space))))
        space[:count] = rest[:count]
        rest = rest[count:]
        events.extend(session.buffer_updated(count))
    return events


def take(session: Session) -> bytes:
    """All the bytes that a session has to send."""
    return b"".join(session.data_to_send())


def exchange(first: Session, second: Session) -> tuple[list[Event], list[Event]]:
    """Move bytes both ways until there are none; return the events of either side."""
    first_events: list[Event] = []
    second_events: list[Event] = []
    while True:
        forth = take(first)
        second_events += deliver(second, forth)
        back = take(second)
        first_events += deliver(first, back)
        if not forth and not back:
            return first_events, second_events


def connect(initiator: Session, responder: Session) -> None:
    """Start both sides and finish the handshake."""
    initiator.start()
    responder.start()
    events = exchange(initiator, responder)
    if [type(event) for side in events for event in side] != [HandshakeCompleted, HandshakeCompleted]:
        raise AssertionError(f"the handshake was not completed: {events}")


def connected_pair(first_seed: int = 1, second_seed: int = 2) -> tuple[Session, Session]:
    """An initiator and a responder after their handshake, of the identities that the seeds decide."""
    initiator = Session(Role.INITIATOR, Identity.generate(first_seed.to_bytes(32, "big")), os.urandom(32))
    responder = Session(Role.RESPONDER, Identity.generate(second_seed.to_bytes(32, "big")), os.urandom(32))
    connect(initiator, responder)
    return initiator, responder
