"""Several averagers live on one host, but a method is served once: streams find their averager by prefix.

The first message of every routed stream has a field ``prefix``. May touch the host's registry of methods,
nothing else.
"""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, runtime_checkable

from shoal.averaging.codes import AveragingCode
from shoal.errors import InvalidValueError, ProtocolViolation, RemoteError
from shoal.p2p.host import Host
from shoal.p2p.rpc import Method, Stream


@runtime_checkable
class HasPrefix(Protocol):
    """The first message of a routed stream."""

    @property
    def prefix(self) -> str: ...


StreamHandler = Callable[[Stream, Any], Awaitable[None]]
"""Called with the stream and its first message, which is already received."""

_routers: weakref.WeakKeyDictionary[Host, Router] = weakref.WeakKeyDictionary()


class Router:
    """Hands streams of a method to the handler that was registered for their prefix."""

    def __init__(self, host: Host) -> None:
        self._host = weakref.ref(host)
        self._handlers: dict[str, dict[str, StreamHandler]] = {}

    @classmethod
    def of(cls, host: Host) -> Router:
        """The one router of ``host``."""
        router = _routers.get(host)
        if router is None:
            router = _routers[host] = cls(host)
        return router

    def register(self, method: Method[Any, Any], prefix: str, handler: StreamHandler) -> None:
        """Serve streams of ``method`` whose first message carries ``prefix``.

        :raises InvalidValueError: the prefix is registered already for this method
        """
        handlers = self._handlers.get(method.name)
        if handlers is None:
            self._get_host().serve_stream(method, self._dispatch)
            handlers = self._handlers[method.name] = {}
        if prefix in handlers:
            raise InvalidValueError(
                f"prefix must be one that no averager on this DHT has, got {prefix!r}, which is in use"
            )
        handlers[prefix] = handler

    def unregister(self, method: Method[Any, Any], prefix: str) -> None:
        """Stop serving ``prefix``; streams that were handed over already go on. Harmless if not registered."""
        handlers = self._handlers.get(method.name)
        if handlers is None:
            return
        handlers.pop(prefix, None)
        if not handlers:
            del self._handlers[method.name]
            self._get_host().stop_serving(method)

    async def _dispatch(self, stream: Stream) -> None:
        first = await stream.receive()
        if not isinstance(first, HasPrefix):
            raise ProtocolViolation(f"{stream.method.name}: the first message names no prefix")
        handler = self._handlers.get(stream.method.name, {}).get(first.prefix)
        if handler is None:
            raise RemoteError(AveragingCode.UNKNOWN_PREFIX, f"no averager with prefix {first.prefix!r} here")
        await handler(stream, first)

    def _get_host(self) -> Host:
        host = self._host()
        assert host is not None, "a router is used only while its host lives"
        return host
