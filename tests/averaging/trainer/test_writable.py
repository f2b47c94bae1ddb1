"""Tensors over read-only memory are found out, by their pages or by their owner, and no others are suspected."""

from __future__ import annotations

import mmap
import sys
import warnings

import numpy as np
import pytest
import torch

from shoal.averaging.partition import Layout
from shoal.averaging.trainer.tensors import TensorStore
from shoal.averaging.trainer.writable import OBJECT_WORDS, _is_bytes, first_read_only
from shoal.errors import InvalidStateError, InvalidValueError

SIZE = 3000

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
    pytest.mark.filterwarnings("ignore:The given (NumPy array|buffer) is not writable"),
]


def frozen_array():
    array = np.zeros(SIZE, dtype=np.float32)
    array.flags.writeable = False
    return array


@pytest.fixture
def weights_file(tmp_path):
    path = tmp_path / "weights"
    np.zeros(SIZE, dtype=np.float32).tofile(path)
    return path


def mapped_by_python(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


READ_ONLY = {
    "memmap": lambda path: torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r")),
    "end of memmap": lambda path: torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r"))[-10:],
    "mmap": lambda path: torch.frombuffer(mapped_by_python(path), dtype=torch.float32),
    "frozen array": lambda _: torch.from_numpy(frozen_array()),
    "part of a frozen array": lambda _: torch.from_numpy(frozen_array()[100:]),
    "part of a tensor": lambda _: torch.from_numpy(frozen_array())[100:],
    "transposed": lambda _: torch.from_numpy(frozen_array().reshape(3, -1).T),
    "parameter": lambda _: torch.nn.Parameter(torch.as_tensor(frozen_array())),
    "array of bytes": lambda _: torch.from_numpy(np.frombuffer(bytes(4 * SIZE), dtype=np.float32)),
    "bytes": lambda _: torch.frombuffer(bytes(4 * SIZE), dtype=torch.float32),
    "part of bytes": lambda _: torch.frombuffer(bytes(4 * SIZE), dtype=torch.float32, offset=128),
    "memoryview": lambda _: torch.frombuffer(memoryview(bytes(4 * SIZE))[400:], dtype=torch.float32),
}


def checkpoint(path):
    saved = path.with_suffix(".pt")
    torch.save(torch.zeros(SIZE), saved)
    return saved


WRITABLE = {
    "torch's own": lambda _: torch.zeros(SIZE),
    "shared": lambda _: torch.zeros(SIZE).share_memory_(),
    "resized": lambda _: torch.zeros(3).resize_(SIZE),
    "empty": lambda _: torch.zeros(0),
    "array": lambda _: torch.from_numpy(np.zeros(SIZE, dtype=np.float32)),
    "dlpack": lambda _: torch.from_dlpack(np.zeros(SIZE, dtype=np.float32)),
    "bytearray": lambda _: torch.frombuffer(bytearray(4 * SIZE), dtype=torch.float32),
    "memmap copied on write": lambda path: torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c")),
    "memmap for writing": lambda path: torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+")),
    "mapped checkpoint": lambda path: torch.load(checkpoint(path), mmap=True),
    "copy": lambda _: torch.tensor(frozen_array()),
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_read_only_memory_is_refused_by_name_when_the_averager_is_made(kind, weights_file):
    tensors = [torch.zeros(2), READ_ONLY[kind](weights_file)]
    layout = Layout.from_tensors(tensors)
    with pytest.raises(
        InvalidValueError, match=r"averaged_tensors\[1\] must be in memory that can be written"
    ):
        TensorStore(tensors, layout)


@pytest.mark.parametrize("kind", WRITABLE)
def test_memory_that_can_be_written_is_not_suspected(kind, weights_file):
    assert first_read_only([WRITABLE[kind](weights_file)]) is None


def test_memory_that_becomes_read_only_is_refused_before_anything_is_written():
    tensors = [torch.ones(SIZE), torch.ones(SIZE)]
    store = TensorStore(tensors, Layout.from_tensors(tensors))
    area = torch.zeros(store.layout.nbytes, dtype=torch.uint8)
    store.snapshot(area)
    tensors[1].data = torch.from_numpy(frozen_array())
    with pytest.raises(
        InvalidStateError, match=r"averaged_tensors\[1\] must be in memory that can be written"
    ):
        store.apply(area, torch.zeros_like(area))
    assert tensors[0].eq(1).all()


def test_looking_leaves_no_file_open(weights_file):
    tensor = torch.from_numpy(np.memmap(weights_file, dtype=np.float32, mode="c"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_read_only([tensor] * 3) is None


def test_a_table_of_objects_with_the_type_bytes_in_it_is_no_bytes_object():
    """Its next word is an address. As a size it would reach every tensor, and refuse one by chance."""
    place, inside = 1 << 20, (1 << 20) + 4096
    words = [1, id(bytes), 8192, *[0] * (OBJECT_WORDS - 3)]
    assert _is_bytes(words, place, inside)
    words[2] = id(words)
    assert not _is_bytes(words, place, inside)
