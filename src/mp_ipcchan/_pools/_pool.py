"""``Pool``: the stdlib's, on workers of our own that no task and no signal can hang, or on any executor.

Results are in ``_async_result`` and ``_imap``, the way of the input in ``_feed``, workers in ``_workforce``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import pool as stdlib
from multiprocessing import util
from types import TracebackType
from typing import Any, TypeVar

from typing_extensions import Self

from .._interrupt import handlers_put_off, raised_by_handler
from . import _engine_url, _progress
from ._async_result import CLOSE, INIT, RUN, TERMINATE, AsyncResult, MapResult, Speeds
from ._imap import IMapIterator, IMapUnorderedIterator, Stream
from ._stats import WorkerStats
from ._task import check_options
from ._workforce import ForeignWorkers, OwnWorkers

S = TypeVar("S")
T = TypeVar("T")


class Pool(stdlib.Pool):
    """A pool of worker processes, as ``multiprocessing.Pool``, which documents it.

    A worker that dies fails the task that it ran, with ``WorkerLostError``, and is replaced; of a ``map`` that is a
    chunk, and the map fails when the others are done. Lambdas and closures work. Input is read as it is needed, so
    it may be endless. ``terminate`` fails what is under way, so nobody waits for ever.

    ``processes``: by default as many as there are CPUs to use. ``maxtasksperchild``: tasks (with chunks: chunks)
    that a worker runs before it is replaced. ``task_timeout``: seconds after which a task that runs is stopped and
    fails with ``TaskTimeoutError``. ``retries``: how often a task whose worker died is run again; what raises, or runs
    out of time, is not. ``engine``: an executor that runs the tasks instead, and outlives the pool. Without it, the
    environment variable ``MP_IPCCHAN_ENGINE`` may name one (``dask://host:port``); ``maxtasksperchild`` then has no
    meaning.
    """

    _pool: list[Any] = property(lambda self: self._workers())  # type: ignore[assignment]
    _state: str

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        task_timeout: float | None = None,
        retries: int = 0,
        engine: Executor | None = None,
    ) -> None:
        # First, since ``__del__`` looks at it.
        self._state = INIT
        self._host: OwnWorkers | ForeignWorkers | None = None
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0):
            raise ValueError("maxtasksperchild must be a positive int or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        check_options("task_timeout", task_timeout, retries)
        if engine is not None:
            _engine_url.check(engine)
        if engine is not None and maxtasksperchild is not None:
            raise ValueError("maxtasksperchild needs workers of the pool's own: leave it out, or engine")
        self._ctx = context or multiprocessing.get_context("ipcchan")
        #: Results that are under way, by their numbers.
        self._cache: dict[int, Any] = {}
        self._speeds = Speeds()
        self._maxtasksperchild = maxtasksperchild
        self._initializer = initializer
        self._initargs = tuple(initargs)
        close: Callable[[], object] | None = None
        if engine is None:
            engine, close = _engine_url.from_environment()
        if engine is None:
            try:
                # Its workers end no sooner than somebody says so: nothing comes between their start and who says it.
                with handlers_put_off():
                    self._begin(
                        OwnWorkers(
                            self._ctx,
                            processes or len(os.sched_getaffinity(0)),
                            initializer,
                            self._initargs,
                            maxtasksperchild,
                            task_timeout,
                            retries,
                        )
                    )
            except BaseException:
                if self._state == RUN:
                    # A handler has raised, and nobody will have this pool.
                    self.terminate()
                raise
        else:
            try:
                self._begin(
                    ForeignWorkers(engine, processes, initializer, self._initargs, task_timeout, retries, close)
                )
            except BaseException:
                if close is not None:
                    close()
                raise

    def _begin(self, host: OwnWorkers | ForeignWorkers) -> None:
        self._host = host
        self._processes = host.processes
        # Called when the pool is forgotten, and when the process ends: then tasks that are left are dropped.
        self._terminate = util.Finalize(self, _terminate, args=(host, self._cache), exitpriority=15)
        self._state = RUN

    def __repr__(self) -> str:
        cls = type(self)
        size = self._processes if isinstance(self._host, ForeignWorkers) else len(self._pool)
        return f"<{cls.__module__}.{cls.__qualname__} state={self._state} pool_size={size}>"

    # -- one call ----------------------------------------------------------------------------

    def apply(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> T:
        """The result of ``func(*args, **kwds)``, run in a worker."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[T]:
        """Run ``func(*args, **kwds)`` in a worker.

        A thread of the pool calls ``callback(result)`` or ``error_callback(exception)``; it has other work, too.
        """
        host = self._running()
        result: AsyncResult[T] = AsyncResult(self, callback, error_callback)  # type: ignore[arg-type]
        try:
            result._enter()
            host.submit(func, args if type(args) is tuple else tuple(args), kwds, result._settle)
        except BaseException as error:
            if not isinstance(error, Exception) or raised_by_handler(error):
                self._cache.pop(result._job, None)
                raise
            # What can't be arguments; ``get`` raises it, as in the stdlib.
            result._settle(False, error)
        return result

    # -- all at once -------------------------------------------------------------------------

    def map(
        self, func: Callable[[S], T], iterable: Iterable[S], chunksize: int | None = None, *, progress: bool = False
    ) -> list[T]:
        """The results of ``func`` for each item, in order.

        ``chunksize``: how many items make one task; by default as many as take some hundreds of microseconds.
        ``progress``: show a bar (tqdm) on standard error.
        """
        return self._map(func, iterable, chunksize, False, progress)

    def starmap(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        *,
        progress: bool = False,
    ) -> list[T]:
        """As ``map``, for items that are the arguments of a call each."""
        return self._map(func, iterable, chunksize, True, progress)

    def map_async(
        self,
        func: Callable[[S], T],
        iterable: Iterable[S],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[T]:
        """As ``map``, without waiting."""
        return self._map_async(func, iterable, False, chunksize, callback, error_callback)

    def starmap_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[T]:
        """As ``starmap``, without waiting."""
        return self._map_async(func, iterable, True, chunksize, callback, error_callback)

    def _map(
        self, func: Callable[..., T], iterable: Iterable[Any], chunksize: int | None, star: bool, progress: bool
    ) -> list[T]:
        self._running()
        if not _progress.wanted(progress):
            return self._wait_for(self._new_map(func, iterable, star, chunksize), iterable)
        bar = _progress.new_bar(iterable)
        try:
            return self._wait_for(self._new_map(func, iterable, star, chunksize, progress=bar.update), iterable)
        finally:
            bar.close()

    def _wait_for(self, result: MapResult[T], iterable: Iterable[Any]) -> list[T]:
        try:
            result._enter()
            result._begin_here(iterable)
            return result.get()
        except BaseException as error:
            # Ctrl-C, most likely: nobody has the result any more. Where it is there, this does nothing. The first call
            # is one in C, since another handler may raise in those in Python: the pool's end doesn't wait for it.
            if self._cache.pop(result._job, None) is not None:
                result._finish(self, False, error)  # type: ignore[arg-type]
            raise

    def _map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        star: bool,
        chunksize: int | None,
        callback: Callable[[list[Any]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> MapResult[Any]:
        self._running()
        result = self._new_map(func, iterable, star, chunksize, callback, error_callback)
        try:
            result._enter()
            result._begin(iterable)
        except BaseException as error:
            if self._cache.pop(result._job, None) is not None:
                result._finish(self, False, error)  # type: ignore[arg-type]
            raise
        return result

    def _new_map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        star: bool,
        chunksize: int | None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> MapResult[Any]:
        _check_chunksize(chunksize)
        return MapResult(self, func, iterable, chunksize, star, callback, error_callback, progress)  # type: ignore[arg-type]

    # -- one by one --------------------------------------------------------------------------

    def imap(
        self, func: Callable[[S], T], iterable: Iterable[S], chunksize: int | None = 1, *, progress: bool = False
    ) -> IMapIterator[T]:
        """An iterator over the results of ``func`` for each item, in order.

        The input is read as results are taken, a bounded number ahead. ``chunksize``: how many items make one
        task; None lets their time decide. ``progress``: show a bar (tqdm) on standard error.
        """
        return self._imap(IMapIterator, func, iterable, chunksize, progress)

    def imap_unordered(
        self, func: Callable[[S], T], iterable: Iterable[S], chunksize: int | None = 1, *, progress: bool = False
    ) -> IMapIterator[T]:
        """As ``imap``, with results in the order in which they come."""
        return self._imap(IMapUnorderedIterator, func, iterable, chunksize, progress)

    def _imap(
        self,
        kind: type[IMapIterator[T]],
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None,
        progress: bool,
    ) -> IMapIterator[T]:
        self._running()
        _check_chunksize(chunksize)
        advance = _progress.advancer(_progress.new_bar(iterable)) if _progress.wanted(progress) else None
        stream = Stream(self, func, iterable, chunksize, kind is IMapIterator)  # type: ignore[arg-type]
        iterator = kind(stream, advance)
        try:
            stream.begin(iterable)
        except BaseException as error:
            self._cache.pop(stream._job, None)
            stream._drop(error)
            raise
        return iterator

    def stats(self) -> list[WorkerStats]:
        """What each worker is doing, and has done; nothing is known of those of another executor."""
        host = self._host
        return host.stats() if host is not None else []

    # -- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more tasks. The workers end when all is done."""
        util.debug("closing pool")
        if self._state == RUN:
            self._state = CLOSE
        self._one_less()

    def terminate(self) -> None:
        """End the workers at once. What was not finished fails; the callbacks are not called."""
        util.debug("terminating pool")
        self._state = TERMINATE
        if self._host is not None:
            # Ctrl-C may end the wait for the workers' end, but not prevent it.
            with handlers_put_off():
                _stop(self._host, self._cache)
            self._terminate()

    def join(self) -> None:
        """Wait until all is done and the workers have ended, after ``close`` or ``terminate``."""
        util.debug("joining pool")
        if self._state == RUN:
            raise ValueError("Pool is still running")
        if self._state not in (CLOSE, TERMINATE):
            raise ValueError("In unknown state")
        # Should a signal's handler have interrupted who was to say so.
        self._one_less()
        # Their results may be taken later, by whoever waits here.
        for result in list(self._cache.values()):
            if isinstance(result, Stream):
                result.unbind()
        host = self._host
        if isinstance(host, OwnWorkers):
            host.join()
        elif host is not None:
            for result in list(self._cache.values()):
                result.await_end()
            host.join()

    def __enter__(self) -> Self:
        self._check_running()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        self.terminate()

    def _check_running(self) -> None:
        self._running()

    def _running(self) -> OwnWorkers | ForeignWorkers:
        host = self._host
        if self._state != RUN or host is None:
            raise ValueError("Pool not running")
        return host

    def _one_less(self) -> None:
        """Close the workers' input, once nothing can follow."""
        if self._state == CLOSE and not self._cache and self._host is not None:
            self._host.close()

    def _workers(self) -> list[Any]:
        return self._host.workers() if self._host is not None else []

    def _repopulate_pool(self) -> None:
        """Nothing to do: a worker that ends is replaced at once."""


# Contexts import it from here; it shows the name by which users do.
Pool.__module__ = "mp_ipcchan"


def _check_chunksize(chunksize: int | None) -> None:
    if chunksize is not None and chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize!r}")


def _stop(host: OwnWorkers | ForeignWorkers, results: dict[int, Any]) -> None:
    for result in list(results.values()):
        result._drop(BrokenProcessPool("the pool was terminated"))
    host.stop()


def _terminate(host: OwnWorkers | ForeignWorkers, results: dict[int, Any]) -> None:
    _stop(host, results)
    host.terminate()
