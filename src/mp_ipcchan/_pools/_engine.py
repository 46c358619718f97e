"""The engine of a pool: workers, and one thread that hears from them.

Who submits a task gives it to an idle worker at once, in the same thread; what finds none waits in the
schedule (``_schedule``, which decides everything about who gets what) until a worker answers. The
thread (``_hearing``) waits for outcomes, deaths and deadlines, completes futures, and replaces workers.
"""

from __future__ import annotations

import operator
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, Final

from .._interrupt import handlers_put_off
from .._reach import make_opaque
from . import _outcome, _resident
from ._commons import Commons
from ._hearing import Hearing
from ._map import Mappings
from ._schedule import Schedule
from ._stats import WorkerStats
from ._task import Task
from ._worker import Setup


class Engine(Hearing):
    """``size`` workers at most, started as they are needed. ``close`` and ``join`` must follow."""

    def __init__(
        self,
        context: Any,
        size: int,
        *,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks: int | None = None,
        max_memory: int | None = None,
        remote_traceback: Callable[[Any], BaseException],
        unsendable: _outcome.Unsendable | None = None,
        finishes: bool = True,
        kind: str = "Process",
    ) -> None:
        initial = (initializer, initargs) if initializer is not None else None
        super().__init__(context, size, Setup(initial, max_memory), max_tasks, remote_traceback, unsendable)
        #: Whether tasks are done, or else dropped, when the interpreter ends.
        self.finishes = finishes
        self._kind = kind
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self.mappings = Mappings()

    # -- for those who submit ----------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Run ``task`` some time. ``BrokenProcessPool``, or ``RuntimeError`` after ``close`` or in a forked child.

        Where a signal's handler raises in here, it may be run or not; all others are run.
        """
        task.engine = self
        task.future._task = task
        if task.timeout is not None:
            self._timed = True
        if self._closing or self._broken:
            self.check()
        try:
            self._schedule.pending.append(task)
            # The usual case where many are submitted, without the lock: whoever takes ``_saturated`` back looks at what
            # waits after that, and this looks at ``_saturated`` after it is among those. A forked child has no workers.
            if self._saturated and len(self.workers) == self._size:
                return
            with self._lock:
                self._hand_out(task)
        except BaseException:
            # The thread goes on where this was interrupted. Without a call: another handler may raise in that.
            self._interrupted = True
            self._notify()
            raise

    def _hand_out(self, task: Task) -> None:
        """Give what waits, ``task`` last, to workers that have nothing to do; start another, if there may be one."""
        pending = self._schedule.pending
        try:
            self.check()
            if self._thread is None:
                self._open()
            # Those that are busy are given more by the thread, several at a time.
            self._dispatch(refill=False)
            if task.timeout is not None or self._setup.max_memory is not None:
                # The thread has to watch it.
                self._notify()
            if pending and not self._torn:
                self._start_for(task)
        except BaseException:
            if task in pending:
                pending.remove(task)
            raise

    def start(self) -> None:
        """Start all the workers now, not when there are tasks for them."""
        with self._lock:
            self.check()
            if self._thread is None:
                self._open(self._size)

    @property
    def window(self) -> int:
        """How many tasks a worker may have at a time, as long as they are now."""
        return self._schedule.window

    def processes(self) -> list[BaseProcess]:
        """The workers' processes."""
        return [worker.process for worker in list(self.workers.values())]

    @property
    def usable(self) -> bool:
        """Whether it takes tasks."""
        return not self._broken and not self._closing and self._pid == os.getpid()

    def check(self) -> None:
        """Raise what ``submit`` would raise."""
        if self._broken:
            raise BrokenProcessPool(self._broken)
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._pid != os.getpid():
            raise RuntimeError(f"this pool belongs to process {self._pid}: a forked child makes one of its own")

    def abandon(self, task: Task) -> None:
        """``task`` was cancelled: if a worker has it, don't let it begin it, or stop it. What waits is never given."""
        self._schedule.any_dropped = True
        self._abandoned.append(task)
        self._notify()

    def close(self, cancel: bool = False) -> None:
        """Take no more tasks. Those that wait are run, or with ``cancel`` cancelled; then the workers end.

        It takes no lock: a finaliser may call it.
        """
        self._cancelling |= cancel
        self._closing = True
        self._notify()

    def kill(
        self,
        kill: Callable[[Any], None],
        reason: str = "the workers were ended by terminate_workers or kill_workers",
    ) -> None:
        """End every worker by ``kill(process)``; what was not finished fails with ``BrokenProcessPool(reason)``."""
        self._closing = True
        self._break(reason)
        with self._lock:
            for worker in self.workers.values():
                kill(worker.process)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all is done and every worker has ended, after ``close``; False after ``timeout`` seconds."""
        # Should a signal's handler have interrupted whoever told it last.
        self._notify()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def stats(self) -> list[WorkerStats]:
        """What each worker is doing, those that are starting included."""
        with self._lock:
            found = self._describe()
        return [WorkerStats(*told, _resident.resident(told[0])) for told in found]

    def revive(self, text: str, pickled: bytes | None) -> BaseException:
        """The exception that a task raised, with the traceback of the worker as its cause."""
        return _outcome.revive(text, pickled, self._remote_traceback)

    def _open(self, workers: int = 0) -> None:
        """Begin, with so many workers already."""
        with handlers_put_off():
            try:
                self._commons = Commons(self._size)
                _engines.add(self)
                # Ahead of the thread: a process that has several is better not forked.
                for _ in range(workers):
                    self._start_worker()
                self._thread = threading.Thread(target=self._run, name="mp_ipcchan-pool", daemon=True)
                self._thread.start()
            except BaseException:
                # Should the thread run already, it sees that it is none of ours.
                self._thread = None
                self._abolish()
                raise

    def _abolish(self) -> None:
        """End all workers, and close what the engine owns."""
        workers, self.workers = list(self.workers.values()), {}
        for worker in workers:
            worker.kill()
            worker.join()
            worker.close()
        self._events.clear()
        self._torn = False
        self._release()

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():
                return
        try:
            self._serve()
        except BaseException as error:
            # Nobody who waits for a future may wait for ever.
            with self._lock:
                self._closing = True
                self._break(f"the pool's thread failed: {error!r}")
                self._abolish()
            self._fail_all()
            raise

    def _release(self) -> None:
        _engines.discard(self)
        super()._release()

    def disown(self) -> None:
        """In a forked child, which has neither the thread nor the workers: close all that is the parent's."""
        self._make_lock()
        self._torn = False
        self._thread = None
        workers = list(self.workers.values())
        self.workers = {}
        self._schedule = Schedule()
        if self._commons is not None:
            self._commons.disown()
        for worker in workers:
            worker.close()


# The receivers in it would move to a process that is started with a pool in reach.
make_opaque(Engine)

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _end() -> None:
    """The interpreter ends: what was submitted is done first, as the stdlib's executors do.

    Not after Ctrl-C: whoever pressed it, perhaps again now, doesn't want to wait for the tasks.
    """
    engines = list(_engines)
    try:
        if getattr(sys, "last_type", None) is KeyboardInterrupt:
            raise KeyboardInterrupt
        for engine in engines:
            if engine.finishes:
                engine.mappings.read_rest()
                engine.close()
            else:
                engine.kill(operator.methodcaller("kill"))
        for engine in engines:
            engine.join()
    except KeyboardInterrupt:
        for engine in engines:
            engine.kill(operator.methodcaller("kill"))
        for engine in engines:
            engine.join()


_register_end: Final[Callable[[Callable[[], None]], None]] = threading._register_atexit  # type: ignore[attr-defined]
_register_end(_end)


def _disown_all() -> None:
    for engine in list(_engines):
        engine.disown()
    _engines.clear()


os.register_at_fork(after_in_child=_disown_all)
