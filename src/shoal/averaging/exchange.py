"""The tensor bytes of one round at one member: parts that arrive for its own span, and averages that arrive
for the others'.

No I/O and no waiting: :mod:`.round` moves the bytes and asks :mod:`.allreduce` what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shoal.averaging.partition import Part, Partition
from shoal.averaging.reduction import apply_difference, encode_difference, is_finite, reduce_part
from shoal.compression.base import Bytes, tensor_bytes
from shoal.errors import AllreduceException, ProtocolViolation

HELD_BYTES = 8 << 20
"""Memory for parts of one sender that wait for slower members; its next ones then stay on the wire."""


@dataclass(frozen=True)
class Arena:
    """Both areas of the shared memory, as one-dimensional uint8 tensors of the layout's size."""

    snapshot: torch.Tensor
    average: torch.Tensor


class NotFiniteError(ProtocolViolation):
    """A member sent NaN or infinity."""

    def __init__(self, member: int) -> None:
        super().__init__("sent values that are not finite (NaN or infinity)")
        self.member = member


def _check_payload(part: Part, expected: int, tag: int, length: int) -> None:
    if tag != expected or length != part.nbytes:
        raise ProtocolViolation(
            f"payload {tag} of {length} bytes; expected {expected} of {part.nbytes} bytes"
        )


class OwnSpan:
    """The span that this member averages: what has arrived from whom, the averages, and what goes back to
    whom.

    A part is averaged in one go when all of it is there, in the members' order, so that its average does not
    depend on the order of arrival.
    """

    def __init__(self, partition: Partition, me: int, arena: Arena, weights: Mapping[int, float]) -> None:
        """``weights``: of every contributor, in the members' order."""
        self.parts = partition.parts_of(me)
        self._weights = dict(weights)
        self._partition = partition
        self._layout = partition.layout
        self._me = me
        self._arena = arena
        self._arrived: dict[int, dict[int, memoryview]] = {}
        self._expected = dict.fromkeys(weights, 0)
        self._spare: dict[int, list[bytearray]] = {}
        self._differences: dict[tuple[int, int], memoryview] = {}

    def receive_into(self, sender: int, tag: int, length: int) -> memoryview:
        """Memory for the next part of a sender; :class:`ProtocolViolation` if it is not the next one."""
        expected = self._expected[sender]
        if expected >= len(self.parts):
            raise ProtocolViolation(f"payload {tag} after the last part")
        part = self.parts[expected]
        _check_payload(part, expected, tag, length)
        self._expected[sender] += 1
        spare = self._spare.get(part.nbytes)
        return memoryview(spare.pop() if spare else bytearray(part.nbytes))

    def deliver(self, sender: int, index: int, data: memoryview) -> None:
        """The part that was received is complete."""
        self._arrived.setdefault(index, {})[sender] = data

    def average(self, index: int) -> None:
        """Average a part that every contributor has delivered; the average lies in the arena from then on.

        :raises NotFiniteError: a sender's values are not finite
        :raises AllreduceException: they are, but their sum is not
        """
        part = self.parts[index]
        codec, dtype = self._layout.codec_of(part), self._layout.dtype_of(part)
        arrived = self._arrived.pop(index, {})
        decoded: dict[int, torch.Tensor] = {}
        for sender, data in sorted(arrived.items()):
            decoded[sender] = codec.decode(data, dtype, part.count)
            if not is_finite(decoded[sender]):
                raise NotFiniteError(sender)
        out = self._layout.part_view(self._arena.average, part)
        inputs = {**decoded, self._me: self._layout.part_view(self._arena.snapshot, part)}
        senders = [member for member in self._weights if member in inputs]
        reduce_part(
            [inputs[sender] for sender in senders], [self._weights[sender] for sender in senders], out
        )
        if not is_finite(out):
            raise AllreduceException("the sum of the members' values exceeds the range of their dtype")
        if not codec.lossless(dtype):
            for sender, values in decoded.items():
                self._differences[sender, index] = encode_difference(codec, out, values)
        for data in arrived.values():
            buffer = data.obj
            if isinstance(buffer, bytearray):
                self._spare.setdefault(part.nbytes, []).append(buffer)

    def to_return(self, member: int, index: int) -> Bytes:
        """What a member gets back for one part: the average, or under a lossy codec its encoded difference."""
        part = self.parts[index]
        difference = self._differences.pop((member, index), None)
        if difference is not None:
            return difference
        codec = self._layout.codec_of(part)
        return codec.encode(self._layout.part_view(self._arena.average, part))


class ForeignSpan:
    """The span of another owner: what this member sends of it, and the averages that come back."""

    def __init__(self, partition: Partition, owner: int, arena: Arena) -> None:
        self.parts = partition.parts_of(owner)
        self._owner = owner
        self._layout = partition.layout
        self._arena = arena
        self._expected = 0

    def to_send(self, index: int) -> Bytes:
        """This member's version of one part, encoded."""
        part = self.parts[index]
        return self._layout.codec_of(part).encode(self._layout.part_view(self._arena.snapshot, part))

    def receive_into(self, tag: int, length: int) -> memoryview:
        """Memory for the next average: its place in the arena, if it travels as it is."""
        if self._expected >= len(self.parts):
            raise ProtocolViolation(f"payload {tag} after the last part")
        part = self.parts[self._expected]
        _check_payload(part, self._expected, tag, length)
        self._expected += 1
        if self._layout.codec_of(part).is_raw(self._layout.dtype_of(part)):
            return tensor_bytes(self._layout.part_view(self._arena.average, part))
        return memoryview(bytearray(length))

    def deliver(self, index: int, data: memoryview) -> None:
        """An average has arrived whole: it lies in the arena from now on.

        :raises ProtocolViolation: it does not decode, or is not finite
        """
        part = self.parts[index]
        codec, dtype = self._layout.codec_of(part), self._layout.dtype_of(part)
        out = self._layout.part_view(self._arena.average, part)
        if codec.lossless(dtype):
            codec.decode(data, dtype, part.count, out)
        else:
            difference = codec.decode(data, dtype, part.count)
            apply_difference(self._layout.part_view(self._arena.snapshot, part), difference, out)
        if not is_finite(out):
            raise NotFiniteError(self._owner)
