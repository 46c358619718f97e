"""Futures that cost little: one lock for all of them, and nothing else that most of them never need.

The stdlib's makes a condition, a lock, three lists and five bound methods for each, which the garbage collector
then looks at again and again: with ten thousand tasks waiting that is most of what submitting costs.

The stdlib's ``wait`` and ``as_completed`` hold several futures still at a time, others' too, in an order that only
locks of each future's own can keep. A future gets one when they ask for its condition; from then on it is changed
under both.
"""

from __future__ import annotations

import operator
import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future as StdlibFuture
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import _base as _futures
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from ._task import Task

T = TypeVar("T")

_ENDED = frozenset((_futures.CANCELLED, _futures.CANCELLED_AND_NOTIFIED, _futures.FINISHED))
#: Nothing changes any more, and all have been told.
_OVER = frozenset((_futures.CANCELLED_AND_NOTIFIED, _futures.FINISHED))
_BEGUN = {_futures.PENDING: _futures.RUNNING}
_CANCELLED = frozenset((_futures.CANCELLED, _futures.CANCELLED_AND_NOTIFIED))

#: For a shorter time (seconds) nobody looks before sleeping.
_LONG = 0.001

#: Every future's, and held for a change of state alone: whoever holds it waits for nothing and runs nothing of the
#: user's. Reentrant: a finaliser may cancel a future anywhere.
_lock: Final = threading.RLock()
# The thread that may have held it at the fork is not in the child.
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


_release: Final = operator.methodcaller("release")


class _Nothing:
    """The condition of all futures that have ended: nothing changes there, so there is nothing to hold."""

    def acquire(self, *_: object) -> bool:
        return True

    def __enter__(self) -> bool:
        return True

    def release(self, *_: object) -> None: ...

    __exit__ = release


_nothing = _Nothing()


class Future(StdlibFuture[T], Generic[T]):
    """A ``concurrent.futures.Future`` whose ``cancel`` stops the task even while it runs."""

    # What the stdlib's constructor sets; the rest of it is made late.
    _state = _futures.PENDING
    _result: Any = None
    _exception: BaseException | None = None
    #: Taken ahead of ``_lock``, where there is one; there are neither waiters nor callbacks where there is none.
    _own: Any = None
    _late_waiters: list[Any] | None = None
    _late_callbacks: list[Any] | None = None
    #: A lock for each thread that waits in ``result`` or ``exception``, to be released at the end.
    _sleepers: list[Any] | None = None
    #: What it is the future of. Not kept once it has ended: who keeps the future doesn't keep the arguments.
    _task: Task | None = None

    def __init__(self) -> None:
        pass

    @property
    def _condition(self) -> Any:  # type: ignore[override]
        """All that the stdlib uses of one but to wait and to notify, which is done here."""
        own = self._own
        if own is None:
            if self._state in _OVER:
                return _nothing
            with _lock:
                own = self._own
                if own is None:
                    own = self._own = threading.RLock()
        return own

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
        task = self._task
        try:
            with self._condition:
                with _lock:
                    if self._state == _futures.FINISHED:
                        return False
                    if self._state not in _CANCELLED:
                        self._state = _futures.CANCELLED
                    self._wake()
                if task is None or not self._late_waiters:
                    self._tell_waiters()
            self._invoke_callbacks()
            if task is not None:
                task.abandon()
        except BaseException:
            # The pool's thread, which no signal's handler interrupts, does what is left to do.
            if task is not None:
                task.abandon()
            raise
        return True

    def conclude_cancel(self) -> None:
        """In the pool's thread: do what ``cancel`` has left."""
        with _lock:
            self._wake()
        if self._state == _futures.CANCELLED:
            with self._condition:
                self._tell_waiters()
        self._task = None
        self._invoke_callbacks()

    def _tell_waiters(self) -> None:
        """They are Python code of the stdlib's, which leaves nothing that tells how far it has come."""
        if self._state == _futures.CANCELLED:
            for waiter in self._late_waiters or ():
                waiter.add_cancelled(self)
            self._state = _futures.CANCELLED_AND_NOTIFIED

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
        """It has ended: let those who wait for that go on. ``_lock`` is held."""
        sleepers = self._sleepers
        if sleepers:
            # In one C call: a signal's handler can't come between.
            deque(map(_release, starmap(sleepers.pop, repeat((), len(sleepers)))), maxlen=0)

    def set_result(self, result: T) -> None:
        """End with a result. For executors and tests."""
        self._end(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """End with an exception. For executors and tests."""
        self._end(None, exception)

    def _end(self, result: Any, exception: BaseException | None) -> None:
        with _lock:
            own = self._own
            if own is None:
                self._finish(result, exception)
                return
        with own:
            with _lock:
                self._finish(result, exception)
            for waiter in self._late_waiters or ():
                (waiter.add_result if exception is None else waiter.add_exception)(self)
        self._invoke_callbacks()

    def _finish(self, result: Any, exception: BaseException | None) -> None:
        if self._state in _ENDED:
            raise _futures.InvalidStateError(f"{self._state}: {self!r}")
        self._result, self._exception = result, exception
        self._state = _futures.FINISHED
        self._task = None
        self._wake()

    def settle_alone(self, result: T) -> bool:
        """End with a result where only the calling thread waits for it; False, with nothing done, where others may.

        A signal's handler may raise in here: it has ended then, or has not.
        """
        with _lock:
            if self._state in _ENDED or self._own is not None or self._sleepers:
                return False
            self._finish(result, None)
        return True

    def _invoke_callbacks(self) -> None:
        """Each once, though that may be interrupted, and done by another thread."""
        callbacks = self._late_callbacks
        while callbacks:
            try:
                callback = callbacks.pop(0)
            except IndexError:
                return
            try:
                callback(self)
            except Exception:
                _futures.LOGGER.exception("exception calling callback for %r", self)


def begin(tasks: Iterable[Task]) -> None:
    """They were given to a worker, perhaps not for the first time."""
    with _lock:
        for task in tasks:
            future = task.future
            # No condition: from CPython 3.12 on, what a handler raises at a loop's jump behind one gets past ``with``.
            future._state = _BEGUN.get(future._state, future._state)
