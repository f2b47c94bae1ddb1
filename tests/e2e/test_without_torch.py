"""Torch stays out of background processes that do not need it: it takes seconds, and 140 MB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.e2e.real_swarm import Swarm, step_all

import shoal
from shoal.compression.registry import CODECS


def has_torch(averager: shoal.DecentralizedAverager) -> bool:
    return "libtorch" in Path(f"/proc/{averager.dht.background.pid}/maps").read_text()


@pytest.mark.sweep
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is in a process")
def test_rounds_and_states_of_plain_tensors_do_without_and_halves_bring_it(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
):
    own = [codec for codec in CODECS._codecs.values() if codec.compression_type < 64]
    monkeypatch.setattr(
        CODECS, "_codecs", {codec.compression_type: codec for codec in own}
    )  # no user's, of other tests
    dhts = [swarm.own_dht(), swarm.own_dht()]
    plain = [[torch.full((1000,), float(index)), torch.zeros(3, dtype=torch.float64)] for index in range(2)]
    averagers = [swarm.peer(own, 2, dht=dht) for own, dht in zip(plain, dhts, strict=True)]
    step_all(averagers)
    assert plain[0][0].tolist() == [0.5] * 1000
    loaded = averagers[1].load_state_from_peers(timeout=60)
    assert loaded is not None
    assert torch.equal(loaded[1][0], plain[0][0])
    assert not any(map(has_torch, averagers))

    halves = [[torch.full((1000,), float(index)).half()] for index in range(2)]
    prefix = f"{swarm.prefix}halves"
    averagers = [swarm.peer(own, 2, dht=dht, prefix=prefix) for own, dht in zip(halves, dhts, strict=True)]
    step_all(averagers)
    assert halves[0][0].tolist() == [0.5] * 1000
    assert all(map(has_torch, averagers))
