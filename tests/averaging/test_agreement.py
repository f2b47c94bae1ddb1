"""Peers that cannot average together are told in what they differ, with both values."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import pytest
import torch

import shoal
from shoal.averaging.agreement import Agreement, find_differences
from shoal.averaging.group import PeerMode
from shoal.averaging.matchmaking.schemas import AGREEMENT, UNKNOWN
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.schema import TensorSchema
from shoal.compression import CompressionBase
from shoal.errors import MatchmakingException, ProtocolViolation, RemoteError
from shoal.p2p.protocol import wire
from shoal.p2p.rpc import Stream
from shoal.testing.clock import run
from shoal.testing.matchmaking import SimulatedMatchmaking

FULL = PeerMode.FULL


def agreement(
    *tensors: torch.Tensor,
    codec: CompressionBase | None = None,
    part: int = 1024,
    least: int = 2,
    span: int = 0,
) -> Agreement:
    codecs = None if codec is None else [codec] * len(tensors)
    return TensorSchema.from_tensors(tensors, codecs).agreement(part, least, span)


OWN = agreement(torch.zeros(3), torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            agreement(torch.zeros(3), torch.zeros(2, 6)),
            "the shape of averaged_tensors[1] is 2x5 here, 2x6 there",
        ),
        (
            agreement(torch.zeros(()), torch.zeros(5, 2)),
            "the shape of averaged_tensors[0] is 3 here, scalar there (and so on: 2 tensors differ in it)",
        ),
        (
            agreement(torch.zeros(3), torch.zeros(2, 5, dtype=torch.float16)),
            "the dtype of averaged_tensors[1] is float32 here, float16 there",
        ),
        (
            agreement(torch.zeros(3), torch.zeros(2, 5), codec=shoal.Float16Compression()),
            (
                "the codec of averaged_tensors[0] is NoCompression here, Float16Compression there "
                "(and so on: 2 tensors differ in it)"
            ),
        ),
        (agreement(torch.zeros(3)), "averaged_tensors has 2 tensors here, 1 there"),
        (
            agreement(torch.zeros(7), torch.zeros(3), torch.zeros(2, 5)),
            "averaged_tensors has 2 tensors here, 3 there; averaged_tensors[0] is float32 3 here, float32 7 there",
        ),
        (msgspec.structs.replace(OWN, part_size_bytes=4096), "part_size_bytes is 1024 here, 4096 there"),
        (msgspec.structs.replace(OWN, min_group_size=3), "min_group_size is 2 here, 3 there"),
        (msgspec.structs.replace(OWN, min_vector_size=9), "min_vector_size is 0 here, 9 there"),
    ],
)
def test_each_difference_is_named_with_both_values(other: Agreement, difference: str) -> None:
    assert find_differences(OWN, other) == [difference]
    assert OWN.digest() != other.digest()


def test_several_differences_are_all_named() -> None:
    other = agreement(torch.zeros(4, dtype=torch.float64), torch.zeros(2, 5), part=2048, least=3)
    assert len(find_differences(OWN, other)) == 4
    assert find_differences(OWN, OWN) == []


@pytest.mark.parametrize(
    "tensors", ["", "\x1b[2J", "shoal tensors 1\n\x1b[2Jfloat 1 codec 99999\n\u202ex", "\n" * 99]
)
def test_whatever_a_peer_describes_is_shown_on_one_printable_line(tensors: str) -> None:
    text = "; ".join(find_differences(OWN, msgspec.structs.replace(OWN, tensors=tensors)))
    assert text
    assert text.isprintable()
    assert len(text) < 1000


def test_a_codec_that_is_not_known_here_is_named_by_its_number() -> None:
    other = msgspec.structs.replace(OWN, tensors=OWN.tensors.replace("codec 0", "codec 201", 1))
    assert find_differences(OWN, other) == [
        "the codec of averaged_tensors[0] is NoCompression here, number 201 there"
    ]


def test_a_description_has_bounds() -> None:
    huge = wire.encode(Agreement("x" * 900_001, 1, 1, 1))
    with pytest.raises(ProtocolViolation):
        wire.decode(huge, Agreement, "an agreement")


# ---- between peers


def tell(story, others: list[Agreement]) -> None:
    """Peer 0 averages OWN, the others what they are given; each under the same prefix."""

    async def told() -> None:
        sim = SimulatedMatchmaking(3, MatchmakingConfig(2, 2))
        try:
            for number, one in enumerate([OWN, *others]):
                await sim.start_one(number, FULL, schema=one.digest(), agreement=one)
            await story(sim)
        finally:
            await sim.close()

    run(told)


def test_both_sides_say_once_in_what_they_differ(caplog: pytest.LogCaptureFixture) -> None:
    async def story(sim: SimulatedMatchmaking) -> None:
        for _ in range(3):
            errors = await asyncio.gather(*(sim.search(number, timeout=4.0) for number in range(3)))
            for number, error in enumerate(errors):
                assert isinstance(error, MatchmakingException), number
            assert "(part_size_bytes is 1024 here, 4096 there)" in str(errors[0])
            assert "(part_size_bytes is 4096 here, 1024 there)" in str(errors[1])

    other = msgspec.structs.replace(OWN, part_size_bytes=4096)
    tell(story, [other, msgspec.structs.replace(OWN, min_vector_size=4096)])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    told = [line for line in warnings if "averages something else under this prefix" in line]
    assert len(told) == 6  # of each of the three peers, about the two others
    assert all(line.startswith("swarm: ") for line in told)


def test_peers_of_one_other_schema_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def story(sim: SimulatedMatchmaking) -> None:
        host = sim.dht.nodes[0].host
        original = host.open_stream

        def open_stream(peer, method, **options):
            asked.extend([peer] if method is AGREEMENT else [])
            return original(peer, method, **options)

        monkeypatch.setattr(host, "open_stream", open_stream)
        await asyncio.gather(*(sim.search(number, timeout=4.0) for number in range(4)))

    tell(story, [msgspec.structs.replace(OWN, min_group_size=3)] * 3)
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["lies", "fails", "hangs"])
def test_a_peer_that_does_not_say_it_costs_nothing(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def story(sim: SimulatedMatchmaking) -> None:
        async def answer(stream: Stream) -> None:
            await stream.receive()
            match kind:
                case "lies":
                    await stream.send(msgspec.structs.replace(OWN, min_group_size=7))
                case "fails":
                    raise RemoteError("failed", "no")
                case "hangs":
                    await asyncio.sleep(1e4)

        host = sim.dht.nodes[1].host
        host.stop_serving(AGREEMENT)
        host.serve_stream(AGREEMENT, answer)
        error, _ = await asyncio.gather(sim.search(0, timeout=6.0), sim.search(1, timeout=6.0))
        assert f"averages something else under this prefix ({UNKNOWN})" in str(error)

    tell(story, [msgspec.structs.replace(OWN, min_group_size=3)])
