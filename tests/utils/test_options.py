"""Configurations whose fields carry their rules."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import pytest

from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.checks import Count, Flag, Number, Text
from shoal.utils.options import check_options, gather, options_of

Patience = Annotated[float | None, Number(above=0, unit="s")]


@dataclass(frozen=True)
class Config:
    name: str
    period: Annotated[float, Number(above=0, unit="s")] = 30.0
    patience: Patience = None
    limit: Annotated[int, "a note of somebody else", Count(1)] | None = None
    quiet: bool | None = None
    further: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_options(self)


def test_options_are_read_from_the_types():
    options = options_of(Config)
    assert {name: option.rule for name, option in options.items()} == {
        "name": Text(),
        "period": Number(above=0, unit="s"),
        "patience": Number(above=0, unit="s"),
        "limit": Count(1),
        "quiet": Flag(),
    }
    assert [name for name, option in options.items() if option.may_be_none] == ["patience", "limit", "quiet"]
    assert (options["name"].default, options["period"].default) == (MISSING, 30.0)
    assert options["patience"].allowed == "more than 0 s, or None"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"name": 3}, InvalidTypeError),
        ({"period": 0}, InvalidValueError),
        ({"period": None}, InvalidTypeError),
        ({"patience": -1}, InvalidValueError),
        ({"limit": 0}, InvalidValueError),
        ({"quiet": "no"}, InvalidTypeError),
    ],
)
def test_each_is_checked_when_the_configuration_is_made_or_changed(
    values: dict[str, Any], error: type[Exception]
):
    with pytest.raises(error, match=f"^{next(iter(values))} must be "):
        Config(**({"name": "n"} | values))
    with pytest.raises(error):
        replace(Config("n"), **values)


def test_values_become_pythons_own():
    config = Config("n", period=np.float64(2.0), limit=np.int32(3), quiet=np.bool_(False))
    assert [type(value) for value in (config.period, config.limit, config.quiet)] == [float, int, bool]


def test_a_function_with_these_parameters_hands_its_locals_over():
    def make(
        name: str,
        period: float = 1.0,
        patience: float | None = 2.0,
        limit: int | None = None,
        quiet: bool = True,
        further: tuple[int, ...] = (),
        stranger: int = 5,
    ) -> Config:
        return gather(Config, locals())

    assert make("n") == Config("n", 1.0, 2.0, None, True, ())


def test_a_parameter_that_is_missing_is_an_error_and_not_a_default():
    with pytest.raises(KeyError, match="patience"):
        gather(Config, {"name": "n", "period": 1.0})
