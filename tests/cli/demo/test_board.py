"""What the peers of a demo declare, and read of each other."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from shoal.cli.demo.board import Board
from shoal.cli.demo.protocol import Part, State, Status
from shoal.cli.demo.settings import Settings
from shoal.dht.types import ValueWithExpiration
from shoal.errors import UsageError
from shoal.p2p.identity import PeerID
from shoal.testing.peers import make_identity

PEERS = [make_identity(f"peer{number}").peer_id for number in range(3)]


class OneDHT:
    """A dictionary that all peers of a test share, as one peer sees it."""

    def __init__(self, records: dict[Any, dict[Any, ValueWithExpiration]], peer_id: PeerID) -> None:
        self.records = records
        self.peer_id = peer_id

    def store(
        self, key: Any, value: Any, expiration_time: float, subkey: Any, return_future: bool
    ) -> Future[bool]:
        assert return_future
        self.records.setdefault(key, {})[subkey] = ValueWithExpiration(value, expiration_time)
        return settled(True)

    def get(self, key: Any, latest: bool, return_future: bool = False) -> Any:
        assert latest
        record = self.records.get(key)
        found = None if record is None else ValueWithExpiration(dict(record), 0.0)
        return settled(found) if return_future else found


def settled(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


@pytest.fixture
def boards() -> list[Any]:
    records: dict[Any, Any] = {}
    return [Board(OneDHT(records, peer)) for peer in PEERS]  # type: ignore[arg-type]


def status_of(peer: PeerID) -> Status:
    return Status("p", str(peer), Part(0), (1, 2), State.TRAINING)


def test_settings_of_the_founder_are_read_by_those_that_join(boards):
    settings = Settings("run", rounds=50)
    boards[0].publish_settings(settings)
    assert boards[1].read_settings(PEERS[0]) == settings


def test_a_peer_that_founded_nothing_is_named(boards):
    boards[0].publish_settings(Settings("run"))
    with pytest.raises(UsageError, match=f"no demo runs at {PEERS[1]}, or it has ended"):
        boards[2].read_settings(PEERS[1])


def test_settings_of_another_version_say_so(boards):
    boards[0].publish_settings(Settings("run"))
    (record,) = boards[0]._dht.records.values()
    record[PEERS[0].to_bytes()].value["lanes"] = 2
    with pytest.raises(UsageError, match=r"is of another version of Shoal: .*lanes"):
        boards[1].read_settings(PEERS[0])


def test_statuses_are_ordered_by_peer_and_those_that_lie_are_left_out(boards):
    assert boards[2].read_statuses("run") == []
    boards[0].publish_status("run", status_of(PEERS[0]))
    boards[1].publish_status("run", status_of(PEERS[1]))
    boards[2].publish_status("run", status_of(PEERS[0]))  # it calls itself another peer
    expected = sorted(PEERS[:2], key=lambda peer: peer.to_bytes())
    assert [status.peer_id for status in boards[2].read_statuses("run")] == [str(peer) for peer in expected]
    boards[1]._dht.store(next(iter(boards[0]._dht.records)), "nonsense", 0.0, PEERS[1].to_bytes(), True)
    assert boards[2].read_statuses("run") == [status_of(PEERS[0])]
