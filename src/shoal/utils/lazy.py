"""Public names of a package that load their modules on first use (PEP 562), and errors that help for names, modules and
attributes of hivemind that Shoal does not have.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from opcode import opmap
from types import FrameType, ModuleType
from typing import Any, NoReturn

_IMPORT_SYSTEM = ("_frozen_importlib", "importlib._bootstrap")


def lazy_names(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for a package.

    :param package: the package's ``__name__``
    :param names: public name -> the module that defines it; a name that maps to itself within the package is
        a submodule (``"dht": "shoal.dht"`` in ``shoal``)

    What is asked for besides is an error, with advice if :mod:`shoal.utils.absent` has any.
    """

    def get(name: str) -> Any:
        where = names.get(name)
        if where is None:
            from shoal.utils.deep import NAMES, name_of_hivemind

            if package in NAMES:
                return name_of_hivemind(package, name, sys._getframe(1))
            raise no_such_name(package, name, sys._getframe(1))
        module = importlib.import_module(where)
        value = module if where == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return get, listing


def names_with_advice(package: str) -> Callable[[str], NoReturn]:
    """``__getattr__`` for a package that imports its names at once: it only helps with those that are not there."""

    def get(name: str) -> NoReturn:
        raise no_such_name(package, name, sys._getframe(1))

    return get


def attributes_with_advice(kind: str) -> Callable[[Any, str], Any]:
    """``__getattr__`` for the class ``kind``: it only helps with names that its objects do not have.

    For type checkers it would mean that there is every name: define it under ``if not TYPE_CHECKING``.
    """

    def get(owner: Any, name: str) -> Any:
        from shoal.utils.absent import ABSENT_OF_OBJECTS

        advice = ABSENT_OF_OBJECTS[kind].get(name)
        if advice is None or hasattr(type(owner), name):
            # The usual error. What the class has is a property that raised one of its own: it is raised again.
            return object.__getattribute__(owner, name)
        raise AttributeError(
            f"{type(owner).__name__!r} object has no attribute {name!r}: {advice}", name=name, obj=owner
        )

    return get


class _AbsentModules(MetaPathFinder):
    """Asked by the import system after all others: a module that hivemind has and Shoal has not is an error that says
    what to use instead.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        package, _, name = fullname.rpartition(".")
        if package.partition(".")[0] != "shoal":
            return
        from shoal.utils.absent import ABSENT

        advice = ABSENT.get(package, {}).get(name)
        if advice is not None:
            raise ModuleNotFoundError(f"No module named {fullname!r}: {advice}", name=fullname)


def advise_on_absent_modules() -> None:
    """From now on, importing a module of hivemind that is not here says what to use instead."""
    if not any(isinstance(finder, _AbsentModules) for finder in sys.meta_path):
        sys.meta_path.append(_AbsentModules())


def no_such_name(package: str, name: str, caller: FrameType) -> Exception:
    """What to raise for a name that is not there: an AttributeError, and an ImportError if a ``from`` statement asked.

    A ``from`` statement replaces an AttributeError by an error of its own, without what ours says. Of a package it asks
    in a function of the import system, of a module by an instruction of the caller's; if either ever changes, its own
    error is all that comes of it.
    """
    from shoal.utils.absent import ABSENT, DEEP  # read only when somebody needs it

    advice = ABSENT.get(package, {}).get(name)
    if (
        advice is None and package not in ABSENT
    ):  # a module that exists in both: advice is listed by the packages
        advice = next((names[name] for names in (DEEP, *ABSENT.values()) if name in names), None)
    if advice is None:
        return AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
    if _is_from_statement(caller):
        return ImportError(f"cannot import name {name!r} from {package!r}: {advice}", name=package)
    return AttributeError(f"module {package!r} has no attribute {name!r}: {advice}", name=name)


def _is_from_statement(caller: FrameType) -> bool:
    code = caller.f_code
    if code.co_name == "_handle_fromlist" and caller.f_globals.get("__name__") in _IMPORT_SYSTEM:
        return True
    return 0 <= caller.f_lasti < len(code.co_code) and code.co_code[caller.f_lasti] == opmap["IMPORT_FROM"]
