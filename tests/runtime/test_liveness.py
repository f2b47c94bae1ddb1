"""When a silent process counts as absent: the pure rules, and what waits for it on an event loop."""

from __future__ import annotations

import asyncio

import pytest

from shoal.runtime.liveness import BEAT, SILENT_SECONDS, STOPPED_SECONDS, Liveness, Silence
from shoal.runtime.presence import Presence, UserProcessAbsent
from shoal.testing.clock import run


def looked_at(liveness: Liveness, until: float) -> float:
    """The silence that regular looks up to ``until`` find."""
    now, found = 0.0, 0.0
    while now < until:
        now += BEAT
        found = liveness.look(now)
    return found


def test_silence_grows_until_something_is_heard():
    liveness = Liveness(1, 0.0)
    assert looked_at(liveness, 5.0) == 5.0
    liveness.hear(5.0)
    assert liveness.look(6.0) == 1.0


def test_a_process_that_was_stopped_itself_does_not_blame_the_other():
    liveness = Liveness(1, 0.0)
    looked_at(liveness, 2.0)
    assert liveness.look(100.0) == pytest.approx(2.0 + BEAT)


@pytest.mark.parametrize(
    ("seconds", "is_stopped", "is_absent"),
    [
        (STOPPED_SECONDS - 0.1, True, False),
        (STOPPED_SECONDS, True, True),
        (30.0, False, False),  # a C call that holds the GIL for so long is no suspension
        (SILENT_SECONDS, False, True),
    ],
)
def test_a_stopped_process_is_absent_soon_and_a_silent_one_late(
    seconds: float, is_stopped: bool, is_absent: bool
):
    assert Silence(7, seconds, is_stopped).is_absence is is_absent


def test_a_stopped_process_is_named_with_what_lets_it_go_on():
    text = Silence(7, 4.0, True).describe("by Ctrl+Z", "'fg' or ")
    assert text == "is stopped (by Ctrl+Z) and has not answered for 4 s; 'fg' or 'kill -CONT 7' lets it go on"


def test_work_ends_when_the_users_process_is_absent():
    async def main() -> None:
        presence = Presence()
        asyncio.get_running_loop().call_later(3.0, presence.update, "it is stopped")
        with pytest.raises(UserProcessAbsent, match="it is stopped"):
            await presence.unless_absent(asyncio.sleep(10.0))
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)
        with pytest.raises(UserProcessAbsent):
            await presence.unless_absent(asyncio.sleep(10.0))
        presence.update(None)
        assert await presence.unless_absent(asyncio.sleep(10.0, "done")) == "done"

    run(main)


def test_cancelling_reaches_the_work():
    async def main() -> None:
        async def work() -> None:
            try:
                await asyncio.sleep(10.0)
            finally:
                story.append("ended")

        story: list[str] = []
        waiting = asyncio.ensure_future(Presence().unless_absent(work()))
        await asyncio.sleep(1.0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert story == ["ended"]

    run(main)


def test_those_who_leave_are_called_at_once_if_it_is_absent_already():
    presence, story = Presence(), []
    presence.update("it is stopped")
    with presence.when_absent(lambda: story.append("left")):
        assert story == ["left"]
    presence.update(None)
    presence.update("again")
    assert story == ["left"]
