"""Anonymous shared memory."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from shoal.errors import InvalidStateError, InvalidValueError
from shoal.runtime import memory as memory_module
from shoal.runtime.memory import SharedMemory, populate


def test_both_mappings_are_the_same_memory():
    with SharedMemory.create(10_000) as ours:
        theirs = SharedMemory.from_descriptor(os.dup(ours.fd), 10_000)
        assert bytes(ours.buffer) == bytes(10_000)
        ours.buffer[9_999] = 7
        assert theirs.buffer[9_999] == 7
        theirs.close()
        assert ours.buffer[9_999] == 7


def test_nothing_has_a_name():
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    with SharedMemory.create(1 << 20) as memory:
        memory.buffer[0] = 1
        assert not os.get_inheritable(memory.fd)
        if os.path.isdir("/dev/shm"):
            assert set(os.listdir("/dev/shm")) <= before


def test_views_survive_closing():
    memory = SharedMemory.create(4096)
    view = memory.buffer[10:20]
    view[0] = 5
    memory.close()
    memory.close()
    assert view[0] == 5
    view[1] = 6
    with pytest.raises(InvalidStateError, match="closed"):
        _ = memory.buffer
    with pytest.raises(InvalidStateError, match="closed"):
        _ = memory.fd


def test_closing_gives_the_descriptor_back():
    memory = SharedMemory.create(4096)
    fd = memory.fd
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_descriptor_of_less_memory_is_refused_and_closed():
    with SharedMemory.create(4096) as memory:
        fd = os.dup(memory.fd)
        with pytest.raises(InvalidValueError, match="4096"):
            SharedMemory.from_descriptor(fd, 4097)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_memory_is_refused(nbytes):
    with pytest.raises(InvalidValueError, match=str(nbytes)):
        SharedMemory.create(nbytes)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_trim_gives_freed_pages_back():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("needs glibc")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(64_000) for _ in range(500)]
    for block in blocks:
        ctypes.memset(block, 1, 64_000)
    full = resident()
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        libc.free(block)
    memory_module.trim()
    assert resident() < full - 16_000_000
    libc.free(blocks[-1])


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pages_come_without_a_change_of_what_is_in_them():
    place = mmap.PAGESIZE + 1000
    with SharedMemory.create(1 << 20) as memory:
        memory.buffer[place] = 7
        if not populate(memory.buffer[mmap.PAGESIZE + 1 :]):
            pytest.skip("the system does not populate memory")
        assert os.fstat(memory.fd).st_blocks * 512 == (1 << 20) - mmap.PAGESIZE
        assert memory.buffer[place] == 7
        assert populate(memory.buffer[:0])


def test_memory_that_is_closed_meanwhile_stays_until_it_has_its_pages(monkeypatch: pytest.MonkeyPatch):
    memory = SharedMemory.create(1 << 20)
    writes = []

    class Libc:
        def madvise(self, address: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
            memory.close()
            assert address.value is not None
            ctypes.memset(address.value, 1, size.value)  # ends the process if the memory is unmapped
            writes.append(size.value)
            return 0

    monkeypatch.setattr(memory_module.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(memory_module.sys, "platform", "linux")
    assert populate(memory.buffer)
    assert writes == [1 << 20]


def test_a_system_that_cannot_populate_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_module.sys, "platform", "darwin")
    with SharedMemory.create(4096) as memory:
        assert not populate(memory.buffer)
