"""What all peers of one demo agree on; the founder publishes it, those who join read it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MIN_PEERS = 2
MAX_PEERS = 8
MIN_ROUNDS = 40
MAX_ROUNDS = 10_000
DEFAULT_PEERS = 4
DEFAULT_ROUNDS = 100

Seconds = Annotated[float, Meta(gt=0, le=600)]


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """The defaults keep the swarm within a point of central training for 2 to 8 peers, with a peer absent for ten
    rounds (tests/cli/demo/test_training.py).

    A step is one update of a model on ``batch_size`` images; learning rate and momentum are those of SGD. After
    ``decay_from`` of the rounds the learning rate falls linearly to zero.
    """

    prefix: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    peers: Annotated[int, Meta(ge=MIN_PEERS, le=MAX_PEERS)] = DEFAULT_PEERS
    rounds: Annotated[int, Meta(ge=MIN_ROUNDS, le=MAX_ROUNDS)] = DEFAULT_ROUNDS
    local_steps: Annotated[int, Meta(ge=1, le=1000)] = 4
    batch_size: Annotated[int, Meta(ge=1, le=1000)] = 32
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 0.2
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    decay_from: Annotated[float, Meta(ge=0, lt=1)] = 0.6
    matchmaking_time: Seconds = 0.5
    """A group that lacks a peer starts after this many seconds: how long the others wait for one that is gone."""
    request_timeout: Seconds = 0.4
    round_timeout: Seconds = 8.0
    """A peer that has found no group for this long looks whether the demo is over."""

    def learning_rate_at(self, round_: int) -> float:
        progress = round_ / self.rounds
        if progress < self.decay_from:
            return self.learning_rate
        return self.learning_rate * max(0.0, 1 - progress) / (1 - self.decay_from)
