"""A network namespace: a machine's own interfaces, addresses, routes and firewall.

Namespaces here have no name in the file system. They live as long as this process holds their descriptors, or a
process runs in them, so nothing of a run that was killed is left behind. Nothing here changes the namespace of the
calling thread: whatever has to happen inside of one happens on a thread of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
TOOL_LIMIT = 60.0
"""Seconds; only a tool that hangs takes as long."""

_libc = ctypes.CDLL(None, use_errno=True)


def why_not(tools: Sequence[str] = ("ip", "nft")) -> str | None:
    """Why there can be no namespaces here, or None if there can.

    :param tools: programs that have to be installed
    """
    if os.name != "posix" or not hasattr(_libc, "setns"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (packages iproute2 and nftables)"
    try:
        probe = Namespace("probe")
    except PermissionError:
        return "this root may not make network namespaces (a container without CAP_SYS_ADMIN)"
    probe.close()
    return None


class Namespace:
    """The network of one machine. Close it when nothing has to run in it any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.descriptor = _on_a_thread(_make)

    @property
    def path(self) -> str:
        """A name of it for ``ip link ... netns``."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def do(self, function: Callable[[], T]) -> T:
        """What ``function`` returns when it is called inside."""

        def inside() -> T:
            enter(self.descriptor)
            return function()

        return _on_a_thread(inside)

    def ip(self, *lines: str) -> None:
        """Run lines of ``ip`` inside, all in one go."""
        self._tool(["ip", "-batch", "-"], "\n".join(lines) + "\n")

    def nft(self, rules: str) -> None:
        """Load rules of ``nft`` inside."""
        self._tool(["nft", "-f", "-"], rules)

    def sysctl(self, **values: int | str) -> None:
        """Set ``net`` settings inside; ``__`` stands for a slash."""

        def write() -> None:
            for name, value in values.items():
                with open(f"/proc/sys/net/{name.replace('__', '/')}", "w") as file:
                    file.write(str(value))

        self.do(write)

    def socket(self, family: int = socket.AF_INET) -> socket.socket:
        """A TCP socket that is inside for good, whichever process uses it."""
        return self.do(lambda: socket.socket(family, socket.SOCK_STREAM))

    def start(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a program inside."""
        return self.do(lambda: subprocess.Popen(arguments, text=True, **options))  # noqa: S603 - the caller's own

    def close(self) -> None:
        """Give it up; it goes when the last process in it has ended."""
        os.close(self.descriptor)

    def _tool(self, arguments: Sequence[str], text: str) -> None:
        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(  # noqa: S603 - ip and nft
                arguments, input=text, capture_output=True, text=True, timeout=TOOL_LIMIT
            )

        done = self.do(run)
        if done.returncode != 0:
            numbered = "\n".join(f"{number}: {line}" for number, line in enumerate(text.splitlines(), 1))
            raise RuntimeError(f"{arguments[0]} failed in {self.name}:\n{done.stderr}{numbered}")


def enter(descriptor: int) -> None:
    """Move the calling thread into a namespace."""
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "setns")


def _make() -> int:
    if _libc.unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _on_a_thread(function: Callable[[], T]) -> T:
    """Call ``function`` on a new thread, since it may change that thread's namespace."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again below, on the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
