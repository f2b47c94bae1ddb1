"""How a state is cut into chunks, where they lie at either side, and what no state can be."""

from __future__ import annotations

import random

import pytest
import torch

from shoal.averaging.codec_formats import CodecFormat, format_by
from shoal.averaging.formats import Format, PlainFormat
from shoal.averaging.state.manifest import (
    CHUNK_ELEMENTS,
    MAX_DIMENSIONS_IN_ALL,
    MAX_METADATA_NBYTES,
    MAX_TENSORS,
    CaptureLayout,
    Manifest,
    ManifestReader,
    aligned,
    metadata_entry,
)
from shoal.averaging.state.messages import TensorEntry
from shoal.compression import Float16Compression, NoCompression
from shoal.errors import ProtocolViolation
from shoal.utils.dtypes import DTYPES, FLOAT32, UINT8


def entries(*tensors: TensorEntry) -> list[TensorEntry]:
    return [metadata_entry(3), *tensors]


def test_tensors_are_cut_into_chunks_whose_sizes_both_sides_know():
    manifest = Manifest(
        entries(
            TensorEntry("float32", (CHUNK_ELEMENTS, 2), 1),
            TensorEntry("bool", (0, 5), 0),
            TensorEntry("int64", (), 0),
        )
    )
    chunks = [manifest.chunk(index) for index in range(manifest.chunk_count)]
    assert [(c.tensor, c.start, c.count, c.nbytes) for c in chunks] == [
        (0, 0, 3, 3),
        (1, 0, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS),
        (1, CHUNK_ELEMENTS, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS),
        (3, 0, 1, 8),
    ]
    assert manifest.nbytes == sum(chunk.nbytes for chunk in chunks)
    assert manifest.offsets == (0, 64, 64 + 8 * CHUNK_ELEMENTS, 64 + 8 * CHUNK_ELEMENTS)
    assert manifest.decoded_nbytes == manifest.offsets[-1] + 64


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [metadata_entry(1)] * (MAX_TENSORS + 1),
        [TensorEntry("float32", (3,), 0)],  # no metadata
        [TensorEntry("uint8", (3, 1), 0)],
        entries(TensorEntry("object", (3,), 0)),
        entries(TensorEntry("float32", (-1,), 0)),
        entries(TensorEntry("float32", (1 << 40, 1 << 40, 0), 0)),
        entries(TensorEntry("float32", (1,) * 65, 0)),
        entries(TensorEntry("float32", (1 << 41,), 0)),  # more than a state may have
        [metadata_entry(MAX_METADATA_NBYTES + 1)],
        entries(*[TensorEntry("int8", (0,) * 64, 0)] * (MAX_DIMENSIONS_IN_ALL // 64)),
        entries(TensorEntry("float32", (3,), 63)),  # no such codec
        entries(TensorEntry("int64", (3,), 1)),  # float16 of integers
    ],
    ids=range(13),
)
def test_what_no_state_can_be_is_refused_before_memory_is_taken(bad: list[TensorEntry]):
    with pytest.raises(ProtocolViolation):
        Manifest(bad)


@pytest.mark.parametrize(("tensors", "nbytes"), [(0, 1), (MAX_TENSORS + 1, 1), (1, -1), (1, 1 << 60)])
def test_an_impossible_offer_is_refused(tensors: int, nbytes: int):
    with pytest.raises(ProtocolViolation):
        ManifestReader(tensors, nbytes)


def test_each_page_of_a_manifest_is_held_to_the_offer():
    float32 = TensorEntry("float32", (2, 2), 0)
    reader = ManifestReader(3, 3 + 16 + 16)
    reader.add([metadata_entry(3), float32])
    assert not reader.is_complete
    with pytest.raises(ProtocolViolation, match="more tensors than the 3"):
        reader.add([float32, float32])
    reader.add([float32])
    assert reader.is_complete
    assert reader.manifest().nbytes == 35
    reader = ManifestReader(1000, 18)
    with pytest.raises(ProtocolViolation, match="offered a state of 18 bytes; its tensors take 19 and more"):
        reader.add([metadata_entry(3), float32])
    reader = ManifestReader(2, 20)
    reader.add([metadata_entry(3), float32])
    with pytest.raises(ProtocolViolation, match="offered a state of 20 bytes; its tensors take 19"):
        reader.manifest()


class Wide(NoCompression):
    """A codec that makes everything larger."""

    compression_type = 200

    def is_raw(self, dtype: torch.dtype) -> bool:
        return False

    def encoded_nbytes(self, dtype: torch.dtype, count: int) -> int:
        return 5 * count + 100


@pytest.mark.parametrize("seed", range(100))
def test_encoding_in_place_never_overwrites_what_is_still_to_be_read(seed: int):
    rng = random.Random(seed)
    given = [metadata_entry(rng.randrange(100))]
    formats: list[Format] = [PlainFormat(UINT8)]
    for _ in range(rng.randrange(1, 12)):
        dtype = rng.choice(list(DTYPES.values()))
        count = rng.choice([0, 1, 17, 1000, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1, 3 * CHUNK_ELEMENTS + 5])
        codec = rng.choice([NoCompression(), Float16Compression(), Wide()])
        formats.append(format_by(dtype, codec if dtype.is_floating else NoCompression()))
        given.append(TensorEntry(dtype.name, (count,), 0))
    layout = CaptureLayout(Manifest(given, formats))
    manifest = layout.manifest
    written = 0
    for index in range(manifest.chunk_count):
        chunk = manifest.chunk(index)
        size = manifest.dtypes[chunk.tensor].itemsize
        source = layout.raw_offsets[chunk.tensor] + chunk.start * size
        begin, end = layout.chunk_offset(index)
        assert begin >= written  # chunks do not overlap
        assert source + chunk.count * size <= layout.nbytes
        assert end <= layout.encoded_nbytes <= layout.nbytes
        if index + 1 < manifest.chunk_count:
            following = manifest.chunk(index + 1)
            dtype = manifest.dtypes[following.tensor]
            assert end <= layout.raw_offsets[following.tensor] + following.start * dtype.itemsize
        written = end
    raw = sum(aligned(d.itemsize * n) for d, n in zip(manifest.dtypes, manifest.counts, strict=True))
    if not any(isinstance(form, CodecFormat) and isinstance(form.codec, Wide) for form in formats):
        assert layout.nbytes == raw  # no memory beside the copy


def test_the_registry_decides_about_codecs_of_donors_too():
    with pytest.raises(ProtocolViolation, match="unknown codec 200"):
        Manifest(entries(TensorEntry("float32", (3,), 200)), [PlainFormat(UINT8), format_by(FLOAT32, Wide())])
