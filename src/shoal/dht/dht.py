"""The DHT as users hold it: a node in a background process, and a synchronous or awaitable view of it here."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar, overload

from shoal.dht import addresses, options
from shoal.dht.commands import (
    AddValidators,
    DescribeNode,
    DHTSetup,
    GetRecord,
    NodeDescription,
    RegisterClasses,
    RunCoroutine,
    StoreEntry,
)
from shoal.dht.config import ProcessConfig
from shoal.dht.description import LastDescription
from shoal.dht.link import NodeLink
from shoal.dht.types import ValueWithExpiration
from shoal.dht.validation import RecordValidatorBase
from shoal.errors import (
    InvalidStateError,
    InvalidTypeError,
    InvalidValueError,
    PeerProcessDied,
)
from shoal.p2p.identity import PeerID
from shoal.p2p.multiaddr import Multiaddr
from shoal.runtime import pickling
from shoal.runtime.futures import MPFuture, chain
from shoal.runtime.process import BackgroundProcess, ServiceHandle
from shoal.runtime.startable import Startable, wait_or_end
from shoal.utils.checks import check_number
from shoal.utils.logging import show_logs
from shoal.utils.options import gather
from shoal.utils.serializer import MSGPackSerializer
from shoal.utils.timed import dht_clock

T = TypeVar("T")
Address = str | Multiaddr

_PRELOAD = {"torch": ("shoal.averaging.background.service",)}
"""What the background process imports ahead, by the module that the user process has imported: an averager is likely
to follow. Names, not imports: for a user process without torch it stays light.
"""


class DHT(Startable):
    """A node of a distributed hash table, running in a background process of its own.

    Two DHTs that were given each other's addresses, or the same third one's, are one DHT: what is stored
    through any of them is found through all of them. Averagers made with this ``dht`` live in the same
    process and share its identity and port.

    May be used on any thread and as a context manager. It ends by :meth:`shutdown`, with the last reference
    to it, or with the interpreter, whichever comes first; a forked child process can neither use nor end it.

    :param initial_peers: addresses of some peers of an existing DHT, as text or Multiaddr; None: begin a new
        DHT. As in the other two lists of addresses, those of transports that Shoal does not have are left out,
        with a warning, and one text may hold several, with commas or blanks between them
    :param start: start at once; otherwise call :meth:`run_in_background`
    :param daemon: if false, the DHT does not end with the last reference to it, and the interpreter waits at
        its end until it is shut down by another thread, Ctrl+C is pressed, or a signal ends the program
    :param record_validators: checks on all records that this node keeps or gets, see
        :mod:`shoal.dht.validation`
    :param shutdown_timeout: seconds that :meth:`shutdown` gives the node to say goodbye before it uses force
    :param await_ready: with ``start``: return when the node has joined the DHT, and raise if it cannot
    :param host_maddrs: where to listen; loopback by default. ``/ip4/0.0.0.0/tcp/0``: any interface, any free
        port
    :param announce_maddrs: what others are told instead, e.g. the outer address of a forwarded port
    :param identity_path: file with the key that makes this node's PeerID; created if it is missing. Without
        it the node gets a new PeerID each time. One running peer can use a key: give each its own file
    :param client_mode: neither listen nor keep records of others; also what becomes of a node that nobody can
        dial
    :param bootstrap_timeout: for how many seconds the initial peers are retried
    :param ensure_bootstrap_success: raise BootstrapError if none of them answered by then, instead of
        retrying for ever
    :param options: the other fields of :class:`~shoal.dht.config.DHTConfig`, in which all of them, and those
        that follow here, are described; None stands for the default. Options of hivemind that make no sense
        here are accepted with a warning
    :raises InvalidTypeError: (a TypeError) an option is unknown or of the wrong type
    :raises InvalidValueError: (a ValueError) a value is not allowed, or an address cannot be listened on
    :raises BootstrapError: no initial peer answered; lists each address with the reason
    :raises IdentityInUse: another running peer has the same key; names its address
    """

    service_name = "dht"
    """The name under which other services of the background process find the node's."""

    def __init__(
        self,
        initial_peers: Sequence[Address] | Address | None = None,
        *,
        start: bool,
        daemon: bool = True,
        record_validators: Iterable[RecordValidatorBase] = (),
        shutdown_timeout: float = 3,
        await_ready: bool = True,
        host_maddrs: Sequence[Address] | Address = ("/ip4/127.0.0.1/tcp/0",),
        announce_maddrs: Sequence[Address] | Address | None = None,
        identity_path: str | os.PathLike[str] | None = None,
        client_mode: bool = False,
        bootstrap_timeout: float | None = None,
        ensure_bootstrap_success: bool = True,
        num_replicas: int | None = None,
        bucket_size: int | None = None,
        parallel_rpc: int | None = None,
        wait_timeout: float | None = None,
        refresh_timeout: float | None = None,
        cache_locally: bool | None = None,
        cache_nearest: int | None = None,
        cache_size: int | None = None,
        cache_on_store: bool | None = None,
        cache_refresh_before_expiry: float | None = None,
        reuse_get_requests: bool | None = None,
        **options_: Any,
    ) -> None:
        given = locals().copy()  # each configuration takes what is its own
        del given["self"], given["options_"]
        self._link = NodeLink()
        Startable.__init__(  # super() would be one more local variable
            self,
            self._link,
            instead_of_a_copy="a DHT cannot be pickled or copied: it belongs to the process that made it. "
            "Make another one there, with initial_peers=[str(address) for address in dht.get_visible_maddrs()]",
        )
        self._last = LastDescription()
        self._shared_classes: dict[int, type[Any]] = {}
        own = gather(ProcessConfig, given)
        config = options.make_config(given, options_)
        listen = addresses.parse_listen_addresses(host_maddrs)
        self._daemon = own.daemon
        self._shutdown_timeout = float(own.shutdown_timeout)
        self._initial_peers = addresses.parse_addresses("initial_peers", initial_peers)
        validators = options.check_validators(record_validators)
        self._setup = DHTSetup(
            listen=() if config.client_mode else listen,
            announce=addresses.parse_announced_addresses(announce_maddrs),
            initial_peers=self._initial_peers,
            config=config,
            validators=pickling.dumps(validators, "record_validators"),
            identity_path=options.check_identity_path(identity_path),
        )
        if own.start:
            self.run_in_background(await_ready=own.await_ready)

    # Life

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """Start the node; for a DHT made with ``start=False``.

        :param await_ready: wait until the node has joined the DHT, for ``timeout`` seconds at most
        :raises InvalidStateError: it was started before
        :raises DeadlineExceeded: (a TimeoutError) it was not ready in time; it is shut down then
        """
        show_logs()
        self._link.start_process(daemon=self._daemon, preload=_likely_modules())
        try:
            from shoal.dht.factory import make_service  # imports nothing of the node here

            self._link.create_node(
                partial(make_service, replace(self._setup, clock_offset=dht_clock.offset)),
                name=self.service_name,
                handler=self._last.set_time,
            )
        except BaseException:
            self.shutdown()
            raise
        if await_ready:
            wait_or_end(self, timeout)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until the node has joined the DHT, and raise what :class:`DHT` raises if it could not.

        :raises DeadlineExceeded: it is not ready after ``timeout`` seconds; it goes on
        """
        super().wait_until_ready(timeout)
        self._link.peer_id = self.peer_id  # from now on repr() says it

    def is_alive(self) -> bool:
        """Whether the background process runs."""
        return self._link.is_alive

    def shutdown(self) -> None:
        """End the node, and the averagers that live with it, in order. Idempotent, on any thread.

        Waits for ``shutdown_timeout`` seconds at most and then uses force.
        """
        self._link.end(self._shutdown_timeout)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the background process has ended, for ``timeout`` seconds at most."""
        self.background.wait(timeout)

    # Properties

    @property
    def background(self) -> BackgroundProcess:
        """The process in which the node and the averagers made with this DHT live.

        :raises InvalidStateError: it was not started
        """
        return self._link.process

    @property
    def daemon(self) -> bool:
        """As given to the constructor."""
        return self._daemon

    @property
    def peer_id(self) -> PeerID:
        """This node's identity, also after its end; waits until the node is ready.

        :raises InvalidStateError: it was not started, or ended before it was ready
        """
        if self._link.peer_id is None:
            self._link.peer_id = PeerID.from_bytes(self._describe_at_last().peer_id)
        return self._link.peer_id

    @property
    def client_mode(self) -> bool:
        """Whether this node is a client now: it was told to be one, or nobody can dial it. After its end: as it was
        last known here.
        """
        return self._describe_at_last().client_mode

    @property
    def initial_peers(self) -> tuple[Multiaddr, ...]:
        """As given to the constructor."""
        return self._initial_peers

    def get_visible_maddrs(self, latest: bool = False) -> list[Multiaddr]:
        """Where others can dial this node: their ``initial_peers``. An empty list in client mode.

        :param latest: of no effect: they are always those of this moment
        """
        return list(self._describe().visible_addresses)

    # Values

    @overload
    def get(
        self, key: Any, latest: bool = ..., return_future: Literal[False] = ...
    ) -> ValueWithExpiration | None: ...
    @overload
    def get(
        self, key: Any, latest: bool = ..., *, return_future: Literal[True]
    ) -> MPFuture[ValueWithExpiration | None]: ...
    @overload
    def get(
        self, key: Any, latest: bool, return_future: Literal[True]
    ) -> MPFuture[ValueWithExpiration | None]: ...

    def get(
        self, key: Any, latest: bool = False, return_future: bool = False
    ) -> ValueWithExpiration | MPFuture[ValueWithExpiration | None] | None:
        """The value under ``key`` that expires last, with its expiration time; None if there is none.

        For a key with sub-keys the value is a dictionary of sub-keys to their own ValueWithExpiration.

        :param latest: ask the whole DHT for the value that expires last, instead of taking the first good
            one
        :param return_future: return a future at once, also while the node is not ready yet; it can be waited
            for, awaited and cancelled
        :raises InvalidTypeError: the key cannot be serialized
        """
        future: MPFuture[ValueWithExpiration | None]
        future = self._call(GetRecord(_serialize("key", key), bool(latest)), with_classes=True)
        return future if return_future else future.result()

    @overload
    def store(
        self,
        key: Any,
        value: Any,
        expiration_time: float,
        subkey: Any = ...,
        return_future: Literal[False] = ...,
    ) -> bool: ...
    @overload
    def store(
        self, key: Any, value: Any, expiration_time: float, subkey: Any = ..., *, return_future: Literal[True]
    ) -> MPFuture[bool]: ...
    @overload
    def store(
        self, key: Any, value: Any, expiration_time: float, subkey: Any, return_future: Literal[True]
    ) -> MPFuture[bool]: ...

    def store(
        self, key: Any, value: Any, expiration_time: float, subkey: Any = None, return_future: bool = False
    ) -> bool | MPFuture[bool]:
        """Store ``value`` under ``key`` until ``expiration_time``, in place of one that expires earlier.

        :param expiration_time: seconds as :func:`shoal.get_dht_time` counts them; at most an hour ahead,
            unless configured
        :param subkey: makes the record a dictionary, in which each sub-key has a value and an expiration time
            of its own
        :param return_future: return a future at once, also while the node is not ready yet; it can be waited
            for, awaited and cancelled
        :returns: whether it was stored; false if a value that expires later is there, or if it was refused
        :raises InvalidTypeError: key, sub-key or value cannot be serialized, see
            :class:`~shoal.utils.MSGPackSerializer`
        """
        expiration_time = check_number("expiration_time", expiration_time)
        command = StoreEntry(
            key=_serialize("key", key),
            value=_serialize("value", value),
            expiration_time=float(expiration_time),
            subkey=None if subkey is None else _serialize("subkey", subkey),
        )
        future: MPFuture[bool] = self._call(command, with_classes=True)
        return future if return_future else future.result()

    # Code of users in the background process

    @overload
    def run_coroutine(
        self, coro: Callable[[Any, Any], Awaitable[T]], return_future: Literal[False] = ...
    ) -> T: ...
    @overload
    def run_coroutine(
        self, coro: Callable[[Any, Any], Awaitable[T]], return_future: Literal[True]
    ) -> MPFuture[T]: ...

    def run_coroutine(
        self, coro: Callable[[Any, Any], Awaitable[T]], return_future: bool = False
    ) -> T | MPFuture[T]:
        """Run ``await coro(dht, node)`` in the background process, and return its result.

        There ``node`` is the :class:`~shoal.dht.node.DHTNode` itself, and ``dht`` a view with ``peer_id``,
        ``client_mode`` and ``get_visible_maddrs()``. Other calls go on meanwhile, so it must not block.
        Cancelling the future cancels it. With ``return_future`` it is returned at once, also while the node is not
        ready yet.

        :param coro: an ``async def`` function. One of ``__main__`` or a notebook, a lambda or a closure is
            sent by value with what it refers to; others by reference, their modules are imported there
        :raises InvalidTypeError: it cannot be sent; the message names what is to blame
        """
        if not callable(coro):
            raise InvalidTypeError(f"coro must be an `async def` function of (dht, node), got {coro!r}")
        command = RunCoroutine(pickling.dumps(coro, f"the coroutine function {_name_of(coro)}"))
        future: MPFuture[T] = self._call(command)
        return future if return_future else future.result()

    def add_validators(self, record_validators: Iterable[RecordValidatorBase]) -> None:
        """Check records with these as well from now on. Classes from ``__main__`` are sent by value.

        :raises InvalidTypeError: one of them is no validator, or cannot be sent
        """
        validators = options.check_validators(record_validators)
        self._call(AddValidators(pickling.dumps(validators, "record_validators"))).result()

    def _call(self, command: object, *, with_classes: bool = False) -> MPFuture[Any]:
        """Send a command as soon as the node is ready; returns at once.

        :param with_classes: make classes known there first that were registered with MSGPackSerializer here
        """
        creation = self._link.creation
        classes = MSGPackSerializer._class_of
        if with_classes and classes != self._shared_classes:
            registered = chain(creation, self._register(dict(classes)))
            return chain(registered, lambda _: creation.result().call(command))
        if creation.done() and not creation.cancelled() and creation.exception() is None:
            return creation.result().call(command)
        return chain(creation, lambda service: service.call(command))

    def _register(self, classes: dict[int, type[Any]]) -> Callable[[ServiceHandle], MPFuture[None]]:
        command = RegisterClasses(pickling.dumps(classes, "a registered class"))
        owner = weakref.ref(self)  # what waits for the node does not keep the DHT alive

        def note(call: Future[None]) -> None:
            # Only now: another thread must not go on before they are known there, nor anybody if that failed.
            dht = owner()
            if dht is not None and not call.cancelled() and call.exception() is None:
                dht._shared_classes = classes

        def register(service: ServiceHandle) -> MPFuture[None]:
            call: MPFuture[None] = service.call(command)
            call.when_done(note)  # before the callback that sends what needs the classes
            return call

        return register

    def _describe(self) -> NodeDescription:
        return self._last.hear(self._describe_later().result())

    def _describe_at_last(self) -> NodeDescription:
        """What the node is now, or was when it was last asked, if it has ended."""
        try:
            return self._describe()
        except (InvalidStateError, PeerProcessDied, CancelledError):
            if self._last_description is None:
                raise
            return self._last_description

    @property
    def _last_description(self) -> NodeDescription | None:
        """What was last heard of the node: for averagers, which ask nobody while they are made."""
        return self._last.description

    def _describe_later(self) -> MPFuture[NodeDescription]:
        """As soon as the node is ready; returns at once."""
        call: MPFuture[NodeDescription] = self._call(DescribeNode())
        call.when_done(self._last.note_answer)
        return call


def _serialize(name: str, value: object) -> bytes:
    try:
        return MSGPackSerializer.dumps(value)
    except InvalidTypeError as error:
        raise InvalidTypeError(f"{name}: {error}") from None
    except InvalidValueError as error:
        raise InvalidValueError(f"{name}: {error}") from None


def _likely_modules() -> tuple[str, ...]:
    return tuple(name for loaded, names in _PRELOAD.items() if loaded in sys.modules for name in names)


def _name_of(function: object) -> str:
    return str(getattr(function, "__qualname__", repr(function)))
