"""What a program gets for a name of hivemind: the object that Shoal has under it, or an error with advice."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from shoal.compat.modules import MODULES, PACKAGES

_IMPORT_SYSTEM = ("_frozen_importlib", "importlib._bootstrap")

_SEARCHED = tuple(package for package in PACKAGES if package != "shoal.compression")
"""What shoal.compression has, shoal has too. Looking there would import torch."""


def names_of_hivemind(module: str) -> Callable[[str], Any]:
    """``__getattr__`` for ``module``."""

    def get(name: str) -> Any:
        return name_of_hivemind(module, name, sys._getframe(1))

    return get


def name_of_hivemind(module: str, name: str, caller: FrameType) -> Any:
    """What ``module`` has of hivemind under ``name``, for which the code in ``caller`` asks.

    :raises AttributeError: nothing; the message says what to use instead, if hivemind has this name there
    :raises ImportError: the same, for a ``from`` statement
    """
    submodule = f"{module}.{name}"
    if submodule in MODULES:
        return importlib.import_module(submodule)
    package = _package_of(name) if name in MODULES.get(module, "").split() else None
    if package is not None:
        return getattr(importlib.import_module(package), name)
    raise _no_such_name(module, name, caller)


def names_here(module: str) -> list[str]:
    """The names that :func:`name_of_hivemind` finds for ``module``, submodules included."""
    parts = (name.rpartition(".") for name in MODULES)
    submodules = [name for package, _, name in parts if package == module]
    return [*submodules, *(name for name in MODULES.get(module, "").split() if _package_of(name))]


def _package_of(name: str) -> str | None:
    return next((package for package in _SEARCHED if name in importlib.import_module(package).__all__), None)


def no_such_module(fullname: str) -> ModuleNotFoundError | None:
    """The error for a module that only hivemind has; None: neither has it."""
    from shoal.compat.advice import ABSENT

    package, _, name = fullname.rpartition(".")
    advice = ABSENT.get(package, {}).get(name)
    if advice is None:
        return None
    return ModuleNotFoundError(f"No module named {fullname!r}: {advice}", name=fullname)


def _no_such_name(module: str, name: str, caller: FrameType) -> Exception:
    """The error for a name that ``module`` does not have.

    A ``from`` statement replaces an AttributeError by an error of its own, without what ours says. So it gets an
    ImportError.
    """
    advice = _advice_on(module, name)
    if advice is None:
        return AttributeError(f"module {module!r} has no attribute {name!r}", name=name)
    if _is_from_statement(caller):
        return ImportError(f"cannot import name {name!r} from {module!r}: {advice}", name=module)
    return AttributeError(f"module {module!r} has no attribute {name!r}: {advice}", name=name)


def _advice_on(module: str, name: str) -> str | None:
    from shoal.compat.advice import ABSENT, ABSENT_IN_MODULES  # long, and read by few programs

    if module in ABSENT:
        return ABSENT[module].get(name)
    if name not in MODULES.get(module, "").split():
        return None
    return next((names[name] for names in (ABSENT_IN_MODULES, *ABSENT.values()) if name in names), None)


def _is_from_statement(caller: FrameType) -> bool:
    """Of a package, a ``from`` statement asks in a function of the import system; of a module, by an instruction of the
    caller's. If either ever changes, the statement's own error is all that comes of it.
    """
    from opcode import opmap

    code = caller.f_code
    if code.co_name == "_handle_fromlist" and caller.f_globals.get("__name__") in _IMPORT_SYSTEM:
        return True
    return 0 <= caller.f_lasti < len(code.co_code) and code.co_code[caller.f_lasti] == opmap["IMPORT_FROM"]


def attributes_with_advice(kind: str) -> Callable[[Any, str], Any]:
    """``__getattr__`` for the class ``kind``: it only helps with names that its objects do not have."""

    def get(owner: Any, name: str) -> Any:
        from shoal.compat.advice import ABSENT_OF_OBJECTS

        advice = ABSENT_OF_OBJECTS[kind].get(name)
        if advice is None or hasattr(type(owner), name):
            # The usual error. What the class has is a property that raised one of its own: it is raised again.
            return object.__getattribute__(owner, name)
        raise AttributeError(
            f"{type(owner).__name__!r} object has no attribute {name!r}: {advice}", name=name, obj=owner
        )

    return get
