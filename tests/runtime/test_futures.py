"""MPFuture alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import pickle

import pytest

from shoal.errors import InvalidTypeError
from shoal.runtime.futures import MPFuture


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
