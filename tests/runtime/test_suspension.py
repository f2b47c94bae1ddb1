"""One of the two processes is stopped: real processes and signals."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import background_services as services
import pytest

from shoal.errors import DeadlineExceeded, PeerProcessUnresponsive
from shoal.runtime.process import BackgroundProcess
from shoal.runtime.processes import is_stopped

LIMIT = 30  # seconds, against hanging only


@pytest.fixture
def own():
    """A background process that the test may stop."""
    process = BackgroundProcess.start("suspended")
    yield process
    process.shutdown(0.0)


@pytest.fixture
def warnings(monkeypatch):
    found: list[str] = []
    heard = threading.Condition()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with heard:
                found.append(record.getMessage())
                heard.notify_all()

    handler = Handler(logging.WARNING)
    logging.getLogger("shoal").addHandler(handler)

    def wait_for(text: str) -> str:
        with heard:
            assert heard.wait_for(lambda: any(text in one for one in found), LIMIT), found
            return next(one for one in found if text in one)

    yield wait_for
    logging.getLogger("shoal").removeHandler(handler)


def test_the_system_says_which_process_is_stopped(own):
    assert not is_stopped(own.pid)
    os.kill(own.pid, signal.SIGSTOP)
    deadline = time.monotonic() + LIMIT
    while not is_stopped(own.pid):  # the signal is on its way
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_a_call_with_a_timeout_ends_when_the_background_process_is_stopped(own, warnings):
    runner = own.create_service(services.make_runner).result(LIMIT)
    os.kill(own.pid, signal.SIGSTOP)
    with pytest.raises(
        PeerProcessUnresponsive, match=rf"'suspended' \(pid {own.pid}\) is stopped .*kill -CONT"
    ) as caught:
        runner.call((services.wait_for, "never"), timeout=0.5).result(LIMIT)
    assert isinstance(caught.value, DeadlineExceeded)


def test_a_wait_that_is_too_short_says_that_the_process_is_stopped(own):
    runner = own.create_service(services.make_runner).result(LIMIT)
    os.kill(own.pid, signal.SIGSTOP)
    with pytest.raises(PeerProcessUnresponsive, match="is stopped"):
        runner.call((services.echo, 1)).result(4)


def test_a_process_that_lives_keeps_the_timeout_itself(own):
    runner = own.create_service(services.make_runner).result(LIMIT)
    waiting = runner.call((services.wait_for, "later"), timeout=0.1)
    with pytest.raises(TimeoutError) as caught:
        waiting.result(3)
    assert not isinstance(caught.value, PeerProcessUnresponsive)
    runner.call((services.set_event, "later")).result(LIMIT)
    assert waiting.result(LIMIT) == "later"


def test_a_call_without_a_timeout_is_warned_of_and_goes_on(own, warnings):
    runner = own.create_service(services.make_runner).result(LIMIT)
    os.kill(own.pid, signal.SIGSTOP)
    waiting = runner.call((services.echo, 1))
    assert f"(pid {own.pid}) is stopped" in warnings("Calls that wait for it: 1")
    os.kill(own.pid, signal.SIGCONT)
    assert waiting.result(LIMIT) == 1
    warnings("answers again")


USER = """
    import sys
    sys.path.insert(0, {folder!r})
    import background_services as services
    from shoal.runtime.process import BackgroundProcess

    process = BackgroundProcess.start("of a stopped user")
    runner = process.create_service(services.make_runner).result(30)
    watching = runner.call((services.see_user_leave_and_return, sys.argv[1]))
    runner.call((services.echo, 1)).result(30)  # the call before it has begun by then
    print(process.pid, flush=True)
    print(watching.result(60), flush=True)
"""


def test_the_background_process_notices_that_its_user_is_stopped_and_that_it_is_back(tmp_path):
    code = textwrap.dedent(USER).format(folder=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        os.kill(user.pid, signal.SIGSTOP)
        note = tmp_path / "absent"
        deadline = time.monotonic() + LIMIT
        while not note.exists():
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)
        os.kill(user.pid, signal.SIGCONT)
        story = user.stdout.readline()
        assert f"user's process (pid {user.pid}) is stopped" in story
        assert "'fg' or 'kill -CONT" in story
        assert story.rstrip().endswith("and is back")
