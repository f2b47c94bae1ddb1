"""What get_current_state() may return, and the way of its tensors through copy and codec."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.averaging.codec_formats import format_by
from shoal.averaging.elements import elements_in
from shoal.averaging.formats import PlainFormat
from shoal.averaging.state import capture as capture_module
from shoal.averaging.state.capture import (
    GROWTH,
    Capture,
    capture_state,
    check_state,
    expected_nbytes,
)
from shoal.averaging.state.encoding import encode_in_place
from shoal.averaging.state.manifest import CHUNK_ELEMENTS
from shoal.averaging.trainer.state_sharing import available_memory, tensors_in
from shoal.compression import (
    CompressionBase,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    TensorRole,
)
from shoal.errors import InvalidTypeError, InvalidValueError, UsageError
from shoal.runtime.memory import SharedMemory
from shoal.utils.dtypes import DTYPES, FLOAT32, UINT8
from shoal.utils.serializer import MSGPackSerializer


def capture(state: Any, compression: CompressionBase = NoCompression(), reserve: int = 0) -> Capture:
    return capture_state(
        lambda: state,
        hold=contextlib.nullcontext,
        serializer=MSGPackSerializer,
        compression=compression,
        reserve=reserve,
    )


def decoded(captured: Capture) -> list[torch.Tensor]:
    """What a joiner would make of it."""
    layout = captured.layout()
    manifest = layout.manifest
    with captured.memory as memory:
        encode_in_place(memory.buffer[:], layout)
        target = bytearray(manifest.decoded_nbytes)
        for index in range(manifest.chunk_count):
            chunk = manifest.chunk(index)
            form = manifest.formats[chunk.tensor]
            begin, end = layout.chunk_offset(index)
            start = manifest.offsets[chunk.tensor] + chunk.start * form.dtype.itemsize
            data = memoryview(bytearray(memory.buffer[begin:end]))
            if form.is_plain:
                target[start : start + len(data)] = data
            else:
                form.decode(data, chunk.count, elements_in(target, form.dtype, chunk.count, start))
        return tensors_in(manifest, memoryview(target))


def every_kind() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    grid = torch.randn(40, 30, generator=generator)
    tensors = [torch.arange(12).to(dtype.torch_dtype).reshape(3, 4) for dtype in DTYPES.values()]
    return [
        *tensors,
        torch.tensor(7),
        torch.zeros(0, 3),
        grid.t(),
        grid[::2, 1:7],
        torch.nn.Parameter(grid.clone()),
        torch.randn(3, dtype=torch.complex64, generator=generator).conj(),
        torch.ones(1).expand(5),
        torch.randn(CHUNK_ELEMENTS + 3, generator=generator),
        grid[:1, 3],
        torch.randn(2, generator=generator)[1::2],
    ]


@pytest.mark.parametrize("reserve", [0, 10, 1 << 22])
def test_tensors_of_every_kind_come_back_bit_for_bit(reserve: int):
    tensors = every_kind()
    metadata, *back = decoded(capture(({"a": (1, 2)}, tensors), reserve=reserve))
    assert all(tensor.untyped_storage().resizable() for tensor in tensors)
    assert MSGPackSerializer.loads(bytes(metadata.numpy())) == {"a": (1, 2)}
    for ours, theirs in zip(tensors, back, strict=True):
        assert theirs.dtype == ours.dtype
        assert theirs.shape == ours.shape
        assert torch.equal(theirs, ours.resolve_conj())
    assert not back[-1].requires_grad


def test_floats_travel_with_the_codec_and_everything_else_as_it_is():
    tensors = every_kind()
    captured = capture((None, tensors), Float16Compression())
    assert {entry.codec for entry in captured.entries if "float" not in entry.dtype} == {0}
    encoded = captured.layout().encoded_nbytes
    assert encoded < captured.memory.nbytes
    _, *back = decoded(captured)
    for ours, theirs in zip(tensors, back, strict=True):
        if ours.is_floating_point():
            assert torch.allclose(theirs.double(), ours.double(), rtol=2**-10, atol=2**-20)
        else:
            assert torch.equal(theirs, ours.resolve_conj())


class ByRole(NoCompression):
    def choose(self, info: CompressionInfo) -> CompressionBase:
        return Float16Compression() if info.role is TensorRole.GRADIENT else NoCompression()


def test_infos_decide_about_the_codec():
    tensors = [torch.zeros(3), torch.zeros(4)]
    infos = [
        CompressionInfo.from_tensor(tensors[0]),
        CompressionInfo.from_tensor(tensors[1], role=TensorRole.GRADIENT),
    ]
    captured = capture((None, tensors, infos), ByRole())
    assert [entry.codec for entry in captured.entries] == [0, 0, 1]
    assert [entry.codec for entry in capture((None, tensors), ByRole()).entries] == [0, 0, 0]


BAD = [
    (None, "got NoneType"),
    ((1,), "got 1 items"),
    ((1, [], None, 2), "got 4 items"),
    ((1, torch.zeros(3)), "single tensor"),
    ((1, 5), "tensors of get_current_state() must be a sequence, got int"),
    ((1, [torch.zeros(1), "x"]), "tensor 1 of get_current_state() must be a torch.Tensor, got str"),
    ((1, [torch.zeros(3).to_sparse()]), "tensor 0 of get_current_state() must be dense"),
    ((1, [torch.zeros(3, device="meta")]), "meta device"),
    ((1, [torch.zeros(3, dtype=torch.float8_e5m2)]), "got torch.float8_e5m2"),
    ((object(), []), "metadata of get_current_state() must be what the serializer takes"),
    ((bytes(1 << 24), []), "must take at most 16,777,216 bytes when encoded, got 16,777,221"),
    ((1, [torch.zeros(1)], []), "for each of its 1 tensors, got 0"),
    ((1, [torch.zeros(1)], ["x"]), "info 0 of get_current_state() must be a CompressionInfo, got str"),
    ((1, [torch.zeros(1)], iter([])), "for each of its 1 tensors, got 0"),
    (
        (1, [torch.zeros(1)], [CompressionInfo.from_tensor(torch.zeros(2))]),
        "info 0 of get_current_state() must describe",
    ),
]


@pytest.mark.parametrize(("state", "problem"), BAD)
def test_what_is_no_state_is_an_error_that_names_the_problem(state: Any, problem: str):
    with pytest.raises(UsageError) as raised:
        check_state(state, MSGPackSerializer, NoCompression())
    assert problem in str(raised.value)


def test_empty_metadata_and_no_tensors_are_a_state():
    assert decoded(capture((None, [])))[0].numel() > 0
    assert len(decoded(capture(({}, iter([torch.zeros(2)]))))) == 2


def test_the_lock_is_held_for_the_call_and_the_copy_alone():
    lock, held = threading.Lock(), []

    @contextlib.contextmanager
    def hold() -> Iterator[None]:
        with lock:
            yield
            held.append(torch.equal(tensor, torch.ones(3)))

    tensor = torch.ones(3)

    def get_state() -> Any:
        assert lock.locked()
        return None, [tensor]

    captured = capture_state(
        get_state, hold=hold, serializer=MSGPackSerializer, compression=Float16Compression(), reserve=0
    )
    assert held == [True]
    assert not lock.locked()
    tensor.zero_()  # what the trainer does afterwards is no part of the copy, encoded or not
    assert torch.equal(decoded(captured)[1], torch.ones(3))


def test_a_state_beyond_what_is_ready_is_asked_for_again_when_its_memory_is(monkeypatch: pytest.MonkeyPatch):
    """No page faults of a large state under the lock."""
    monkeypatch.setattr(capture_module, "MAX_UNREADY", 1000)
    lock, asked, made = threading.Lock(), [], []
    create = SharedMemory.create

    def create_noted(nbytes: int) -> SharedMemory:
        made.append((nbytes, lock.locked()))
        return create(nbytes)

    monkeypatch.setattr(SharedMemory, "create", create_noted)
    tensor = torch.arange(10_000)

    def get_state() -> Any:
        asked.append(len(made))
        return None, [tensor]

    def take(reserve: int) -> Capture:
        return capture_state(
            get_state,
            hold=lambda: lock,
            serializer=MSGPackSerializer,
            compression=NoCompression(),
            reserve=reserve,
        )

    captured = take(reserve=500)
    nbytes = captured.layout().nbytes
    assert asked == [1, 2]
    assert made == [(500, False), (nbytes + GROWTH, False)]
    assert torch.equal(decoded(captured)[1], tensor)
    asked.clear()
    take(reserve=nbytes).memory.close()
    assert len(asked) == 1
    monkeypatch.setattr(capture_module, "MAX_UNREADY", nbytes)
    take(reserve=500).memory.close()
    assert len(asked) == 2
    assert made[-1] == (nbytes, True)


def test_a_state_that_grows_while_its_memory_is_made_ready_is_copied_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(capture_module, "MAX_UNREADY", 1000)
    sizes = iter([100_000, 400_000])
    captured = capture_state(
        lambda: (None, [torch.ones(next(sizes), dtype=torch.uint8)]),
        hold=contextlib.nullcontext,
        serializer=MSGPackSerializer,
        compression=NoCompression(),
        reserve=1,
    )
    assert len(decoded(captured)[1]) == 400_000


class Lying(NoCompression):
    compression_type = 0

    def is_raw(self, dtype: torch.dtype) -> bool:
        return False

    def encode(self, part: torch.Tensor) -> memoryview:
        return super().encode(part)[:-1]


def test_a_codec_that_breaks_its_word_is_named():
    captured = replace(
        capture((None, [torch.zeros(5)])), formats=(PlainFormat(UINT8), format_by(FLOAT32, Lying()))
    )
    with pytest.raises(
        InvalidValueError, match=r"Lying\(\)\.encode must make 20 bytes of 5 elements .*, got 19"
    ):
        decoded(captured)


class Unregistered(NoCompression):
    compression_type = 201


def test_a_codec_that_nobody_could_decode_is_refused():
    with pytest.raises(
        InvalidValueError, match="state_compression must be a registered codec, got Unregistered"
    ):
        capture((None, [torch.zeros(5)]), Unregistered())


def test_a_failure_under_the_lock_gives_the_memory_back():
    def fail() -> Any:
        raise KeyError("optimizer")

    with pytest.raises(KeyError):
        capture_state(
            fail,
            hold=contextlib.nullcontext,
            serializer=MSGPackSerializer,
            compression=NoCompression(),
            reserve=10,
        )
    with pytest.raises(InvalidTypeError):
        capture(5)


def test_what_is_reserved_suffices_for_the_default_state():
    tensors = [torch.zeros(3), torch.zeros(CHUNK_ELEMENTS + 1), torch.zeros(0)]
    assert expected_nbytes(tensors) >= capture(({"group_key": "run.0b"}, tensors)).layout().nbytes


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8000),
        ({"memory.max": "max", "memory.current": "7", "memory.stat": "anon 1"}, 8000),
        ({"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 1\ninactive_file 3000"}, 4000),
        ({"memory.max": "5000", "memory.current": "4000"}, 1000),
        ({"memory.max": "5000", "memory.current": "6000", "memory.stat": "anon 1"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "5000",
                "memory/memory.usage_in_bytes": "4000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2000",
            },
            3000,
        ),
    ],
)
def test_what_a_container_may_take_counts_and_files_in_its_cache_do_not(
    tmp_path: Path, files: dict[str, str], free: int
):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  8 kB\nHugePages_Total:  0\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    expected = free if free != 8000 else 8 * 1024
    assert available_memory(tmp_path) == expected


def test_the_system_says_how_much_memory_is_free():
    available = available_memory()
    assert available is not None
    assert available > 1 << 20
