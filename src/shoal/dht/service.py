"""The DHT's service in the background process: a host, a node, and a method for each command."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.dht.commands import (
    AddValidators,
    ClockReading,
    DescribeNode,
    DHTSetup,
    GetRecord,
    NodeDescription,
    RegisterClasses,
    RunCoroutine,
    StoreEntry,
)
from shoal.dht.node import DHTNode
from shoal.dht.types import ValueWithExpiration
from shoal.dht.validation import RecordValidatorBase
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.p2p.config import HostConfig
from shoal.p2p.host import Host
from shoal.p2p.identity import Identity, PeerID
from shoal.p2p.lease import KeyLease, make_sure
from shoal.p2p.multiaddr import Multiaddr
from shoal.p2p.network import TcpNetwork
from shoal.runtime import pickling
from shoal.runtime.descriptors import close_descriptors
from shoal.runtime.service import ServiceContext
from shoal.utils.serializer import MSGPackSerializer
from shoal.utils.tasks import TaskSet
from shoal.utils.timed import dht_clock


@dataclass(frozen=True)
class DHTView:
    """What ``run_coroutine`` passes as ``dht`` to a coroutine in the background process.

    There the node itself does the work: ``await node.get(...)``, ``await node.store(...)``.
    """

    node: DHTNode

    @property
    def peer_id(self) -> PeerID:
        return self.node.peer_id

    @property
    def client_mode(self) -> bool:
        return self.node.client_mode

    def get_visible_maddrs(self) -> list[Multiaddr]:
        """Where others can dial this node; usable as their ``initial_peers``."""
        host = self.node.host
        return [address.with_peer_id(host.peer_id) for address in host.visible_addresses]


class DHTService:
    """See :class:`shoal.runtime.service.Service`. Other services of the process find the node here."""

    def __init__(self, node: DHTNode, context: ServiceContext, lease: KeyLease | None = None) -> None:
        self.node = node
        self._context = context
        self._lease = lease
        self._tasks = TaskSet()
        node.clock.on_move.append(self._clock_moved)
        context.when_ending(node.host.leave)
        self._view = DHTView(node)
        self._methods: dict[type[object], Callable[[Any], Awaitable[object]]] = {
            StoreEntry: self._store,
            GetRecord: self._get,
            RunCoroutine: self._run_coroutine,
            AddValidators: self._add_validators,
            RegisterClasses: self._register_classes,
            DescribeNode: self._describe,
        }

    async def carry_out(self, command: object, descriptors: Sequence[int]) -> object:
        close_descriptors(descriptors)  # no command of the DHT comes with any
        return await self._methods[type(command)](command)

    async def close(self) -> None:
        """Say goodbye to everybody and stop listening."""
        try:
            await self._tasks.close()
            await self.node.shutdown()
        finally:
            await self.node.host.close()
            if self._lease is not None:
                self._lease.close()

    async def _store(self, command: StoreEntry) -> bool:
        return await self.node.store_serialized(
            command.key, command.value, command.expiration_time, command.subkey
        )

    async def _get(self, command: GetRecord) -> ValueWithExpiration | None:
        return await self.node.get_serialized(command.key, command.latest)

    async def _run_coroutine(self, command: RunCoroutine) -> object:
        # On a thread: loading it imports the modules that it needs.
        function = await asyncio.to_thread(pickling.loads, command.function)
        coroutine = function(self._view, self.node)
        if not inspect.isawaitable(coroutine):
            raise InvalidTypeError(
                f"coro must be an `async def` function, got {function!r}, which returned {coroutine!r}"
            )
        return await coroutine

    async def _add_validators(self, command: AddValidators) -> None:
        self.node.add_validators(await asyncio.to_thread(pickling.loads, command.validators))

    async def _register_classes(self, command: RegisterClasses) -> None:
        classes: dict[int, type[Any]] = await asyncio.to_thread(pickling.loads, command.classes)
        for code, target in classes.items():
            MSGPackSerializer.ext_serializable(code)(target)

    async def _describe(self, _: DescribeNode) -> NodeDescription:
        addresses = tuple(self._view.get_visible_maddrs())
        return NodeDescription(
            self.node.peer_id.to_bytes(), self.node.client_mode, addresses, self._read_clock()
        )

    def _read_clock(self) -> ClockReading:
        return ClockReading(self.node.clock.offset, self.node.clock.moves)

    def _clock_moved(self) -> None:
        self._tasks.start(self._tell_time(self._read_clock()), "tell the user's process the time")

    async def _tell_time(self, reading: ClockReading) -> None:
        with contextlib.suppress(BrokenPipeError):  # the user's process is gone
            await self._context.call_user(reading)


def _bytes_a_second(megabits: float | None) -> float | None:
    return None if megabits is None else megabits * 1e6 / 8


async def create_dht_service(setup: DHTSetup, context: ServiceContext) -> DHTService:
    """The factory that the user's process sends by reference.

    :raises InvalidValueError: an address cannot be listened on (in use, not of this machine, not allowed)
    :raises BootstrapError: no initial peer answered
    :raises IdentityInUse: another peer answers under the identity of this key file
    """
    dht_clock.set_offset(setup.clock_offset)
    path = setup.identity_path
    identity = Identity.generate() if path is None else Identity.load_or_create(path)
    lease = None if path is None else KeyLease.open(path)
    context.set_log_fields(peer=str(identity.peer_id))
    validators: Iterable[RecordValidatorBase] = await asyncio.to_thread(pickling.loads, setup.validators)
    host_config = HostConfig(
        client_mode=setup.config.client_mode,
        announce=setup.announce,
        max_lanes=setup.config.max_lanes,
        max_upload_rate=_bytes_a_second(setup.config.max_upload_rate),
        max_download_rate=_bytes_a_second(setup.config.max_download_rate),
        congestion_control=setup.config.congestion_control,
    )
    host = Host(identity, TcpNetwork(), host_config, clock=dht_clock)
    try:
        own = [one for one in setup.initial_peers if one.peer_id == str(identity.peer_id)]
        await make_sure(host, lease, own)
        await _listen(host, setup.listen)
        _note_addresses(host, lease)
        node = await DHTNode.create(
            host,
            setup.config,
            initial_peers=setup.initial_peers,
            validators=list(validators),
            clock=dht_clock,
        )
    except BaseException:
        await host.close()
        if lease is not None:
            lease.close()
        raise
    _note_addresses(host, lease)
    host.tenancy.on_lost.append(context.fail)
    return DHTService(node, context, lease)


def _note_addresses(host: Host, lease: KeyLease | None) -> None:
    """Beside the key file: where a newcomer with the same key can ask."""
    if lease is not None:
        addresses = list(dict.fromkeys([*host.announced_addresses, *host.candidate_addresses]))
        lease.write(addresses, client=not addresses)


async def _listen(host: Host, addresses: Sequence[Multiaddr]) -> None:
    try:
        await host.start(addresses)
    except OSError as error:
        listing = ", ".join(map(str, addresses))
        number = error.errno
        reason = os.strerror(number) if number is not None else str(error)
        advice = "; choose another port, or 0 for any free one" if number == errno.EADDRINUSE else ""
        raise InvalidValueError(f"host_maddrs: cannot listen on {listing}: {reason}{advice}") from error
