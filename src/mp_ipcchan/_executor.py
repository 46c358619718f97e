"""``ProcessPoolExecutor``: the stdlib's, but a worker that dies takes one task with it, not the pool."""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from concurrent.futures import process as stdlib
from itertools import islice
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from ._chunk import ChunkSize, run_chunk
from ._deadline import deadline_in, remaining
from ._engine import Engine
from ._task import Future, Task

T = TypeVar("T")

#: ``map`` keeps this many chunks a worker on their way; its results and their input are bounded by that.
_CHUNKS_AHEAD = 4


class _Submits(Executor):
    """What an executor and its views with options have in common."""

    _engine: Engine
    _max_workers: int
    _timeout: float | None = None
    _retries: int = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` in a worker.

        What can't be pickled fails the future with what pickle says of it. Raises ``RuntimeError`` after
        ``shutdown``, ``BrokenProcessPool`` where no worker can be started.
        """
        return self._submit(fn, args, kwargs)

    def _submit(self, fn: Callable[..., T], args: Any, kwargs: Any) -> Future[T]:
        self._engine.check()
        try:
            task = Task(fn, args, kwargs, self._timeout, self._retries)
        except Exception as error:
            failed: Future[T] = Future()
            failed.set_exception(error)
            return failed
        self._engine.submit(task)
        return task.future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """The results of ``fn`` for each call, in order, as the builtin ``map``.

        The input is read as results are taken, a bounded number of calls ahead, so it may be endless.
        ``timeout``: seconds from now, for each result; ``concurrent.futures.TimeoutError`` then. ``chunksize``: calls
        that go to a worker as one task; by default what takes about two milliseconds. ``buffersize``: the most
        calls that are on their way or done and not taken.
        """
        if chunksize is not None and chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be >= 1, or None")
        results = _Results(self, fn, zip(*iterables), chunksize, buffersize, deadline_in(timeout))  # noqa: B905
        results.fill()
        return results.each()

    def options(self, *, timeout: float | None = None, retries: int = 0) -> _Submits:
        """This executor with options for what is submitted through the view that is returned.

        ``timeout``: seconds after which a task that runs is stopped, and fails with ``TaskTimeoutError``.
        ``retries``: how often a task whose worker died is run again before it fails with ``WorkerLostError``.
        """
        if retries < 0:
            raise ValueError(f"retries must not be negative: {retries}")
        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout must be more than zero seconds: {timeout}")
        return _View(self, timeout, retries)


class ProcessPoolExecutor(_Submits):
    """Runs calls in worker processes, as ``concurrent.futures.ProcessPoolExecutor``, which documents it.

    A worker that dies fails the task that it ran, with ``WorkerLostError``, and is replaced. ``Future.cancel`` stops a
    task that runs. Functions that pickle can't take (lambdas, closures) go by value, with cloudpickle.

    ``max_workers``: processes, by default as many as there are CPUs to use. ``mp_context``: a context of
    ours, by default "ipcchan". ``max_tasks_per_child``: how many tasks a worker runs before it is replaced.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
    ) -> None:
        if max_workers is None:
            max_workers = len(os.sched_getaffinity(0))
        if max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        self._max_workers = max_workers
        self._engine = Engine(
            mp_context or multiprocessing.get_context("ipcchan"),
            max_workers,
            initializer=initializer,
            initargs=initargs,
            max_tasks=max_tasks_per_child,
            remote_traceback=stdlib._RemoteTraceback,
        )
        # An executor that is forgotten ends its workers once they have done what was submitted.
        self._forgotten = weakref.finalize(self, self._engine.close)
        self._forgotten.atexit = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; the workers end when all is done. ``wait`` for that. ``cancel_futures`` that wait."""
        self._engine.close(cancel_futures)
        if wait:
            self._engine.join()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            # Whoever pressed Ctrl-C doesn't want to wait for the tasks.
            self.kill_workers()
        self.shutdown(wait=True)

    def terminate_workers(self) -> None:
        """End the workers with SIGTERM, and the executor; what was not finished fails with ``BrokenProcessPool``."""
        self._engine.kill(BaseProcess.terminate)

    def kill_workers(self) -> None:
        """End the workers with SIGKILL, and the executor; what was not finished fails with ``BrokenProcessPool``."""
        self._engine.kill(BaseProcess.kill)


class _View(_Submits):
    """An executor with options."""

    def __init__(self, executor: _Submits, timeout: float | None, retries: int) -> None:
        # Kept, or it would end when nobody else has it.
        self._executor = executor
        self._engine = executor._engine
        self._max_workers = executor._max_workers
        self._timeout = timeout
        self._retries = retries

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the executor down that this is a view of."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)


class _Results:
    """The chunks of one ``map``: those on their way, and what is to follow them."""

    def __init__(
        self,
        executor: _Submits,
        function: Callable[..., Any],
        calls: Iterator[tuple[Any, ...]],
        chunksize: int | None,
        buffersize: int | None,
        deadline: float | None,
    ) -> None:
        self._executor = executor
        self._function = function
        self._calls = calls
        self._size = ChunkSize(chunksize)
        self._buffersize = buffersize
        self._deadline = deadline
        self._most = max(2, _CHUNKS_AHEAD * executor._max_workers)
        #: In order; and how many calls each is.
        self._chunks: deque[tuple[Future[Any], int]] = deque()
        self._ahead = 0

    def fill(self) -> None:
        """Submit chunks until enough are on their way, or the input ends."""
        while len(self._chunks) < self._most:
            size = self._size.size
            if self._buffersize is not None:
                size = min(size, self._buffersize - self._ahead)
            calls = list(islice(self._calls, size)) if size > 0 else []
            if not calls:
                return
            self._chunks.append((self._executor._submit(run_chunk, (self._function, calls), {}), len(calls)))
            self._ahead += len(calls)

    def each(self) -> Iterator[Any]:
        """The results. Whatever is on its way when this ends is cancelled."""
        try:
            yield from self._each()
        finally:
            for future, _ in self._chunks:
                future.cancel()

    def _each(self) -> Iterator[Any]:
        while self._chunks:
            future, calls = self._chunks[0]
            results, failure, seconds = future.result(remaining(self._deadline))
            self._chunks.popleft()
            self._size.learn(calls, seconds)
            # Taken from the end: nothing is kept that was handed out.
            results.reverse()
            while results:
                self._ahead -= 1
                self.fill()
                yield results.pop()
            if failure is not None:
                raise self._executor._engine.revive(*failure)
            self.fill()


_reusable: ProcessPoolExecutor | None = None
_reusable_made_of: tuple[Any, ...] = ()


def get_reusable_executor(
    max_workers: int | None = None,
    mp_context: Any = None,
    initializer: Callable[..., Any] | None = None,
    initargs: tuple[Any, ...] = (),
    *,
    max_tasks_per_child: int | None = None,
) -> ProcessPoolExecutor:
    """The executor of this process: made once, and anew where it is broken, shut down, or other arguments are given."""
    global _reusable, _reusable_made_of
    made_of = (os.getpid(), max_workers, mp_context, initializer, initargs, max_tasks_per_child)
    if _reusable is None or _reusable_made_of != made_of or not _reusable._engine.usable:
        if _reusable is not None and _reusable_made_of[0] == os.getpid():
            _reusable.shutdown(wait=False)
        _reusable = ProcessPoolExecutor(
            max_workers, mp_context, initializer, initargs, max_tasks_per_child=max_tasks_per_child
        )
        _reusable_made_of = made_of
    return _reusable
