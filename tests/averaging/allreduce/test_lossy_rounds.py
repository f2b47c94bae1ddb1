"""Rounds under lossy codecs, from hand to hand: how far a result is from the average, and that errors do not add up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.averaging.allreduce.assignment import Assignment
from shoal.averaging.allreduce.exchange import ForeignSpan, OwnSpan
from shoal.averaging.allreduce.reduction import encode_difference, encode_part
from shoal.averaging.codec_formats import CodecFormat
from shoal.averaging.load_balancing import load_balance_peers
from shoal.averaging.partition import Layout, Partition
from shoal.compression import (
    BFloat16Compression,
    BlockwiseQuantization,
    CompressionBase,
    Float16Compression,
    Quantile8BitQuantization,
    ScaledFloat16Compression,
    Uniform8BitQuantization,
)
from shoal.errors import AllreduceException
from shoal.testing.arena import make_arena, part_tensor, vector_in
from shoal.testing.codecs import error_bound
from shoal.utils.dtypes import FLOAT32

CODECS: list[CompressionBase] = [
    Float16Compression(),
    BFloat16Compression(),
    ScaledFloat16Compression(),
    Uniform8BitQuantization(),
    Quantile8BitQuantization(),
    BlockwiseQuantization(),
]
codecs = pytest.mark.parametrize("codec", CODECS, ids=repr)

# Errors (RMS) of values of a normal distribution, in standard deviations, as the docstrings say.
TYPICAL = {
    Float16Compression: 0.0003,
    BFloat16Compression: 0.0020,
    ScaledFloat16Compression: 0.0003,
    Uniform8BitQuantization: 0.0120,  # of parts without outlier slots
    Quantile8BitQuantization: 0.0070,
    BlockwiseQuantization: 0.0075,
}


class Group:
    """Members that average as often as they are told to. ``sizes`` cuts each member's elements into tensors."""

    def __init__(
        self,
        tensors: list[torch.Tensor],
        codec: CompressionBase,
        weights: list[float],
        part_size: int = 1 << 12,
        sizes: list[int] | None = None,
    ) -> None:
        size = len(tensors)
        self.sizes = sizes or [len(tensors[0])]
        self.layout = Layout.from_tensors(tensors[0].split(self.sizes), [codec] * len(self.sizes))
        owned = load_balance_peers(self.layout.data_nbytes, [None] * size)
        self.partition = Partition.create(self.layout, owned, part_size)
        self.spans = Assignment.first([len(self.partition.parts_of(me)) for me in range(size)]).spans
        self.codec, self.weights = codec, weights
        self.arenas = [make_arena(self.layout) for _ in tensors]
        for me, tensor in enumerate(tensors):
            self.tensor(me).copy_(tensor)

    def tensor(self, me: int) -> torch.Tensor:
        """All elements, one tensor after another."""
        return self._elements(self.arenas[me].snapshot)

    def _elements(self, area: memoryview) -> torch.Tensor:
        return vector_in(self.layout, area)

    def average(self) -> torch.Tensor:
        """The exact average of what the members have."""
        total = sum(weight * self.tensor(me).double() for me, weight in enumerate(self.weights))
        return torch.as_tensor(total) / sum(self.weights)

    def round(self) -> None:
        """Everybody takes the result of a round."""
        members = range(len(self.arenas))
        weights = dict(enumerate(self.weights))
        for one in self.spans:
            owner = one.owner
            span = OwnSpan(self.partition, one, owner, self.arenas[owner], weights)
            foreign = {me: ForeignSpan(self.partition, one, self.arenas[me]) for me in members if me != owner}
            for index in range(len(span.parts)):
                for me, mine in foreign.items():
                    data = bytes(mine.to_send(index))
                    span.receive_into(me, index, len(data))[:] = data
                    span.deliver(me, index, memoryview(bytearray(data)))
                span.average(index)
                for me, mine in foreign.items():
                    data = bytes(span.to_return(me, index))
                    memory = mine.receive_into(index, len(data))
                    memory[:] = data
                    mine.deliver(index, memory)
        for me in members:
            self.tensor(me).copy_(self._elements(self.arenas[me].average))

    def spread(self) -> float:
        """Standard deviation of the members from their mean, over all elements."""
        stacked = torch.stack([self.tensor(me).double() for me in range(len(self.arenas))])
        return math.sqrt((stacked - stacked.mean(0)).square().mean().item())


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def there_and_back(codec: CompressionBase, values: torch.Tensor) -> torch.Tensor:
    return codec.decode(bytearray(codec.encode(values)), values.dtype, len(values))


def round_bounds(group: Group) -> list[torch.Tensor]:
    """How far each member's result may be from the exact average: twice what the codec may lose of a part (once on its
    way into the average, once because the member's own loss is put back), and once what it may lose of a difference.
    """
    codec, weights = group.codec, torch.tensor(group.weights, dtype=torch.float64)
    bounds = [torch.zeros(group.layout.numel, dtype=torch.float64) for _ in weights]
    for owner, where in segments(group.partition):
        exact = [group.tensor(me)[where] for me in range(len(weights))]
        lost = [error_bound(codec, mine) for mine in exact]
        seen = [mine if me == owner else there_and_back(codec, mine) for me, mine in enumerate(exact)]
        lost[owner] = torch.zeros_like(lost[owner])
        average = _weighted(seen, weights)
        for me, mine in enumerate(exact):
            bounds[me][where] = _weighted(lost, weights) + lost[me]
            if me != owner:
                bounds[me][where] += error_bound(codec, (average - seen[me].double()).to(mine.dtype))
            magnitude = torch.stack(exact).double().abs().max(0).values + bounds[me][where]
            info = torch.finfo(mine.dtype)  # in which averages, differences and results are rounded
            bounds[me][where] += 4 * max(info.eps, 2**-21) * magnitude + 4 * info.smallest_normal * info.eps
    return bounds


def segments(partition: Partition) -> Iterator[tuple[int, slice]]:
    """The owner and the place of everything that a codec encodes by itself."""
    for part in partition.parts:
        for start, stop in itertools.pairwise(itertools.accumulate(part.segments, initial=part.start)):
            yield part.owner, slice(start, stop)


def _weighted(tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    return (torch.stack(tensors).double() * weights.unsqueeze(1)).sum(0) / weights.sum()


@codecs
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=5),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    spread=st.sampled_from([1e-4, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    count=st.integers(1, 9000),
)
def test_results_are_within_twice_the_bound_of_parts_and_once_that_of_differences(
    codec, seed, weights, offset, spread, dtype, count
):
    group = Group(
        [(offset + spread * normal(count, seed + me)).to(dtype) for me in range(len(weights))], codec, weights
    )
    expected, bounds = group.average(), round_bounds(group)
    group.round()
    for me, bound in enumerate(bounds):
        assert bool(((group.tensor(me).double() - expected).abs() <= bound).all())


MAGNITUDES = {700: 20.0, 40: 0.01, 3: 1e-4, 5000: 1.0, 1: 1e-6, 900: 300.0}


@codecs
@pytest.mark.parametrize("part_size", [256, 1 << 12, 1 << 19])
def test_a_tensor_loses_nothing_to_its_neighbours(codec, part_size):
    """Small values beside large ones are as exact as they are alone, however parts and spans cut the tensors."""
    scales = torch.cat([torch.full((size,), magnitude) for size, magnitude in MAGNITUDES.items()])
    tensors = [scales * normal(len(scales), me) for me in range(3)]
    group = Group(tensors, codec, [1.0] * 3, part_size, list(MAGNITUDES))
    expected, bounds = group.average(), round_bounds(group)
    group.round()
    for me, bound in enumerate(bounds):
        errors = (group.tensor(me).double() - expected).abs()
        assert bool((errors <= bound).all())
        assert bool((errors <= 0.5 * scales).all())  # a shared level would be 300 / 256 for all


@codecs
def test_members_come_as_near_as_the_codec_sees_them_and_stay_there(codec):
    """The floor: each member ends up off by what the codec loses of its own values."""
    group = Group([normal(6000, me) for me in range(4)], codec, [1.0] * 4)
    spreads = []
    for _ in range(8):
        group.round()
        spreads.append(group.spread())
    assert spreads[0] < TYPICAL[type(codec)]  # times the deviation of the values, 1
    assert max(spreads[1:]) < TYPICAL[type(codec)] * 0.6  # the mean of four has half the deviation


ROUNDS, NOISE = 50, 0.1


@pytest.mark.sweep
@codecs
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_fifty_rounds_with_noise_do_not_drift(codec, offset):
    """Members train (noise of 0.1) and average. The mean of all follows the noise and nothing else."""
    group = Group([offset + normal(4000, me) for me in range(4)], codec, [1.0] * 4)
    mean = group.average()
    spreads = []
    for index in range(ROUNDS):
        before = group.average()
        for me in range(4):
            group.tensor(me).add_(NOISE * normal(4000, 100 + index * 4 + me))
        mean += group.average() - before
        group.round()
        spreads.append(group.spread())
    drift = math.sqrt((group.average() - mean).square().mean().item())
    assert drift < drift_limit(codec, max(spreads))
    assert max(spreads[25:]) < 1.5 * max(spreads[1:10])  # they stay as near as they came at first


def drift_limit(codec: CompressionBase, spread: float) -> float:
    """Only what is lost of differences moves the mean, a little to all sides in each round. Differences are made of the
    noise and of the spread that the codec leaves.
    """
    return TYPICAL[type(codec)] * (NOISE + spread) * math.sqrt(ROUNDS)


@codecs
def test_members_who_took_the_decoded_average_would_drift(codec):
    """What differences are good for: the exchange that suggests itself fails the test above."""
    members = [normal(4000, me) for me in range(4)]
    mean = torch.stack(members).double().mean(0)
    for index in range(ROUNDS):
        changes = torch.stack([NOISE * normal(4000, 100 + index * 4 + me) for me in range(4)])
        mean += changes.double().mean(0)
        members = [there_and_back(codec, (torch.stack(members) + changes).mean(0))] * 4
    drift = math.sqrt((members[0].double() - mean).square().mean().item())
    assert drift > 1.5 * drift_limit(codec, 0.0)


@codecs
def test_who_did_not_send_gets_the_average_within_the_codecs_bound(codec):
    """An owner sends the encoded average itself to a member whose part it does not have."""
    group = Group([normal(4000, me) for me in range(3)], codec, [1.0] * 3)
    span = OwnSpan(group.partition, group.spans[0], 0, group.arenas[0], {0: 1.0, 1: 1.0})
    foreign = ForeignSpan(group.partition, group.spans[0], group.arenas[1])
    for index, part in enumerate(span.parts):
        data = bytes(foreign.to_send(index))
        span.receive_into(1, index, len(data))[:] = data
        span.deliver(1, index, memoryview(bytearray(data)))
        span.average(index)
        average = part_tensor(group.layout, group.arenas[0].average, part)
        returned = codec.decode(bytes(span.to_return(2, index)), torch.float32, part.count)
        assert bool(((returned - average).abs() <= error_bound(codec, average)).all())


class WrongSize(Float16Compression):
    """A user's codec that does not keep to its own ``encoded_nbytes``."""

    compression_type = 201

    def encode(self, part: torch.Tensor) -> memoryview:
        return memoryview(bytes(super().encode(part)) + b"!")


def test_a_codec_that_makes_another_size_fails_at_its_own_member_and_is_named():
    form = CodecFormat(FLOAT32, WrongSize())
    with pytest.raises(AllreduceException, match=r"WrongSize\(\).encode must make 6 bytes of 3 elements"):
        encode_part(form, np.ones(3, np.float32))
    with pytest.raises(AllreduceException, match="WrongSize"):
        encode_difference(form, np.ones(3, np.float32), np.zeros(3, np.float32))
