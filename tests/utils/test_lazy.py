"""The public names of the packages, and what importing them costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

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
    own = {name for name in out if name.startswith("shoal")}
    hook = {"shoal.compat", "shoal.compat.answers", "shoal.compat.finder", "shoal.compat.modules"}
    assert own == {"shoal", "shoal.utils", "shoal.utils.lazy", *hook}
    assert not {"torch", "numpy", "asyncio", "cryptography", "msgspec", "importlib.abc", "opcode"} & set(out)


def test_the_dht_of_a_host_needs_no_torch():
    code = "import shoal, sys; shoal.DHT; print(bool({'torch', 'numpy', 'rich', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
