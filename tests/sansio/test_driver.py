"""A driver has a core hear of events and of time, in order, and shows its turns."""

from __future__ import annotations

import asyncio
import math

import pytest

from shoal.sansio import trace
from shoal.sansio.core import NEVER, TimePassed
from shoal.sansio.driver import Driver
from shoal.testing.clock import run


class Echo:
    """Asks for what it is told; a number is a deadline."""

    def __init__(self) -> None:
        self.deadline = NEVER
        self.heard: list[tuple[object, float]] = []

    def handle(self, event, now):
        self.heard.append((event, now))
        if isinstance(event, TimePassed):
            self.deadline = NEVER
        elif isinstance(event, float):
            self.deadline = event
        elif event == "bad":
            raise ValueError("bad")
        return [event]


class Counting(Echo):
    """How often is it asked for its deadline?"""

    asked = 0

    @property
    def deadline(self):
        self.asked += 1
        return self._deadline

    @deadline.setter
    def deadline(self, value):
        self._deadline = value


def make(carry_out=lambda effect: None, **options):
    core = Echo()
    return core, Driver(core, carry_out, name="echo", subject="one", **options)


def test_an_event_that_is_told_meanwhile_waits_for_its_turn():
    async def main() -> None:
        done = []

        def carry_out(effect) -> None:
            if effect == "first":
                driver.tell("second")
                driver.tell("third")
            done.append(effect)

        core, driver = make(carry_out)
        driver.tell("first")
        assert done == ["first", "second", "third"]
        assert [event for event, _ in core.heard] == done

    run(main)


def test_the_core_hears_of_its_deadline_once():
    async def main() -> None:
        core, driver = make()
        began = asyncio.get_running_loop().time()
        driver.tell(began + 5.0)
        driver.tell(began + 3.0)  # earlier
        driver.tell(began + 4.0)  # later: the timer that is early is set again
        await asyncio.sleep(10.0)
        times = [now - began for event, now in core.heard if isinstance(event, TimePassed)]
        assert times == pytest.approx([4.0], abs=0.01)

    run(main)


def test_a_closed_driver_has_no_timer():
    async def main() -> None:
        core, driver = make()
        driver.tell(asyncio.get_running_loop().time() + 1.0)
        driver.close()
        driver.tell(asyncio.get_running_loop().time() + 1.0)
        await asyncio.sleep(5.0)
        assert not any(isinstance(event, TimePassed) for event, _ in core.heard)

    run(main)


def test_an_error_of_the_core_reaches_the_caller_and_the_next_event_is_heard():
    async def main() -> None:
        core, driver = make()
        with pytest.raises(ValueError, match="bad"):
            driver.tell("bad")
        driver.tell("good")
        assert [event for event, _ in core.heard] == ["bad", "good"]

    run(main)


def test_it_uses_the_clock_that_it_was_given():
    async def main() -> None:
        loop = asyncio.get_running_loop()
        core, driver = make(clock=lambda: loop.time() + 1000.0)
        driver.tell(loop.time() + 1002.0)
        await asyncio.sleep(3.0)
        ((_, first), (event, second)) = core.heard
        assert event == TimePassed()
        assert math.isclose(second - first, 2.0, abs_tol=0.01)

    run(main)


@pytest.mark.parametrize("delay", [-1.0, 0.0, 0.01])
def test_deadlines_are_kept_on_uvloop(delay):
    """Its handles of timers that are due at once are others than those of later ones."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        core, driver = make()
        driver.tell(asyncio.get_running_loop().time() + delay)
        async with asyncio.timeout(30.0):
            while len(core.heard) < 2:  # noqa: ASYNC110 - the driver under test is what would set an event
                await asyncio.sleep(0.001)
        assert core.heard[1][0] == TimePassed()

    uvloop.run(main())


def test_with_slack_the_deadline_is_asked_for_once_in_that_time_and_heard_so_much_late():
    async def main() -> None:
        loop, core = asyncio.get_running_loop(), Counting()
        driver = Driver(core, lambda effect: None, name="echo", subject="one", slack=0.5)
        began = loop.time()
        driver.tell("part")
        for _ in range(100):
            driver.tell("part")
        driver.tell(began + 0.2)
        assert core.asked == 1
        await asyncio.sleep(5)
        # asked again when the slack was over, and told at once that the time had passed
        assert core.heard[-1] == (TimePassed(0.0), pytest.approx(began + 0.5))
        assert core.asked < 6
        driver.tell(loop.time() + 2.0)
        await asyncio.sleep(5)
        assert core.heard[-1] == (TimePassed(0.0), pytest.approx(began + 7.0))

    run(main)


def test_a_driver_that_is_closed_asks_for_no_deadline_that_was_put_off():
    async def main() -> None:
        core = Counting()
        driver = Driver(core, lambda effect: None, name="echo", subject="one", slack=0.5)
        driver.tell("part")
        driver.tell(asyncio.get_running_loop().time() + 0.1)
        driver.close()
        await asyncio.sleep(5)
        assert core.asked == 1
        assert not any(isinstance(event, TimePassed) for event, _ in core.heard)

    run(main)


def test_a_watcher_sees_turns_before_and_after_their_effects():
    async def main() -> None:
        order = []
        _core, driver = make(order.append)

        def watch(turn: trace.Turn):
            order.append((turn.core, turn.subject, turn.event, turn.effects))
            return lambda: order.append("after")

        driver.tell("unseen")
        with trace.watching(watch):
            driver.tell("seen")
        driver.tell("unseen again")
        assert order == ["unseen", ("echo", "one", "seen", ("seen",)), "seen", "after", "unseen again"]

    run(main)
