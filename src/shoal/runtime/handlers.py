"""Answers the calls that services make to the user process: one handler for each service, on a thread of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from shoal.errors import InvalidStateError
from shoal.runtime import pickling
from shoal.runtime.channel import Channel, Frame, Kind
from shoal.runtime.descriptors import WithDescriptors
from shoal.runtime.workers import SerialThread

Handler = Callable[[Any], Any]
"""Takes a command and returns the answer. A future's outcome is the answer when it is there, and the next call does not
wait for it. :class:`~.descriptors.WithDescriptors` answers with file descriptors besides.
"""


class Handlers:
    """The handlers of one background process's services."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._handlers: dict[int, tuple[SerialThread, Handler]] = {}
        self._waiting: set[int] = set()
        """Calls that have not begun, and may still be cancelled."""

    def add(self, service: int, handler: Handler, thread_name: str) -> None:
        thread = SerialThread(thread_name)
        thread.start()
        self._handlers[service] = (thread, handler)

    def remove(self, service: int) -> None:
        """The service is closed; its handler may have been removed before."""
        if (entry := self._handlers.pop(service, None)) is not None:
            entry[0].stop()

    def remove_all(self) -> None:
        for service in list(self._handlers):
            self.remove(service)

    def receive(self, frame: Frame) -> None:
        """A service has made a call; never blocks."""
        if (entry := self._handlers.get(frame.service)) is None:
            self._answer_error(
                frame.call, InvalidStateError("the service has no handler in the user process")
            )
            return
        thread, handler = entry
        self._waiting.add(frame.call)
        thread.submit(partial(self._run, handler, frame))

    def cancel(self, call: int) -> None:
        """The service wants no answer any more. A call that runs is left to finish, and its answer dropped there."""
        self._waiting.discard(call)

    def _run(self, handler: Handler, frame: Frame) -> None:
        if frame.call not in self._waiting:
            return  # cancelled before it began
        self._waiting.discard(frame.call)
        try:
            answer = handler(pickling.loads(frame.body))
        except BaseException as error:  # noqa: BLE001 - the edge of the handler's thread: the service raises it
            self._answer_error(frame.call, error)
            return
        if isinstance(answer, Future):
            # Past the dispatch of MPFuture: callbacks of users may be waiting on that thread.
            Future.add_done_callback(answer, partial(self._answer_later, frame.call))
        else:
            self._answer(frame.call, answer)

    def _answer_later(self, call: int, answer: Future[Any]) -> None:
        try:
            result = answer.result()
        except BaseException as error:  # noqa: BLE001 - as that of a handler
            self._answer_error(call, error)
        else:
            self._answer(call, result)

    def _answer(self, call: int, answer: object) -> None:
        attached = answer if isinstance(answer, WithDescriptors) else WithDescriptors(answer, ())
        with contextlib.closing(attached):
            try:
                body = pickling.dumps(attached.value, "the handler's result")
            except Exception as error:  # noqa: BLE001 - of the classes of what is sent; the service raises it
                self._answer_error(call, error)
                return
            with contextlib.suppress(BrokenPipeError):
                self._channel.send(Kind.RESULT, call=call, body=body, descriptors=attached.descriptors)

    def _answer_error(self, call: int, error: BaseException) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._channel.send(Kind.ERROR, call=call, body=pickling.dump_error(error))
