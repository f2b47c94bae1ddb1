"""Log records and output of the background process, as the user process's logging sees them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import background_services as services
import pytest

from shoal.runtime.process import BackgroundProcess

LIMIT = 20


class Collector(logging.Handler):
    """Keeps records, and lets tests wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._arrived = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._arrived:
            self.records.append(record)
            self._arrived.notify_all()

    def wait_for(self, text: str) -> logging.LogRecord:
        def find() -> logging.LogRecord | None:
            return next((record for record in self.records if text in record.getMessage()), None)

        with self._arrived:
            record = self._arrived.wait_for(find, LIMIT)
        assert record is not None, [record.getMessage() for record in self.records]
        return record


@pytest.fixture
def collector():
    handler = Collector()
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)


@pytest.fixture
def runner(process, collector):
    handle = process.create_service(services.make_runner).result(LIMIT)
    yield handle
    handle.close().result(LIMIT)


def test_records_keep_what_they_say(process, runner, collector):
    before = time.time()
    extra = {"peer": "12D3KooWx", "round": 7, "reason": ["a list"]}
    runner.call((services.log, "shoal.tests.deep", logging.WARNING, "%s of %d", "one", 2)).result(LIMIT)
    after = time.time()
    record = collector.wait_for("one of 2")
    assert (record.name, record.levelno, record.levelname) == ("shoal.tests.deep", logging.WARNING, "WARNING")
    assert before <= record.created <= after
    assert (record.process, record.processName) == (process.pid, "shared")
    assert record.filename == "background_services.py"
    assert record.funcName == "log"
    runner.call((services.evaluate, f"logging.getLogger('shoal').info('with fields', extra={extra})")).result(
        LIMIT
    )
    record = collector.wait_for("with fields")
    assert (record.peer, record.round, record.reason) == ("12D3KooWx", 7, "['a list']")


def test_fields_of_the_process_are_on_every_record(own_process, collector):
    runner = own_process.create_service(services.make_runner).result(LIMIT)
    runner.call((services.evaluate, "service.context.set_log_fields(peer='12D3KooWself')")).result(LIMIT)
    runner.call((services.log, "shoal", logging.INFO, "mine")).result(LIMIT)
    assert collector.wait_for("mine").peer == "12D3KooWself"


def test_tracebacks_come_along(runner, collector):
    runner.call((services.log_with_traceback,)).result(LIMIT)
    record = collector.wait_for("it failed")
    assert 'raise LookupError("looked up")' in logging.Formatter().format(record)


def test_levels_follow_the_host_s(runner, collector):
    runner.call((services.log, "shoal.tests", logging.DEBUG, "too fine")).result(LIMIT)
    logging.getLogger("shoal").setLevel(logging.DEBUG)
    try:
        runner.call((services.log, "shoal.tests", logging.DEBUG, "fine")).result(LIMIT)
        collector.wait_for("fine")
    finally:
        logging.getLogger("shoal").setLevel(logging.NOTSET)
    runner.call((services.log, "shoal.tests", logging.DEBUG, "too fine again")).result(LIMIT)
    runner.call((services.log, "shoal.tests", logging.INFO, "the end")).result(LIMIT)
    collector.wait_for("the end")
    assert not any("too fine" in record.getMessage() for record in collector.records)


def test_what_is_printed_becomes_records(process, runner, collector):
    runner.call((services.print_lines,)).result(LIMIT)
    for text, level in [
        ("printed", logging.INFO),
        ("and more", logging.INFO),
        ("complained", logging.WARNING),
        ("from below Python", logging.WARNING),
    ]:
        record = collector.wait_for(text)
        assert (record.name, record.levelno, record.process) == ("shoal.runtime.output", level, process.pid)
    assert "from below Python" in process.log_tail
    assert "INFO shoal.runtime.output: printed" in process.log_tail


def test_every_record_is_out_when_shutdown_returns(own_process, collector):
    runner = own_process.create_service(services.make_runner).result(LIMIT)
    runner.call((services.log_much, 200)).result(LIMIT)
    runner.call((services.log, "shoal", logging.INFO, "the last"))
    own_process.shutdown()
    assert collector.records[-1].getMessage() == "the last"


def test_a_slow_handler_delays_no_result(runner, collector):
    blocked = threading.Event()

    class Blocking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            blocked.wait(LIMIT)

    handler = Blocking()
    logging.getLogger("shoal.tests").addHandler(handler)
    try:
        runner.call((services.log, "shoal.tests", logging.INFO, "stuck")).result(LIMIT)
        assert runner.call((services.echo, 1)).result(LIMIT) == 1
    finally:
        blocked.set()
        logging.getLogger("shoal.tests").removeHandler(handler)
    collector.wait_for("stuck")


def test_a_host_that_does_not_read_holds_up_nothing():
    """The background process logs 30 MB while its user process is stopped, and drops most of it."""
    script = textwrap.dedent(
        f"""
        import logging, os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import background_services as services
        from shoal.runtime.process import BackgroundProcess
        dropped = []
        class Handler(logging.Handler):
            def emit(self, record):
                if "dropped" in record.getMessage():
                    dropped.append(record)
        logging.getLogger("shoal").addHandler(Handler())
        logging.getLogger("shoal").setLevel(logging.INFO)
        process = BackgroundProcess.start("chatty")
        runner = process.create_service(services.make_runner).result()
        print(process.pid, flush=True)
        logged = runner.call((services.log_much, 30_000))
        os.kill(os.getpid(), signal.SIGSTOP)
        print(logged.result(20) < 10)
        runner.call((services.log, "shoal", logging.INFO, "after")).result(20)
        process.shutdown()
        print(bool(dropped))
        """
    )
    host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    os.waitpid(host.pid, os.WUNTRACED)
    # While the user process stands still the process goes on, until it waits for work.
    wait_until_idle(int(host.stdout.readline()))
    os.kill(host.pid, signal.SIGCONT)
    assert host.communicate(timeout=LIMIT)[0].split() == ["True", "True"]


def wait_until_idle(pid: int) -> None:
    def cpu() -> list[str]:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[11:13]

    deadline = time.monotonic() + LIMIT
    before = None
    while (now := cpu()) != before:
        assert time.monotonic() < deadline
        before = now
        time.sleep(0.2)


def test_a_script_that_configures_nothing_sees_info():
    script = textwrap.dedent(
        f"""
        import sys, logging
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import background_services as services
        from shoal.runtime.process import BackgroundProcess
        from shoal.utils import get_logger
        get_logger()
        process = BackgroundProcess.start("x")
        runner = process.create_service(services.make_runner).result()
        for level in (logging.DEBUG, logging.INFO, logging.ERROR):
            runner.call((services.log, "shoal.x", level, f"level {{level}}")).result()
        process.shutdown()
        """
    )

    def lines(**environment: str) -> list[str]:
        env = {**os.environ, **environment}
        result = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=LIMIT, check=True
        )
        assert result.stdout == ""
        return [line.split("] ", 1)[1] for line in result.stderr.splitlines()]

    assert lines() == ["[shoal.x] level 20", "[shoal.x] level 40"]
    assert lines(SHOAL_LOGLEVEL="error") == ["[shoal.x] level 40"]
    assert lines(SHOAL_LOGLEVEL="debug")[0] == "[shoal.x] level 10"
    assert lines(SHOAL_LOGLEVEL="off") == []


def test_names_of_the_process_are_in_the_system_s_list():
    process = BackgroundProcess.start("a telling name")
    if sys.platform == "linux":
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            assert file.read().rstrip(b"\0").split(b"\0")[-1] == b"a telling name"
    process.shutdown()
