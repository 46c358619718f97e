"""Context variables on their way to a worker: those that are attributes of modules, with values that pickle takes.

A variable has no name that leads to it, so the modules are searched for it, once for each variable and
again when more modules are there. A context without variables, the usual case, costs a look.
"""

from __future__ import annotations

import contextvars
import importlib
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

#: Module, name, value.
Values: TypeAlias = tuple[tuple[str, str, Any], ...]

_Variable: TypeAlias = "contextvars.ContextVar[Any]"
#: Variables of these packages say which event loop runs in a thread: not in the worker's.
_LOOPS = frozenset(("anyio", "asyncio", "sniffio", "trio"))
#: Where each variable was found.
_places: dict[_Variable, tuple[str, str]] = {}
#: How many modules there were when a variable was not found.
_missed: dict[_Variable, int] = {}
#: Of these types nothing can't be pickled.
_SAFE = frozenset((str, bytes, int, float, bool, type(None)))


def current() -> Values | None:
    """The variables of the calling context that can travel; None where there are none."""
    context = contextvars.copy_context()
    return _travelling(context) if len(context) else None


def _travelling(context: contextvars.Context) -> Values | None:
    found = []
    for variable, value in context.items():
        place = _places.get(variable) or _find(variable)
        if place is not None and (value.__class__ in _SAFE or _can_be_pickled(value)):
            found.append((*place, value))
    return tuple(found) or None


def _find(variable: _Variable) -> tuple[str, str] | None:
    if _missed.get(variable) == len(sys.modules):
        return None
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _LOOPS:
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is variable:
                _places[variable] = (name, attribute)
                return name, attribute
    _missed[variable] = len(sys.modules)
    return None


def _can_be_pickled(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def call_with(values: Values, function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """In a context of its own: set the variables, then call."""
    for module, name, value in values:
        try:
            variable = getattr(importlib.import_module(module), name)
        except Exception:
            # A module that can't be imported here, or is another there: the task may do without.
            continue
        if isinstance(variable, contextvars.ContextVar):
            variable.set(value)
    return function(*args, **options)
