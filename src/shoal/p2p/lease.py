"""Who uses a key file: a lock beside it, with the addresses at which its holder answers.

On one machine the lock decides at once between processes that start together; the kernel frees it when its holder dies,
however that comes about. The addresses tell a newcomer where to ask, also where the folder was copied to another
machine, and the lock with it. A holder that does not answer there, because it is suspended, loses its identity, lock or
no lock.

Where no such file can be made (a key in a folder that is read-only), or the file system knows no locks, there is no
lease: then the peers' handshakes alone tell that an identity is used twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.errors import DialOutcome, IdentityInUse, InvalidValueError
from shoal.p2p.host import Host
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.protocol.claims import SILENCE

logger = logging.getLogger(__name__)

SUFFIX = ".lock"
MAX_BYTES = 8192
LOOK_EVERY = 0.05
"""How often the lock of a holder that starts or ends is tried again."""


@dataclass(frozen=True)
class Holder:
    """What a holder has written of itself."""

    pid: int = 0
    process: str = ""
    """Its number and its machine, for people; "" if nobody is known."""
    addresses: tuple[Multiaddr, ...] = ()
    is_client: bool = False
    """Whether it has no address at which it could be asked."""


class KeyLease:
    """The lock file of one key file; :meth:`open` it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, key_path: str) -> KeyLease | None:
        """The lease on this key file, not held yet; None where there can be none."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            # One lock for one file, also where links lead to it.
            return cls(os.open(os.path.realpath(key_path) + SUFFIX, flags, 0o600))
        except OSError as error:
            logger.debug("no lock beside %s: %s", key_path, error)
            return None

    def try_to_hold(self) -> bool:
        """Take the lock if it is free, or if the file system has none."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            logger.debug("no lock on this file system: %s", error)
        return True

    def read(self) -> Holder:
        """The holder, or the last one; nobody if what stands there makes no sense."""
        try:
            content = json.loads(os.pread(self._descriptor, MAX_BYTES, 0))
            pid = int(content["pid"])
            process = f"process {pid} on {content['machine']}"
            addresses = tuple(Multiaddr.parse(text) for text in content["addresses"])
            return Holder(pid, process, addresses, bool(content["client"]))
        except (OSError, ValueError, KeyError, TypeError, InvalidValueError):
            return Holder()

    def write(self, addresses: Iterable[Multiaddr], *, client: bool) -> None:
        """Say where this process answers."""
        content = {
            "pid": os.getpid(),
            "machine": socket.gethostname(),
            "addresses": [str(address) for address in addresses],
            "client": client,
        }
        self._write(json.dumps(content).encode()[:MAX_BYTES])

    def close(self) -> None:
        """End in order: the next one has nobody to ask."""
        if self._descriptor < 0:
            return
        if self.read().pid == os.getpid():  # else another one has taken over
            self._write(b"")
        os.close(self._descriptor)
        self._descriptor = -1

    def _write(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk: nobody is told the addresses
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content, 0)


async def make_sure(host: Host, lease: KeyLease | None, others: Sequence[Multiaddr]) -> None:
    """Before ``host`` starts: nobody else answers under its identity, as far as this machine can know.

    ``others``: addresses at which another one may be, besides those of the lease. Takes 5 s at most, and no time to
    speak of where the old addresses refuse connections, as after a crash.

    :raises IdentityInUse: somebody does, or starts at this moment
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + SILENCE
    while True:
        is_free = lease is None or lease.try_to_hold()
        holder = Holder() if lease is None else lease.read()
        failures = await host.ask_rivals([*holder.addresses, *others])
        if is_free:
            return
        if any(failure.outcome is DialOutcome.TIMED_OUT for failure in failures):
            logger.warning(
                "%s holds the lock on this key file, but does not answer: taking over", holder.process
            )
            return
        if holder.is_client or loop.time() >= deadline:
            raise IdentityInUse(str(host.peer_id), holder.process or "another process of this machine")
        # It is about to start, or to end.
        await asyncio.sleep(LOOK_EVERY)
