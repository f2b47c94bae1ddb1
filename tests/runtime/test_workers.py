"""Threads that run one callable after the other."""

from __future__ import annotations

import sys
import threading

from shoal.runtime.workers import SerialThread, Strand

LIMIT = 20  # seconds, against hanging only


def test_a_serial_thread_outlives_what_calls_exit(caplog):
    thread, done = SerialThread("serial"), threading.Event()
    thread.submit(lambda: sys.exit(3))
    thread.submit(done.set)
    assert done.wait(LIMIT)
    assert "serial failed" in caplog.text
    thread.stop(LIMIT)


def test_a_strand_runs_everything_in_order_one_at_a_time():
    strand, done, seen = Strand("strand"), threading.Event(), []
    barrier = threading.Barrier(4)

    def submit_some(first: int) -> None:
        barrier.wait(LIMIT)
        for number in range(first, first + 500):
            strand.submit(lambda number=number: seen.append(number))

    threads = [threading.Thread(target=submit_some, args=(first,)) for first in range(0, 2000, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    strand.submit(done.set)
    assert done.wait(LIMIT)
    assert sorted(seen) == list(range(2000))
    for first in range(0, 2000, 500):
        mine = [number for number in seen if first <= number < first + 500]
        assert mine == sorted(mine)


def test_a_strand_has_a_thread_only_while_there_is_work_and_survives_failures(caplog):
    strand, began, go_on = Strand("short-lived"), threading.Event(), threading.Event()
    done = threading.Event()

    def work() -> None:
        began.set()
        go_on.wait(LIMIT)
        raise SystemExit(1)

    for _ in range(2):
        strand.submit(work)
        assert began.wait(LIMIT)
        (thread,) = (one for one in threading.enumerate() if one.name == "short-lived")
        go_on.set()
        thread.join(LIMIT)
        assert not thread.is_alive()
        began.clear()
        go_on.clear()
    strand.submit(done.set)
    assert done.wait(LIMIT)
    assert caplog.text.count("short-lived failed") == 2
