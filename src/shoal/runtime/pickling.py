"""What crosses the private channel, as bytes: by reference where the other side can import it, else by value.

Only ever applied to bytes from that channel; nothing from the network is unpickled.
"""

from __future__ import annotations

import functools
import inspect
import io
import pickle
import sys
import threading
import traceback
from types import FunctionType
from typing import Any

from shoal.errors import InvalidTypeError, ShoalError, UsageError

_by_value_lock = threading.Lock()
_HEAP_TYPE = 1 << 9
"""``Py_TPFLAGS_HEAPTYPE``: of classes that were made at run time, not by the interpreter."""


class RemoteTraceback(Exception):
    """The traceback of the background process, as the ``__cause__`` of an error that was raised there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _NeedsValue(Exception):
    """Internal: a function or class that the other side could not import was met."""


class _ReferencePickler(pickle.Pickler):
    """Pickles functions and classes by reference, and stops at one that cannot be imported by its name."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, FunctionType)) and not _has_a_name(obj):
            raise _NeedsValue
        return NotImplemented


def dumps(value: object, what: str = "this object", to: str = "the background process") -> bytes:
    """Bytes from which :func:`loads` makes an equal object in the other process.

    :param what: names ``value`` in an error, and ``to`` where it should have gone
    :raises InvalidTypeError: ``value``, or something that it refers to, cannot be sent; the message names it
    """
    try:
        file = io.BytesIO()
        try:
            _ReferencePickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        except _NeedsValue:
            return _dumps_by_value(value)
        return file.getvalue()
    except UsageError as error:  # e.g. a DHT among the values: it says itself what to do instead
        culprit = _find_culprit(value)
        if not culprit:
            raise
        raise InvalidTypeError(f"{what} cannot be sent to {to} because of {culprit}: {error}") from error
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        culprit = _find_culprit(value)
        because = f" because of {culprit}" if culprit else ""
        raise InvalidTypeError(f"{what} cannot be sent to {to}{because}: {error}") from error


def loads(data: bytes) -> Any:
    """The object that :func:`dumps` was given."""
    return pickle.loads(data)  # noqa: S301 - from our own process, over the private channel


def dump_error(error: BaseException) -> bytes:
    """An exception as bytes that can be loaded for certain, whatever its class does."""
    trace = "" if isinstance(error, ShoalError) else "".join(traceback.format_exception(error))
    try:
        data = dumps((error, trace))
        loads(data)
    except Exception:  # noqa: BLE001 - exceptions of users may fail to be pickled or made again in any way
        trace = "".join(traceback.format_exception(error))
        text = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
        data = pickle.dumps((ShoalError(text), trace))
    return data


def load_error(data: bytes) -> BaseException:
    """The exception that :func:`dump_error` was given, with the other side's traceback as its cause.

    Shoal's own errors say what happened by themselves and come without a traceback.
    """
    try:
        error, trace = loads(data)
    except Exception as problem:  # noqa: BLE001 - a class that only the other side can make; any error is possible
        return ShoalError(f"an error of the background process could not be loaded here: {problem!r}")
    assert isinstance(error, BaseException)
    if trace:
        error.__cause__ = RemoteTraceback(trace)
    return error


def _dumps_by_value(value: object) -> bytes:
    import cloudpickle

    modules = [sys.modules[name] for name in _modules_by_value(value) if name in sys.modules]
    # cloudpickle's list of modules is global to the process: held for no longer than this call.
    with _by_value_lock:
        registered = cloudpickle.list_registry_pickle_by_value()
        added = [module for module in modules if module.__name__ not in registered]
        for module in added:
            cloudpickle.register_pickle_by_value(module)
        try:
            data: bytes = cloudpickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        finally:
            for module in added:
                cloudpickle.unregister_pickle_by_value(module)
    return data


def _modules_by_value(value: object) -> set[str]:
    """Modules of the functions and classes in ``value`` that the other process could not import."""
    found: set[str] = set()
    import cloudpickle

    class Collector(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, (type, FunctionType)) and not _is_importable(obj.__module__):
                found.add(obj.__module__)
            return super().reducer_override(obj)

    previous: set[str] | None = None
    # A module sent by value may refer to others that have to be: again until no more are found.
    while previous != found:
        previous = set(found)
        with _by_value_lock:
            added = [
                sys.modules[name]
                for name in found
                if name in sys.modules and name not in cloudpickle.list_registry_pickle_by_value()
            ]
            for module in added:
                cloudpickle.register_pickle_by_value(module)
            try:
                Collector(io.BytesIO(), protocol=pickle.HIGHEST_PROTOCOL).dump(value)
            finally:
                for module in added:
                    cloudpickle.unregister_pickle_by_value(module)
    return found - {"__main__"}


def _has_a_name(thing: type | FunctionType) -> bool:
    """Whether the other process finds a function or class under its module and name."""
    if not _is_importable(thing.__module__):
        return False
    found: object = sys.modules[thing.__module__]
    for part in thing.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is thing


def _is_importable(name: str | None) -> bool:
    """Whether a new interpreter with our ``sys.path`` finds the module ``name`` in the same place as we did."""
    if name is None or name == "__main__":
        return False
    module = sys.modules.get(name)
    if module is None:
        return False  # it came by value from a process that could import it
    return _finds(name, getattr(module, "__file__", None), tuple(sys.path))


@functools.lru_cache(maxsize=4096)
def _finds(name: str, file: str | None, path: tuple[str, ...]) -> bool:
    if name in sys.builtin_module_names or name.partition(".")[0] in sys.stdlib_module_names:
        return True
    parent, _, _ = name.rpartition(".")
    where = None
    if parent:
        package = sys.modules.get(parent)
        if package is None or not _is_importable(parent):
            return False
        if not hasattr(package, "__path__"):
            return True  # a module that its parent makes by itself, as torch does with some
        where = package.__path__
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec(name, where) if find_spec is not None else None
        if spec is not None:
            return file is None or spec.origin is None or spec.origin == file
    return bool(parent)  # made by its package at run time


def _find_culprit(value: object, depth: int = 4) -> str:
    """Names the part of ``value`` that cannot be sent, and how ``value`` refers to it."""
    if isinstance(value, functools.partial):
        parts = {f"argument {index + 1}": part for index, part in enumerate(value.args)}
        parts |= {f"argument {name!r}": part for name, part in value.keywords.items()}
        parts["its function"] = value.func
    elif inspect.ismethod(value):
        parts = {"the object it is bound to": value.__self__}
    elif isinstance(value, FunctionType):
        variables = inspect.getclosurevars(value)
        used = {**variables.globals, **variables.nonlocals}
        parts = {f"the variable {name!r}": part for name, part in used.items()}
    elif isinstance(value, type):
        parts = {
            f"its method {name!r}": part
            for name, part in vars(value).items()
            if isinstance(part, FunctionType)
        }
    elif isinstance(value, (list, tuple)):
        parts = {f"item {index}": part for index, part in enumerate(value)}
    else:
        parts = {f"its attribute {name!r}": part for name, part in getattr(value, "__dict__", {}).items()}
        if _is_made_in_python(type(value)) and not _has_a_name(type(value)):
            parts["its class"] = type(value)
    for name, part in parts.items():
        try:
            dumps(part)
        except (InvalidTypeError, RecursionError):
            label = part.__qualname__ if isinstance(part, type) else _full_name(type(part))
            goes_on = depth > 0 and (
                isinstance(part, FunctionType | type | list | tuple) or not _has_a_name(type(part))
            )
            inner = _find_culprit(part, depth - 1) if goes_on else ""
            return f"{name} ({label})" + (f", {inner}" if inner else "")
    return ""


def _is_made_in_python(kind: type) -> bool:
    """Whether a class has parts to look at; builtin ones have none, and to search for their names imports much."""
    return bool(kind.__flags__ & _HEAP_TYPE)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
