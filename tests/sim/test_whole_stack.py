"""Whole peers (DHT, search and rounds) on the simulated network, struck by faults that seeds choose."""

from __future__ import annotations

import pytest
from tests.sim.fault_script import FAULTS, Story, Violation, commit, sweep
from tests.swept import rest_swept

SMALL = (2, 3, 4)
"""Sizes of swarms that take less than a second."""


@pytest.mark.parametrize("seed", rest_swept(range(20), kept=8))
def test_a_small_swarm(seed: int):
    assert Story(seed, SMALL).play()


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(20))
def test_a_swarm_of_up_to_sixteen(seed: int):
    assert Story(100 + seed).play()


def test_a_seed_replays_exactly():
    stories = [Story(8, (3,)) for _ in range(2)]
    assert stories[0].play() == stories[1].play()
    assert stories[0].swarm.log == stories[1].swarm.log
    assert len(stories[0].swarm.log) > 5


def test_a_seed_that_fails_says_how_to_play_it_again(monkeypatch: pytest.MonkeyPatch):
    story = Story(1, SMALL)

    def fail() -> None:
        raise AssertionError("an average is wrong")

    monkeypatch.setattr(story.swarm, "check", fail)
    with pytest.raises(Violation) as caught:
        story.play()
    assert str(caught.value).startswith(f"seed 1 at commit {commit()}: ")
    assert "an average is wrong" in str(caught.value)
    assert story.swarm.log[-1] in str(caught.value)


@pytest.mark.soak
@pytest.mark.parametrize("block", range(30))
def test_swarms_of_up_to_sixteen_soak(block: int):
    endings = sweep(range(1000 + 10 * block, 1010 + 10 * block))
    assert endings["committed"] > 5


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_a_swarm_of_64_soak(seed: int):
    assert Story(seed, (64,)).play() == "committed"


@pytest.mark.soak
@pytest.mark.parametrize("kind", FAULTS)
def test_every_kind_of_fault_happens_soak(kind: str):
    """It is one of those that seeds choose."""
    assert any(kind in Story(seed).kinds for seed in range(200))
