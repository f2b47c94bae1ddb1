"""One place says what values an option takes: signatures, docstrings and docs/api.md agree with the configurations."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

import shoal
from shoal.averaging.config import AveragerConfig
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.averaging.trainer.config import TrainerConfig
from shoal.dht import config as dht_config
from shoal.dht.config import DHTConfig, ProcessConfig
from shoal.utils.options import Option, options_of

API = Path(__file__).parents[2] / "docs" / "api.md"
CONFIGURATIONS: Mapping[type, tuple[type, ...]] = {
    shoal.DecentralizedAverager: (MatchmakingConfig, AveragerConfig, TrainerConfig),
    shoal.DHT: (ProcessConfig, DHTConfig),
}

# What only the constructors know: objects, and addresses, which are checked where they are parsed.
OBJECTS = {
    shoal.DecentralizedAverager: {
        "averaged_tensors",
        "dht",
        "compression",
        "state_compression",
        "tensor_infos",
    },
    shoal.DHT: {
        "initial_peers",
        "record_validators",
        "host_maddrs",
        "announce_maddrs",
        "identity_path",
        "options_",
    },
}
HEADER = "| option | default | values |\n| -- | -- | -- |"


def options(kind: type) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for config in CONFIGURATIONS[kind]:
        found |= options_of(config)
    return found


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    return {name: one for name, one in inspect.signature(kind).parameters.items() if name != "self"}


def bare(hint: Any) -> Any:
    """A type without its annotations."""
    if get_origin(hint) is Annotated:
        return bare(get_args(hint)[0])
    return hint


def table(kind: type) -> str:
    """The reference of docs/api.md: options in the order of the signature, then those that have no parameter."""
    known = options(kind)
    order = [name for name in parameters(kind) if name in known]
    rows = []
    for option in (known[name] for name in [*order, *(name for name in known if name not in order)]):
        default = "" if option.default is MISSING else f"`{option.default!r}`"
        rows.append(f"| `{option.name}` | {default} | {option.allowed} |")
    return "\n".join([HEADER, *rows])


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_every_parameter_is_an_option_or_an_object(kind: type):
    known = set(options(kind))
    assert set(parameters(kind)) - OBJECTS[kind] <= known
    assert not known & OBJECTS[kind]
    if kind is shoal.DecentralizedAverager:  # a DHT takes further ones by keyword
        assert known <= set(parameters(kind))


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_no_two_configurations_have_one_option(kind: type):
    names = [name for config in CONFIGURATIONS[kind] for name in options_of(config)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_defaults_and_types_of_the_signature_are_those_of_the_configuration(kind: type):
    hints = get_type_hints(kind.__init__)
    types = {
        name: bare(hint)
        for config in CONFIGURATIONS[kind]
        for name, hint in get_type_hints(config, include_extras=True).items()
    }
    for name, option in options(kind).items():
        parameter = parameters(kind).get(name)
        if parameter is None:
            continue
        default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
        if kind is shoal.DHT and default is None:  # stands for the default
            assert hints[name] == types[name] | None, name
        else:
            assert (hints[name], default) == (types[name], option.default), name


def test_the_docstring_of_the_averager_describes_its_parameters_in_their_order():
    described = re.findall(r"^\s*:param (\w+):", shoal.DecentralizedAverager.__doc__, re.MULTILINE)
    assert sorted(described) == sorted(parameters(shoal.DecentralizedAverager))
    assert [name for name in parameters(shoal.DecentralizedAverager) if name in described] == described


def test_every_option_of_the_dht_is_described():
    """In the docstring of the class, or below the field."""
    (body,) = [
        node.body
        for node in ast.parse(Path(dht_config.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "DHTConfig"
    ]
    described = {
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    in_docstring = set(re.findall(r"^\s*:param (\w+):", shoal.DHT.__doc__, re.MULTILINE))
    assert {field.name for field in fields(DHTConfig)} <= described
    assert {field.name for field in fields(ProcessConfig)} <= in_docstring


@pytest.mark.parametrize(
    ("kind", "heading"),
    [(shoal.DecentralizedAverager, "### Of an averager"), (shoal.DHT, "### Of a DHT")],
)
def test_the_reference_has_the_values_and_defaults_of_the_configuration(kind: type, heading: str):
    section = API.read_text().partition(f"\n{heading}\n")[2].partition("\n#")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert rows == table(kind), "docs/api.md has to say:\n" + table(kind)
