"""The public names of the packages, and what importing them costs."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys

import pytest

from shoal.utils.absent import ABSENT_OF_OBJECTS
from shoal.utils.lazy import attributes_with_advice

PACKAGES = ["shoal", "shoal.utils", "shoal.dht"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_other_names_are_not(package):
    module = importlib.import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'no_such_name'"):
        _ = module.no_such_name
    with pytest.raises(ImportError):
        exec(f"from {package} import no_such_name")


def test_importing_loads_next_to_nothing():
    code = "import shoal, sys; print(*sorted(name for name in sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert [name for name in out if name.startswith("shoal")] == ["shoal", "shoal.utils", "shoal.utils.lazy"]
    assert not {"torch", "numpy", "asyncio", "cryptography", "msgspec"} & set(out)


def test_the_dht_of_a_host_needs_no_torch():
    code = "import shoal, sys; shoal.DHT; print(bool({'torch', 'numpy', 'rich', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


class Advised:
    __getattr__ = attributes_with_advice("StepControl")

    def __init__(self) -> None:
        self.kept = 1

    @property
    def broken(self) -> int:
        return self.missing_inside

    @property
    def attach(self) -> int:
        """A name with advice, which this class has all the same."""
        return self.missing_inside


def test_an_attribute_that_is_not_there_is_advised_on():
    with pytest.raises(AttributeError) as error:
        _ = Advised().get_timeout
    advice = ABSENT_OF_OBJECTS["StepControl"]["get_timeout"]
    assert str(error.value) == f"'Advised' object has no attribute 'get_timeout': {advice}"
    assert error.value.name == "get_timeout"
    assert not hasattr(Advised(), "get_timeout")


def test_other_attributes_are_the_usual_errors():
    class Bare:
        pass

    for name in ("no_such_name", "__no_such_protocol__"):
        with pytest.raises(AttributeError) as usual:
            getattr(Bare(), name)
        with pytest.raises(AttributeError) as ours:
            getattr(Advised(), name)
        assert str(ours.value) == str(usual.value).replace("Bare", "Advised")


@pytest.mark.parametrize("name", ["broken", "attach"])
def test_what_a_property_lacks_itself_is_named(name):
    with pytest.raises(AttributeError, match=r"^'Advised' object has no attribute 'missing_inside'$"):
        getattr(Advised(), name)


def test_objects_are_copied_and_pickled_as_ever():
    for again in (copy.copy(Advised()), copy.deepcopy(Advised()), pickle.loads(pickle.dumps(Advised()))):
        assert vars(again) == {"kept": 1}
    assert not hasattr(Advised.__new__(Advised), "kept")
