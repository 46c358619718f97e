"""What ``apply_async`` and ``map_async`` of a pool return: results that somebody may wait for.

The stdlib's in all that a program sees. A result is settled once, in the thread that hears of it: first its
callback, then whoever waits. One that is dropped with its pool raises in ``get``, where the stdlib's waits for ever.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import TimeoutError as StdlibTimeoutError
from multiprocessing import pool as stdlib
from typing import Any, Generic, Protocol, TypeVar

from ._chunk import ChunkSize, run_units
from ._feed import Feed, at_hand
from ._task import WorkerLostError

T = TypeVar("T")

#: States of a pool.
INIT, RUN, CLOSE, TERMINATE = "INIT", "RUN", "CLOSE", "TERMINATE"

#: A first guess is far off, so chunks of input whose size is known may grow by this factor.
_GROWTH = 64
#: The largest chunk of input whose size isn't known.
_LARGEST = 4096
#: Calls that are made in a row in a worker before it looks at the clock.
_UNIT = 32

_job_counter: Iterator[int] = stdlib.job_counter  # type: ignore[attr-defined]


class Host(Protocol):
    """Where a pool's tasks run."""

    processes: int
    #: How much work (seconds) goes there at a time, where it can be chosen.
    target: float
    #: Whether each call is a task by itself, because tasks have limits.
    single: bool
    #: How many tasks a worker runs before it is replaced.
    max_tasks: int | None

    def submit(
        self, function: Callable[..., Any], args: Sequence[Any], options: Any, settle: Callable[[bool, Any], None]
    ) -> None:
        """Run a call; ``settle(succeeded, outcome)`` hears how it ended, perhaps before this returns."""

    def portable(self, function: Callable[..., Any]) -> Any:
        """What goes with each chunk of a map, so that ``function`` is there."""

    def revive(self, text: str, pickled: bytes | None) -> BaseException:
        """An exception that a runner has described."""

    def window(self) -> int:
        """How many tasks a worker may have at a time, as long as they are now."""


class Speeds:
    """How long calls of functions took when they were last mapped: a first chunk needn't be a guess again."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[int, float]] = weakref.WeakKeyDictionary()

    def get(self, function: Any) -> tuple[int, float] | None:
        """How many calls took how many seconds, if that is known."""
        try:
            return self._known.get(function)
        except TypeError:  # there is no weak reference to it, or it can't be hashed
            return None

    def note(self, function: Any, calls: int, seconds: float) -> None:
        """``calls`` calls have taken ``seconds``."""
        try:
            self._known[function] = calls, seconds
        except TypeError:
            pass


class Jobs(Protocol):
    """What results need of their pool."""

    _cache: dict[int, Any]
    _host: Host
    _state: str
    _speeds: Speeds

    def _one_less(self) -> None: ...


class AsyncResult(stdlib.ApplyResult[T], Generic[T]):
    """The result of a call, once it is there; ``multiprocessing.pool.AsyncResult``, which documents it."""

    _value: Any
    _success: bool
    _done = False
    _callback: Callable[[Any], object] | None = None
    _error_callback: Callable[[BaseException], object] | None = None

    def __init__(
        self,
        pool: Jobs,
        callback: Callable[[T], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        #: Kept while it is under way: a pool whose results somebody waits for is not forgotten.
        self._pool: Jobs | None = pool
        if callback is not None:
            self._callback = callback
        if error_callback is not None:
            self._error_callback = error_callback
        #: Locks of those who wait, released when it is there.
        self._gates: list[threading.Lock] = []
        self._job = next(_job_counter)

    def _enter(self) -> None:
        """Let the pool wait for this at its end. Whoever calls it calls ``_drop`` if it can't be begun."""
        if self._pool is not None:
            self._pool._cache[self._job] = self

    def ready(self) -> bool:
        """Whether the call has ended."""
        return self._done

    def successful(self) -> bool:
        """Whether it ended without an exception; ``ValueError`` where it hasn't ended."""
        if not self._done:
            raise ValueError(f"{self!r} not ready")
        return self._success

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is there, or for ``timeout`` seconds."""
        if not self._done:
            gate = threading.Lock()
            gate.acquire()
            self._gates.append(gate)
            # Looked at after the gate was shown, as who settles looks at the gates after that.
            if not self._done:
                gate.acquire(timeout=-1 if timeout is None else max(0.0, min(timeout, threading.TIMEOUT_MAX)))

    def get(self, timeout: float | None = None) -> T:
        """The result, or the call's exception; ``multiprocessing.TimeoutError`` after ``timeout`` seconds."""
        if not self._done:
            self.wait(timeout)
            if not self._done:
                raise StdlibTimeoutError
        if self._success:
            result: T = self._value
            return result
        raise self._value

    def _settle(self, success: bool, value: Any) -> None:
        pool = self._pool
        if pool is None or pool._cache.pop(self._job, None) is None:
            return  # dropped meanwhile
        callback: Callable[[Any], object] | None = self._callback if success else self._error_callback
        if callback is not None:
            call_back(callback, value)
        self._finish(pool, success, value)

    def _finish(self, pool: Jobs, success: bool, value: Any) -> None:
        self._success, self._value = success, value
        self._callback = self._error_callback = self._pool = None
        self._done = True
        for gate in self._gates:
            gate.release()
        if pool._state == CLOSE:
            pool._one_less()

    def await_end(self) -> None:
        """Wait until it is settled."""
        self.wait()

    def _drop(self, error: BaseException) -> None:
        """The pool was terminated: nothing is called back, as in the stdlib's."""
        pool = self._pool
        if pool is not None and pool._cache.pop(self._job, None) is not None:
            self._finish(pool, False, error)


def is_final(error: object) -> bool:
    """Whether whatever is submitted after this fails, too."""
    return isinstance(error, BrokenProcessPool) and not isinstance(error, WorkerLostError)


def call_back(callback: Callable[[Any], object], value: Any) -> None:
    """Call a user's function in a thread of ours, which goes on whatever it raises."""
    try:
        callback(value)
    except BaseException:
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


class MapResult(AsyncResult[list[T]], stdlib.MapResult[T]):
    """The results of a map, in order, once they are all there, or the first exception.

    Its items go to the workers in chunks of what the user asked for, or what their time suggests. Where those are
    short, several go as one task; a failure ends its own chunk, not the others.
    """

    def __init__(
        self,
        pool: Jobs,
        function: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        star: bool,
        callback: Callable[[list[Any]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        host = pool._host
        length = len(iterable) if isinstance(iterable, Sized) else None
        self._host = host
        self._key = function
        self._speeds = pool._speeds
        self._function = host.portable(function)
        self._star = star
        self._progress = progress
        self._lock = threading.Lock()
        #: Tasks that are under way.
        self._out = 0
        self._most = 3 * host.processes
        self._all_read = False
        self._parts: dict[int, list[Any]] = {}
        self._failure: BaseException | None = None
        fair = max(1, -(-length // (4 * host.processes))) if length is not None else None
        if chunksize is None and host.max_tasks is not None and fair is not None:
            chunksize = fair  # so many tasks as the stdlib makes of it, since they are counted
        elif chunksize is None and host.single:
            chunksize = 1
        self._unit = chunksize or _UNIT
        if chunksize is not None and (host.single or host.max_tasks is not None):
            self._sizes = ChunkSize(chunksize)
        else:
            self._sizes = ChunkSize(
                target=host.target,
                largest=fair or _LARGEST,
                growth=_GROWTH if length is not None else _GROWTH // 4,
            )
            known = pool._speeds.get(function)
            if known is not None:
                self._sizes.learn(*known)
            else:
                # What the first ones say is worth waiting for.
                self._most = host.processes
        self._step = chunksize or 1
        self._feed: Feed | None = Feed(
            iterable,
            room=self._room,
            launch=self._launch,
            failed=self._input_failed,
            ended=self._input_ended,
            whole=True,
        )
        super().__init__(pool, callback, error_callback)

    def _begin(self, iterable: Iterable[Any]) -> None:
        feed = self._feed
        if feed is not None:
            feed.begin(at_hand(iterable))

    def _begin_here(self, iterable: Iterable[Any]) -> None:
        """For a caller that waits for the results anyway: input is read in its thread."""
        feed = self._feed
        if feed is None:
            return
        if at_hand(iterable):
            feed.begin(True)
        else:
            feed.read_here()

    def _room(self) -> int:
        if self._out >= self._most:
            return 0
        # Whole chunks, at least one.
        return max(1, self._sizes.size // self._step) * self._step

    def _launch(self, position: int, items: list[Any]) -> None:
        with self._lock:
            self._out += 1
        self._submit(position, items)

    def _submit(self, position: int, items: list[Any]) -> None:
        def settle(succeeded: bool, outcome: Any) -> None:
            self._hear(position, items, succeeded, outcome)

        self._host.submit(run_units, (self._function, items, self._unit, self._star), {}, settle)

    def _hear(self, position: int, items: list[Any], succeeded: bool, outcome: Any) -> None:
        """A task has ended."""
        done = len(items)
        self._most = 3 * self._host.processes
        if succeeded:
            values, failure, done, seconds = outcome
            self._sizes.learn(done, seconds)
            if done == len(items):
                self._speeds.note(self._key, done, seconds)
            if failure is not None:
                self._fail(self._host.revive(*failure))
            elif self._failure is None:
                self._parts[position] = values
        else:
            self._fail(outcome)
            if is_final(outcome) and self._feed is not None:
                self._feed.stop()
                self._all_read = True
        if self._progress is not None:
            call_back(self._progress, done)
        if done < len(items) and self._pool is not None:
            self._submit(position + done, items[done:])
            return
        with self._lock:
            self._out -= 1
        feed = self._feed
        if feed is not None:
            feed.advance()
        self._end_if_done()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            self._parts.clear()

    def _input_failed(self, error: BaseException) -> None:
        self._fail(error)
        self._input_ended()

    def _input_ended(self) -> None:
        self._all_read = True
        self._end_if_done()

    def _end_if_done(self) -> None:
        with self._lock:
            if self._out > 0 or not self._all_read or self._feed is None:
                return
            self._feed = None
        if self._failure is not None:
            self._settle(False, self._failure)
        else:
            self._settle(True, list(chain.from_iterable(map(self._parts.pop, sorted(self._parts)))))

    def _finish(self, pool: Jobs, success: bool, value: Any) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.stop()
        self._parts.clear()
        super()._finish(pool, success, value)
