"""What peers declare of themselves, on a simulated DHT: stored, renewed, withdrawn and read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shoal.dht.config import DHTConfig
from shoal.dht.declaration_kind import DeclarationKind
from shoal.dht.declarations import RETRY_PERIOD, Declarations, lifetime_for
from shoal.dht.node import DHTNode
from shoal.dht.types import ValueWithExpiration
from shoal.dht.validation import DHTRecord, RecordValidatorBase, is_protected, protected_key
from shoal.errors import InvalidValueError
from shoal.testing.clock import run
from shoal.testing.dht import SimulatedDHT
from shoal.utils.tasks import TaskSet

PERIOD = 60.0
WITHDRAWN = -1


def decode(value: object) -> int:
    if not isinstance(value, int):
        raise InvalidValueError(f"a number is an int, not {value!r}")
    return value


NUMBERS = DeclarationKind[int]("a number", lambda number: number, decode, WITHDRAWN)


class Moody(RecordValidatorBase):
    """Refuses all declarations while it is told to, and counts those that it is shown."""

    def __init__(self) -> None:
        self.refuses = False
        self.shown = 0

    def validate(self, record: DHTRecord) -> bool:
        if not is_protected(record.key):
            return True
        self.shown += 1
        return not self.refuses


class Peer:
    """One node that declares numbers, and what became of that."""

    def __init__(self, dht: SimulatedDHT, node: DHTNode, mood: Moody, lifetime: float) -> None:
        self.node = node
        self.mood = mood
        self.tasks = TaskSet()
        self.number: int | None = None
        self.outcomes: list[str | None] = []
        self.declarations = Declarations(node, NUMBERS, self.tasks, dht.now, lifetime=lifetime)

    def declare(self, number: int) -> None:
        self.declarations.declare("numbers", number, self.note)

    def keep(self) -> None:
        self.declarations.keep("numbers", lambda: self.number, period=PERIOD, when_done=self.note)

    def change(self, number: int | None) -> None:
        self.number = number
        self.declarations.describe_again("numbers")

    def note(self, _: float, failure: str | None) -> None:
        self.outcomes.append(failure)

    async def seen(self) -> list[int]:
        """What this peer reads of all peers."""
        return sorted(number for _, number in await self.declarations.read("numbers"))


def with_peers(story: Callable[[SimulatedDHT, Peer, Peer], Awaitable[None]], **options: float) -> None:
    """Run a story with two peers of one DHT."""

    async def main() -> None:
        dht, lifetime = SimulatedDHT(3), options.get("lifetime", lifetime_for(PERIOD))
        peers = []
        for node in await dht.start_many(2, DHTConfig(check_reachability=False)):
            mood = Moody()
            node.add_validators([mood])
            peers.append(Peer(dht, node, mood, lifetime))
        try:
            await story(dht, *peers)
        finally:
            for peer in peers:
                await peer.tasks.close()
            await dht.close()

    run(main, limit=7200.0)


def test_only_the_newest_of_several_that_wait_is_stored():
    """The first is being stored; of the others the last takes the place of those before it."""

    async def story(_: SimulatedDHT, own: Peer, other: Peer) -> None:
        own.declare(0)
        await asyncio.sleep(0)
        for number in range(1, 5):
            own.declare(number)
        await own.declarations.close(timeout=5.0)
        assert own.outcomes == [None, None]
        assert await other.seen() == [4]

    with_peers(story)


def test_what_is_declared_once_expires_after_its_lifetime():
    async def story(_: SimulatedDHT, own: Peer, other: Peer) -> None:
        own.declare(1)
        await asyncio.sleep(9.0)
        assert await other.seen() == [1]
        await asyncio.sleep(2.0)
        assert await other.seen() == []

    with_peers(story, lifetime=10.0)


def test_what_is_kept_is_renewed_before_it_expires():
    async def story(_: SimulatedDHT, own: Peer, other: Peer) -> None:
        own.number = 7
        own.keep()
        for _ in range(20):
            await asyncio.sleep(PERIOD * 2.5)
            assert await other.seen() == [7]

    with_peers(story)


def test_a_change_is_declared_at_once_and_nothing_is_withdrawn():
    async def story(_: SimulatedDHT, own: Peer, other: Peer) -> None:
        own.keep()
        await asyncio.sleep(PERIOD)
        assert own.outcomes == []  # there is nothing to declare, and nothing to withdraw
        for number in (1, 2):
            own.change(number)
            await asyncio.sleep(1.0)
            assert await other.seen() == [number]
        own.change(None)
        await asyncio.sleep(1.0)
        assert await other.seen() == []
        assert own.outcomes == [None] * 3

    with_peers(story)


def test_a_declaration_that_was_refused_is_tried_again_soon():
    async def story(_: SimulatedDHT, own: Peer, other: Peer) -> None:
        own.mood.refuses = True
        own.number = 3
        own.keep()
        await asyncio.sleep(1.0)
        assert own.outcomes == ["no node of the DHT accepted it"]
        own.mood.refuses = False
        await asyncio.sleep(RETRY_PERIOD)
        assert own.outcomes[1:] == [None]
        assert await other.seen() == [3]

    with_peers(story)


def test_an_error_of_the_dht_is_the_reason_of_a_failure():
    async def story(_: SimulatedDHT, own: Peer, __: Peer) -> None:
        own.declare(1)
        await own.declarations.close(timeout=5.0)
        (failure,) = own.outcomes
        assert failure is not None
        assert failure.startswith("expiration_time must be at most")

    with_peers(story, lifetime=1e6)


def test_closing_withdraws_what_is_being_stored_for_the_first_time():
    """The other node has it before its answer comes, so the declaration may stand though nobody has said so."""

    async def story(_: SimulatedDHT, own: Peer, other: Peer) -> None:
        own.number = 5
        own.keep()
        while not other.mood.shown:  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.001)
        assert own.outcomes == []
        await own.declarations.close(timeout=5.0)
        await own.tasks.close()
        assert own.outcomes == [None]
        await asyncio.sleep(0.1)
        assert await other.seen() == []

    with_peers(story)


def test_closing_waits_no_longer_than_it_may():
    async def story(dht: SimulatedDHT, own: Peer, _: Peer) -> None:
        own.number = 5
        own.keep()
        await asyncio.sleep(1.0)
        dht.network.kill("node1", silently=True)
        began = asyncio.get_running_loop().time()
        await own.declarations.close(timeout=0.5)
        assert asyncio.get_running_loop().time() - began == pytest.approx(0.5)

    with_peers(story)


def test_unreadable_declarations_are_left_out_and_named_when_asked_for():
    async def story(dht: SimulatedDHT, own: Peer, other: Peer) -> None:
        own.declare(1)
        key, subkey = protected_key("numbers"), other.node.peer_id.to_bytes()
        assert await other.node.store(key, "five", dht.now() + 60, subkey=subkey)
        await asyncio.sleep(1.0)
        assert await own.seen() == [1]
        record = await own.node.get(key, latest=True)
        assert NUMBERS.of(own.node.peer_id, record) == 1
        with pytest.raises(InvalidValueError, match="not 'five'"):
            NUMBERS.of(other.node.peer_id, record)
        assert NUMBERS.of(dht.identity(9).peer_id, record) is None

    with_peers(story)


@pytest.mark.parametrize("record", [None, ValueWithExpiration(5, 1e10)])
def test_where_no_peer_has_written_nothing_is_declared(record: ValueWithExpiration | None, many_peers):
    assert NUMBERS.all_in(record) == ()
    assert NUMBERS.of(many_peers[0], record) is None
