"""Public names of a package that load their modules on first use (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from shoal.compat.answers import name_of_hivemind, names_here


def lazy_names(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for a package.

    :param package: the package's ``__name__``
    :param names: public name -> the module that defines it; a name that maps to itself within the package is
        a submodule (``"dht": "shoal.dht"`` in ``shoal``)

    What is asked for besides is left to :mod:`shoal.compat`, which answers for names of hivemind.
    """

    def get(name: str) -> Any:
        where = names.get(name)
        if where is None:
            return name_of_hivemind(package, name, sys._getframe(1))
        module = importlib.import_module(where)
        value = module if where == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names, *names_here(package)})

    return get, listing
