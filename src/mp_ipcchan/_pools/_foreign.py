"""What runs on somebody else's executor for a pool. It needs ``mp_ipcchan`` to be importable there."""

from __future__ import annotations

import itertools
import pickle
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SerializationError
from . import _call, _outcome


class Serial:
    """Numbers that nobody else has: some executors take two equal calls for one."""

    def __init__(self) -> None:
        self._prefix = uuid.uuid4().hex
        self._numbers = itertools.count()

    def next(self) -> str:
        return f"{self._prefix}-{next(self._numbers)}"


class Initializer:
    """A pool's initializer, which runs once in each process that runs a task of the pool, ahead of that."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._key = uuid.uuid4().hex
        self._payload = to_bytes((function, args), by_value=True)

    def ensure(self) -> None:
        """Run it, unless it was. What it raises fails the task; the next one tries again."""
        with _lock:
            if self._key not in _initialized:
                function, args = _call.decode(self._payload)
                function(*args)
                _initialized.add(self._key)


class Bound:
    """A function together with an initializer of the main program, whose variables are for it.

    The other side has another main program, so both go by value, and share their variables only where they go as one.
    There the initializer runs once in each process for each function, not for each process.
    """

    def __init__(
        self, initializer: Callable[..., Any], initargs: tuple[Any, ...], function: Callable[..., Any]
    ) -> None:
        self._key = uuid.uuid4().hex
        self._payload = to_bytes((initializer, initargs, function), by_value=True)
        self.__qualname__ = getattr(function, "__qualname__", None) or repr(function)

    def __call__(self, *args: Any, **options: Any) -> Any:
        with _lock:
            function = _bound.get(self._key)
            if function is None:
                initializer, initargs, function = pickle.loads(self._payload)
                initializer(*initargs)
                if len(_bound) >= _MOST_BOUND:
                    del _bound[next(iter(_bound))]
                _bound[self._key] = function
        return function(*args, **options)


_bound: dict[str, Callable[..., Any]] = {}
_MOST_BOUND = 64
_initialized: set[str] = set()
_lock = threading.RLock()


def run_encoded(payload: bytes, serial: str, initializer: Initializer | None) -> bytes:  # noqa: ARG001 - makes it unique
    """In a worker: run a call that ``to_bytes`` encoded; its outcome, for ``from_bytes``."""
    try:
        if initializer is not None:
            initializer.ensure()
    except BaseException as error:
        return to_bytes((_call.RAISED, *_call.describe(error)))
    return outcome_in_bytes(payload)


def run_here(initializer: Initializer, function: Callable[..., Any], args: Sequence[Any], options: Any) -> Any:
    """In a worker: run a call, after the initializer."""
    initializer.ensure()
    return function(*args, **options)


def to_bytes(obj: object, by_value: bool = False) -> bytes:
    """``obj`` pickled. ``by_value``: what the main module defines goes along, since the other side has another."""
    import cloudpickle  # type: ignore[import-untyped]

    if by_value:
        made: bytes = cloudpickle.dumps(obj)
        return made
    try:
        return pickle.dumps(obj)
    except Exception:
        pass
    # What this raises tells more: pickle itself would only say that a lambda is one.
    return cloudpickle.dumps(obj)  # type: ignore[no-any-return]


def outcome_in_bytes(payload: bytes) -> bytes:
    """Run the call in ``payload``; how it ended. Raises nothing that a task may raise."""
    try:
        function, args, options = pickle.loads(payload)
        result = function(*args, **options)
    except BaseException as error:
        return to_bytes((_call.RAISED, *_call.describe(error)))
    try:
        return to_bytes((_call.DONE, result))
    except Exception as error:
        return to_bytes((_call.UNENCODED, *_call.describe(error), _call.shown(result)))


def from_bytes(
    outcome: bytes,
    cause: Callable[[str], BaseException],
    unsendable: Callable[[BaseException, str], BaseException],
) -> tuple[bool, Any]:
    """Whether a call succeeded, and its result or exception."""
    try:
        kind, *rest = pickle.loads(outcome)
    except Exception as error:
        wrapped = SerializationError(f"the result can't be unpickled: {error}")
        wrapped.__cause__ = error
        return False, wrapped
    if kind == _call.DONE:
        return True, rest[0]
    raised = _outcome.revive(rest[0], rest[1], cause)
    return False, unsendable(raised, rest[2]) if kind == _call.UNENCODED else raised
