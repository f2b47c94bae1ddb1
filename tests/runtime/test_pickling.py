"""What crosses by reference, what by value, and what cannot."""

from __future__ import annotations

import functools
import importlib.util
import json
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest

from shoal.errors import DialFailure, DialOutcome, InvalidTypeError, PeerUnreachable, RemoteError, ShoalError
from shoal.runtime import pickling


class Unpicklable:
    def __init__(self) -> None:
        self.guard = threading.Lock()


class PickyError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def run_elsewhere(data: bytes, tmp_path) -> str:
    """The result of calling what ``data`` holds in an interpreter that knows none of this module."""
    file = tmp_path / "data"
    file.write_bytes(data)
    code = "import sys; from shoal.runtime import pickling; print(pickling.loads(open(sys.argv[1], 'rb').read())())"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, str(file)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout.strip()


def test_importable_functions_go_by_reference():
    assert len(pickling.dumps(json.dumps)) < 60
    assert pickling.loads(pickling.dumps(json.dumps)) is json.dumps


@pytest.fixture
def outside(tmp_path):
    """A module that was loaded from a file which no ``sys.path`` leads to."""
    file = tmp_path / "outside" / "made_by_hand.py"
    file.parent.mkdir()
    file.write_text(
        "WORD = 'by value'\ndef function():\n    return helper()\ndef helper():\n    return WORD\n"
    )
    spec = importlib.util.spec_from_file_location("made_by_hand", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["made_by_hand"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["made_by_hand"]


def test_functions_of_modules_that_cannot_be_imported_go_by_value(outside, tmp_path):
    assert run_elsewhere(pickling.dumps(outside.function), tmp_path) == "by value"


def test_lambdas_and_closures_go_by_value(tmp_path):
    word = "closure"
    assert run_elsewhere(pickling.dumps(functools.partial(lambda a: a + word, "a ")), tmp_path) == "a closure"


def test_modules_beside_the_script_go_by_reference(tmp_path, monkeypatch):
    (tmp_path / "beside_the_script.py").write_text("def function():\n    return __name__\n")
    monkeypatch.syspath_prepend(tmp_path)
    import beside_the_script

    data = pickling.dumps(beside_the_script.function)
    assert b"beside_the_script" in data
    assert len(data) < 60


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (functools.partial(print, threading.Lock()), ["argument 1", "lock"]),
        (functools.partial(print, end=threading.Lock()), ["argument 'end'", "lock"]),
        ([1, threading.Lock()], ["item 1", "lock"]),
        (Unpicklable(), ["attribute 'guard'", "lock"]),
        (Unpicklable().__init__, ["the object it is bound to", "Unpicklable"]),
        ((number for number in ()), ["generator"]),
    ],
)
def test_what_cannot_be_sent_is_named(value, names):
    with pytest.raises(InvalidTypeError) as caught:
        pickling.dumps(value, "the argument")
    assert str(caught.value).startswith("the argument cannot be sent to the background process")
    for name in names:
        assert name in str(caught.value)


def test_a_captured_variable_is_named():
    guard = threading.Lock()
    with pytest.raises(InvalidTypeError, match=r"the variable 'guard' \(_thread\.lock\)"):
        pickling.dumps(lambda: guard)


def test_the_list_of_modules_by_value_is_left_as_it_was(outside):
    import cloudpickle

    before = set(cloudpickle.list_registry_pickle_by_value())
    pickling.dumps(outside.function)
    assert set(cloudpickle.list_registry_pickle_by_value()) == before


def crossed(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:  # noqa: BLE001
        return pickling.load_error(pickling.dump_error(raised))


def test_errors_keep_type_text_and_attributes():
    error = crossed(RemoteError("busy", "try later"))
    assert isinstance(error, RemoteError)
    assert (error.code, str(error)) == ("busy", "try later [busy]")
    assert error.__cause__ is None  # Shoal's own errors say what happened by themselves
    address = "/ip4/10.0.0.1/tcp/1"
    unreachable = crossed(PeerUnreachable("no way", [DialFailure(address, DialOutcome.REFUSED, "refused")]))
    assert unreachable.failures == {address: "refused"}
    assert unreachable.is_refused


def test_foreign_errors_come_with_the_traceback():
    error = crossed(KeyError("missing"))
    assert isinstance(error, KeyError)
    assert "in crossed" in str(error.__cause__)


def test_errors_that_cannot_be_made_again_keep_their_text():
    error = crossed(PickyError(1, 2))
    assert type(error) is ShoalError
    assert "PickyError: 1 and 2" in str(error)
    assert "in crossed" in str(error.__cause__)


def test_pickles_that_plain_pickle_can_read():
    assert pickle.loads(pickling.dumps({"a": (1, 2.0)})) == {"a": (1, 2.0)}


def test_a_script_s_own_functions_go_by_value(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from shoal.runtime import pickling
            WORD = "main"
            def function():
                return helper()
            def helper():
                return WORD
            open(sys.argv[1], "wb").write(pickling.dumps(function))
            """
        )
    )
    subprocess.run([sys.executable, str(script), str(tmp_path / "out")], check=True)
    assert run_elsewhere((tmp_path / "out").read_bytes(), tmp_path) == "main"
