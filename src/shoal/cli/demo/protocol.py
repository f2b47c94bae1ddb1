"""What a worker and the terminal that started it say to each other: JSON objects, one a line.

The terminal writes to the worker's standard input: first its :class:`Assignment`, then commands. A worker whose input
ends has lost its terminal, and ends too. The worker writes reports to its standard output, and nothing else. Both sides
validate what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from shoal.cli.demo.settings import Settings
from shoal.errors import ProtocolViolation

MAX_LINE_BYTES = 1 << 16

Name = Annotated[str, Meta(min_length=1, max_length=40, pattern=r"^[A-Za-z0-9 _-]+$")]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


class State(Enum):
    """What a peer is doing; ``KILLED`` and ``FAILED`` are said of it by its terminal."""

    STARTING = "loads torch"
    READY = "ready"
    CATCHING_UP = "catching up"
    TRAINING = "training"
    SEARCHING = "searching"
    AVERAGING = "averaging"
    FINISHED = "finished"
    KILLED = "killed"
    FAILED = "failed"

    @property
    def averages(self) -> bool:
        """Whether the peer takes part in the rounds."""
        return self in (State.READY, State.TRAINING, State.SEARCHING, State.AVERAGING)

    @property
    def is_final(self) -> bool:
        return self in (State.FINISHED, State.KILLED, State.FAILED)


class Part(Struct, frozen=True):
    """Which of the images a peer has: one of the founders' parts, or one of the reserve."""

    index: Count
    reserve: bool = False


# From the terminal


class Assignment(Struct, frozen=True, tag="assignment"):
    """All that a worker is told before it begins.

    :param newcomer: the swarm trains already: begin with other weights and catch up by averaging
    :param seed: of the newcomer's weights and of the order in which the worker draws its images
    """

    name: Name
    settings: Settings
    part: Part
    initial_peers: tuple[str, ...]
    host: str
    seed: Count
    newcomer: bool = False


class Begin(Struct, frozen=True, tag="begin"):
    """To a founder that is ready: start to train. To a newcomer that stands by: catch up and train."""


class Hold(Struct, frozen=True, tag="hold"):
    """In your next round, stop when the all-reduce has begun, say so, and wait to be killed."""


class Stop(Struct, frozen=True, tag="stop"):
    """Leave the swarm in order, at once."""


Command = Begin | Hold | Stop

# From the worker, and (the status) between peers through the DHT


class Status(Struct, frozen=True, tag="status"):
    """What a peer shows of itself.

    :param classes: the digits that its images show
    :param round: rounds of the swarm that are behind it
    :param group: members of its last group, itself included; 0: none yet
    :param loss: mean training loss on its own images in the last round
    :param accuracy: on the held-out images, after the last average
    :param nbytes: tensor bytes sent and received so far
    :param seconds: from the start of the last step of averaging to its result
    """

    name: Name
    peer_id: Annotated[str, Meta(max_length=64)]
    part: Part
    classes: Annotated[tuple[Count, ...], Meta(max_length=10)]
    state: State
    round: Count = 0
    group: Count = 0
    loss: float | None = None
    accuracy: Fraction | None = None
    nbytes: Count = 0
    seconds: Annotated[float, Meta(ge=0)] = 0.0


class Loaded(Struct, frozen=True, tag="loaded"):
    """The worker has its images and its averager. A newcomer stands by until :class:`Begin`."""

    classes: tuple[Count, ...]
    samples: Count


class Ready(Struct, frozen=True, tag="ready"):
    """The worker is about to train. A founder waits for :class:`Begin` before it does."""

    status: Status


class Holding(Struct, frozen=True, tag="holding"):
    """The worker is in the middle of a round, as asked by :class:`Hold`: its group waits for its tensors."""

    round: Count
    group: Count


class Finished(Struct, frozen=True, tag="finished"):
    """The worker has done all rounds and left the swarm."""

    accuracy: Fraction
    rounds_averaged: Count


Report = Status | Loaded | Ready | Holding | Finished

_decode_assignment = msgspec.json.Decoder(Assignment).decode
_decode_command: Callable[[bytes], Command] = msgspec.json.Decoder(Command).decode
_decode_report: Callable[[bytes], Report] = msgspec.json.Decoder(Report).decode


def encode(message: Assignment | Command | Report) -> bytes:
    """One line, with its end."""
    return msgspec.json.encode(message) + b"\n"


def decode_assignment(line: bytes) -> Assignment:
    """:raises ProtocolViolation: the line is no valid assignment"""
    try:
        return _decode_assignment(line)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"not an assignment of the demo: {error}") from error


def decode_command(line: bytes) -> Command:
    """:raises ProtocolViolation: the line is no valid command"""
    try:
        return _decode_command(line)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"not a command of the demo: {error}") from error


def decode_report(line: bytes) -> Report:
    """:raises ProtocolViolation: the line is no valid report"""
    try:
        return _decode_report(line)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"not a report of the demo: {error}") from error
