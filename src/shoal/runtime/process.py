"""The host's side of a background process: start it, call services in it, and end it."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from shoal.runtime.futures import MPFuture
from shoal.runtime.service import Service, ServiceContext

ServiceFactory = Callable[[ServiceContext], Awaitable[Service]]


class BackgroundProcess:
    """A Python process of our own beside the host's, on whose event loop services live."""

    @classmethod
    def start(
        cls, name: str, *, daemon: bool = True, preload: tuple[str, ...] = (), timeout: float = 30
    ) -> BackgroundProcess:
        raise NotImplementedError

    def create_service(
        self, factory: ServiceFactory, *, name: str = "", handler: Callable[[Any], Any] | None = None
    ) -> MPFuture[ServiceHandle]:
        """Make a service in the process by ``factory`` (picklable; functools.partial for arguments)."""
        raise NotImplementedError

    @property
    def is_alive(self) -> bool:
        raise NotImplementedError

    @property
    def pid(self) -> int:
        raise NotImplementedError

    @property
    def log_tail(self) -> str:
        raise NotImplementedError

    def shutdown(self, timeout: float = 3.0) -> None:
        raise NotImplementedError


class ServiceHandle:
    """A service in the background process, as the host sees it."""

    def call(self, command: object, *, descriptors: Sequence[int] = ()) -> MPFuture[Any]:
        raise NotImplementedError

    def close(self) -> concurrent.futures.Future[None]:
        raise NotImplementedError
