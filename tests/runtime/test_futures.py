"""MPFuture alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable

import pytest

from shoal.errors import DeadlineExceeded, InvalidStateError, InvalidTypeError
from shoal.runtime import futures
from shoal.runtime.futures import MPFuture, chain


def test_it_can_be_awaited_and_waited_for():
    future: MPFuture[int] = MPFuture()

    async def main() -> int:
        asyncio.get_running_loop().call_soon(future.set_result, 5)
        return await future

    assert asyncio.run(main()) == 5
    assert future.result() == 5
    assert isinstance(future, concurrent.futures.Future)


def test_cancelling_an_awaiting_task_cancels_it():
    cancelled = []
    future: MPFuture[int] = MPFuture(on_cancel=lambda: not cancelled.append(True))

    async def main() -> None:
        task = asyncio.ensure_future(wait(future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def wait(future):
        return await future

    asyncio.run(main())
    assert future.cancelled()
    assert cancelled == [True]
    # Whoever waits by concurrent.futures is told as well.
    assert concurrent.futures.wait([future], timeout=5).done == {future}


def test_callbacks_go_through_the_dispatcher():
    dispatched = []
    called = []
    future: MPFuture[int] = MPFuture(dispatch=dispatched.append)
    future.add_done_callback(called.append)
    future.set_result(1)
    assert called == []
    dispatched.pop()()
    assert called == [future]
    future.add_done_callback(called.append)  # finished: at once, as in concurrent.futures
    assert called == [future, future]


@pytest.mark.parametrize("copier", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_copied(copier):
    with pytest.raises(InvalidTypeError, match="result"):
        copier(MPFuture())


# chain


def test_a_chain_is_done_when_its_call_is():
    first: MPFuture[int] = MPFuture()
    call: MPFuture[str] = MPFuture()
    begun = []
    outer = chain(first, lambda value: begun.append(value) or call)
    assert not begun
    first.set_result(3)
    assert begun == [3]
    assert not outer.done()
    call.set_result("done")
    assert outer.result(0) == "done"
    assert chain(first, lambda _: call).result(0) == "done"


def test_a_chain_is_late_for_the_reason_of_the_link_that_it_waits_for():
    reasons = [DeadlineExceeded("the first is late"), DeadlineExceeded("the call is late")]
    first: MPFuture[int] = MPFuture(explain=lambda: reasons[0])
    outer = chain(first, lambda _: MPFuture(explain=lambda: reasons[1]))
    for reason in reasons:
        with pytest.raises(DeadlineExceeded) as caught:
            outer.result(0)
        assert caught.value is reason
        if not first.done():
            first.set_result(1)


@pytest.mark.parametrize("where", ["first", "begin", "call"])
def test_a_chain_fails_as_its_links_do(where):
    first: MPFuture[int] = MPFuture()
    call: MPFuture[int] = MPFuture()

    def begin(_: int) -> MPFuture[int]:
        if where == "begin":
            raise LookupError(where)
        return call

    outer = chain(first, begin)
    if where == "first":
        first.set_exception(LookupError(where))
    else:
        first.set_result(1)
    if where == "call":
        call.set_exception(LookupError(where))
    with pytest.raises(LookupError, match=where):
        outer.result(0)


def test_cancelling_a_chain_before_its_call_keeps_it_from_being_made():
    first: MPFuture[int] = MPFuture()
    begun = []
    outer = chain(first, lambda value: begun.append(value) or MPFuture())
    assert outer.cancel()
    assert outer.cancel()
    assert concurrent.futures.wait([outer], timeout=0).done
    first.set_result(1)
    assert begun == []
    assert first.result(0) == 1


def test_cancelling_a_chain_cancels_its_call_and_the_other_way_round():
    first: MPFuture[int] = MPFuture()
    first.set_result(1)
    for cancelled in ("outer", "call"):
        call: MPFuture[int] = MPFuture(on_cancel=iter([True, False, False, False]).__next__)
        outer = chain(first, lambda _, call=call: call)
        assert (outer if cancelled == "outer" else call).cancel()
        assert outer.cancelled()
        assert call.cancelled()
        assert concurrent.futures.wait([outer, call], timeout=0).not_done == set()
    doomed: MPFuture[int] = MPFuture(on_cancel=iter([True, False]).__next__)
    outer = chain(doomed, lambda _: MPFuture())
    doomed.cancel()
    assert outer.cancelled()


def test_a_chain_goes_on_while_a_callback_of_a_user_is_waiting():
    """Dispatched callbacks may wait for the chain itself; here they never run."""
    dispatched = []
    first: MPFuture[int] = MPFuture(dispatch=dispatched.append)
    call: MPFuture[int] = MPFuture(dispatch=dispatched.append)
    outer = chain(first, lambda _: call)
    outer.add_done_callback(lambda _: None)
    first.set_result(1)
    call.set_result(2)
    assert outer.result(0) == 2
    assert len(dispatched) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda future: future.set_result(1),
        lambda future: future.set_exception(ValueError()),
        lambda future: future.cancel(),
        lambda future: future.result(),
        lambda future: future.exception(),
        lambda future: future.done(),
        lambda future: future.add_done_callback(print),
        lambda future: concurrent.futures.wait([future]),
        lambda future: next(concurrent.futures.as_completed([future])),
    ],
    ids=[
        "set_result",
        "set_exception",
        "cancel",
        "result",
        "exception",
        "done",
        "callback",
        "wait",
        "as_completed",
    ],
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_future_in_a_forked_child_is_an_error_that_says_what_to_use(use):
    future: MPFuture[int] = MPFuture()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "nothing was raised"
        try:
            use(future)
        except InvalidStateError as error:
            outcome = str(error)
        finally:
            os.write(writer, outcome.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcome = pipe.read()
    os.waitpid(child, 0)
    assert f"belongs to process {os.getpid()}" in outcome
    assert "multiprocessing.Queue" in outcome


@pytest.mark.parametrize("ask", [MPFuture.result, MPFuture.exception])
def test_a_signal_that_wakes_nobody_ends_a_wait_soon(ask: Callable[[MPFuture[int]], object]):
    """As one does that comes in the moment when the wait begins. Here another thread gets it."""
    thread = threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    thread.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(MPFuture())
    assert time.monotonic() - began < 30
    thread.join()


def test_waits_end_in_time_and_with_what_was_set_meanwhile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(futures, "AWAKE", 0.01)
    future: MPFuture[int] = MPFuture()
    for ask in (future.result, future.exception):
        with pytest.raises(TimeoutError):
            ask(0.05)
    threading.Timer(0.1, future.set_exception, [TimeoutError("of the call")]).start()
    with pytest.raises(TimeoutError, match="of the call"):
        future.result(20)
    cancelled: MPFuture[int] = MPFuture()
    threading.Timer(0.1, cancelled.cancel).start()
    with pytest.raises(concurrent.futures.CancelledError):
        cancelled.result()
