"""The virtual clock: time jumps, order is kept, and programs that hang or leave something behind fail."""

from __future__ import annotations

import asyncio
import time

import pytest

from shoal.testing.clock import Deadlock, VirtualTimeLimitExceeded, run


def test_sleeping_takes_virtual_time_only():
    async def main():
        loop = asyncio.get_running_loop()
        await asyncio.sleep(1800)
        return loop.time()

    started = time.monotonic()
    assert run(main) == 1800
    assert time.monotonic() - started < 10


def test_timers_of_one_instant_run_in_the_order_in_which_they_were_set():
    async def main():
        loop = asyncio.get_running_loop()
        order = []
        for number in range(50):
            loop.call_at(7.5, order.append, number)
        await asyncio.sleep(8)
        return order

    assert run(main) == list(range(50))


def test_timeouts_and_cancelled_timers_work():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run(main) == 3


def test_executors_run_inline():
    async def main():
        loop = asyncio.get_running_loop()
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, lambda: 1 // 0)
        return await asyncio.to_thread(lambda: 5)

    assert run(main) == 5


def test_a_program_that_waits_for_ever_is_a_deadlock_that_says_where():
    async def waits_for_ever():
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="waits_for_ever"):
        run(waits_for_ever)


def test_the_limit_of_virtual_time():
    async def main():
        for _ in range(1000):
            await asyncio.sleep(1)

    with pytest.raises(VirtualTimeLimitExceeded, match="10 virtual seconds"):
        run(main, limit=10)


def test_a_task_left_behind_is_an_error():
    async def main():
        task = asyncio.create_task(asyncio.sleep(100))
        task.set_name("forgotten")

    with pytest.raises(AssertionError, match="forgotten"):
        run(main)


def test_a_failure_that_nobody_saw_is_an_error():
    async def fails():
        raise ValueError("unseen")

    async def main():
        task = asyncio.create_task(fails())
        await asyncio.sleep(1)
        assert task.done()

    with pytest.raises(AssertionError, match="unseen"):
        run(main)


def test_a_failure_that_was_seen_is_none():
    async def fails():
        raise ValueError("seen")

    async def main():
        task = asyncio.create_task(fails())
        with pytest.raises(ValueError):
            await task

    run(main)


def test_the_error_of_the_main_coroutine_comes_through():
    async def main():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(main)
