"""What needs no Trainer: what is refused, what is counted, what is logged, and what a missing package says."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.errors import InvalidValueError
from shoal.frameworks.transformers.checks import check_arguments
from shoal.frameworks.transformers.figures import EpochFigures
from shoal.optim.report import EpochReport


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"deepspeed_plugin": object()}, "deepspeed must be off"),
        ({"fsdp": ["full_shard"]}, r"fsdp must be off, got \['full_shard'\]"),
    ],
)
def test_what_shards_is_refused(given: dict[str, Any], message: str):
    fine = {"deepspeed_plugin": None, "fsdp": None}
    check_arguments(SimpleNamespace(**fine))
    with pytest.raises(InvalidValueError, match=message):
        check_arguments(SimpleNamespace(**{**fine, **given}))


def test_figures_count_epochs_and_tell_of_the_last_one():
    figures = EpochFigures()
    assert figures.figures(0, 0) == {
        "shoal/epoch": 0, "shoal/peers": 1, "shoal/averaged": 0, "shoal/own": 0, "shoal/failed": 0,
    }  # fmt: skip
    reports: list[dict[str, Any]] = [
        {"gradients": "averaged"},
        {"gradients": "averaged", "state": "failed"},
        {"gradients": "own", "failure": "nobody came"},
        {"gradients": "skipped", "failure": "nobody came"},
    ]
    for epoch, report in enumerate(reports):
        figures.note(EpochReport(epoch, 2, 100 + epoch, 50, seconds={"epoch": 1.5}, **report))
    assert figures.figures(4, 3) == {
        "shoal/epoch": 4, "shoal/peers": 3, "shoal/samples": 103, "shoal/local_samples": 50,
        "shoal/seconds/epoch": 1.5, "shoal/averaged": 2, "shoal/own": 1, "shoal/failed": 3,
    }  # fmt: skip


@pytest.mark.parametrize("package", ["accelerate", "transformers"])
def test_a_package_that_is_missing_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch):
    module = f"shoal.frameworks.{package}"
    importlib.import_module(module)
    for name in [name for name in sys.modules if name.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'shoal\[{package}\]'"):
        importlib.import_module(module)


@pytest.mark.sweep
def test_shoal_alone_imports_no_framework():
    code = "import shoal, sys; shoal.Optimizer; print({'accelerate', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
