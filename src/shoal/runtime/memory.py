"""Anonymous memory for the user process and its background process: no name, no file, gone with its last user. And how
a process gives freed memory of its own back.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import sys
from types import TracebackType

from shoal.errors import InvalidStateError, InvalidValueError

_MADV_POPULATE_WRITE = 23
"""Of Linux 5.14; Python has no name for it."""


class SharedMemory:
    """A block of zeroed memory behind a file descriptor that can be sent to the other process.

    One side creates it and sends :attr:`fd` with a command (``descriptors=[memory.fd]``); the other side maps
    what it received by :meth:`from_descriptor`. The memory lives until both sides have closed it or ended,
    however they end.
    """

    # An object whose mapping failed owns nothing: its maker closes the descriptor.
    _fd = -1
    _map: mmap.mmap | None = None
    _buffer: memoryview | None = None

    def __init__(self, fd: int, nbytes: int) -> None:
        mapping = mmap.mmap(fd, nbytes)
        self._fd = fd
        self._nbytes = nbytes
        self._map = mapping
        self._buffer = memoryview(mapping)

    @classmethod
    def create(cls, nbytes: int) -> SharedMemory:
        """New memory of ``nbytes`` zero bytes (at least 1).

        :raises InvalidValueError: ``nbytes`` is not positive
        :raises OSError: the system has no room for it
        """
        if nbytes <= 0:
            raise InvalidValueError(f"nbytes must be at least 1 byte, got {nbytes!r}")
        fd = _anonymous_file()
        try:
            os.ftruncate(fd, nbytes)
            return cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_descriptor(cls, fd: int, nbytes: int) -> SharedMemory:
        """Map memory that the other side created. ``fd`` is taken over: closed by :meth:`close`, or on failure.

        :raises InvalidValueError: the memory behind ``fd`` is smaller than ``nbytes``
        """
        try:
            size = os.fstat(fd).st_size
            # Touching a page past the end would be a SIGBUS, not an exception.
            if not 0 < nbytes <= size:
                raise InvalidValueError(f"nbytes must be 1 to {size}, the size of the memory, got {nbytes!r}")
            return cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise

    @property
    def fd(self) -> int:
        """The descriptor to send to the other side; stays this object's own."""
        if self._fd < 0:
            raise InvalidStateError("this shared memory is closed")
        return self._fd

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def buffer(self) -> memoryview:
        """All of the memory, writable."""
        if self._buffer is None:
            raise InvalidStateError("this shared memory is closed")
        return self._buffer

    def close(self) -> None:
        """Give the memory back; idempotent.

        Safe while others still hold views of :attr:`buffer` (NumPy arrays, tensors, slices): those stay
        valid, and the memory is unmapped when the last of them is gone.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        buffer, self._buffer = self._buffer, None
        mapping, self._map = self._map, None
        if buffer is None or mapping is None:
            return
        try:
            buffer.release()
            mapping.close()
        except BufferError:
            pass  # a view is still alive; it owns the mapping from here on

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def populate(memory: memoryview) -> bool:
    """Get the pages of memory that is about to be written, and change nothing in it. To touch them one by one takes
    half as long again. Other threads run meanwhile.

    :param memory: of a :class:`SharedMemory`, or a slice of it
    :returns: whether the system could do it; if not, pages come as they are touched
    """
    if sys.platform != "linux":
        return False
    if not memory.nbytes:
        return True
    held = ctypes.c_char.from_buffer(memory)  # keeps the mapping
    begin = ctypes.addressof(held)
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    size = begin + memory.nbytes - first
    result: int = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_POPULATE_WRITE
    )
    return result == 0


def trim() -> None:
    """Have the C library give freed pages back to the system that it keeps for later. Takes about 1 ms; does nothing
    where the C library has no such function (it is not glibc).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("shoal", os.MFD_CLOEXEC)
    if sys.platform == "win32":
        raise OSError("shared memory is supported on Linux and macOS only")
    import _posixshmem

    name = f"/shoal-{secrets.token_hex(8)}"  # macOS allows 31 characters
    fd: int = _posixshmem.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
    _posixshmem.shm_unlink(
        name
    )  # from here on it has no name, and lives as long as the descriptors and mappings
    return fd
