"""Where the tasks of a pool run: in workers of its own, or on an executor that somebody else made."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from multiprocessing import pool as stdlib
from multiprocessing.process import BaseProcess
from typing import Any

from .._interrupt import raised_by_handler
from . import _call, _outcome
from ._engine import Engine
from ._executor import ProcessPoolExecutor, _Submits
from ._foreign import Bound, Initializer, Serial, from_bytes, run_encoded, run_here, to_bytes
from ._stats import WorkerStats
from ._task import Task
from ._ticket import Ticket

# typeshed doesn't have them.
_RemoteTraceback: Any = stdlib.RemoteTraceback  # type: ignore[attr-defined]
_MaybeEncodingError: Any = stdlib.MaybeEncodingError  # type: ignore[attr-defined]

Settle = Callable[[bool, Any], None]

#: How long (seconds) a worker that was sent SIGTERM may take to end.
_GRACE = 2.0
#: How many functions are kept with their initializer.
_MOST_BOUND = 64
_TERMINATED = "the pool was terminated"


def remote_traceback(text: str) -> BaseException:
    """What an exception of a task has as its cause."""
    cause: BaseException = _RemoteTraceback(f'\n"""\n{text}"""')
    return cause


def unsendable(reason: BaseException, shown: str) -> BaseException:
    """What a task fails with whose result, which shows itself as ``shown``, can't be pickled."""
    error: BaseException = _MaybeEncodingError(reason, None)
    error.value = shown  # type: ignore[attr-defined]
    error.args = (repr(reason), shown)
    error.__cause__ = reason.__cause__
    return error


class OwnWorkers:
    """Workers of the pool's own, started at once."""

    #: So that a worker has the next while it does one.
    target = 0.0004

    def __init__(
        self,
        context: Any,
        processes: int,
        initializer: Callable[..., Any] | None,
        initargs: tuple[Any, ...],
        max_tasks: int | None,
        task_timeout: float | None,
        retries: int,
    ) -> None:
        self.processes = processes
        self.max_tasks = max_tasks
        self._timeout = task_timeout
        self._retries = retries
        self.single = task_timeout is not None or retries > 0
        self._stopped = False
        self.engine = Engine(
            context,
            processes,
            initializer=initializer,
            initargs=initargs,
            max_tasks=max_tasks,
            remote_traceback=remote_traceback,
            unsendable=unsendable,
            finishes=False,
            kind="PoolWorker",
        )
        self.revive = self.engine.revive
        self.portable = _call.portable
        try:
            self.engine.start()
        except BaseException:
            self.terminate()
            raise

    def submit(self, function: Callable[..., Any], args: Sequence[Any], options: Any, settle: Settle) -> None:
        ticket = Ticket(settle)
        try:
            self.engine.submit(Task(function, args, options, self._timeout, self._retries, ticket))
        except Exception as error:
            if raised_by_handler(error):
                raise
            # It can't be pickled, or the pool is broken or at its end.
            ticket.set_exception(error)

    def window(self) -> int:
        return self.engine.window

    def stats(self) -> list[WorkerStats]:
        return self.engine.stats()

    def workers(self) -> list[BaseProcess]:
        return self.engine.processes()

    def close(self) -> None:
        self.engine.close()

    def join(self) -> None:
        self.engine.join()

    def stop(self) -> None:
        """Tell the workers to end, once: SIGTERM."""
        if not self._stopped:
            self._stopped = True
            self.engine.kill(BaseProcess.terminate, _TERMINATED)

    def terminate(self) -> None:
        """End the workers: SIGTERM, and SIGKILL for those that don't heed it."""
        self.stop()
        if not self.engine.join(_GRACE):
            self.engine.kill(BaseProcess.kill, _TERMINATED)
            self.engine.join()


class ForeignWorkers:
    """The workers of any executor. It belongs to whoever made it, and goes on after the pool.

    Calls go there as bytes and come back as bytes, so that what can be pickled, what an exception has with it and how
    results that can't be sent fail doesn't depend on whose executor it is. To threads, and to executors of ours, which
    do as much themselves, calls go as they are.
    """

    max_tasks = None

    def __init__(
        self,
        executor: Executor,
        processes: int | None,
        initializer: Callable[..., Any] | None,
        initargs: tuple[Any, ...],
        task_timeout: float | None,
        retries: int,
        close: Callable[[], object] | None = None,
    ) -> None:
        self.processes = processes or workers_of(executor)
        self.single = task_timeout is not None or retries > 0
        self._direct = isinstance(executor, (ThreadPoolExecutor, ProcessPoolExecutor))
        if self.single:
            if not isinstance(executor, ProcessPoolExecutor):
                raise ValueError(
                    f"task_timeout and retries need workers that can be stopped; {type(executor).__name__}'s can't: "
                    "leave them out, or use mp_ipcchan.ProcessPoolExecutor"
                )
            executor = executor.options(timeout=task_timeout, retries=retries)
        #: Work (seconds) that makes the way to strangers worth it.
        self.target = 0.002 if self._direct else 0.02
        self._executor = executor
        self._initializer: Initializer | None = None
        #: The initializer goes with each function, once for all.
        self._binds: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self._bound: dict[Callable[..., Any], Bound] = {}
        if initializer is not None:
            if self._direct or getattr(initializer, "__module__", None) != "__main__":
                self._initializer = Initializer(initializer, initargs)
            else:
                self._binds = initializer, initargs
        self._serial = Serial()
        self._close = close
        #: Those that have not ended.
        self._futures: set[Future[Any]] = set()

    def portable(self, function: Callable[..., Any]) -> Any:
        # What goes as bytes goes by value where it must.
        return function

    def revive(self, text: str, pickled: bytes | None) -> BaseException:
        return _outcome.revive(text, pickled, remote_traceback)

    def submit(self, function: Callable[..., Any], args: Sequence[Any], options: Any, settle: Settle) -> None:
        try:
            if not self._direct:
                if self._binds is not None:
                    function, args = self._bind(function, args)
                payload = to_bytes((function, args, options), by_value=True)
                future = self._executor.submit(run_encoded, payload, self._serial.next(), self._initializer)
            elif self._initializer is not None:
                future = self._executor.submit(run_here, self._initializer, function, args, options)
            else:
                future = self._executor.submit(function, *args, **options)
        except Exception as error:
            if raised_by_handler(error):
                raise
            settle(False, error)
            return
        self._futures.add(future)
        future.add_done_callback(lambda done: self._hear(done, settle))

    def _bind(self, function: Callable[..., Any], args: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
        if _call.is_runner(function):
            return function, (self._bind(args[0], ())[0], *args[1:])
        assert self._binds is not None
        bound = self._bound.get(function)
        if bound is None:
            if len(self._bound) >= _MOST_BOUND:
                self._bound.clear()
            bound = self._bound[function] = Bound(*self._binds, function)
        return bound, args

    def _hear(self, future: Future[Any], settle: Settle) -> None:
        try:
            try:
                outcome = future.result()
                succeeded = True
                if not self._direct:
                    succeeded, outcome = from_bytes(outcome, remote_traceback, unsendable)
            except BaseException as error:
                succeeded, outcome = False, error
            settle(succeeded, outcome)
        finally:
            self._futures.discard(future)

    def window(self) -> int:
        return 2

    def stats(self) -> list[WorkerStats]:
        """Of workers of ours; nothing is known of others'."""
        executor = self._executor
        return executor.stats() if isinstance(executor, _Submits) else []

    def workers(self) -> list[BaseProcess]:
        return []

    def close(self) -> None:
        """Nothing more will be submitted. The executor isn't ours to close."""

    def join(self) -> None:
        """Wait for what was submitted."""
        # For their end, not until they are taken out: a signal's handler may have prevented that.
        wait(list(self._futures))
        self._leave()

    def stop(self) -> None:
        """Cancel what hasn't begun; what runs somewhere can't be stopped, unless the executor can."""
        for future in list(self._futures):
            future.cancel()

    def terminate(self) -> None:
        """As ``stop``, and have done with the executor."""
        self.stop()
        self._leave()

    def _leave(self) -> None:
        close, self._close = self._close, None
        if close is not None:
            close()


def workers_of(executor: Executor) -> int:
    """How many workers ``executor`` has, as far as it tells."""
    known = getattr(executor, "_max_workers", None)
    if isinstance(known, int):
        return known
    client: Any = getattr(executor, "_client", None)
    if hasattr(client, "ncores"):
        # Dask: threads of all its workers.
        return sum(client.ncores().values()) or 1
    return os.cpu_count() or 1
