"""Codecs between real processes: each comes within its bound, members agree, adaptive ones mix, users' own travel."""

from __future__ import annotations

import pytest
import torch
from real_swarm import Swarm, step_all

from shoal.compression import (
    BFloat16Compression,
    BlockwiseQuantization,
    CompressionBase,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    Quantile8BitQuantization,
    RoleAdaptiveCompression,
    ScaledFloat16Compression,
    TensorRole,
    Uniform8BitQuantization,
    register_codec,
)
from shoal.errors import AllreduceException, InvalidValueError
from shoal.testing.codecs import error_bound

pytestmark = pytest.mark.xdist_group("averaging")

SIZE = 100_000


def values(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "codec",
    [
        Float16Compression(),
        BFloat16Compression(),
        ScaledFloat16Compression(),
        Uniform8BitQuantization(),
        Quantile8BitQuantization(),
        BlockwiseQuantization(),
    ],
    ids=repr,
)
def test_every_codec_comes_within_its_bound(swarm: Swarm, codec: CompressionBase):
    tensors = [values(seed) for seed in range(2)]
    average = (tensors[0] + tensors[1]) / 2
    # Twice for a part, once for the difference that comes back, which is no larger than the values here.
    limit = 3 * float(torch.cat([error_bound(codec, tensor) for tensor in tensors]).max())
    step_all([swarm.peer([tensor], size=2, compression=codec) for tensor in tensors])
    for tensor in tensors:
        error = (tensor - average).abs().max()
        assert 0 < error <= limit
    mean = (tensors[0] + tensors[1]) / 2
    assert float((mean - average).square().mean().sqrt()) < float(
        (tensors[0] - average).square().mean().sqrt()
    )


def test_an_adaptive_codec_chooses_for_each_tensor_by_its_info(swarm: Swarm):
    models = [[values(seed), values(seed + 2)] for seed in range(2)]
    averages = [(a + b) / 2 for a, b in zip(*models, strict=True)]
    infos = [
        CompressionInfo.from_tensor(tensor, key=key, role=role)
        for key, (tensor, role) in enumerate(
            zip(models[0], (TensorRole.PARAMETER, TensorRole.GRADIENT), strict=True)
        )
    ]
    codec = RoleAdaptiveCompression(parameter=NoCompression(), gradient=Uniform8BitQuantization())
    step_all([swarm.peer(model, size=2, compression=codec, tensor_infos=infos) for model in models])
    for model in models:
        assert torch.equal(model[0], averages[0])
        assert not torch.equal(model[1], averages[1])
        assert torch.allclose(model[1], averages[1], atol=0.1)


def half_precision_of_users() -> CompressionBase:
    class HalfPrecision(Float16Compression):  # not importable in the background process: travels by value
        compression_type = 77

    return HalfPrecision()


def moody_codec() -> CompressionBase:
    class MoodyCompression(Float16Compression):
        """Raises for twos, and makes too few bytes of threes."""

        compression_type = 78

        def encode(self, part: torch.Tensor) -> memoryview:
            if float(part[0]) == 2.0:
                raise RuntimeError("no twos")
            return super().encode(part[1:] if float(part[0]) == 3.0 else part)

    return MoodyCompression()


def test_a_codec_of_the_users_own_runs_in_the_background_process(swarm: Swarm):
    codec = half_precision_of_users()
    register_codec(codec)
    tensors = [[torch.full((10_000,), float(index))] for index in range(2)]
    step_all([swarm.peer(own, size=2, compression=codec) for own in tensors])
    assert torch.equal(tensors[0][0], torch.full((10_000,), 0.5))
    assert torch.equal(tensors[1][0], tensors[0][0])


def counting_codec() -> CompressionBase:
    class CountingCompression(Float16Compression):
        compression_type = 80

        def __init__(self) -> None:
            self.uses = 0

        def encode(self, part: torch.Tensor) -> memoryview:
            self.uses += 1
            return super().encode(part)

    return CountingCompression()


def test_a_codec_that_changes_in_use_serves_further_averagers_on_its_dht(swarm: Swarm):
    codec = counting_codec()
    register_codec(codec)
    dhts = [swarm.dht(), swarm.dht()]
    for number in range(2):
        tensors = [torch.full((1_000,), float(index)) for index in range(2)]
        averagers = [
            swarm.peer([tensor], 2, dht=dht, compression=codec, prefix=f"{swarm.prefix}{number}")
            for tensor, dht in zip(tensors, dhts, strict=True)
        ]
        step_all(averagers)
        assert all(torch.equal(tensor, torch.full((1_000,), 0.5)) for tensor in tensors)


def rounding_codec(step: float) -> CompressionBase:
    class RoundingCompression(NoCompression):
        compression_type = 79

        def __init__(self, step: float) -> None:
            self.step = torch.tensor(step)  # has no equality of its own

        def lossless(self, dtype: torch.dtype) -> bool:
            return False

        def is_raw(self, dtype: torch.dtype) -> bool:
            return False

        def encode(self, part: torch.Tensor) -> memoryview:
            return super().encode((part / self.step).round() * self.step)

    return RoundingCompression(step)


def test_a_users_codec_works_with_its_settings_and_with_no_others(swarm: Swarm):
    codec = rounding_codec(0.25)
    register_codec(codec)
    tensors = [torch.full((100,), value) for value in (0.0, 0.6)]
    step_all(
        [
            swarm.peer([tensor], size=2, compression=codec, bandwidth=bandwidth)
            for tensor, bandwidth in zip(tensors, (1.0, 0.0), strict=True)
        ]
    )
    # The owner got 0.5 for 0.6, and sent the difference of the average to that: -0.25.
    assert torch.allclose(tensors[0], torch.full((100,), 0.25))
    assert torch.allclose(tensors[1], torch.full((100,), 0.35))
    with pytest.raises(
        InvalidValueError, match=r"compression must be equal to RoundingCompression\(step=tensor"
    ):
        swarm.peer([tensors[0]], size=2, compression=type(codec)(0.01))


@pytest.mark.parametrize(("value", "reason"), [(2.0, "no twos"), (3.0, "as its encoded_nbytes says")])
def test_a_users_codec_that_fails_fails_its_own_member_by_name(swarm: Swarm, value: float, reason: str):
    codec = moody_codec()
    register_codec(codec)
    tensors = [torch.full((10_000,), each) for each in (1.0, 1.0, value)]
    averagers = [
        swarm.peer(
            [tensor],
            size=3,
            min_group_size=2,
            min_matchmaking_time=3.0,
            compression=codec,
            bandwidth=0.0 if index == 2 else None,
        )
        for index, tensor in enumerate(tensors)
    ]
    controls = [averager.step(wait=False, timeout=10.0, allow_retries=False) for averager in averagers]
    with pytest.raises(AllreduceException, match=reason):
        controls[2].result(60)
    for control in controls[:2]:
        control.result(60)
        (excluded,) = control.report.excluded
        assert excluded.member == averagers[2].peer_id.to_base58()
    assert [float(tensor.mean()) for tensor in tensors] == [1.0, 1.0, value]
