"""How the background process lives and ends beside real host programs: scripts, threads, notebooks, forks, signals.

Each host is a program of its own, written to a file and run by a new interpreter, as a user would.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_swarm import is_running, wait_until

from shoal import DHT, get_dht_time
from shoal.errors import InvalidStateError

LIMIT = 30.0  # seconds, against hanging
PROMISED = 2.0  # within which nothing is left of a host that was killed

START = "import os, sys, shoal\ndht = shoal.DHT(start=True)\nprint(dht.background.pid, flush=True)\n"


class Script:
    """A running program whose first line of output is the number of its background process."""

    def __init__(self, folder: Path, code: str, **environment: str) -> None:
        path = folder / "script.py"
        path.write_text(textwrap.dedent(code))
        # Short: torch's workers make Unix sockets there, whose paths have 107 characters at most.
        self.temporary = Path(tempfile.mkdtemp(prefix="shoal-"))
        self.process = subprocess.Popen(
            [sys.executable, str(path)],
            cwd=folder,
            env={**os.environ, "SHOAL_LOGLEVEL": "WARNING", "TMPDIR": str(self.temporary), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str, str]:
        """Exit status, what is left of the output, and errors; waits for the end."""
        assert self.process.stdout is not None
        rest = self.process.stdout.read()  # what readline() has read ahead is lost to communicate()
        _, errors = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, rest, errors


@pytest.fixture
def run(tmp_path) -> Iterator[Callable[..., Script]]:
    scripts: list[Script] = []

    def start(code: str, **environment: str) -> Script:
        scripts.append(Script(tmp_path, code, **environment))
        return scripts[-1]

    yield start
    for script in scripts:
        if script.process.poll() is None:
            script.process.kill()
        script.process.communicate()
        shutil.rmtree(script.temporary)


# Where it can be made


def test_a_plain_script_without_main_guard(run, tmp_path):
    (tmp_path / "beside.py").write_text("async def coroutine(dht, node):\n    return __name__\n")
    script = run(
        START
        + """
import beside
WORD = "from main"
def helper():
    return WORD
async def coroutine(dht, node):
    return helper()
class Validator(shoal.RecordValidatorBase):
    def validate(self, record):
        return shoal.MSGPackSerializer.loads(record.value) != WORD
print(dht.run_coroutine(coroutine), dht.run_coroutine(beside.coroutine))
dht.add_validators([Validator()])
print(dht.store("k", WORD, shoal.get_dht_time() + 9), dht.store("k", 1, shoal.get_dht_time() + 9))
print("main ran once")
""",
        SHOAL_LOGLEVEL="ERROR",
    )
    pid = int(script.line())
    assert script.end() == (0, "from main beside\nFalse True\nmain ran once\n", "")
    assert not is_running(pid)


def test_from_a_thread_that_ends():
    made: list[DHT] = []
    thread = threading.Thread(target=lambda: made.append(DHT(start=True)))
    thread.start()
    thread.join(LIMIT)
    with made[0] as dht:
        assert dht.store("k", 1, get_dht_time() + 9)
        assert dht.get("k").value == 1


@pytest.mark.sweep
def test_after_torch_was_imported_the_process_imports_what_averagers_need_ahead(run):
    script = run(
        """
        import torch
        import shoal, time
        dht = shoal.DHT(start=True)
        async def has_all(dht, node):
            import sys
            return "shoal.averaging.background.service" in sys.modules
        began = time.monotonic()
        assert dht.get("k") is None  # answers while it imports
        while not dht.run_coroutine(has_all):
            time.sleep(0.05)
            assert time.monotonic() < began + 30
        print("all is there")
        """
    )
    assert script.end() == (0, "all is there\n", "")


def test_signal_handlers_stay_as_they_are(run):
    script = run(
        """
        import signal
        signals = [s for s in signal.valid_signals() if s not in (signal.SIGKILL, signal.SIGSTOP)]
        signal.signal(signal.SIGTERM, lambda *_: None)
        before = {s: signal.getsignal(s) for s in signals}, signal.set_wakeup_fd(-1), signal.pthread_sigmask(0, ())
        import shoal
        with shoal.DHT(start=True) as dht:
            during = {s: signal.getsignal(s) for s in signals}, signal.set_wakeup_fd(-1), signal.pthread_sigmask(0, ())
            assert dht.get("k") is None
        after = {s: signal.getsignal(s) for s in signals}, signal.set_wakeup_fd(-1), signal.pthread_sigmask(0, ())
        print(before == during == after)
        """
    )
    assert script.end() == (0, "True\n", "")


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
def test_in_a_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    make = "dht = shoal.DHT(start=True)\nprint('pid', dht.background.pid)"
    say = """
        WORD = "hello"
        async def say(dht, node):
            print(WORD)
            logging.getLogger("shoal.x").info("said")
            return WORD
    """
    cells = [
        "import shoal, logging",
        make,
        make,
        say,
        "print(dht.run_coroutine(say))\nimport time; time.sleep(0.3)",
        "print((await dht.run_coroutine(say, return_future=True)).upper())",
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell)) for cell in cells]
    )
    nbclient.NotebookClient(
        notebook, timeout=LIMIT, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    def output(index: int) -> str:
        return "".join(out["text"] for out in notebook.cells[index].outputs if out["output_type"] == "stream")

    pids = [int(output(index).split()[1]) for index in (1, 2)]
    assert pids[0] != pids[1]
    assert "hello" in output(4)
    assert "[INFO] [shoal.x] said" in output(4)
    assert "[INFO] [shoal.runtime.output] hello" in output(4)
    assert "HELLO" in output(5)
    # The first cell's DHT was collected when the cell ran again, the second one's ended with the kernel.
    for pid in pids:
        wait_until(lambda pid=pid: not is_running(pid))


# How it ends


def test_the_end_of_the_script_ends_it(run):
    script = run(START + "keep = [dht]\nkeep.append(keep)\n")
    pid = int(script.line())
    assert script.end() == (0, "", "")
    assert not is_running(pid)  # by the time the host's own end is seen


def test_an_error_in_the_script_shows_nothing_of_ours(run):
    script = run(START + "raise ValueError('of the user')\n")
    pid = int(script.line())
    status, _, errors = script.end()
    assert status == 1
    assert errors.count("Traceback") == 1
    assert errors.endswith("ValueError: of the user\n")
    assert not is_running(pid)


@pytest.mark.parametrize("daemon", [True, False])
def test_ctrl_c_ends_everything_in_order(run, daemon):
    script = run(
        f"""
        import shoal, asyncio
        dht = shoal.DHT(start=True, daemon={daemon})
        print(dht.background.pid, flush=True)
        async def forever(dht, node):
            print("waiting")
            await asyncio.sleep(3600)
        future = dht.run_coroutine(forever, return_future=True)
        print("waiting", flush=True)
        future.result()
        """
    )
    pid = int(script.line())
    assert script.line() == "waiting"
    script.process.send_signal(signal.SIGINT)
    status, _, errors = script.end()
    assert status == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert errors.endswith("KeyboardInterrupt\n")
    assert not is_running(pid)


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="DataLoader workers are forked on Linux only")
def test_kill_9_while_forked_dataloader_workers_live(run):
    script = run(
        START
        + """
import torch
from torch.utils.data import DataLoader
class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 10_000
    def __getitem__(self, index):
        return index
loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork")
batches = iter(loader)
next(batches)
print(*[worker.pid for worker in batches._workers], flush=True)
print(*[str(a) for a in dht.get_visible_maddrs()], flush=True)
import time
while True:
    next(batches)
    time.sleep(0.01)
"""
    )
    pid = int(script.line())
    workers = [int(text) for text in script.line().split()]
    assert len(workers) == 2
    names = set(os.listdir("/dev/shm"))
    with DHT([script.line()], start=True) as friend:

        async def neighbours(dht, node):
            return len(node.host.connected_peers())

        assert friend.run_coroutine(neighbours) == 1
        killed = time.monotonic()
        script.process.kill()
        wait_until(lambda: not is_running(pid), killed + PROMISED - time.monotonic())
        wait_until(lambda: friend.run_coroutine(neighbours) == 0, killed + PROMISED - time.monotonic())
    for worker in workers:  # torch's own: they notice the end of their parent within 5 s
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert not [name for name in set(os.listdir("/dev/shm")) - names if "shoal" in name]
    left = [path.name for path in script.temporary.iterdir()]
    assert all(name.startswith(("pymp-", "torch")) for name in left)  # multiprocessing's and torch's


@pytest.mark.sweep
def test_kill_9_while_its_event_loop_is_stuck(run):
    script = run(
        START
        + """
async def spin(dht, node):
    while True:
        pass
dht.run_coroutine(spin, return_future=True)
print("stuck", flush=True)
import time
time.sleep(3600)
"""
    )
    pid = int(script.line())
    assert script.line() == "stuck"
    script.process.kill()
    wait_until(lambda: not is_running(pid), PROMISED)


def test_sigterm_of_the_host_ends_it(run):
    script = run(START + "import time\ntime.sleep(3600)\n")
    pid = int(script.line())
    script.process.terminate()
    assert script.end()[0] == -signal.SIGTERM
    wait_until(lambda: not is_running(pid), PROMISED)


def test_a_signal_handler_may_shut_down(run):
    script = run(
        START
        + """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: (dht.shutdown(), sys.exit(5)))
print("ready", flush=True)
while True:
    dht.get("k")
"""
    )
    pid = int(script.line())
    assert script.line() == "ready"
    script.process.terminate()
    status, _, errors = script.end()
    assert (status, errors) == (5, "")
    assert not is_running(pid)


DAEMON_FALSE = """
import shoal, threading, sys
def main():
    dht = shoal.DHT(start=True, daemon=False)
    print(dht.background.pid, *dht.get_visible_maddrs(), flush=True)
    {more}
main()
print("the script has ended", flush=True)
"""


@pytest.mark.sweep
def test_without_daemon_the_interpreter_waits_for_ctrl_c(run):
    script = run(DAEMON_FALSE.format(more=""))
    pid, address = script.line().split()
    assert script.line() == "the script has ended"
    with DHT([address], start=True) as other:  # it still serves
        assert other.store("k", 1, get_dht_time() + 9)
    assert script.process.poll() is None
    script.process.send_signal(signal.SIGINT)
    assert script.end() == (0, "", "")
    assert not is_running(int(pid))


def test_without_daemon_a_shutdown_on_another_thread_lets_it_end(run, tmp_path):
    os.mkfifo(tmp_path / "go")
    more = "threading.Thread(target=lambda: (open('go').read(), dht.shutdown()), daemon=True).start()"
    script = run(DAEMON_FALSE.format(more=more))
    pid = int(script.line().split()[0])
    assert script.line() == "the script has ended"
    assert script.process.poll() is None
    (tmp_path / "go").write_text("go")
    assert script.end() == (0, "", "")
    assert not is_running(pid)


# Forks and references


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_children_can_neither_use_nor_end_it(run):
    script = run(
        START
        + """
import multiprocessing, gc
def child(connection):
    try:
        dht.get("k")
    except shoal.InvalidStateError as error:
        connection.send(str(error))
    dht.shutdown()
    globals().pop("dht")
    gc.collect()
ours, theirs = multiprocessing.Pipe()
process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
process.start()
print("forked" in ours.recv())
process.join()
if os.fork() == 0:
    sys.exit(0)  # runs what was registered with atexit
os.wait()
print(process.exitcode, dht.store("k", 1, shoal.get_dht_time() + 9), dht.is_alive())
"""
    )
    pid = int(script.line())
    status, out, errors = script.end()
    assert (status, errors) == (0, "")
    assert out.splitlines() == ["True", "0 True True"]
    assert not is_running(pid)


def test_garbage_collection_ends_it():
    dht = DHT(start=True)
    pid = dht.background.pid
    assert is_running(pid)
    del dht
    gc.collect()
    wait_until(lambda: not is_running(pid))


def test_shutdown_in_any_order_and_on_any_thread():
    dht = DHT(start=True)
    background = dht.background
    threads = [threading.Thread(target=dht.shutdown) for _ in range(3)]
    for thread in threads:
        thread.start()
    dht.shutdown()
    background.shutdown()
    for thread in threads:
        thread.join(LIMIT)
    with pytest.raises(InvalidStateError, match="shut down"):
        dht.store("k", 1, get_dht_time() + 9)
