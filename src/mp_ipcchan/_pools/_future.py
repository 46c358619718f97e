"""Futures that cost little: one lock for all of them, and nothing else that most of them never need.

The stdlib's makes a condition, a lock, three lists and five bound methods for each, which the garbage collector
then looks at again and again: with ten thousand tasks waiting that is most of what submitting costs, and ``wait``
acquires each.

The lock is held for a change of state, never while anything of the user's runs; it is acquired and released in C, so
no signal's handler can leave it held.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future as StdlibFuture
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import _base as _futures
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from ._task import Task

T = TypeVar("T")

_ENDED = frozenset((_futures.CANCELLED, _futures.CANCELLED_AND_NOTIFIED, _futures.FINISHED))
_BEGUN = {_futures.PENDING: _futures.RUNNING}
_CANCELLED = frozenset((_futures.CANCELLED, _futures.CANCELLED_AND_NOTIFIED))

#: For a shorter time (seconds) nobody looks before sleeping.
_LONG = 0.001

#: Every future's. Reentrant: ``wait`` acquires that of each, and a finaliser may cancel a future anywhere.
_lock: Final = threading.RLock()
# In place: every future has it. The thread that may have held it at the fork is not in the child.
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


class Future(StdlibFuture[T], Generic[T]):
    """A ``concurrent.futures.Future`` whose ``cancel`` stops the task even while it runs."""

    # What the stdlib's constructor sets; the rest of it is made late.
    _state = _futures.PENDING
    _result: Any = None
    _exception: BaseException | None = None
    #: All that the stdlib uses of a condition but to wait and to notify, which is done here.
    _condition: Any = _lock
    _late_waiters: list[Any] | None = None
    _late_callbacks: list[Any] | None = None
    #: A lock for each thread that waits in ``result`` or ``exception``, to be released at the end.
    _sleepers: list[Any] | None = None
    #: What it is the future of. Not kept once it has ended: who keeps the future doesn't keep the arguments.
    _task: Task | None = None

    def __init__(self) -> None:
        pass

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
        with _lock:
            if self._state in _CANCELLED:
                return True
            if self._state == _futures.FINISHED:
                return False
            self._state = _futures.CANCELLED
            self._wake()
            self.set_running_or_notify_cancel()
            task, self._task = self._task, None
        if task is not None:
            task.abandon()
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
        if self._state not in _ENDED:
            if timeout is None or timeout > _LONG:
                self._look()
            self._sleep(timeout)
        if self._state == _futures.FINISHED and self._exception is None:
            return self._result  # type: ignore[no-any-return]
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the task raised, None if it didn't; raise ``CancelledError`` if it was cancelled.

        ``concurrent.futures.TimeoutError`` where it has not ended after ``timeout`` seconds.
        """
        if self._state not in _ENDED:
            self._sleep(timeout)
        return super().exception()

    def _look(self) -> None:
        """See whether it ends in a moment, without having to be woken for it."""
        task = self._task
        if task is not None and task.engine is not None:
            task.engine.look_for(task, self)

    def _sleep(self, timeout: float | None) -> None:
        """Until it has ended; ``TimeoutError`` after ``timeout`` seconds."""
        sleeper = threading.Lock()
        sleeper.acquire()
        with _lock:
            if self._state in _ENDED:
                return
            if self._sleepers is None:
                self._sleepers = []
            self._sleepers.append(sleeper)
        if timeout is None:
            sleeper.acquire()
        elif not (sleeper.acquire(timeout=timeout) if timeout > 0 else sleeper.acquire(False)):
            with _lock:
                if self._state not in _ENDED:
                    self._sleepers.remove(sleeper)
                    raise FutureTimeoutError

    def _wake(self) -> None:
        """It has ended: let those who wait for that go on. The lock is held."""
        for sleeper in self._sleepers or ():
            sleeper.release()
        self._sleepers = None

    def set_result(self, result: T) -> None:
        """End with a result. For executors and tests."""
        with _lock:
            if self._state in _ENDED:
                raise _futures.InvalidStateError(f"{self._state}: {self!r}")
            self._result = result
            self._state = _futures.FINISHED
            self._task = None
            if self._late_waiters:
                for waiter in self._late_waiters:
                    waiter.add_result(self)
            if self._sleepers:
                self._wake()
        if self._late_callbacks:
            self._invoke_callbacks()

    def settle_alone(self, result: T) -> bool:
        """End with a result where only the calling thread waits for it; False, with nothing done, where others may.

        A signal's handler may raise in here: it has ended then, or has not.
        """
        with _lock:
            if self._state in _ENDED or self._late_waiters or self._late_callbacks or self._sleepers:
                return False
            self._result = result
            self._state = _futures.FINISHED
            self._task = None
        return True

    def set_exception(self, exception: BaseException | None) -> None:
        """End with an exception. For executors and tests."""
        with _lock:
            if self._state in _ENDED:
                raise _futures.InvalidStateError(f"{self._state}: {self!r}")
            self._exception = exception
            self._state = _futures.FINISHED
            self._task = None
            for waiter in self._late_waiters or ():
                waiter.add_exception(self)
            self._wake()
        self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        if self._late_callbacks is not None:
            super()._invoke_callbacks()  # type: ignore[misc]


def begin(tasks: Iterable[Task]) -> None:
    """They were given to a worker, perhaps not for the first time."""
    with _lock:
        for task in tasks:
            future = task.future
            # No condition: from CPython 3.12 on, what a handler raises at a loop's jump behind one gets past ``with``.
            future._state = _BEGUN.get(future._state, future._state)
