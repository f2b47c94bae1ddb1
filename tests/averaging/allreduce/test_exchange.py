"""The tensor bytes of a whole group, moved from hand to hand: exact averages, the same bits at everybody."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.averaging.allreduce import exchange
from shoal.averaging.allreduce.assignment import Assignment, Span
from shoal.averaging.allreduce.exchange import (
    NOT_FINITE,
    Arena,
    ForeignSpan,
    NotFiniteError,
    Offence,
    OwnSpan,
)
from shoal.averaging.load_balancing import load_balance_peers
from shoal.averaging.partition import Layout, Partition
from shoal.compression import BFloat16Compression, CompressionBase, Float16Compression, NoCompression
from shoal.compression.base import tensor_bytes
from shoal.compression.registry import CODECS
from shoal.errors import AllreduceException, ProtocolViolation
from shoal.testing.arena import make_arena, part_tensor, tensor_in

SHAPES = [(300, 7), (), (0,), (1000,)]


class Group:
    """Members that hold random tensors, and their spans."""

    def __init__(
        self,
        size: int,
        codec: CompressionBase,
        dtype: torch.dtype = torch.float32,
        weights: list[float] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(size)
        self.tensors = [
            [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
            for _ in range(size)
        ]
        self.layout = Layout.from_tensors(self.tensors[0], [codec] * len(SHAPES))
        owned = load_balance_peers(self.layout.data_nbytes, [None] * size)
        self.partition = Partition.create(self.layout, owned, part_size_bytes=1024)
        self.weights = weights or [1.0] * size
        self.arenas = [self._arena(tensors) for tensors in self.tensors]
        weights = dict(enumerate(self.weights))
        parts = [len(self.partition.parts_of(me)) for me in range(size)]
        self.spans: list[Span] = list(Assignment.first(parts).spans)
        self.own = [
            OwnSpan(self.partition, span, span.owner, self.arenas[span.owner], weights) for span in self.spans
        ]

    def _arena(self, tensors: list[torch.Tensor]) -> Arena:
        arena = make_arena(self.layout)
        for index, tensor in enumerate(tensors):
            tensor_in(self.layout, arena.snapshot, index).copy_(tensor.reshape(-1))
        return arena

    def foreign(self, me: int, owner: int) -> ForeignSpan:
        return ForeignSpan(self.partition, self.spans[owner], self.arenas[me])

    def exchange(self) -> None:
        members = range(len(self.own))
        foreign = {(me, owner): self.foreign(me, owner) for me in members for owner in members}
        for owner in members:
            for index in range(len(self.own[owner].parts)):
                for sender in reversed(members):  # the order of arrival must not matter
                    if sender != owner:
                        self.send(foreign[sender, owner].to_send(index), owner, sender, index)
                self.own[owner].average(index)
                for receiver in members:
                    if receiver != owner:
                        data = bytes(self.own[owner].to_return(receiver, index))
                        memory = foreign[receiver, owner].receive_into(index, len(data))
                        memory[:] = data
                        foreign[receiver, owner].deliver(index, memory)

    def send(self, data: object, owner: int, sender: int, index: int) -> None:
        raw = bytes(data)  # type: ignore[call-overload]
        memory = self.own[owner].receive_into(sender, index, len(raw))
        memory[:] = raw
        self.own[owner].deliver(sender, index, memory)

    def results(self, me: int) -> list[torch.Tensor]:
        return [tensor_in(self.layout, self.arenas[me].average, index) for index in range(len(SHAPES))]

    def references(self) -> list[torch.Tensor]:
        total = sum(self.weights)
        pairs = [list(zip(self.weights, tensors, strict=True)) for tensors in zip(*self.tensors, strict=True)]
        return [sum(w * t.double() for w, t in pair).reshape(-1) / total for pair in pairs]


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_lossless_averages_are_exact_and_equal_at_everybody(size: int, dtype: torch.dtype):
    group = Group(size, NoCompression(), dtype, weights=[0.5 + member for member in range(size)])
    group.exchange()
    for me in range(size):
        assert group.arenas[me].average == group.arenas[0].average
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps)
    for index, reference in enumerate(group.references()):
        scale = torch.stack([tensors[index].double().abs().reshape(-1) for tensors in group.tensors]).mean(0)
        error = (group.results(0)[index].double() - reference).abs()
        assert bool((error <= tolerance * scale).all())


def test_float16_keeps_the_mean_of_all_members_and_comes_close_to_the_average():
    group = Group(4, Float16Compression())
    group.exchange()
    for index, reference in enumerate(group.references()):
        results = torch.stack([group.results(me)[index].double() for me in range(4)])
        assert torch.allclose(results, reference.expand_as(results), atol=5e-3)
        # owners take the average itself, so that their part of the mean moves by what the codec lost of the others'
        assert torch.allclose(results.mean(0), reference, atol=1e-3)


def test_float16_bounds_the_error_by_its_resolution():
    group = Group(2, Float16Compression())
    group.exchange()
    largest = max(
        tensor.abs().max().item() for tensors in group.tensors for tensor in tensors if tensor.numel()
    )
    for index, reference in enumerate(group.references()):
        for me in range(2):
            error = (group.results(me)[index].double() - reference).abs()
            assert bool((error <= 3 * largest * 2**-11).all())


def test_values_that_are_not_finite_are_left_out_and_name_their_sender():
    group = Group(2, NoCompression())
    part = group.own[0].parts[0]
    bad = torch.full((part.count,), float("nan"))
    group.send(bad.numpy().tobytes(), owner=0, sender=1, index=0)
    assert group.own[0].average(0) == {1: Offence(NOT_FINITE, 0)}
    own = part_tensor(group.layout, group.arenas[0].snapshot, part)
    assert torch.equal(part_tensor(group.layout, group.arenas[0].average, part), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1e9, 5e-324, 5e-324], [1.0, 0.3, 0.3]], ids=str)
def test_no_average_hides_an_element_that_is_not_finite(dtype: torch.dtype, bad: list[float], weights):
    """A single element is enough, also of senders whose weights hardly count."""
    group = Group(3, NoCompression(), dtype, weights=weights)
    part = group.own[0].parts[0]
    for sender, value in enumerate(bad, start=1):
        values = torch.ones(part.count, dtype=dtype)
        values[part.count // 2] = value
        group.send(tensor_bytes(values), owner=0, sender=sender, index=0)
    assert group.own[0].average(0) == dict.fromkeys(range(1, len(bad) + 1), Offence(NOT_FINITE, 0))
    own = part_tensor(group.layout, group.arenas[0].snapshot, part)
    assert torch.equal(part_tensor(group.layout, group.arenas[0].average, part), own)


def test_a_sender_without_weight_is_looked_at_all_the_same():
    group = Group(2, NoCompression(), weights=[1.0, 0.0])
    bad = torch.full((group.own[0].parts[0].count,), math.nan)
    group.send(tensor_bytes(bad), owner=0, sender=1, index=0)
    assert group.own[0].average(0) == {1: Offence(NOT_FINITE, 0)}


def test_a_healthy_part_is_looked_at_once_at_its_owner(monkeypatch: pytest.MonkeyPatch):
    """Each look is a pass over memory, and there would be one for each sender."""
    looks: list[object] = []
    monkeypatch.setattr(exchange, "is_finite", lambda values, dtype: looks.append(values) or True)
    group = Group(4, NoCompression())
    for sender in (1, 2, 3):
        group.send(group.foreign(sender, 0).to_send(0), owner=0, sender=sender, index=0)
    group.own[0].average(0)
    assert len(looks) == 1


def test_plain_parts_leave_from_the_memory_where_they_lie():
    group = Group(2, NoCompression())
    sent = group.foreign(0, 1).to_send(1)
    part = group.own[1].parts[1]
    sent[:4] = bytes(4)
    assert part_tensor(group.layout, group.arenas[0].snapshot, part)[0] == 0


def test_a_codec_of_the_users_own_is_asked_although_it_inherits(monkeypatch: pytest.MonkeyPatch):
    class Doubling(NoCompression):
        compression_type = 77

        def encode(self, part: torch.Tensor) -> memoryview:
            return super().encode(part * 2)

    codec = Doubling()
    monkeypatch.setitem(CODECS._codecs, codec.compression_type, codec)
    group = Group(2, codec)
    part = group.own[1].parts[0]
    sent = torch.frombuffer(group.foreign(0, 1).to_send(0), dtype=torch.float32)
    assert torch.equal(sent, 2 * part_tensor(group.layout, group.arenas[0].snapshot, part))


def test_values_whose_sum_overflows_have_an_average():
    group = Group(3, NoCompression())
    for arena, value in zip(group.arenas, (2e38, 2e38, 1.0), strict=True):
        tensor_in(group.layout, arena.snapshot, 0).fill_(value)
    group.exchange()
    for me in range(3):
        assert torch.allclose(group.results(me)[0], torch.tensor(4e38 / 3))


def test_own_values_that_are_not_finite_are_an_error():
    group = Group(2, NoCompression())
    tensor_in(group.layout, group.arenas[0].snapshot, 0).fill_(float("inf"))
    with pytest.raises(AllreduceException, match="own values are not finite"):
        group.own[0].average(0)


def test_a_member_too_far_from_the_average_for_its_dtype_is_named():
    group = Group(3, BFloat16Compression(), weights=[4.0, 4.0, 1.0])
    for arena, sign in zip(group.arenas, (1, 1, -1), strict=True):
        tensor_in(group.layout, arena.snapshot, 0).fill_(sign * 3e38)
    for sender in (1, 2):
        span = ForeignSpan(group.partition, group.spans[0], group.arenas[sender])
        group.send(span.to_send(0), owner=0, sender=sender, index=0)
    offenders = group.own[0].average(0)
    assert list(offenders) == [2]
    assert "further from the average" in offenders[2].reason
    assert offenders[2].kept == 1  # this part is averaged with it all the same


def test_a_part_is_averaged_over_the_weights_that_arrived():
    group = Group(3, NoCompression(), weights=[1.0, 2.0, 5.0])
    span = ForeignSpan(group.partition, group.spans[0], group.arenas[1])
    group.send(span.to_send(0), owner=0, sender=1, index=0)  # nothing comes from member 2
    assert group.own[0].average(0) == {}
    part = group.own[0].parts[0]
    mine, other = (part_tensor(group.layout, group.arenas[me].snapshot, part).double() for me in (0, 1))
    result = part_tensor(group.layout, group.arenas[0].average, part)
    assert torch.allclose(result.double(), (mine + 2 * other) / 3, atol=1e-6)


def test_a_part_to_which_nobody_contributes_is_an_error():
    group = Group(2, NoCompression(), weights=[0.0, 1.0])
    with pytest.raises(AllreduceException, match="nobody contributes"):
        group.own[0].average(0)


@pytest.mark.parametrize("codec", [NoCompression(), Float16Compression()])
def test_who_sends_nothing_gets_the_average_itself(codec: CompressionBase):
    group = Group(2, codec, weights=[1.0, 0.0])
    part = group.own[0].parts[0]
    group.own[0].average(0)
    span = ForeignSpan(group.partition, group.spans[0], group.arenas[1])
    span.sends = False
    memory = span.receive_into(0, part.nbytes)
    memory[:] = bytes(group.own[0].to_return(1, 0))
    span.deliver(0, memory)
    average, received = (part_tensor(group.layout, group.arenas[me].average, part) for me in (0, 1))
    assert torch.equal(received, codec.decode(bytes(codec.encode(average)), torch.float32, part.count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spread_of_a_small_span_is_exact_and_changes_nothing(dtype: torch.dtype):
    group = Group(2, NoCompression(), dtype)
    before = [bytes(arena.snapshot) for arena in group.arenas]
    group.exchange()
    assert all(arena.snapshot == old for arena, old in zip(group.arenas, before, strict=True))
    distance = average = 0.0
    for mine, other in zip(*group.tensors, strict=True):
        mean = (mine.double() + other.double()) / 2
        distance += ((mine - mean).square().sum() + (other - mean).square().sum()).item() / 2
        average += mean.square().sum().item()
    sums = [own.spread() for own in group.own]
    assert sum(one[0] or 0.0 for one in sums) == pytest.approx(distance, rel=1e-5)
    assert sum(one[1] or 0.0 for one in sums) == pytest.approx(average, rel=1e-5)


@pytest.mark.parametrize("codec", [NoCompression(), Float16Compression()])
def test_averages_that_are_not_finite_are_refused(codec: CompressionBase):
    group = Group(2, codec)
    span = ForeignSpan(group.partition, group.spans[0], group.arenas[1])
    part = span.parts[0]
    bad = codec.encode(torch.full((part.count,), float("nan")))
    memory = span.receive_into(0, part.nbytes)
    memory[:] = bad
    with pytest.raises(NotFiniteError) as caught:
        span.deliver(0, memory)
    assert caught.value.member == 0


@pytest.mark.parametrize("extra", [1, -1])
def test_a_payload_of_another_size_is_a_violation(extra: int):
    group = Group(2, NoCompression())
    nbytes = group.own[0].parts[0].nbytes
    with pytest.raises(ProtocolViolation, match=f"expected {nbytes} bytes"):
        group.own[0].receive_into(1, 0, nbytes + extra)
    with pytest.raises(ProtocolViolation, match=f"expected {nbytes} bytes"):
        ForeignSpan(group.partition, group.spans[0], group.arenas[1]).receive_into(0, nbytes + extra)


def test_parts_may_come_in_any_order_each_once():
    group = Group(2, NoCompression())
    span = ForeignSpan(group.partition, group.spans[0], group.arenas[1])
    parts = list(enumerate(group.own[0].parts))
    for index, part in reversed(parts):
        assert len(group.own[0].receive_into(1, index, part.nbytes)) == part.nbytes
        assert len(span.receive_into(index, part.nbytes)) == part.nbytes
    for index in (0, len(parts)):
        with pytest.raises(ProtocolViolation, match="no part of the span, or came before"):
            group.own[0].receive_into(1, index, 8)
        with pytest.raises(ProtocolViolation, match="no part of the span, or came before"):
            span.receive_into(index, 8)


def test_nothing_of_an_offender_is_averaged_after_its_offence():
    """The first parts of each member are in the average and no others, so that a report can say which."""
    group = Group(2, NoCompression())
    span = ForeignSpan(group.partition, group.spans[0], group.arenas[1])
    bad = torch.full((span.parts[0].count,), float("nan"))
    group.send(bad.numpy().tobytes(), owner=0, sender=1, index=0)
    group.send(span.to_send(1), owner=0, sender=1, index=1)  # came before the first one was looked at
    assert group.own[0].average(0) == {1: Offence(NOT_FINITE, 0)}
    assert group.own[0].average(1) == {}
    part = group.own[0].parts[1]
    average, own = (
        part_tensor(group.layout, area, part) for area in (group.arenas[0].average, group.arenas[0].snapshot)
    )
    assert torch.equal(average, own)


def test_a_span_of_a_repair_is_a_run_of_parts_of_another_owner():
    group = Group(3, NoCompression())
    first = group.spans[2]
    taken = Span(first.id, 0, first.first + 1, 2)
    own = OwnSpan(group.partition, taken, 0, group.arenas[0], {0: 1.0, 1: 1.0})
    foreign = ForeignSpan(group.partition, taken, group.arenas[1])
    assert own.parts == foreign.parts == group.partition.parts[first.first + 1 : first.first + 3]
    for index, part in enumerate(own.parts):
        data = bytes(foreign.to_send(index))
        own.receive_into(1, index, len(data))[:] = data
        own.deliver(1, index, memoryview(bytearray(data)))
        assert own.average(index) == {}
        mine, other = (part_tensor(group.layout, group.arenas[me].snapshot, part).double() for me in (0, 1))
        average = part_tensor(group.layout, group.arenas[0].average, part)
        assert torch.allclose(average.double(), (mine + other) / 2, atol=1e-6)
