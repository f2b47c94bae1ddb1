from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest

from shoal.cli.demo import peer as peer_module
from shoal.cli.demo.peer import Headcount, latest_round
from shoal.cli.demo.protocol import Part, State, Status
from shoal.cli.demo.settings import Settings
from shoal.dht.types import ValueWithExpiration
from shoal.p2p.identity import Identity

PEERS = [Identity.generate(bytes([number]) * 32).peer_id for number in range(6)]


@pytest.mark.parametrize(
    ("gathered", "round_"),
    [
        ([{"round": 3}, {"round": 5}], 5),
        ([{"round": 3}, {"round": 0}], 3),
        ([{"round": 0}, {"round": 1}], 2),
        # What others gather is theirs to choose.
        ([{"round": 3}, {"round": 10**9}], 3),
        ([{"round": 3}, {"round": 100}], 3),
        ([{"round": 3}, {"round": -1}], 3),
        ([{"round": 3}, None, "x", {}, {"round": "9"}], 3),
    ],
)
def test_the_round_is_that_of_the_most_advanced(gathered: list[Any], round_: int) -> None:
    assert latest_round(dict(enumerate(gathered)), rounds=100, own=2) == round_


def record_of(*values: Any) -> ValueWithExpiration:
    entries = {
        peer.to_bytes(): ValueWithExpiration(value, 1.0) for peer, value in zip(PEERS, values, strict=False)
    }
    return ValueWithExpiration(entries, 1.0)


def status_of(number: int, state: State = State.TRAINING) -> Any:
    return msgspec.to_builtins(Status(f"peer {number}", str(PEERS[number]), Part(0), (), state))


@pytest.mark.parametrize(
    ("record", "count"),
    [
        (record_of(*map(status_of, range(5))), 5),
        (record_of(status_of(0), status_of(1), status_of(2), status_of(3, State.FINISHED)), 3),
        (record_of(status_of(0), status_of(1), status_of(2, State.CATCHING_UP)), 2),
        # A record that another peer wrote under a PeerID that is not its own, and ones that make no sense.
        (record_of(status_of(0), status_of(1), status_of(2), status_of(0), {"name": 3}, "x"), 3),
        (None, 2),
    ],
)
def test_headcount_follows_the_board(
    record: ValueWithExpiration | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(0, peer_module.COUNT_INTERVAL * 2)
    monkeypatch.setattr(peer_module.time, "monotonic", lambda: next(times))
    answers: list[Future[Any]] = []

    class FakeBoard:
        def request_statuses(self, prefix: str) -> Future[Any]:
            answers.append(Future())
            return answers[-1]

    headcount = Headcount(FakeBoard(), Settings("test", peers=4))
    assert [headcount.latest(), headcount.latest()] == [4, 4], (
        "as in the settings until the board has answered"
    )
    assert len(answers) == 1, "one question at a time"
    answers[0].set_result(record)
    assert headcount.latest() == count
    assert len(answers) == 2
