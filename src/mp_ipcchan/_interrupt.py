"""Exceptions of a signal's handler, told from those of what it interrupted.

An alarm's handler that raises ``TimeoutError`` while an object is pickled looks as if pickling had failed.
"""

from __future__ import annotations

import signal
from types import CodeType
from typing import Final

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
