"""Tasks of a pool, their futures, and how they fail."""

from __future__ import annotations

import operator
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import InvalidStateError
from concurrent.futures.process import BrokenProcessPool
from typing import Any, SupportsIndex

from .._message import Message, Outgoing
from ..errors import IpcError
from . import _call, _variables
from ._future import Future
from ._schedule import ALONE
from ._ticket import Ticket


class WorkerLostError(IpcError, BrokenProcessPool):
    """The worker that ran a task died, and that task alone is lost. The pool goes on.

    ``pid``: of the worker. ``exitcode``: as ``Process.exitcode``. ``signal``: the name of the signal that
    killed it, such as "SIGKILL", or None. ``function``: the name of the task's function.
    """

    # Tracebacks show it, who imports it from there or not.
    __module__ = "mp_ipcchan"

    def __init__(self, pid: int, exitcode: int | None, function: str, hint: str = "") -> None:
        # All of them as arguments, so that the error can be pickled.
        super().__init__(pid, exitcode, function, hint)
        self.pid = pid
        self.exitcode = exitcode
        self.function = function
        self.hint = hint
        self.signal: str | None = _signal_name(exitcode)

    def __str__(self) -> str:
        how = f"was killed by {self.signal}" if self.signal else f"ended with exit code {self.exitcode}"
        hint = f" ({self.hint})" if self.hint else ""
        return f"worker {self.pid} {how} while it ran {self.function}{hint}; the pool goes on"


def _signal_name(exitcode: int | None) -> str | None:
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


def check_options(name: str, timeout: object, retries: object) -> None:
    """Refuse what can't be a time limit, which the caller knows as ``name``, or a number of retries."""
    if not isinstance(retries, SupportsIndex):
        raise TypeError(f"retries is how often a task may be run again, not {retries!r}")
    if operator.index(retries) < 0:
        raise ValueError(f"retries must not be negative: {retries}")
    try:
        positive = timeout is None or timeout > 0  # type: ignore[operator]
    except TypeError:
        raise TypeError(f"{name} is a number of seconds, or None, not {timeout!r}") from None
    if not positive:
        raise ValueError(f"{name} must be more than zero seconds: {timeout}")


class Task:
    """A call, who waits for it, and what was asked for."""

    __slots__ = (
        "args",
        "by_value",
        "engine",
        "function",
        "future",
        "item",
        "options",
        "refused",
        "repeatable",
        "retries",
        "runs",
        "size",
        "timeout",
        "variables",
    )

    #: How often a worker that ran it has died. Not set before the first.
    runs: int

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        options: Mapping[str, Any],
        timeout: float | None = None,
        retries: int = 0,
        future: Future[Any] | Ticket | None = None,
    ) -> None:
        self.function, self.args, self.options = function, args, options
        #: Whom it was given to.
        self.engine: Any = None
        self.timeout = timeout
        self.retries = retries
        #: Who waits.
        self.future: Future[Any] | Ticket = Future() if future is None else future
        self.by_value = False
        self.variables = _variables.current()
        self.item: Outgoing = _call.encode_call(function, args, options, self.variables)
        #: Whether it can be sent twice: what a message carries along moves with the first.
        self.repeatable = not isinstance(self.item, Message) or not self.item.handles
        #: Its weight. One that can't be sent twice can't be taken back, so it waits behind none.
        self.size = len(self.item) if self.repeatable else ALONE

        #: Why it could not be sent, which is what it fails with once its worker has said that it never came.
        self.refused: OSError | None = None

    def encode_by_value(self) -> None:
        """Let the function that the user gave travel by value, and its arguments, as far as they can."""
        self.item = _call.encode_by_value(self.function, self.args, self.options, self.variables)
        self.size = len(self.item)
        self.by_value = True

    def let_go(self) -> None:
        """It is not sent any more: what it would have taken along is its caller's again."""
        if isinstance(self.item, Message):
            self.item.unsent()

    def why_not_by_value(self) -> BaseException | None:
        """Why the user's function can't go by value; None where it can."""
        function = self._given
        try:
            (function if isinstance(function, _call.ByValue) else _call.ByValue(function)).pickled()
        except BaseException as error:
            return error
        return None

    def succeed(self, result: object) -> None:
        """End well; what was cancelled meanwhile stays so."""
        try:
            self.future.set_result(result)
        except InvalidStateError:
            pass

    def fail(self, error: BaseException) -> None:
        """End with an error; what was cancelled meanwhile stays so."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            pass

    def abandon(self) -> None:
        """Nobody wants the result any more: don't let it begin, or stop it."""
        if self.engine is not None:
            self.engine.abandon(self)

    @property
    def _given(self) -> Any:
        """The user's function."""
        return self.args[0] if _call.is_runner(self.function) else self.function

    @property
    def name(self) -> str:
        """The name of the user's function, for messages."""
        function = self._given
        return getattr(function, "__qualname__", None) or repr(function)

    @property
    def described(self) -> str:
        """What it is, for messages: the function's name, or that these are several calls of it."""
        several = _call.is_runner(self.function) and len(self.args[1]) > 1
        return f"a chunk of calls of {self.name}" if several else self.name

    def note_loss(self) -> str:
        """A worker has died that ran it: how often that was, for the hint, if more than once."""
        self.runs = getattr(self, "runs", 0) + 1
        return f"run {self.runs} times, as its workers died" if self.runs > 1 else ""
