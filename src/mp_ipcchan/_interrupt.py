"""Signals' handlers that raise: told from what they interrupt, and put off where that must not be left half done.

An alarm's handler that raises ``TimeoutError`` while an object is pickled looks as if pickling had failed.
"""

from __future__ import annotations

# Without the enumerations: ten times as fast.
import _signal  # type: ignore[import-not-found]
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, Final

#: How often to try to rescue what a handler has interrupted, as another may interrupt that.
ATTEMPTS: Final = range(64)


def raised_by_handler(error: BaseException) -> bool:
    """Whether ``error`` came out of a signal's handler that is written in Python."""
    codes = _codes_of_handlers()
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False


def _codes_of_handlers() -> set[CodeType]:
    codes = set()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        # Unwrapped: functools.partial, bound methods, objects that can be called.
        handler = getattr(handler, "func", handler)
        for function in (handler, vars(type(handler)).get("__call__")):
            code = getattr(function, "__code__", None)
            if code is not None:
                codes.add(code)
    return codes


_NUMBERS: Final = tuple(map(int, signal.valid_signals()))
#: How long (seconds) handlers are put off at most: who presses Ctrl-C once more after that is heard.
_LONGEST: Final = 5.0


class _StandIn:
    """In place of the handlers of several signals. Notes what comes, until it lets everything through."""

    def __init__(self, handlers: dict[int, Callable[..., Any]]) -> None:
        self._handlers = handlers
        self._came: list[int] = []
        self._passes = False
        self._until = time.monotonic() + _LONGEST

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._passes or time.monotonic() > self._until:
            self._handlers[number](number, frame)
        elif number not in self._came:
            self._came.append(number)

    def install(self) -> None:
        for number in self._handlers:
            _signal.signal(number, self)

    def leave(self) -> None:
        """Give the handlers back. One of them may raise meanwhile; what is not given back yet comes through."""
        self._passes = True
        try:
            for number, handler in self._handlers.items():
                self._leave_to(number, handler)
        except BaseException:
            self.leave()
            raise

    def _leave_to(self, number: int, handler: Callable[..., Any]) -> None:
        if _signal.getsignal(number) is self:
            _signal.signal(number, handler)

    def deliver(self) -> None:
        """Call the handlers of what came, each of them, whatever they raise.

        Not raised once more: a wakeup descriptor (asyncio's) has told of it already.
        """
        if self._came:
            number = self._came.pop(0)
            try:
                self._handlers[number](number, sys._getframe())
            finally:
                self.deliver()

    def forget(self) -> None:
        """In a forked child, which the signals were not for."""
        self._came.clear()
        self.leave()


#: What stands in now.
_standing_in: _StandIn | None = None


@contextlib.contextmanager
def handlers_put_off() -> Iterator[None]:
    """What handlers of signals raise in the main thread is raised behind this, whichever thread the kernel tells.

    The stdlib's hooks at a fork, and its threads as they start, keep locks held where a handler raises in them; what
    was opened, and not yet noted by its owner, would stay open.
    """
    global _standing_in
    handlers: dict[int, Callable[..., Any]] = {}
    if _standing_in is None and threading.current_thread() is threading.main_thread():
        for number in _NUMBERS:
            handler = _signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
    if not handlers:
        yield
        return
    standing_in = _StandIn(handlers)
    try:
        _standing_in = standing_in
        standing_in.install()
        yield
    finally:
        _standing_in = None
        try:
            standing_in.leave()
        finally:
            standing_in.deliver()


def _leave_after_fork() -> None:
    """The child is not in the block, whichever thread forked it: it would hear of nothing."""
    global _standing_in
    standing_in, _standing_in = _standing_in, None
    if standing_in is not None:
        standing_in.forget()


os.register_at_fork(after_in_child=_leave_after_fork)
