"""The link between a DHT as users hold it and its node in the background process, which it starts and ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from shoal.errors import InvalidStateError
from shoal.p2p.identity import PeerID
from shoal.runtime.futures import MPFuture
from shoal.runtime.process import BackgroundProcess, ServiceFactory, ServiceHandle
from shoal.runtime.startable import result_of_start


class NodeLink:
    """Owns the process, which ends with the last reference to it. Methods may be called on any thread."""

    def __init__(self) -> None:
        self._process: BackgroundProcess | None = None
        self._creation: MPFuture[ServiceHandle] | None = None
        self.peer_id: PeerID | None = None
        """The node's identity, once it is known here."""

    @property
    def name(self) -> str:
        """What a printout calls the DHT."""
        return f"DHT {self.peer_id or 'of unknown peer id'}"

    def start_process(self, *, daemon: bool, preload: tuple[str, ...]) -> None:
        """:raises InvalidStateError: it was started before"""
        if self._process is not None:
            raise InvalidStateError("this DHT was started before; make a new one to start again")
        self._process = BackgroundProcess.start("shoal-dht", daemon=daemon, preload=preload)

    def create_node(self, factory: ServiceFactory, *, name: str, handler: Callable[[Any], Any]) -> None:
        """Have the node made in the process; returns at once."""
        self._creation = self.process.create_service(factory, name=name, handler=handler)
        self._creation.add_done_callback(partial(_end_after_failure, weakref.ref(self.process)))

    @property
    def process(self) -> BackgroundProcess:
        """:raises InvalidStateError: it was not started"""
        if self._process is None:
            raise InvalidStateError(
                "this DHT was not started: use start=True, run_in_background() or a with block"
            )
        return self._process

    @property
    def creation(self) -> MPFuture[ServiceHandle]:
        """The node's service, which may still be in the making."""
        self.process  # noqa: B018 - raises if it was not started
        if self._creation is None:
            raise InvalidStateError("this DHT could not be started")
        return self._creation

    @property
    def was_started(self) -> bool:
        """Whether it was, whatever became of it since."""
        return self._process is not None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.is_alive

    def wait(self, timeout: float | None = None) -> ServiceHandle:
        """The node's service, once it is there."""
        return result_of_start(self.creation, timeout, "DHT")

    def end(self, timeout: float) -> None:
        """End the process in order within ``timeout`` seconds, else by force; nothing before the start."""
        if self._process is not None:
            self._process.shutdown(timeout)


def _end_after_failure(process: weakref.ref[BackgroundProcess], creation: Future[ServiceHandle]) -> None:
    """A process whose node could not be made is of no use to anybody."""
    alive = process()
    if alive is not None and (creation.cancelled() or creation.exception() is not None):
        alive.shutdown()  # in order: it has nobody to say goodbye to, and is quick
