"""A real background process: calls, cancellation, errors, services, output, death and its end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import background_services as services
import psutil
import pytest

from shoal.errors import InvalidStateError, InvalidTypeError, PeerProcessDied, ShoalError
from shoal.runtime.descriptors import WithDescriptors
from shoal.runtime.memory import SharedMemory
from shoal.runtime.pickling import RemoteTraceback
from shoal.runtime.process import BackgroundProcess

LIMIT = 20  # seconds, against hanging only


@pytest.fixture
def runner(process):
    handle = process.create_service(services.make_runner).result(LIMIT)
    yield handle
    handle.close().result(LIMIT)


def own_runner(process: BackgroundProcess, **options):
    return process.create_service(services.make_runner, **options).result(LIMIT)


# Calls


def test_calls_return_results(runner):
    value = {"a": (1, 2.5, b"x"), "b": [None, "text"]}
    assert runner.call((services.echo, value)).result(LIMIT) == value


def test_large_values_cross_in_both_directions(runner):
    value = os.urandom(5_000_000)
    assert runner.call((services.echo, value)).result(LIMIT) == value


def test_any_number_of_calls_is_under_way(runner):
    waiting = [runner.call((services.wait_for, f"event {number}")) for number in range(100)]
    for number in reversed(range(100)):
        runner.call((services.set_event, f"event {number}")).result(LIMIT)
        assert waiting[number].result(LIMIT) == f"event {number}"


def test_calls_from_many_threads(runner):
    def work(first: int) -> list[int]:
        return [runner.call((services.echo, number)).result(LIMIT) for number in range(first, first + 50)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(0, 400, 50))) == [
            list(range(first, first + 50)) for first in range(0, 400, 50)
        ]


def test_calls_can_be_awaited(runner):
    async def main() -> list[object]:
        return await asyncio.gather(*(runner.call((services.echo, number)) for number in range(5)))

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_callbacks_may_wait_for_further_calls(runner):
    done: concurrent.futures.Future[object] = concurrent.futures.Future()

    def callback(future) -> None:
        done.set_result(runner.call((services.echo, future.result() + 1)).result(LIMIT))

    release = runner.call((services.wait_for, "release"))
    release.add_done_callback(lambda _: runner.call((services.echo, 1)).add_done_callback(callback))
    runner.call((services.set_event, "release"))
    assert done.result(LIMIT) == 2


def test_a_callback_that_calls_exit_does_not_keep_others_from_running(runner, caplog):
    done = threading.Event()
    release = runner.call((services.wait_for, "release"))
    release.add_done_callback(lambda _: sys.exit("by a callback"))
    release.add_done_callback(lambda _: done.set())
    runner.call((services.set_event, "release"))
    assert done.wait(LIMIT)
    assert "by a callback" in caplog.text


def test_cancelling_the_future_cancels_the_command(runner):
    future = runner.call((services.wait_for_cancellation,))
    runner.call((services.wait_for, "waiting")).result(LIMIT)
    assert future.cancel()
    assert concurrent.futures.wait([future], LIMIT).done
    runner.call((services.wait_for, "cancelled")).result(LIMIT)


def test_a_command_that_cancels_itself_is_cancelled_here(runner):
    future = runner.call((services.fail, asyncio.CancelledError()))
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(LIMIT)


def test_errors_cross_with_type_text_and_traceback(runner):
    with pytest.raises(ZeroDivisionError, match="by zero") as caught:
        runner.call((services.evaluate, "1 / 0")).result(LIMIT)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in evaluate" in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_command_cannot_end_the_process(process, runner, error):
    with pytest.raises(ShoalError, match=type(error).__name__):
        runner.call((services.fail, error)).result(LIMIT)
    assert runner.call((services.echo, 1)).result(LIMIT) == 1
    assert process.is_alive


def test_results_that_cannot_be_sent_are_named(runner):
    with pytest.raises(InvalidTypeError, match=r"the result cannot be sent to the user process.*generator"):
        runner.call((services.evaluate, "(x for x in ())")).result(LIMIT)


def test_commands_that_cannot_be_sent_are_named_before_anything_is_sent(runner):
    with pytest.raises(InvalidTypeError, match=r"the command cannot be sent.*item 1 \(_thread.lock\)"):
        runner.call((services.echo, threading.Lock()))


def test_descriptors_and_shared_memory(runner):
    with SharedMemory.create(10_000) as memory:
        for _ in range(3):
            runner.call((services.add_one_to_memory, 10_000), descriptors=[memory.fd]).result(LIMIT)
        assert memory.buffer[9_999] == 3


# Services and calls of theirs


def test_services_find_each_other_by_name(process, runner):
    named = process.create_service(services.make_runner, name="node").result(LIMIT)
    find = "service.context.find('node').context.service_id"
    assert runner.call((services.evaluate, find)).result(LIMIT) == named.service_id
    assert named.service_id in runner.call((services.evaluate, "list(service.context.services)")).result(
        LIMIT
    )
    named.close().result(LIMIT)
    with pytest.raises(InvalidStateError, match="'node'"):
        runner.call((services.evaluate, find)).result(LIMIT)
    with pytest.raises(InvalidStateError, match="closed"):
        named.call((services.echo, 1)).result(LIMIT)
    named.close().result(LIMIT)


def test_a_factory_s_failure_reaches_the_host(process):
    with pytest.raises(ConnectionRefusedError, match="nobody there"):
        process.create_service(services.make_failing).result(LIMIT)


def test_a_service_that_does_not_come_to_be_leaves_no_thread(process, runner):
    process.create_service(services.make_failing, name="unborn", handler=print).exception(LIMIT)
    with no_answers_read(runner):
        assert process.create_service(services.make_runner, name="unborn", handler=print).cancel()
    wait_until(lambda: "shared-unborn" not in {thread.name for thread in threading.enumerate()})


def test_a_service_whose_creation_is_cancelled_too_late_is_closed(process, runner, tmp_path):
    path = tmp_path / "story"
    with no_answers_read(runner):
        creation = process.create_service(partial(services.make_runner_with_birth_note, str(path)))
        wait_until(path.exists)
        assert creation.cancel()
    wait_until(lambda: path.read_text().startswith("born\n") and path.read_text() != "born\n")
    present = "[type(s).__name__ for s in service.context.services.values()]"
    assert runner.call((services.evaluate, present)).result(LIMIT) == ["Runner"]


@contextlib.contextmanager
def no_answers_read(runner) -> Iterator[None]:
    """Hold the thread that reads what the background process sends: no future ends by that meanwhile."""
    reading, release = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        reading.set()
        release.wait(LIMIT)

    held = runner.call((services.wait_for, "the reader is to be held"))
    concurrent.futures.Future.add_done_callback(held, hold)
    runner.call((services.set_event, "the reader is to be held"))
    assert reading.wait(LIMIT)
    try:
        yield
    finally:
        release.set()


def test_closing_a_service_cancels_its_commands_and_says_farewell(process, runner, tmp_path):
    path = tmp_path / "farewell"
    other = process.create_service(partial(services.make_runner_with_farewell, str(path))).result(LIMIT)
    waiting = other.call((services.wait_for, "never"))
    other.close().result(LIMIT)
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result(LIMIT)
    assert path.read_text() == f"{other.service_id}\n"
    assert runner.call((services.echo, 1)).result(LIMIT) == 1


def test_services_call_the_user_process_in_order_on_one_thread(process):
    seen: list[object] = []

    def handler(command: object) -> object:
        seen.append((command, threading.current_thread().name))
        return [command]

    handle = own_runner(process, name="caller", handler=handler)
    assert handle.call((services.call_user, *range(20))).result(LIMIT) == [[number] for number in range(20)]
    assert [command for command, _ in seen] == list(range(20))
    assert {thread for _, thread in seen} == {"shared-caller"}
    handle.close().result(LIMIT)


def test_a_handler_may_call_the_service_and_its_errors_cross(process):
    def handler(command: object) -> object:
        if command == "fail":
            raise LookupError("not in the user process")
        return handle.call((services.echo, command)).result(LIMIT)

    handle = own_runner(process, handler=handler)
    assert handle.call((services.call_user, "there and back")).result(LIMIT) == ["there and back"]
    with pytest.raises(LookupError, match="not in the user process"):
        handle.call((services.call_user, "fail")).result(LIMIT)
    handle.close().result(LIMIT)


def test_cancelling_a_call_to_the_user_process_drops_it_unless_it_runs(process):
    began, go_on, seen = threading.Event(), threading.Event(), []

    def handler(command: object) -> None:
        seen.append(command)
        began.set()
        go_on.wait(LIMIT)

    handle = own_runner(process, handler=handler)
    first = handle.call((services.call_user, "first"))
    assert began.wait(LIMIT)
    assert handle.call((services.call_user_and_cancel, "dropped")).result(LIMIT) == "cancelled"
    go_on.set()
    first.result(LIMIT)
    handle.call((services.call_user, "last")).result(LIMIT)
    assert seen == ["first", "last"]
    handle.close().result(LIMIT)


def test_a_handler_answers_with_descriptors(process):
    """The answer owns them: here they are closed when it is sent, there when it is let go."""
    with SharedMemory.create(10_000) as memory:
        given: list[WithDescriptors] = []

        def handler(nbytes: int) -> WithDescriptors:
            given.append(WithDescriptors("filled", [os.dup(memory.fd)]))
            return given[-1]

        handle = own_runner(process, handler=handler)
        before = handle.call((services.count_descriptors,)).result(LIMIT)
        for _ in range(3):
            assert handle.call((services.add_one_to_memory_of_user, 10_000)).result(LIMIT) == "filled"
        assert memory.buffer[9_999] == 3
        assert handle.call((services.call_user_and_forget, 10_000)).result(LIMIT) is None
        assert handle.call((services.count_descriptors,)).result(LIMIT) == before
        assert [answer.descriptors for answer in given] == [()] * 4
        handle.close().result(LIMIT)


def test_descriptors_of_an_answer_that_nobody_waits_for_are_closed(process):
    began, go_on = threading.Event(), threading.Event()

    def handler(command: object) -> object:
        if command == "first":
            began.set()
            go_on.wait(LIMIT)
            return WithDescriptors(None, [os.dup(0)])
        return command

    handle = own_runner(process, handler=handler)
    before = handle.call((services.count_descriptors,)).result(LIMIT)
    first = handle.call((services.call_user, "first"))
    assert began.wait(LIMIT)
    first.cancel()
    go_on.set()
    handle.call((services.call_user, "second")).result(LIMIT)  # behind it, there and back
    assert handle.call((services.count_descriptors,)).result(LIMIT) == before
    handle.close().result(LIMIT)


def test_a_handler_that_answers_later_holds_up_no_other_call(process):
    later: concurrent.futures.Future[object] = concurrent.futures.Future()
    handle = own_runner(process, handler=lambda command: later if command == "later" else command)
    first = handle.call((services.call_user, "later"))
    assert handle.call((services.call_user, "now")).result(LIMIT) == ["now"]
    assert not first.done()
    later.set_exception(LookupError("after some time"))
    with pytest.raises(LookupError, match="after some time"):
        first.result(LIMIT)
    handle.close().result(LIMIT)


def test_an_answer_that_cannot_be_sent_is_an_error_of_the_call(process):
    handle = own_runner(process, handler=lambda _: WithDescriptors(threading.Lock(), [os.dup(0)]))
    with pytest.raises(InvalidTypeError, match="the handler's result"):
        handle.call((services.call_user, 1)).result(LIMIT)
    handle.close().result(LIMIT)


def test_an_answer_that_cannot_be_loaded_is_an_error_of_the_call(process):
    handle = own_runner(process, handler=lambda _: services.FailsToLoad())
    with pytest.raises(InvalidTypeError, match="an answer of the user process could not be loaded"):
        handle.call((services.call_user, 1)).result(LIMIT)
    handle.close().result(LIMIT)


def test_a_service_without_handler_cannot_call_the_user_process(runner):
    with pytest.raises(InvalidStateError, match="no handler"):
        runner.call((services.call_user, 1)).result(LIMIT)


# The process itself


def test_it_loads_only_what_it_needs(runner):
    loaded = set(runner.call((services.evaluate, "sorted(sys.modules)")).result(LIMIT))
    assert not loaded & {"torch", "numpy", "cloudpickle", "pydantic", "rich", "typer", "cryptography"}


def test_it_has_a_session_of_its_own_and_leaves_signals_alone(process, runner):
    assert os.getsid(process.pid) == process.pid != os.getsid(0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    os.kill(process.pid, signal.SIGINT)
    assert runner.call((services.echo, 1)).result(LIMIT) == 1


def test_it_inherits_no_descriptor_of_the_host():
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    process = BackgroundProcess.start("inherits nothing")
    os.close(writer)
    assert os.read(reader, 1) == b""  # the end: the process holds no copy
    os.close(reader)
    process.shutdown()


def test_the_environment_is_the_host_s(runner):
    assert runner.call((services.evaluate, "os.environ.get('PYTHONPATH')")).result(LIMIT) == os.environ.get(
        "PYTHONPATH"
    )


def test_modules_on_a_path_added_later_are_found(runner, tmp_path, monkeypatch):
    (tmp_path / "added_later.py").write_text("def where():\n    return __file__\n")
    monkeypatch.syspath_prepend(tmp_path)
    import added_later

    assert runner.call((services.call_function, added_later.where)).result(LIMIT) == str(
        tmp_path / "added_later.py"
    )


def test_the_current_folder_shadows_no_module(tmp_path):
    (tmp_path / "asyncio.py").write_text("raise ImportError('shadowed')")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "from shoal.runtime.process import BackgroundProcess\n"
        "BackgroundProcess.start('x').shutdown()\nprint('fine')\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )
    assert (result.stdout, result.stderr) == ("fine\n", "")


def test_handles_cannot_be_pickled_or_copied(process, runner):
    for thing in (process, runner):
        for copier in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(InvalidTypeError, match="cannot be pickled or copied"):
                copier(thing)


# Death


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        ("exit", 3, ["exit status 3"]),
        ("kill", -9, ["SIGKILL", "-9"]),
        ("segfault", -11, ["SIGSEGV", "Fatal Python error: Segmentation fault", "in die"]),
    ],
)
def test_death_fails_pending_and_later_calls(own_process, how, status, says):
    runner = own_runner(own_process)
    waiting = [runner.call((services.wait_for, "never")) for _ in range(3)]
    waiting.append(runner.call((services.die, how)))
    for future in waiting:
        with pytest.raises(PeerProcessDied) as caught:
            future.result(LIMIT)
        for text in [*says, "last words"]:
            assert text in str(caught.value)
        assert caught.value.exit_status == status
        assert "last words" in caught.value.log_tail
    assert own_process.wait(LIMIT)
    assert not own_process.is_alive
    with pytest.raises(PeerProcessDied, match="last words"):
        runner.call((services.echo, 1)).result(LIMIT)
    with pytest.raises(PeerProcessDied):
        own_process.create_service(services.make_runner).result(LIMIT)
    own_process.shutdown()


def test_an_interpreter_that_cannot_start_is_reported(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho this is no python >&2\nexit 7\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(PeerProcessDied, match="no python") as caught:
        BackgroundProcess.start("broken")
    assert caught.value.exit_status == 7
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(InvalidStateError, match="executable"):
        BackgroundProcess.start("none")


def test_shutdown_closes_services_in_reverse_order(own_process, tmp_path):
    path = tmp_path / "farewell"
    factory = partial(services.make_runner_with_farewell, str(path))
    numbers = [own_process.create_service(factory).result(LIMIT).service_id for _ in range(3)]
    own_process.shutdown(LIMIT)
    assert path.read_text().split() == [str(number) for number in reversed(numbers)]
    assert own_process.exit_status == 0


def test_shutdown_is_idempotent_from_any_thread_and_ends_calls(own_process):
    runner = own_runner(own_process)
    waiting = runner.call((services.wait_for, "never"))
    threads = [threading.Thread(target=own_process.shutdown) for _ in range(4)]
    for thread in threads:
        thread.start()
    own_process.shutdown()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    with pytest.raises((PeerProcessDied, concurrent.futures.CancelledError)):
        waiting.result(LIMIT)
    with pytest.raises(InvalidStateError, match="shut down"):
        runner.call((services.echo, 1))
    with pytest.raises(InvalidStateError, match="shut down"):
        runner.close()
    assert not own_process.is_alive
    own_process.shutdown()


@pytest.mark.parametrize("stuck", ["close", "loop"])
def test_what_does_not_end_is_ended_by_force(own_process, stuck):
    if stuck == "close":
        own_process.create_service(services.make_stubborn).result(LIMIT)
        own_process.shutdown(0.2)
    else:
        own_runner(own_process).call((services.block_loop,))
        own_process.shutdown(0.2)
        assert own_process.exit_status == -signal.SIGKILL
    assert not is_running(own_process.pid)


def test_sigterm_ends_it_in_order(own_process, tmp_path):
    path = tmp_path / "farewell"
    handle = own_process.create_service(partial(services.make_runner_with_farewell, str(path))).result(LIMIT)
    os.kill(own_process.pid, signal.SIGTERM)
    assert own_process.wait(LIMIT)
    assert path.read_text()
    with pytest.raises(PeerProcessDied, match="SIGTERM"):
        handle.call((services.echo, 1)).result(LIMIT)


@pytest.mark.parametrize("how", ["cancel", "close", "shutdown", "SIGTERM"])
def test_a_command_that_is_cancelled_knows_whether_its_service_ends(own_process, how, tmp_path):
    path = tmp_path / "why"
    runner = own_runner(own_process)
    call = runner.call((services.note_why_cancelled, str(path)))
    runner.call((services.wait_for, "waiting")).result(LIMIT)
    if how == "cancel":
        call.cancel()
        runner.call((services.echo, 1)).result(LIMIT)  # frames keep their order
    elif how == "close":
        runner.close().result(LIMIT)
    elif how == "shutdown":
        own_process.shutdown(LIMIT)
    else:
        os.kill(own_process.pid, signal.SIGTERM)
        assert own_process.wait(LIMIT)
    assert path.read_text() == ("the call was cancelled" if how == "cancel" else "the service ends")


def test_others_are_told_of_the_end_though_a_service_hangs(own_process, tmp_path):
    path = tmp_path / "farewell"
    factory = partial(services.make_stubborn_with_farewell, str(path))
    own_process.create_service(factory).result(LIMIT)
    os.kill(own_process.pid, signal.SIGTERM)
    wait_until(lambda: path.exists() and path.read_text() == "goodbye\n")


def test_collecting_the_last_reference_ends_it():
    process = BackgroundProcess.start("collected")
    runner = own_runner(process)
    pid = process.pid
    del process
    gc.collect()
    assert runner.call((services.echo, 1)).result(LIMIT) == 1  # a service keeps it
    del runner
    gc.collect()
    wait_until(lambda: not is_running(pid))


def test_no_thread_or_descriptor_is_left():
    BackgroundProcess.start("warm up").shutdown()
    threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
    for _ in range(3):
        process = BackgroundProcess.start("leaky")
        own_runner(process, handler=print)
        process.shutdown()
    wait_until(lambda: threading.active_count() <= threads)
    assert len(os.listdir("/dev/fd")) == descriptors


# Forked children


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_neither_use_nor_end_it(process, runner):
    pending = runner.call((services.wait_for, "later"))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "nothing was raised"
        try:
            try:
                runner.call((services.echo, 1))
            except InvalidStateError as error:
                outcome = f"call: {error}; "
            try:
                pending.result(LIMIT)
            except InvalidStateError as error:
                outcome += f"result: {error}; "
            outcome += f"alive: {process.is_alive}"
            process.shutdown()
            del process, runner
            gc.collect()
            import atexit

            atexit._run_exitfuncs()
        finally:
            os.write(writer, outcome.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcome = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert "forked" in outcome.partition("; ")[0]
    assert "result: this future belongs to process" in outcome
    assert "alive: False" in outcome
    runner.call((services.set_event, "later"))
    assert pending.result(LIMIT) == "later"
    assert process.is_alive


def test_a_signal_handler_that_interrupts_its_thread_as_it_sends_may_shut_down():
    """That thread holds the channel's lock until the handler returns, which waits for the receiving thread."""
    process = BackgroundProcess.start("interrupted")
    with process._link._channel._lock:
        process.shutdown()
        assert not process.is_alive
    assert not is_running(process.pid)


def is_running(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
