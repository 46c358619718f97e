"""``ProcessPoolExecutor``: the stdlib's, but a worker that dies takes one task with it, not the pool."""

from __future__ import annotations

import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from concurrent.futures import process as stdlib
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from .._context import of_ours
from .._deadline import deadline_in
from .._interrupt import raised_by_handler
from . import _progress
from ._chunk import run_chunk
from ._engine import Engine
from ._future import Future
from ._map import Mapping
from ._stats import WorkerStats
from ._task import Task, check_options

T = TypeVar("T")


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
        future: Future[T] = Future()
        try:
            task = Task(fn, args, kwargs, self._timeout, self._retries, future)
        except Exception as error:
            if raised_by_handler(error):
                raise
            self._engine.check()
            future.set_exception(error)
            return future
        self._engine.submit(task)
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
        progress: bool = False,
    ) -> Iterator[T]:
        """The results of ``fn`` for each call, in order, as the builtin ``map``.

        The input is read as results are taken, a bounded number of calls ahead, so it may be endless. A list or the
        like is worked off before anybody takes results; ``shutdown`` finishes it, too, and other input of which no
        results were taken, unless it gets a ``buffersize``. Leaving the iteration early cancels what is on its way.

        ``timeout``: seconds from now, for each result; ``concurrent.futures.TimeoutError`` then. ``chunksize``: calls
        that go to a worker as one task, which a worker's death loses together; by default what takes about two
        milliseconds, or one where tasks have a time limit (``options``), which is the whole chunk's. ``buffersize``:
        the most calls that are on their way or done and not taken. ``progress``: show a bar (tqdm) on standard error.
        """
        if chunksize is not None and chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        if chunksize is None and self._timeout is not None:
            # The time is each call's.
            chunksize = 1
        self._engine.check()
        bar = _progress.new_bar(*iterables) if _progress.wanted(progress) else None
        deadline = deadline_in(timeout)
        mapping = Mapping(self._submit_chunk, fn, iterables, self._max_workers, chunksize, buffersize)
        try:
            mapping.fill()
            mapping.check()
            self._engine.mappings.add(mapping)
        except BaseException:
            # It failed, or Ctrl-C: nobody gets the results.
            mapping.cancel()
            raise
        results = mapping.results(deadline, self._engine.revive)
        return _progress.shown(results, bar) if bar is not None else results

    def _submit_chunk(self, fn: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Future[Any]:
        return self._submit(run_chunk, (fn, calls), {})

    def stats(self) -> list[WorkerStats]:
        """What each worker is doing, and has done."""
        return self._engine.stats()

    def terminate_workers(self) -> None:
        """End the workers with SIGTERM, and the executor; what was not finished fails with ``BrokenProcessPool``."""
        self._engine.kill(BaseProcess.terminate)

    def kill_workers(self) -> None:
        """End the workers with SIGKILL, and the executor; what was not finished fails with ``BrokenProcessPool``."""
        self._engine.kill(BaseProcess.kill)

    def options(self, *, timeout: float | None = None, retries: int = 0) -> _Submits:
        """This executor with options for what is submitted through the view that is returned.

        ``timeout``: seconds after which a task that runs is stopped, and fails with ``TaskTimeoutError``.
        ``retries``: how often a task whose worker died is run again before it fails with ``WorkerLostError``. What
        raises, or runs out of time, is not run again.
        """
        check_options("timeout", timeout, retries)
        return _View(self, timeout, retries)


class ProcessPoolExecutor(_Submits):
    """Runs calls in worker processes, as ``concurrent.futures.ProcessPoolExecutor``, which documents it.

    A worker that dies fails the task that it ran, with ``WorkerLostError``, and is replaced. ``Future.cancel`` stops a
    task that runs. Functions that pickle can't take (lambdas, closures) go by value, with cloudpickle.

    ``max_workers``: processes, by default as many as there are CPUs to use. ``mp_context``: a context, by default
    "ipcchan"; a stock one stands for ours with its start method. ``max_tasks_per_child``: how many tasks a worker runs
    before it is replaced. ``max_memory_per_child``: bytes of resident memory. A worker that gets more while a task
    runs is killed within some hundredths of a second, and the task fails with ``WorkerLostError``, whose hint names
    the limit and the size. One that has used up three quarters of its room after a task is replaced.

    Log records and warnings of tasks reach the ``logging`` handlers and the warnings filters of this process. Context
    variables that are attributes of modules reach the tasks, if their values can be pickled.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        max_memory_per_child: int | None = None,
    ) -> None:
        if max_workers is None:
            max_workers = len(os.sched_getaffinity(0))
        if max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if isinstance(mp_context, str):
            known = mp_context in multiprocessing.get_all_start_methods() or mp_context.startswith("ipcchan")
            method = mp_context if known else "spawn"
            raise TypeError(
                f"mp_context is a context, such as multiprocessing.get_context({method!r}) gives, not {mp_context!r}"
            )
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        _check_limit("max_tasks_per_child", max_tasks_per_child)
        _check_limit("max_memory_per_child", max_memory_per_child)
        self._max_workers = max_workers
        self._engine = Engine(
            of_ours(mp_context) if mp_context is not None else multiprocessing.get_context("ipcchan"),
            max_workers,
            initializer=initializer,
            initargs=initargs,
            max_tasks=max_tasks_per_child,
            max_memory=max_memory_per_child,
            remote_traceback=stdlib._RemoteTraceback,
        )
        # An executor that is forgotten ends its workers once they have done what was submitted.
        self._forgotten = weakref.finalize(self, self._engine.close)
        self._forgotten.atexit = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; the workers end when all is done. ``wait`` for that. ``cancel_futures`` that wait."""
        if not cancel_futures:
            self._engine.mappings.read_rest()
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


def _check_limit(name: str, value: int | None) -> None:
    if value is None:
        return
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer")
    if value <= 0:
        raise ValueError(f"{name} must be >= 1")


_reusable_lock = threading.RLock()
_reusable: ProcessPoolExecutor | None = None
_reusable_made_of: tuple[Any, ...] = ()


def get_reusable_executor(
    max_workers: int | None = None,
    mp_context: Any = None,
    initializer: Callable[..., Any] | None = None,
    initargs: tuple[Any, ...] = (),
    *,
    max_tasks_per_child: int | None = None,
    max_memory_per_child: int | None = None,
) -> ProcessPoolExecutor:
    """The executor of this process: made once, and anew where it is broken, shut down, or other arguments are given."""
    global _reusable, _reusable_made_of
    limits = (max_tasks_per_child, max_memory_per_child)
    made_of = (os.getpid(), max_workers, mp_context, initializer, initargs, limits)
    with _reusable_lock:
        if _reusable is None or _reusable_made_of != made_of or not _reusable._engine.usable:
            if _reusable is not None and _reusable_made_of[0] == os.getpid():
                _reusable.shutdown(wait=False)
            _reusable = ProcessPoolExecutor(
                max_workers,
                mp_context,
                initializer,
                initargs,
                max_tasks_per_child=max_tasks_per_child,
                max_memory_per_child=max_memory_per_child,
            )
            _reusable_made_of = made_of
        return _reusable


def _forget_lock() -> None:
    global _reusable_lock
    _reusable_lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_lock)
