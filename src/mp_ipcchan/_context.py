"""The contexts, and how multiprocessing finds them.

``import mp_ipcchan`` registers "ipcchan", "ipcchan_fork", "ipcchan_spawn" and "ipcchan_forkserver".
``install()`` goes further: the stock names stand for our contexts too, so that programs, and children
that are told "spawn", get ours without knowing.

The stdlib's module-level factories (``multiprocessing.Queue``) make the stdlib's objects whatever
context is the default. While this package is imported they ask the default context instead, which for
a stock one changes nothing.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterable
from multiprocessing import context as stdlib
from multiprocessing import spawn
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, ClassVar

from . import _connection
from ._interrupt import handlers_put_off
from ._process import ForkProcess, ForkServerProcess, SpawnProcess
from ._queues import _queue

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ._pools._pool import Pool

#: The factories that differ between contexts; all others of the stdlib take the context as an argument.
FACTORIES = ("Queue", "JoinableQueue", "SimpleQueue", "Pipe", "Pool")


class Context(BaseContext):
    """A context of ours: the whole of a stock one, with queues, pipes and pools of this package.

    ``get_context`` gives one; so does ``multiprocessing.get_context("ipcchan")``, of which type checkers know less.
    """

    #: Starts processes in the way of this context.
    Process: ClassVar[type[BaseProcess]]

    def Queue(self, maxsize: int = 0) -> _queue.Queue[Any]:  # type: ignore[override]
        """A queue; see ``mp_ipcchan.Queue``."""
        return _queue.Queue(maxsize)

    def JoinableQueue(self, maxsize: int = 0) -> _queue.JoinableQueue[Any]:  # type: ignore[override]
        """A queue that counts tasks."""
        return _queue.JoinableQueue(maxsize)

    def SimpleQueue(self) -> _queue.SimpleQueue[Any]:  # type: ignore[override]
        """A queue without bound and counts."""
        return _queue.SimpleQueue()

    def Pipe(self, duplex: bool = True) -> tuple[_connection.Connection, _connection.Connection]:
        """Two connected ends."""
        return _connection.Pipe(duplex)

    def Pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        *,
        task_timeout: float | None = None,
        retries: int = 0,
        engine: Executor | None = None,
    ) -> Pool:
        """A pool of workers; see ``mp_ipcchan.Pool``."""
        # Imported late: a program without pools needs none of it, and the pool stands above the contexts. CPython 3.10
        # keeps its import lock, without which no other thread can fork, where a handler raises in here.
        with handlers_put_off():
            made: type[Pool] = importlib.import_module("._pools._pool", __package__).Pool
        return made(
            processes,
            initializer,
            initargs,
            maxtasksperchild,
            self.get_context(),
            task_timeout=task_timeout,
            retries=retries,
            engine=engine,
        )


# The names of the classes begin as the stdlib's do: its tests, and others, look at that.


class ForkContext(Context, stdlib.ForkContext):
    Process: ClassVar[type[ForkProcess]] = ForkProcess


class SpawnContext(Context, stdlib.SpawnContext):
    Process: ClassVar[type[SpawnProcess]] = SpawnProcess


class ForkServerContext(Context, stdlib.ForkServerContext):
    Process: ClassVar[type[ForkServerProcess]] = ForkServerProcess


_registry: dict[str, stdlib.BaseContext] = stdlib._concrete_contexts  # type: ignore[attr-defined]
_default: stdlib.DefaultContext = stdlib._default_context
_stock = {name: _registry[name] for name in ("fork", "spawn", "forkserver")}
_ours: dict[str, Context] = {
    "fork": ForkContext(),
    "spawn": SpawnContext(),
    "forkserver": ForkServerContext(),
}
#: What was the interpreter's default, and what had been chosen, before ``install``; meaningless while not installed.
_before: tuple[stdlib.BaseContext, stdlib.BaseContext | None] = _default._default_context, None  # type: ignore[attr-defined]


def _register() -> None:
    for name, ours in _ours.items():
        _registry[f"ipcchan_{name}"] = ours
    _registry["ipcchan"] = _ours[_default._default_context._name]  # type: ignore[attr-defined]
    for factory in FACTORIES:
        setattr(stdlib.DefaultContext, factory, _asking(factory))
        setattr(multiprocessing, factory, getattr(_default, factory))
    spawn.get_preparation_data = _preparation_data


def _asking(factory: str) -> Any:
    original = getattr(stdlib.BaseContext, factory)

    def make(self: stdlib.DefaultContext, *args: Any, **options: Any) -> Any:
        return getattr(self.get_context(), factory)(*args, **options)

    make.__name__, make.__qualname__, make.__doc__ = factory, original.__qualname__, original.__doc__
    return make


def installed() -> bool:
    """Whether ``install`` is in force in this process."""
    return _registry["fork"] is _ours["fork"]


def of_ours(context: stdlib.BaseContext) -> stdlib.BaseContext:
    """Our context in place of a stock one, by its start method; any other context is itself."""
    if context is _default:
        context = _default.get_context()
    return next((_ours[name] for name, stock in _stock.items() if context is stock), context)


def get_context(method: str | None = None) -> Context:
    """Our context that starts processes by ``method``: "fork", "spawn" or "forkserver"; else in the interpreter's way.

    As ``multiprocessing.get_context("ipcchan")`` and the like, whose names it takes, too; but type checkers know that
    it is ours. Raises ``ValueError`` for a method that there isn't.
    """
    for name in (method or "ipcchan", f"ipcchan_{method}"):
        context = _registry.get(name)
        if isinstance(context, Context):
            return context
    there = sorted({*_ours, *(name for name, context in _registry.items() if isinstance(context, Context))})
    raise ValueError(f"cannot find context for {method!r}; there are {', '.join(there)}")


def install(method: str = "ipcchan") -> None:
    """Make ``multiprocessing`` ours, in this process and the children it starts, until ``uninstall()``.

    ``multiprocessing.Queue``, ``Pipe``, ``Process`` and the rest, and the start methods "fork", "spawn"
    and "forkserver", are ours then; ``method`` ("ipcchan", "ipcchan_fork", ...) becomes the default, which a
    program may still change by ``set_start_method``, if it hasn't yet.
    Objects, and names, that a module took from ``multiprocessing`` before ``mp_ipcchan`` was imported stay what
    they are. Raises ``ValueError`` for a method that there isn't.
    """
    global _before
    context = _registry.get(method)
    if context is None:
        raise ValueError(f"cannot find context for {method!r}; there are {', '.join(sorted(_registry))}")
    if not installed():
        _before = _default._default_context, _default._actual_context  # type: ignore[attr-defined]
        _registry.update(_ours)
    _set_default(_ours[context.get_start_method()], None)


def uninstall() -> None:
    """Undo ``install``: stock names mean stock contexts again, and the default is what it was before."""
    if installed():
        _registry.update(_stock)
        _set_default(*_before)


def _set_default(default: stdlib.BaseContext, chosen: stdlib.BaseContext | None) -> None:
    _default._default_context, _default._actual_context = default, chosen  # type: ignore[attr-defined]


# -- spawned children ------------------------------------------------------------------------

_stock_preparation_data = spawn.get_preparation_data


class _Import:
    """Unpickled in a child before anything else of it: makes our contexts known there.

    The child sets its start method before it could import anything of ours, so the name would mean
    nothing to it. This refers to builtins only, and puts the parent's path in place first.
    """

    def __init__(self, sys_path: list[str], method: str | None) -> None:
        install = f"; mp_ipcchan.install({method!r})" if method else ""
        self._source = f"import sys; sys.path[:] = {sys_path!r}; import mp_ipcchan{install}"

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self._source, {})


def _preparation_data(name: str) -> dict[str, Any]:
    data: dict[str, Any] = _stock_preparation_data(name)
    default = _default._actual_context or _default._default_context  # type: ignore[attr-defined]
    method = next((f"ipcchan_{way}" for way, ours in _ours.items() if ours is default), None)
    if installed():
        return {"mp_ipcchan": _Import(data["sys_path"], method or "ipcchan"), **data}
    if method:
        return {"mp_ipcchan": _Import(data["sys_path"], None), **data, "start_method": method}
    return data


_register()
