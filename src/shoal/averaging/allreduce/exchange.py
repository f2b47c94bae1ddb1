"""The tensor bytes of one round at one member: parts that arrive for its own span, and averages that arrive
for the others'.

No I/O and no waiting: :mod:`.round` moves the bytes and asks :mod:`.core` what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.averaging.allreduce.assignment import Span
from shoal.averaging.allreduce.reduction import (
    OutOfRangeError,
    apply_difference,
    encode_difference,
    encode_part,
    reduce_part,
    reduce_wide,
)
from shoal.averaging.allreduce.spread import SpreadSample
from shoal.averaging.elements import Elements, elements_in, is_finite
from shoal.averaging.formats import Bytes, Format
from shoal.averaging.partition import Part, Partition
from shoal.errors import AllreduceException, ProtocolViolation, UsageError
from shoal.utils.dtypes import DType

HELD_BYTES = 8 << 20
"""Memory for parts of one sender that wait for slower members; its next ones then stay on the wire."""


@dataclass(frozen=True)
class Arena:
    """Both areas of the shared memory, as bytes of the layout's size."""

    snapshot: memoryview
    average: memoryview


def _bytes_of(memory: memoryview, part: Part) -> memoryview:
    """A part of an area. A slice of memory costs a tenth of a slice of a tensor, whose code the cache has lost by the
    time when the next part comes.
    """
    return memory[part.offset : part.offset + part.memory_nbytes]


NOBODY_CONTRIBUTED = "nobody contributes: each member's weight is 0, or it was excluded"
NOT_FINITE = "it sent values that are not finite (NaN or infinity)"


class NotFiniteError(ProtocolViolation):
    """A member sent NaN or infinity."""

    def __init__(self, member: int) -> None:
        super().__init__(NOT_FINITE)
        self.member = member


class _Places:
    """Which parts of a span one member may still send. They may come in any order, each once."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._is_open = bytearray(b"\x01" * len(parts))

    def take(self, tag: int, length: int) -> Part:
        """The part that a payload brings; :class:`ProtocolViolation` if it is none, or was brought before."""
        if tag >= len(self._parts) or not self._is_open[tag]:
            raise ProtocolViolation(f"payload {tag}, which is no part of the span, or came before")
        part = self._parts[tag]
        if length != part.nbytes:
            raise ProtocolViolation(f"payload {tag} of {length} bytes; expected {part.nbytes} bytes")
        self._is_open[tag] = 0
        return part


class Offence(NamedTuple):
    """Why no more is taken from a sender, and how many of its parts, the first ones, are in the average."""

    reason: str
    kept: int


class OwnSpan:
    """A span that this member averages: what has arrived from which sender, the averages, and what goes back.

    A part is averaged in one go from what has arrived, in the members' order, so that its average does not depend on
    the order of arrival.
    """

    def __init__(
        self, partition: Partition, span: Span, me: int, arena: Arena, weights: Mapping[int, float]
    ) -> None:
        """``weights``: of the contributors, as far as they are known; see :meth:`set_weight`."""
        self.parts = partition.parts[span.first : span.first + span.count]
        self._weights = dict(weights)
        self._partition = partition
        self._layout = partition.layout
        self._me = me
        self._arena = arena
        self._arrived: dict[int, dict[int, memoryview]] = {}
        self._places: dict[int, _Places] = {}
        self._spare: dict[int, list[npt.NDArray[np.uint8]]] = {}
        self._differences: dict[tuple[int, int], memoryview] = {}
        self._sample = SpreadSample(len(self.parts))

    def set_weight(self, member: int, weight: float) -> None:
        """A member contributes with this weight; this member itself does so from its snapshot."""
        self._weights[member] = weight

    def receive_into(self, sender: int, tag: int, length: int) -> memoryview:
        """Memory for a part of a sender; :class:`ProtocolViolation` if it is none, or has come before."""
        part = self._places.setdefault(sender, _Places(self.parts)).take(tag, length)
        spare = self._spare.get(part.nbytes)
        # Not a bytearray: that is filled with zeros first.
        return (spare.pop() if spare else np.empty(part.nbytes, np.uint8)).data

    def deliver(self, sender: int, index: int, data: memoryview) -> None:
        """The part that was received is complete."""
        self._arrived.setdefault(index, {})[sender] = data

    def average(self, index: int) -> dict[int, Offence]:
        """Average what has been delivered of a part; the average lies in the arena from then on.

        :returns: members whose version was left out, or that cannot be told the average. What has come of them beyond
          that is forgotten, so that the first parts of each member are in the average, and no others
        :raises AllreduceException: no version with a weight above 0 is left, or this member's own is not finite
        """
        part = self.parts[index]
        form, dtype = self._layout.format_of(part), self._layout.dtype_of(part)
        arrived = self._arrived.pop(index, {})
        received, left_out = self._decode(part, arrived)
        out = self._layout.part_in(self._arena.average, part)
        values, weights = self._contributions(part, received)
        reduce_part(values, weights, out, dtype)
        # A finite average has only finite terms: as a rule nobody looks at these.
        if not is_finite(out, dtype):
            left_out |= _take_not_finite(received, dtype)
            values, weights = self._contributions(part, received)
            _reduce_carefully(values, weights, out, dtype)
        offenders = {sender: Offence(reason, index) for sender, reason in left_out.items()}
        if self._sample.wants(index):
            self._sample.add(index, values, out, dtype)
        if not form.is_lossless:
            untold = self._encode_differences(index, form, out, received)
            offenders |= {sender: Offence(reason, index + 1) for sender, reason in untold.items()}
        for waiting in self._arrived.values():
            for sender in offenders:
                waiting.pop(sender, None)
        self._recycle(part, arrived.values())
        return offenders

    def _contributions(
        self, part: Part, received: Mapping[int, Elements]
    ) -> tuple[list[Elements], list[float]]:
        """The versions that count, in the members' order, and their weights.

        :raises AllreduceException: there is none
        """
        inputs = dict(received)
        if self._me in self._weights:
            inputs[self._me] = self._layout.part_in(self._arena.snapshot, part)
        senders = sorted(sender for sender in inputs if self._weights.get(sender, 0) > 0)
        if not senders:
            raise AllreduceException(NOBODY_CONTRIBUTED)
        return [inputs[sender] for sender in senders], [self._weights[sender] for sender in senders]

    def _encode_differences(
        self, index: int, form: Format, average: Elements, received: Mapping[int, Elements]
    ) -> dict[int, str]:
        offenders: dict[int, str] = {}
        for sender, decoded in received.items():
            try:
                self._differences[sender, index] = encode_difference(form, average, decoded)
            except OutOfRangeError as e:
                offenders[sender] = str(e)  # it cannot get the average; a wrong one would be worse
        return offenders

    def _decode(
        self, part: Part, arrived: Mapping[int, memoryview]
    ) -> tuple[dict[int, Elements], dict[int, str]]:
        """What has come of a part, and why the rest of it is no such part. Nothing is said of NaN in what counts."""
        form, dtype = self._layout.format_of(part), self._layout.dtype_of(part)
        decoded: dict[int, Elements] = {}
        offenders: dict[int, str] = {}
        for sender, data in arrived.items():
            try:
                values = elements_in(data, dtype) if form.is_plain else form.decode(data, part.count)
            except ProtocolViolation as e:
                offenders[sender] = str(e)
                continue
            except UsageError as e:
                raise AllreduceException(str(e)) from e  # a mistake in this member's own codec
            decoded[sender] = values
        weightless = {sender: decoded[sender] for sender in decoded if not self._weights.get(sender, 0) > 0}
        for sender, reason in _take_not_finite(weightless, dtype).items():  # no average would show it
            del decoded[sender]
            offenders[sender] = reason
        return decoded, offenders

    def _recycle(self, part: Part, memory: Iterable[memoryview]) -> None:
        for data in memory:
            if isinstance(data.obj, np.ndarray):
                self._spare.setdefault(part.nbytes, []).append(data.obj)

    def clear(self) -> None:
        """Nothing more is averaged or returned: let go of all parts and differences."""
        self._arrived.clear()
        self._spare.clear()
        self._differences.clear()

    def spread(self) -> tuple[float | None, float | None]:
        """How far apart the senders were in this span; see :class:`.messages.SpanAveraged`."""
        return self._sample.total(sum(part.count for part in self.parts))

    def to_return(self, member: int, index: int) -> Bytes:
        """What a member gets back for one part: the average, or under a lossy codec its encoded difference."""
        part = self.parts[index]
        difference = self._differences.pop((member, index), None)
        if difference is not None:
            return difference
        if self._layout.is_plain(part):
            return _bytes_of(self._arena.average, part)
        return encode_part(self._layout.format_of(part), self._layout.part_in(self._arena.average, part))


def _take_not_finite(received: dict[int, Elements], dtype: DType) -> dict[int, str]:
    """Take the versions with NaN or infinity out of ``received``; returns their senders, with the reason."""
    senders = [sender for sender, values in received.items() if not is_finite(values, dtype)]
    for sender in senders:
        del received[sender]
    return dict.fromkeys(senders, NOT_FINITE)


def _reduce_carefully(
    values: Sequence[Elements], weights: Sequence[float], out: Elements, dtype: DType
) -> None:
    """Average versions of which all but this member's own are finite, and whose sum may overflow.

    :raises AllreduceException: this member's own is not finite
    """
    if not all(is_finite(version, dtype) for version in values):
        raise AllreduceException("this member's own values are not finite")
    reduce_part(values, weights, out, dtype)
    if not is_finite(out, dtype):
        reduce_wide(values, weights, out, dtype)


class ForeignSpan:
    """A span of another owner: what this member sends of it, and the averages that come back."""

    def __init__(self, partition: Partition, span: Span, arena: Arena) -> None:
        self.parts = partition.parts[span.first : span.first + span.count]
        self._owner = span.owner
        self._layout = partition.layout
        self._arena = arena
        self._places = _Places(self.parts)
        self.sends = True
        """False for a member with weight 0: then the averages themselves come back, also under a lossy codec."""

    def to_send(self, index: int) -> Bytes:
        """This member's version of one part, encoded."""
        part = self.parts[index]
        if self._layout.is_plain(part):
            return _bytes_of(self._arena.snapshot, part)
        return encode_part(self._layout.format_of(part), self._layout.part_in(self._arena.snapshot, part))

    def receive_into(self, tag: int, length: int) -> memoryview:
        """Memory for an average: its place in the arena, if it travels as it is."""
        part = self._places.take(tag, length)
        if self._layout.format_of(part).is_raw:
            return _bytes_of(self._arena.average, part)
        return memoryview(bytearray(length))

    def deliver(self, index: int, data: memoryview) -> None:
        """An average has arrived whole: it lies in the arena from now on.

        :raises ProtocolViolation: it does not decode, or is not finite
        """
        part = self.parts[index]
        form, dtype = self._layout.format_of(part), self._layout.dtype_of(part)
        out = self._layout.part_in(self._arena.average, part)
        if form.is_plain:
            assert data.obj is self._arena.average.obj  # it has come to where receive_into() said
        elif form.is_lossless or not self.sends:
            form.decode(data, part.count, out)
        else:
            difference = form.decode(data, part.count)
            apply_difference(self._layout.part_in(self._arena.snapshot, part), difference, out, dtype)
        if not is_finite(out, dtype):
            raise NotFiniteError(self._owner)
