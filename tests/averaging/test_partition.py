from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.averaging.load_balancing import load_balance_peers
from shoal.averaging.partition import ALIGNMENT, MAX_JOINED, MAX_PARTS, Layout, Partition
from shoal.averaging.schema import TensorSchema, TensorSpec
from shoal.compression import (
    BlockwiseQuantization,
    Float16Compression,
    NoCompression,
    Quantile8BitQuantization,
    Uniform8BitQuantization,
)
from shoal.errors import InvalidValueError
from shoal.testing.arena import part_tensor, tensor_in
from shoal.utils.dtypes import AVERAGED, FLOAT32

specs = st.builds(
    TensorSpec,
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from(list(AVERAGED.values())),
    st.sampled_from([0, 1, 5, 6]),
)
schemas = st.lists(specs, min_size=1, max_size=8).map(lambda s: TensorSchema(tuple(s)))


@st.composite
def partitions(draw):
    layout = Layout.from_schema(draw(schemas))
    peers = draw(st.lists(st.none() | st.integers(0, 100), min_size=1, max_size=6))
    owned = load_balance_peers(layout.data_nbytes, peers)
    return Partition.create(layout, owned, draw(st.integers(1, 300)))


@given(schemas)
def test_tensors_lie_one_after_another(schema):
    layout = Layout.from_schema(schema)
    assert layout.nbytes % ALIGNMENT == 0
    assert layout.numel == sum(math.prod(spec.shape) for spec in schema.specs)
    assert layout.data_nbytes == sum(math.prod(s.shape) * s.dtype.itemsize for s in schema.specs)
    end = 0
    for spec, slot in zip(schema.specs, layout.slots, strict=True):
        assert (slot.shape, slot.dtype) == (spec.shape, spec.dtype)
        assert end <= slot.offset < end + ALIGNMENT
        assert slot.offset % slot.dtype.itemsize == 0
        end = slot.offset + slot.nbytes
    assert layout.nbytes - ALIGNMENT < end <= layout.nbytes


@given(schemas)
def test_sections_are_maximal_runs(schema):
    sections = Layout.from_schema(schema).sections
    kinds = [(section.dtype, section.format.wire_id) for section in sections]
    assert kinds == [kind for kind, _ in itertools.groupby((spec.dtype, spec.codec) for spec in schema.specs)]
    for before, after in itertools.pairwise(sections):
        assert before.end_element == after.first_element
        if before.dtype == after.dtype:
            assert after.offset == before.offset + before.nbytes
        else:
            assert after.offset % ALIGNMENT == 0


@given(schemas)
def test_codecs_do_not_move_tensors(schema):
    """Buffers that users fill are laid out before an averager says how they travel."""
    plain = TensorSchema(tuple(TensorSpec(spec.shape, spec.dtype) for spec in schema.specs))
    assert Layout.from_schema(schema).slots == Layout.from_schema(plain).slots


@given(partitions())
def test_parts_cover_every_element_once(partition):
    end = 0
    for index, part in enumerate(partition.parts):
        assert part.index == index
        assert part.start == end
        assert part.count > 0
        end += part.count
    assert end == partition.layout.numel
    end = 0
    for owner, span in enumerate(partition.spans):
        assert span.owner == owner
        assert span.start == end
        end = span.stop
    assert end == partition.layout.numel


@given(partitions())
def test_each_tensor_in_a_part_is_a_segment(partition):
    """Under a codec that is elementwise, a part is one segment."""
    borders = {0, *partition.layout.tensor_ends}
    for part in partition.parts:
        assert min(part.segments) > 0
        assert sum(part.segments) == part.count
        if partition.layout.sections[part.section].format.is_elementwise:
            assert len(part.segments) == 1
            continue
        ends = list(itertools.accumulate(part.segments, initial=part.start))
        assert borders.intersection(range(part.start + 1, part.start + part.count)) == set(ends[1:-1])


def gpt2() -> list[tuple[int, ...]]:
    """The shapes of GPT-2 (124 million parameters)."""
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


@pytest.mark.parametrize("owners", [1, 8, 32])
@pytest.mark.parametrize(
    "codec", [Uniform8BitQuantization(), Quantile8BitQuantization(), BlockwiseQuantization()], ids=repr
)
def test_levels_of_its_own_cost_a_real_model_little(codec, owners):
    schema = TensorSchema(tuple(TensorSpec(s, FLOAT32, codec.compression_type) for s in gpt2()))
    layout = Layout.from_schema(schema)
    owned = load_balance_peers(layout.data_nbytes, [1.0] * owners)
    parts = Partition.create(layout, owned, 1 << 19).parts
    assert sum(part.nbytes for part in parts) <= 1.01 * layout.numel
    assert all(part.nbytes <= 1 << 19 for part in parts)
    assert len(parts) <= layout.numel / (1 << 19) + 2 * owners + 1  # small tensors share parts


@given(partitions())
def test_parts_cross_no_border(partition):
    for part in partition.parts:
        span, section = partition.spans[part.owner], partition.layout.sections[part.section]
        assert max(span.start, section.first_element) <= part.start
        assert part.start + part.count <= min(span.stop, section.end_element)
        assert part.nbytes == partition.layout.format_of(part).encoded_nbytes(part.count)


@given(partitions())
def test_parts_of_owners(partition):
    owned = [partition.parts_of(owner) for owner in range(len(partition.spans))]
    assert tuple(itertools.chain.from_iterable(owned)) == partition.parts
    for span, parts in zip(partition.spans, owned, strict=True):
        assert sum(part.count for part in parts) == span.count


@given(schemas, st.data())
def test_parts_and_tensors_see_the_same_memory(schema, data):
    layout = Layout.from_schema(schema)
    partition = Partition.create(layout, [layout.data_nbytes], data.draw(st.integers(1, 100)))
    area = memoryview(bytearray(layout.nbytes))
    for index in range(len(layout.slots)):
        tensor_in(layout, area, index).fill_(index + 1)
    through_parts = [value for part in partition.parts for value in part_tensor(layout, area, part).tolist()]
    expected = [index + 1 for index, slot in enumerate(layout.slots) for _ in range(slot.count)]
    assert through_parts == expected


def layout_of(*tensors, codecs=None):
    return Layout.from_tensors(tensors, codecs)


def test_part_size_is_after_compression():
    layout = layout_of(torch.zeros(100), torch.zeros(100), codecs=[NoCompression(), Float16Compression()])
    parts = Partition.create(layout, [layout.data_nbytes], 80).parts
    assert [part.count for part in parts] == [20] * 5 + [40, 40, 20]
    assert [part.nbytes for part in parts] == [80] * 7 + [40]


def test_small_tensors_share_a_part():
    layout = layout_of(*(torch.zeros(3) for _ in range(10)))
    assert len(Partition.create(layout, [120], 1 << 19).parts) == 1


def test_part_of_one_element_at_least():
    layout = layout_of(torch.zeros(3, dtype=torch.float64))
    assert [part.count for part in Partition.create(layout, [24], 1).parts] == [1, 1, 1]


def test_spans_are_in_bytes():
    # 64 bytes of float64 are half of the vector's bytes, but a third of its elements.
    layout = layout_of(torch.zeros(8, dtype=torch.float64), torch.zeros(16))
    assert [span.count for span in Partition.create(layout, [64, 64], 1 << 19).spans] == [8, 16]


def test_borders_inside_an_element_move_to_its_beginning():
    layout = layout_of(torch.zeros(3))
    assert [span.count for span in Partition.create(layout, [7, 0, 5], 100).spans] == [1, 0, 2]


def test_nothing_to_average():
    layout = layout_of(torch.zeros(0), torch.zeros(3, 0, dtype=torch.float64))
    partition = Partition.create(layout, [0, 0], 100)
    assert layout.nbytes == 0
    assert partition.parts == ()
    assert partition.parts_of(1) == ()
    assert [span.count for span in partition.spans] == [0, 0]


def test_a_model_of_4_gb():
    layout = Layout.from_schema(TensorSchema((TensorSpec((1 << 30,), FLOAT32),)))
    partition = Partition.create(layout, load_balance_peers(layout.data_nbytes, [None] * 4), 1 << 19)
    assert len(partition.parts) == 8192 / MAX_JOINED


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (1000, [1000]),  # too small to cut
        (1 << 20, [1 << 17] * 8),  # few parts: smaller ones
        (12 << 19, [1 << 19] * 12),
        (24 << 19, [1 << 20] * 12),  # many parts: larger ones
        (100 << 19, [1 << 21] * 25),
    ],
)
def test_uncompressed_parts_follow_the_size_of_the_span(span, expected):
    partition = Partition.create(layout_of(torch.zeros(2 * span // 4)), [span, span], 1 << 19)
    for owner in range(2):
        assert [part.nbytes for part in partition.parts_of(owner)] == expected


@pytest.mark.parametrize(
    ("part_size", "expected"),
    [(1 << 20, 1 << 21), (3 << 19, 3 << 19), (1 << 21, 1 << 21), (1 << 26, 1 << 26)],
)
def test_large_parts_are_not_joined_beyond_what_a_payload_may_have(part_size, expected):
    layout = Layout.from_schema(TensorSchema((TensorSpec((1 << 30,), FLOAT32),)))
    partition = Partition.create(layout, [layout.data_nbytes], part_size)
    assert max(part.nbytes for part in partition.parts) == expected


def test_compressed_parts_are_of_the_size_that_is_asked_for():
    layout = layout_of(torch.zeros(1 << 23), codecs=[Float16Compression()])
    partition = Partition.create(layout, [layout.data_nbytes], 1 << 19)
    assert [part.nbytes for part in partition.parts] == [1 << 19] * 32


def test_too_many_parts_are_refused_before_they_are_made():
    layout = Layout.from_schema(TensorSchema((TensorSpec((1 << 40,), FLOAT32),)))
    with pytest.raises(InvalidValueError, match=f"for {MAX_PARTS} parts"):
        Partition.create(layout, [layout.data_nbytes], 1024)


@pytest.mark.parametrize(("owned", "part_size"), [([11], 10), ([13, -1], 10), ([12], 0)])
def test_bad_arguments(owned, part_size):
    with pytest.raises(InvalidValueError):
        Partition.create(layout_of(torch.zeros(3)), owned, part_size)
