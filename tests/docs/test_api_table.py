"""docs/api.md: no public name is missing, and every test that it refers to exists."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import shoal.compression
from shoal.averaging import DecentralizedAverager, SharedBuffers, StepControl, StepReport
from shoal.dht import DHT
from shoal.optim import PerformanceEMA, ProgressTracker

ROOT = Path(__file__).parents[2]
HEADER = ["name", "what it does here", "differs from hivemind: how and why", "test"]
WITH_A_TEST_OF_ITS_OWN = "Options: values and defaults"  # test_options.py

# Called by the averager when a step goes on; not for users.
OF_THE_AVERAGER = {"follow", "reach", "bind", "begin_allreduce", "succeed", "fail"}
OF_FUTURES = {"result", "exception", "done", "cancelled", "cancel", "add_done_callback"}


def tables() -> dict[str, list[list[str]]]:
    """The rows of each section's table, as lists of cells."""
    found: dict[str, list[list[str]]] = {}
    section = ""
    for line in (ROOT / "docs" / "api.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("|") and section != WITH_A_TEST_OF_ITS_OWN:
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            found.setdefault(section, []).append(cells)
    return found


TABLES = tables()
ROWS = [(section, row) for section, rows in TABLES.items() for row in rows[2:]]


def names_in(section: str) -> set[str]:
    return {name for row in TABLES[section][2:] for name in re.findall(r"`([^`]+)`", row[0])}


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


@pytest.mark.parametrize("section", TABLES)
def test_every_table_has_the_same_columns(section: str):
    assert TABLES[section][0] == HEADER
    assert all(len(row) == len(HEADER) for row in TABLES[section]), section


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("DecentralizedAverager: constructor", parameters(DecentralizedAverager)),
        ("DecentralizedAverager: methods and properties", public(DecentralizedAverager)),
        ("step()", parameters(DecentralizedAverager.step)),
        ("StepControl", public(StepControl) - OF_THE_AVERAGER | OF_FUTURES),
        ("StepReport", public(StepReport) | {field.name for field in dataclasses.fields(StepReport)}),
        ("SharedBuffers", public(SharedBuffers) | parameters(SharedBuffers)),
        ("ProgressTracker", public(ProgressTracker) | parameters(ProgressTracker)),
        ("PerformanceEMA", public(PerformanceEMA) | parameters(PerformanceEMA)),
        ("DHT", public(DHT)),
        ("Compression", set(shoal.compression.__all__)),
    ],
)
def test_every_public_name_has_a_row(section: str, expected: set[str]):
    assert expected - names_in(section) == set()


def test_what_is_left_out_is_there_and_not_documented_either():
    assert public(StepControl) >= OF_THE_AVERAGER
    assert not OF_THE_AVERAGER & names_in("StepControl")


@cache
def names_defined_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize(("section", "row"), ROWS, ids=[f"{section}: {row[0]}" for section, row in ROWS])
def test_every_row_is_proved_by_tests_that_exist(section: str, row: list[str]):
    proofs = re.findall(r"`([^`]+)`", row[3])
    assert proofs, "no test"
    for proof in proofs:
        path, _, name = proof.partition("::")
        assert name in names_defined_in(path), proof
