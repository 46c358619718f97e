"""What stands for a future where nobody needs a whole one: it tells a function how its task ended.

A ``concurrent.futures.Future`` costs more than everything else that the parent does for a short task. A
ticket has of it what the engine uses.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any


class Ticket:
    """Calls ``settle(succeeded, result or exception)``, once."""

    __slots__ = ("_settle", "_state", "_task")

    def __init__(self, settle: Callable[[bool, Any], None]) -> None:
        self._settle: Callable[[bool, Any], None] | None = settle
        #: As a future's; but nobody asks for the state.
        self._state = ""
        self._task: Any = None

    def cancelled(self) -> bool:
        """Whether nobody wants to know any more."""
        return self._settle is None

    def cancel(self) -> bool:
        """Have the task stopped, where it hasn't ended."""
        task = self._task
        if self._settle is None or task is None:
            return False
        self._end(False, CancelledError())
        task.abandon()
        return True

    def conclude_cancel(self) -> None:
        """Nothing is left to do."""

    def set_result(self, result: object) -> None:
        self._end(True, result)

    def set_exception(self, error: BaseException | None) -> None:
        self._end(False, error)

    def _end(self, succeeded: bool, outcome: Any) -> None:
        settle, self._settle = self._settle, None
        # The task refers to this: nothing is to wait for the garbage collector.
        self._task = None
        if settle is not None:
            settle(succeeded, outcome)
