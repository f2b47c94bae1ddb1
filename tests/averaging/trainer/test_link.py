"""How an averager comes to its service and parts from it: every call of the start is answered by the test."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from user_side import UserSide

import shoal
from shoal.averaging.commands import AttachArena
from shoal.averaging.trainer.life import LifeState
from shoal.averaging.trainer.shared_buffers import SharedBuffers
from shoal.errors import DeadlineExceeded, InvalidStateError, InvalidValueError, PeerProcessUnresponsive
from shoal.runtime.futures import MPFuture

LIMIT = 20  # seconds, against hanging only


class Handle:
    """A service; it ends at once when it is told to."""

    def __init__(self) -> None:
        self.attaching: MPFuture[Any] = MPFuture()
        self.was_called = threading.Event()
        self.closed = 0
        self.closing: MPFuture[None] = MPFuture()
        self.closing.set_result(None)
        self.attached: AttachArena | None = None

    def call(self, command: object, *, descriptors: Any = ()) -> MPFuture[Any]:
        assert isinstance(command, AttachArena)
        assert len(descriptors) == 1
        self.attached = command
        self.was_called.set()
        return self.attaching

    def close(self) -> MPFuture[None]:
        self.closed += 1
        return self.closing


class Start:
    """An averager's start: its calls, each of which the test ends."""

    def __init__(
        self,
        explain: Callable[[], Exception | None] | None = None,
        tensors: torch.Tensor | SharedBuffers | None = None,
    ) -> None:
        config: Any = SimpleNamespace(prefix="run", client_mode=None, auxiliary=False, mode=None)
        self.link = UserSide(torch.zeros(3) if tensors is None else tensors, config=config).link
        self.describing: MPFuture[Any] = MPFuture(explain=explain)
        self.creating: MPFuture[Any] = MPFuture(explain=explain)
        self.handle = Handle()
        self.dht: Any = SimpleNamespace(background=self, _describe_later=lambda: self.describing)

    def create_service(self, factory: Any, *, name: str, handler: Any) -> MPFuture[Any]:
        assert name == "averager run"
        return self.creating

    def begin(self) -> None:
        factory: Any = None
        self.link.start(self.dht, factory)

    def come_to(self, state: LifeState) -> None:
        self.begin()
        if state is LifeState.WAITING_FOR_DHT:
            return
        self.describing.set_result(SimpleNamespace(client_mode=False))
        if state is LifeState.CREATING:
            return
        self.creating.set_result(self.handle)
        assert self.handle.was_called.wait(LIMIT)
        if state is LifeState.ATTACHING:
            return
        self.handle.attaching.set_result(None)
        self.link.wait(LIMIT)


@pytest.fixture(autouse=True)
def _no_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.averaging.trainer.link.settle_modes", lambda config, dht_is_client: None)


ON_THE_WAY = (LifeState.WAITING_FOR_DHT, LifeState.CREATING, LifeState.ATTACHING)


@pytest.mark.parametrize("state", [*ON_THE_WAY, LifeState.RUNNING])
def test_the_start_goes_from_call_to_call(state: LifeState):
    start = Start()
    assert not start.link.is_alive
    start.come_to(state)
    assert start.link.life.state is state
    assert start.link.is_alive
    if state is LifeState.RUNNING:
        assert start.link.ready() is start.handle
    else:
        with pytest.raises(DeadlineExceeded, match="not ready after 0 s"):
            start.link.wait(0)
    start.link.end(LIMIT)


@pytest.mark.parametrize("state", ON_THE_WAY)
def test_an_end_during_the_start_is_told_to_those_who_wait_for_it(state: LifeState):
    start = Start()
    start.come_to(state)
    start.link.end(LIMIT)
    with pytest.raises(InvalidStateError, match="shut down before it had started"):
        start.link.wait(LIMIT)
    with pytest.raises(InvalidStateError, match="was shut down"):
        start.link.ready()
    assert start.describing.cancelled() == (state is LifeState.WAITING_FOR_DHT)
    assert start.creating.cancelled() == (state is LifeState.CREATING)
    assert start.handle.attaching.cancelled() == (state is LifeState.ATTACHING)
    assert start.handle.closed == (state is LifeState.ATTACHING)


def test_a_service_that_came_to_be_as_its_start_was_given_up_is_closed():
    """Its answer is there, and nobody has been told yet."""
    start = Start()
    start.come_to(LifeState.CREATING)
    start.creating.set_running_or_notify_cancel()
    ending = threading.Thread(target=start.link.end, args=(LIMIT,))
    ending.start()
    while start.link.is_alive:
        pass
    start.creating.set_result(start.handle)
    ending.join(LIMIT)
    assert start.handle.closed == 1


def test_an_end_as_the_dht_gets_ready_leaves_no_service():
    start = Start()
    start.begin()

    def create_service(*_: Any, **__: Any) -> MPFuture[Any]:
        start.link.end(LIMIT)
        return start.creating

    start.create_service = create_service  # type: ignore[method-assign]
    start.describing.set_result(SimpleNamespace(client_mode=False))
    assert start.creating.cancelled()
    assert start.link.life.state is LifeState.ENDED


@pytest.mark.parametrize("state", ON_THE_WAY)
def test_whatever_fails_in_the_start_is_raised_by_all_who_wait(state: LifeState):
    start = Start()
    start.come_to(state)
    calls = dict(zip(ON_THE_WAY, (start.describing, start.creating, start.handle.attaching), strict=True))
    calls[state].set_exception(InvalidValueError("of the start"))
    for wait in (start.link.wait, start.link.ready):
        with pytest.raises(InvalidValueError, match="of the start"):
            wait(LIMIT)
    assert not start.link.is_alive
    assert start.link.life.was_started
    start.link.end(LIMIT)
    assert start.handle.closed == (state is LifeState.ATTACHING)
    with pytest.raises(InvalidStateError, match="was shut down"):
        start.link.ready()


@pytest.mark.parametrize("state", [LifeState.WAITING_FOR_DHT, LifeState.CREATING])
def test_a_wait_that_is_too_short_says_why_nothing_comes(state: LifeState):
    start = Start(explain=lambda: PeerProcessUnresponsive("it is stopped"))
    start.come_to(state)
    for wait in (start.link.wait, start.link.ready):
        with pytest.raises(PeerProcessUnresponsive, match="it is stopped"):
            wait(0.01)
    start.link.end(LIMIT)


def test_a_start_that_cannot_begin_may_be_tried_again():
    start = Start()

    def not_running() -> MPFuture[Any]:
        raise InvalidStateError("this DHT was not started")

    describe, start.dht._describe_later = start.dht._describe_later, not_running
    with pytest.raises(InvalidStateError, match="DHT was not started"):
        start.begin()
    with pytest.raises(InvalidStateError, match="not started; call run_in_background"):
        start.link.wait()
    start.dht._describe_later = describe
    start.begin()
    with pytest.raises(InvalidStateError, match="started already"):
        start.begin()
    start.link.end(LIMIT)


def test_nothing_of_a_start_keeps_the_tensors_alive_after_the_end():
    start = Start()
    start.come_to(LifeState.RUNNING)
    link, gone = start.link, weakref.ref(start.link._arena.store)
    link.end(LIMIT)
    vars(start.handle).clear()  # no handle keeps its calls
    vars(start).clear()
    gc.collect()
    gc.disable()  # no cycle is in the way
    try:
        del link
        assert gone() is None
    finally:
        gc.enable()


# buffers that were handed over


@pytest.mark.parametrize("state", [*ON_THE_WAY, LifeState.RUNNING])
def test_buffers_are_taken_at_the_start_and_free_after_the_end(state: LifeState):
    buffers = SharedBuffers([((3,), torch.float32)])
    start, other = Start(tensors=buffers), Start(tensors=buffers)
    start.come_to(state)
    with pytest.raises(InvalidStateError, match="the averager 'run' has these"):
        other.begin()
    start.link.end(LIMIT)
    other.come_to(LifeState.RUNNING)
    other.link.end(LIMIT)


@pytest.mark.parametrize("handed_over", [False, True])
def test_the_service_hears_whether_the_first_area_has_values(handed_over: bool):
    start = Start(tensors=SharedBuffers([((3,), torch.float32)]) if handed_over else None)
    start.come_to(LifeState.RUNNING)
    assert start.handle.attached == AttachArena(128, holds_values=handed_over)
    start.link.end(LIMIT)


def test_buffers_are_not_taken_by_a_start_that_cannot_begin():
    buffers = SharedBuffers([((3,), torch.float32)])
    start = Start(tensors=buffers)
    start.dht._describe_later = None  # it is no DHT that was started
    with pytest.raises(TypeError):
        start.begin()
    Start(tensors=buffers).come_to(LifeState.WAITING_FOR_DHT)


def test_a_service_that_does_not_end_in_time_keeps_the_buffers():
    """Its process is stopped, say, and would go on with a round when it runs again."""
    buffers = SharedBuffers([((3,), torch.float32)])
    start = Start(tensors=buffers)
    start.come_to(LifeState.RUNNING)
    start.handle.closing = MPFuture()
    start.link.end(0)
    with pytest.raises(InvalidStateError, match="its background process has not answered since"):
        Start(tensors=buffers).begin()
    start.handle.closing.set_result(None)
    Start(tensors=buffers).come_to(LifeState.WAITING_FOR_DHT)


def test_an_averager_that_nobody_refers_to_is_gone_at_once():
    averager = shoal.DecentralizedAverager(
        [torch.zeros(3)], shoal.DHT(start=False), prefix="run", start=False
    )
    gone = weakref.ref(averager)
    gc.disable()
    try:
        del averager
        assert gone() is None
    finally:
        gc.enable()
