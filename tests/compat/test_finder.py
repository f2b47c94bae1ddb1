"""The import hook: modules get the names of hivemind, and are otherwise as if it were not there."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType

import pytest

import shoal
from shoal.compat import finder
from shoal.compat.advice import ABSENT, ABSENT_OF_OBJECTS
from shoal.compat.modules import CLASSES, MODULES, PACKAGES

MADE_OF_NAMES = {
    "shoal.averaging.averager": shoal.StepControl,
    "shoal.averaging.control": shoal.StepControl,
    "shoal.optim.grad_averager": shoal.optim.GradientAverager,
    "shoal.optim.progress_tracker": shoal.optim.ProgressTracker,
    "shoal.optim.state_averager": shoal.optim.TrainingStateAverager,
}
"""Each with something that is in it."""


def the_finder() -> finder.HivemindFinder:
    (found,) = [entry for entry in sys.meta_path if isinstance(entry, finder.HivemindFinder)]
    return found


@pytest.mark.parametrize("name", [*MODULES, *CLASSES])
def test_a_module_keeps_its_own_loader_and_source(name: str):
    module = importlib.import_module(name)
    if name in MADE_OF_NAMES:
        return
    assert isinstance(module.__loader__, SourceFileLoader)
    assert module.__spec__.loader is module.__loader__
    assert inspect.getsource(module).startswith('"""')


def test_only_these_modules_are_made_of_names():
    """Any other entry without a file is a mistake in the table, or a module that was moved."""
    assert [
        name for name in MODULES if importlib.import_module(name).__spec__.origin == "names of hivemind"
    ] == [*MADE_OF_NAMES]


def test_the_hook_answers_for_what_a_module_lacks():
    """Packages with lazy names answer themselves, and ask the same tables."""
    for name in MODULES:
        function = vars(importlib.import_module(name))["__getattr__"]
        lazy = ["shoal.averaging.allreduce", "shoal.averaging.matchmaking", "shoal.utils"]
        assert function.__module__ == ("shoal.utils.lazy" if name in lazy else "shoal.compat.answers")


@pytest.mark.parametrize("name", MADE_OF_NAMES)
def test_a_module_made_of_names_can_be_used_like_any_other(name: str):
    module = importlib.import_module(name)
    namespace: dict[str, object] = {}
    exec(f"from {name} import *", namespace)
    inside = MADE_OF_NAMES[name]
    assert namespace[inside.__name__] is inside
    assert {*module.__all__} <= {*dir(module)}
    assert inside.__name__ in module.__all__
    assert module.__name__ == name
    assert module.__doc__
    with pytest.raises(ModuleNotFoundError, match="is not a package"):
        importlib.import_module(f"{name}.inside")


def test_both_spellings_are_one_class():
    """Also for a process that unpickles what another has made of either."""
    from shoal.averaging.averager import DecentralizedAverager
    from shoal.averaging.control import AveragingStage

    assert DecentralizedAverager is shoal.DecentralizedAverager
    assert pickle.loads(pickle.dumps(AveragingStage.FINISHED)) is shoal.AveragingStage.FINISHED


def test_a_reloaded_module_has_the_names_still():
    code = """
import importlib, shoal.dht.validation
again = importlib.reload(shoal.dht.validation)
assert again.DHTRecord is not None
try:
    from shoal.dht.schema import conbytes
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (
        out == f"cannot import name 'conbytes' from 'shoal.dht.schema': {ABSENT['shoal.dht']['conbytes']}\n"
    )


def test_tools_read_a_module_without_executing_it():
    loader = find_spec("shoal.dht.dht").loader
    assert loader.get_code("shoal.dht.dht").co_filename.endswith("dht.py")
    with pytest.raises(AttributeError):
        _ = loader.no_such_method


def test_imports_of_others_are_left_alone():
    for name in ("json", "shoaling", "shoal", "hivemind.averaging"):
        assert the_finder().find_spec(name, None) is None


def test_other_finders_are_asked_first(monkeypatch: pytest.MonkeyPatch):
    """So that a program may bring modules of its own, even under a name that only hivemind has."""

    class Other:
        def find_spec(self, fullname: str, path: object, target: ModuleType | None) -> ModuleSpec | None:
            return ModuleSpec(fullname, None) if fullname == "shoal.optim" else None

    monkeypatch.setattr(sys, "meta_path", [the_finder(), object(), Other()])
    assert the_finder().find_spec("shoal.optim", None).name == "shoal.optim"
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'shoal\.moe': Shoal averages tensors"):
        the_finder().find_spec("shoal.moe", None)


def test_it_is_installed_once():
    finder.install_finder()
    assert the_finder() in sys.meta_path


def test_every_class_with_advice_is_in_the_table():
    assert sorted(name for names in CLASSES.values() for name in names) == sorted(ABSENT_OF_OBJECTS)


def test_every_package_with_advice_is_in_the_table():
    assert sorted(ABSENT) == sorted(PACKAGES)


def test_asking_for_what_is_not_there_loads_no_torch():
    code = """
import sys, shoal
for name in ("P2P", "no_such_name"):
    assert not hasattr(shoal.dht.dht, name)
print("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_listing_a_package_loads_no_torch():
    code = """
import sys, shoal
assert {"averager", "control", "DecentralizedAverager"} <= set(dir(shoal.averaging))
assert {"MPFuture", "logging"} <= set(dir(shoal.utils))
assert "P2P" not in dir(shoal.averaging.matchmaking)
print("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
