"""Machines joined by long links, for as long as a context is open."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.network.plan import DEVICE, Link, ip_lines, links, settings, why_not_controlled
from benchmarks.work import Control, Network
from shoal.testing import namespaces
from shoal.testing.namespaces import Namespace

ROOT = Path(__file__).parents[2]
TUN = "/dev/net/tun"
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 1, 2
AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
MEMORY = Path("/run/shoal-benchmarks")
"""What was allowed before a run changed it; empty if nothing is to be put back."""
STOPS_AFTER = 10.0
SEED = 1


def why_not(network: Network | None = None) -> str | None:
    """Why there can be no long links here, or not this network, or None if there can."""
    reason = namespaces.why_not(tools=["ip"])
    if reason is not None:
        return reason
    if not os.path.exists(TUN):
        return f"{TUN} is missing: the kernel's module tun is not loaded"
    return why_not_controlled(network.control, available_controls()) if network is not None else None


def available_controls() -> list[str]:
    """The congestion controls of this kernel."""
    return AVAILABLE.read_text().split() if AVAILABLE.exists() else []


@dataclass
class Laboratory:
    """Machines, and the program that carries packets between them."""

    machines: list[Namespace]
    emulator: subprocess.Popen[str]

    def finish(self) -> dict[str, float]:
        """End the emulator; what it carried."""
        output, _ = self.emulator.communicate(timeout=STOPS_AFTER)
        return dict(json.loads(output.splitlines()[-1]))


@contextlib.contextmanager
def laboratory(network: Network, hosts: int) -> Iterator[Laboratory]:
    """Machines with these links. Nothing of them is left at the end, or when this process is killed."""
    planned = links(network, hosts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_control(network.control))
        machines, devices = [], []
        for host, link in enumerate(planned):
            machine = stack.enter_context(contextlib.closing(Namespace(f"machine {host}")))
            device = machine.do(open_device)
            stack.callback(os.close, device)
            set_up(machine, link, network)
            machines.append(machine)
            devices.append(device)
        yield Laboratory(machines, stack.enter_context(emulating(planned, devices)))


def set_up(machine: Namespace, link: Link, network: Network) -> None:
    machine.ip(*ip_lines(link))
    machine.sysctl(**settings(network))


def open_device() -> int:
    """A TUN device of the namespace that this thread is in, which takes bundles of segments."""
    descriptor = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    name = struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR)
    fcntl.ioctl(descriptor, TUNSETIFF, name)
    fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return descriptor


@contextlib.contextmanager
def emulating(planned: Sequence[Link], devices: Sequence[int]) -> Iterator[subprocess.Popen[str]]:
    """The emulator's process."""
    arguments = [json.dumps([link.as_json() for link in planned]), json.dumps(devices), str(SEED)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.network.emulator", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=devices,
        start_new_session=True,  # Ctrl+C is for the runner
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the emulator of links did not start")
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def only_control(control: Control) -> Iterator[None]:
    """Allow programs no other congestion control; those that have CAP_NET_ADMIN may use any all the same.

    The list is the whole machine's. So it is put back, by the next run if this one is killed, and a second run waits
    until the first one does not need it.
    """
    with MEMORY.open("a+") as memory:
        fcntl.flock(memory, fcntl.LOCK_EX)
        memory.seek(0)
        before = memory.read() or ALLOWED.read_text()
        MEMORY.write_text(before)
        ALLOWED.write_text(control)
        try:
            yield
        finally:
            ALLOWED.write_text(before)
            MEMORY.write_text("")
