"""The import hook by which modules and classes of Shoal get the names of hivemind.

The modules themselves say nothing of it. The hook leaves alone every import that does not begin with ``shoal.``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from shoal.compat.answers import attributes_with_advice, names_here, names_of_hivemind, no_such_module
from shoal.compat.modules import CLASSES, MODULES, PACKAGES

if TYPE_CHECKING:  # at run time its import would take longer than all of ours
    from importlib.abc import Loader

_ADVISED = frozenset({*MODULES, *CLASSES, *PACKAGES})


class HivemindFinder:
    """Finds submodules of Shoal, and knows which of them hivemind has as well.

    - A module of both gets hivemind's names after it was executed.
    - A module of hivemind whose contents Shoal keeps elsewhere is made of hivemind's names alone.
    - A module that Shoal does not have is an error that says what to use instead.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called by the import system, as the first of its finders.

        :raises ModuleNotFoundError: only hivemind has this module
        """
        if not fullname.startswith("shoal."):
            return None
        spec = self._ask_others(fullname, path, target)
        if spec is not None:
            if fullname in _ADVISED:
                spec.loader = cast("Loader", _NamingLoader(spec.loader))
            return spec
        if fullname in MODULES:
            return ModuleSpec(fullname, cast("Loader", _NamingLoader(None)), origin="names of hivemind")
        if (error := no_such_module(fullname)) is not None:
            raise error
        return None

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # old finders of other libraries lack it
            if finder is not self and find is not None:
                spec: ModuleSpec | None = find(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _NamingLoader:
    """Has a module executed by its own loader, and then gives it the names of hivemind.

    :param own: None for a module that has nothing but these names
    """

    def __init__(self, own: Loader | None) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None if self._own is None else self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self._own is None:
            _fill(module)
        else:
            # From here on the module looks as if its own loader had been alone.
            module.__loader__ = self._own
            if module.__spec__ is not None:
                module.__spec__.loader = self._own
            self._own.exec_module(module)
        _add_names(module)

    def __getattr__(self, name: str) -> Any:
        # Tools that read modules without executing them ask for get_code, get_source and the like.
        return getattr(object.__getattribute__(self, "_own"), name)


def _add_names(module: ModuleType) -> None:
    """Answer for names that ``module`` lacks, unless it answers itself, and for attributes that its classes lack."""
    if "__getattr__" not in vars(module):
        vars(module)["__getattr__"] = names_of_hivemind(module.__name__)
    for name in CLASSES.get(module.__name__, ()):
        kind: Any = vars(module)[name]
        kind.__getattr__ = attributes_with_advice(name)


def _fill(module: ModuleType) -> None:
    """Make a module of what Shoal has under the names of hivemind's module."""
    names = names_here(module.__name__)
    module.__doc__ = (
        f"What Shoal has of hivemind's module of this name; the public names are in {PACKAGES[0]}."
    )
    vars(module)["__all__"] = names
    vars(module)["__dir__"] = lambda: sorted({*vars(module), *names})


def install_finder() -> None:
    """From now on, submodules of Shoal are imported with the names of hivemind. Idempotent."""
    if not any(isinstance(finder, HivemindFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, HivemindFinder())
