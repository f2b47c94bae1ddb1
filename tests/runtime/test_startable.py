"""The base of what users start, wait for and end; its objects here have no process."""

from __future__ import annotations

import copy
import pickle

import pytest

from shoal.errors import DeadlineExceeded, InvalidTypeError
from shoal.runtime.futures import MPFuture
from shoal.runtime.startable import Startable, result_of_start, wait_or_end


class Link:
    name = "thing 7"
    was_started = False

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def wait(self, timeout: float | None = None) -> object:
        if self.error is not None:
            raise self.error
        return timeout


class Thing(Startable):
    def __init__(self) -> None:
        self.link = Link()
        self.story: list[str] = []
        super().__init__(self.link, instead_of_a_copy="a thing can't be copied: make another one")

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        self.story.append("start")
        self.link.was_started = True
        if await_ready:
            wait_or_end(self, timeout)

    def is_alive(self) -> bool:
        return self.story[-1:] == ["start"]

    def shutdown(self) -> None:
        self.story.append("shutdown")


def test_a_block_starts_what_was_not_started_and_ends_it():
    thing = Thing()
    with thing as inside:
        assert inside is thing
    assert thing.story == ["start", "shutdown"]
    started = Thing()
    started.run_in_background()
    with started:
        pass
    assert started.story == ["start", "shutdown"]


def test_a_printout_says_how_it_is():
    thing = Thing()
    assert repr(thing) == "<thing 7, not started>"
    thing.run_in_background()
    assert repr(thing) == "<thing 7, alive>"
    thing.shutdown()
    assert repr(thing) == "<thing 7, ended>"


@pytest.mark.parametrize("error", [DeadlineExceeded("not in time"), KeyboardInterrupt()])
def test_a_start_that_is_waited_for_in_vain_is_shut_down(error: BaseException):
    thing = Thing()
    thing.link.error = error
    with pytest.raises(type(error)):
        thing.run_in_background()
    assert thing.story == ["start", "shutdown"]
    waiting = Thing()
    waiting.link.error = error
    waiting.run_in_background(await_ready=False)
    with pytest.raises(type(error)):
        waiting.wait_until_ready()
    assert waiting.story == ["start"], "a wait alone ends nothing"


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_with_what_to_do_instead(copying):
    with pytest.raises(InvalidTypeError, match="make another one"):
        copying(Thing())


def test_a_start_that_fails_by_a_timeout_of_its_own_is_not_taken_for_a_short_wait():
    started: MPFuture[object] = MPFuture()
    with pytest.raises(DeadlineExceeded, match=r"the thing was not ready after 0\.01 s"):
        result_of_start(started, 0.01, "thing")
    started.set_exception(TimeoutError("of the start"))
    with pytest.raises(TimeoutError, match="of the start"):
        result_of_start(started, 0.01, "thing")
