"""Futures that cost little: what most of them never need, a condition to wait on, is made when somebody waits.

The stdlib's makes a condition, a lock, three lists and five bound methods for each, which the garbage collector
then looks at again and again: with ten thousand tasks waiting that is most of what submitting costs.

Until there is a condition, the state changes under ``_young``, which is held for nothing else. Whoever makes
a condition holds it, too; from then on the stdlib's code and ours change the state under the condition.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from concurrent.futures import Future as StdlibFuture
from concurrent.futures import _base as _futures
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from ._task import Task

T = TypeVar("T")

_ENDED = frozenset((_futures.CANCELLED, _futures.CANCELLED_AND_NOTIFIED, _futures.FINISHED))
_CANCELLED = frozenset((_futures.CANCELLED, _futures.CANCELLED_AND_NOTIFIED))

#: Reentrant: a finaliser may cancel a future anywhere.
_young = threading.RLock()


class _Condition:
    """A ``threading.Condition`` that costs a third, and whose lock is taken and released in C.

    The stdlib's is entered in Python code: Ctrl-C there leaves its lock held, and the pool's thread would wait for it.
    """

    __slots__ = ("_lock", "_waiters")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiters: list[Any] = []

    acquire: Any = property(operator.attrgetter("_lock.acquire"))
    release: Any = property(operator.attrgetter("_lock.release"))
    __enter__: Any = property(operator.attrgetter("_lock.__enter__"))
    __exit__: Any = property(operator.attrgetter("_lock.__exit__"))
    _is_owned: Any = property(operator.attrgetter("_lock._is_owned"))
    _release_save: Any = property(operator.attrgetter("_lock._release_save"))
    _acquire_restore: Any = property(operator.attrgetter("_lock._acquire_restore"))
    wait: Any = threading.Condition.wait
    notify: Any = threading.Condition.notify

    def notify_all(self) -> None:
        if self._waiters:
            self.notify(len(self._waiters))


class _Ended:
    """The condition of all futures that have ended: nothing changes there, so there is nothing to hold.

    Who waits for thousands of futures asks for the condition of each, and many have ended by then.
    """

    def acquire(self, *_: object) -> bool:
        return True

    def __enter__(self) -> bool:
        return True

    def release(self, *_: object) -> None: ...

    __exit__ = release
    notify_all = release


_ended = _Ended()


class Future(StdlibFuture[T], Generic[T]):
    """A ``concurrent.futures.Future`` whose ``cancel`` stops the task even while it runs."""

    # What the stdlib's constructor sets; the rest of it is made late.
    _state = _futures.PENDING
    _result: Any = None
    _exception: BaseException | None = None
    _late_condition: _Condition | None = None
    _late_waiters: list[Any] | None = None
    _late_callbacks: list[Any] | None = None
    #: Called with the task when it is cancelled: takes it out of the queue, or ends the worker that runs it.
    _abandon: Callable[[Task], None] | None = None
    _task: Task | None = None

    def __init__(self) -> None:
        pass

    @property
    def _condition(self) -> Any:  # type: ignore[override]
        condition = self._late_condition
        if condition is None:
            if self._state in _ENDED:
                return _ended
            with _young:
                condition = self._late_condition
                if condition is None:
                    condition = self._late_condition = _Condition()
        return condition

    @property
    def _waiters(self) -> list[Any]:
        if self._late_waiters is None:
            self._late_waiters = []
        return self._late_waiters

    @_waiters.setter
    def _waiters(self, waiters: list[Any]) -> None:
        self._late_waiters = waiters

    @property
    def _done_callbacks(self) -> list[Any]:
        if self._late_callbacks is None:
            self._late_callbacks = []
        return self._late_callbacks

    def cancel(self) -> bool:
        """Cancel the task, running or not; False only where it has finished."""
        with self._condition:
            if self._state in _CANCELLED:
                return True
            if self._state == _futures.FINISHED:
                return False
            self._state = _futures.CANCELLED
            self._condition.notify_all()
            self.set_running_or_notify_cancel()
            abandon, task = self._abandon, self._task
            self._forget()
        if abandon is not None and task is not None:
            abandon(task)
        self._invoke_callbacks()
        return True

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._state in _CANCELLED

    def running(self) -> bool:
        """Whether it was given to a worker, and has not ended."""
        return self._state == _futures.RUNNING

    def done(self) -> bool:
        """Whether it has ended, cancelled or not."""
        return self._state in _ENDED

    def result(self, timeout: float | None = None) -> T:
        """What the task returned; or raise what it raised, ``CancelledError`` if it was cancelled.

        ``concurrent.futures.TimeoutError`` where it has not ended after ``timeout`` seconds.
        """
        if self._state == _futures.FINISHED and self._exception is None:
            return self._result  # type: ignore[no-any-return]
        return super().result(timeout)

    def set_result(self, result: T) -> None:
        """End with a result. For executors and tests."""
        with _young:
            condition = self._late_condition
            if condition is None and self._state not in _ENDED:
                self._result = result
                self._state = _futures.FINISHED
                return
        if condition is None:
            super().set_result(result)  # which says what is wrong
            return
        with condition:
            if self._state in _ENDED:
                raise _futures.InvalidStateError(f"{self._state}: {self!r}")
            self._result = result
            self._state = _futures.FINISHED
            for waiter in self._late_waiters or ():
                waiter.add_result(self)
            condition.notify_all()
        self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        if self._late_callbacks is not None:
            super()._invoke_callbacks()  # type: ignore[misc]

    def _begin(self) -> None:
        """It was given to a worker, perhaps not for the first time."""
        with _young:
            condition = self._late_condition
            if condition is None and self._state == _futures.PENDING:
                self._state = _futures.RUNNING
        if condition is not None:
            with condition:
                if self._state == _futures.PENDING:
                    self._state = _futures.RUNNING

    def _forget(self) -> None:
        """It has ended: who keeps the future doesn't keep the arguments."""
        self._task = self._abandon = None
