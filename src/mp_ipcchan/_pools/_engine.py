"""The engine of a pool: workers, and one thread that hears from them.

Who submits a task gives it to an idle worker at once, in the same thread; what finds none waits in the
schedule (``_schedule``, which decides everything about who gets what) until a worker answers. The
thread waits for outcomes, deaths and deadlines, completes futures, and replaces workers.

Locks: ``_lock`` is held for everything of ``_crew``, never while anything of the user's runs (decoding a
result, a future's callbacks).
"""

from __future__ import annotations

import operator
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, Final

from .._inlet import NoRoom
from .._message import Incoming
from .._reach import make_opaque
from . import _call, _logs, _outcome, _resident
from ._commons import Commons
from ._crew import Crew
from ._map import Mappings
from ._member import ENDING, OPEN, STARTING, Member
from ._schedule import Schedule
from ._stats import WorkerStats
from ._task import Task
from ._worker import READY, Setup


class Engine(Crew):
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
    ) -> None:
        initial = (initializer, initargs) if initializer is not None else None
        super().__init__(context, size, Setup(initial, max_memory), max_tasks)
        self._remote_traceback = remote_traceback
        self._unsendable_result = unsendable
        #: Whether tasks are done, or else dropped, when the interpreter ends.
        self.finishes = finishes
        self._lock = threading.RLock()
        #: No more tasks are taken.
        self._closing = False
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self.mappings = Mappings()

    # -- for those who submit ----------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Run ``task`` some time. ``BrokenProcessPool``, or ``RuntimeError`` after ``close`` or in a forked child."""
        future = task.future
        future._task, future._abandon = task, self._abandon
        if task.timeout is not None:
            self._timed = True
        self.check()
        pending = self._schedule.pending
        if self._saturated and len(self.workers) == self._size:
            # The usual case where many are submitted, without the lock: whoever takes ``_saturated`` back looks at what
            # waits after that, and this looks at ``_saturated`` after it is among those.
            pending.append(task)
            if self._saturated:
                return
            waits = True
        else:
            waits = False
        with self._lock:
            try:
                self.check()
                if self._thread is None:
                    self._open()
            except BaseException:
                if waits and task in pending:
                    pending.remove(task)
                raise
            if not waits:
                pending.append(task)
            # Those that are busy are given more by the thread, several at a time.
            self._dispatch(refill=False)
            if task.timeout is not None or self._setup.max_memory is not None:
                # The thread has to watch it.
                self._notify()
            if pending:
                self._start_for(task)

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

    def _abandon(self, task: Task) -> None:
        """``task`` was cancelled: if a worker has it, don't let it begin it, or stop it. What waits is never given."""
        with self._lock:
            if self._drop(task) or self._closing:
                # There is something to hand out, or it may be the last that the end has waited for.
                self._notify()

    def close(self, cancel: bool = False) -> None:
        """Take no more tasks. Those that wait are run, or with ``cancel`` cancelled; then the workers end.

        Without ``cancel`` it takes no lock: a finaliser may call it.
        """
        dropped: list[Task] = []
        self._closing = True
        if cancel:
            with self._lock:
                dropped.extend(self._schedule.pending)
                self._schedule.pending.clear()
        self._notify()
        for task in dropped:
            task.future.cancel()

    def kill(
        self,
        kill: Callable[[Any], None],
        reason: str = "the workers were ended by terminate_workers or kill_workers",
    ) -> None:
        """End every worker by ``kill(process)``; what was not finished fails with ``BrokenProcessPool(reason)``."""
        with self._lock:
            self._closing = True
            tasks = self._break(reason)
            for worker in self.workers.values():
                kill(worker.process)
        self._fail_broken(tasks)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all is done and every worker has ended, after ``close``; False after ``timeout`` seconds."""
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
        self._commons = Commons(self._size)
        self._thread = threading.Thread(target=self._run, name="mp_ipcchan-pool", daemon=True)
        _engines.add(self)
        try:
            # Ahead of the thread: a process that has several is better not forked.
            for _ in range(workers):
                self._start_worker()
            self._thread.start()
        except BaseException:
            self._thread = None
            for worker in self.workers.values():
                worker.kill()
                worker.join()
                worker.close()
            self.workers.clear()
            self._events.clear()
            self._release()
            raise

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            # Nobody who waits for a future may wait for ever.
            with self._lock:
                self._closing = True
                tasks = self._break(f"the pool's thread failed: {error!r}")
                workers, self.workers = list(self.workers.values()), {}
                for worker in workers:
                    worker.kill()
                    worker.join()
                    worker.close()
                self._release()
            self._fail_broken(tasks)
            raise

    def _serve(self) -> None:
        commons = self._commons
        assert commons is not None
        while True:
            failed: list[tuple[Task, BaseException]] = []
            with self._lock:
                patience = self._look_after()
                failed, self._unsendable = self._unsendable, failed
                finished = self._finished()
            _outcome.fail(failed)
            if finished:
                self._release()
                return
            commons.falls_asleep()
            if any(worker.has_more for worker in list(self.workers.values())):
                patience = 0
            events = commons.epoll.poll(patience)
            commons.is_awake()
            deaths: list[int] = []
            readable: set[int] = set()
            for fd, _ in events:
                if fd == commons.wake:
                    os.eventfd_read(fd)
                    continue
                if fd == commons.logs_fd:
                    self._hear_logs()
                    continue
                key, died = self._events.get(fd, (-1, False))
                if died:
                    deaths.append(key)
                elif key >= 0:
                    readable.add(key)
            for key, worker in list(self.workers.items()):
                if key in readable or worker.has_more:
                    self._hear(key, key in readable)
            for key in deaths:
                self._bury(key)

    def _hear(self, key: int, readable: bool = True) -> None:
        """Take the outcomes that a worker has sent. ``readable``: whether its channel is."""
        worker = self.workers[key]
        incoming, ended = worker.receive(readable)
        if ended:
            self._ignore(worker.results_fd)
        if incoming and worker.state == STARTING:
            self._begin(key, worker, incoming.popleft())
        if not incoming:
            return
        with self._lock:
            if self._broken:
                return
            tasks = [self._schedule.answer(key) for _ in incoming]
            worker.head_since = time.monotonic()
            self._schedule.measure(len(tasks), worker.newly_busy())
            self._saturated = False
            self._dispatch()
        if worker.has_logged():
            # What a task has logged was sent before its outcome, and is handled before it.
            self._hear_logs()
        again = [
            task
            for task, outcome in zip(tasks, incoming, strict=True)
            if task is not None and not _outcome.settle(task, outcome, self._remote_traceback, self._unsendable_result)
        ]
        if again:
            with self._lock:
                self._schedule.pending.extendleft(reversed(again))
                self._dispatch()

    def _hear_logs(self) -> None:
        commons = self._commons
        assert commons is not None
        found: deque[Incoming] = deque()
        inlet = commons.logs._open_link().inlet
        try:
            inlet.take_what_is_there(found, _MOST_RECORDS)
        except NoRoom:
            inlet.drop_next()
        except OSError:
            # Not from us.
            pass
        for message in found:
            try:
                _logs.handle(_call.decode(message))
            except BaseException:
                # Handlers are the user's.
                _outcome.report("a log record of a worker could not be handled")

    def _begin(self, key: int, worker: Member, incoming: Incoming) -> None:
        """A worker's first words."""
        said = _call.decode(incoming)
        tasks: list[Task] = []
        with self._lock:
            if said == READY:
                worker.state = OPEN
                self._false_starts = 0.0
                self._schedule.open(key, self._max_tasks)
                self._dispatch()
            elif not self._broken:
                tasks = self._break(said[1])
        self._fail_broken(tasks)

    def _bury(self, key: int) -> None:
        """A worker has died: take what it has sent, settle its tasks, replace it."""
        self._hear_out(key)
        with self._lock:
            failed, broken = self._remove(key)
            if not self._broken and (not self._closing or not self._schedule.idle):
                broken += self._try_to_start()
        _outcome.fail(failed)
        self._fail_broken(broken)

    def _hear_out(self, key: int) -> None:
        """Everything that a dead worker has sent."""
        worker = self.workers[key]
        while True:
            before = worker.state, self._answered(key)
            self._hear(key)
            if (worker.state, self._answered(key)) == before:
                break
        self._hear_logs()

    def _answered(self, key: int) -> int:
        lane = self._schedule.lanes.get(key)
        return lane.answered if lane else -1

    def _fail_broken(self, tasks: list[Task]) -> None:
        """Let ``tasks``, which ``_break`` gave, fail; without the lock."""
        _outcome.fail(self._broken_tasks(tasks))

    def _finished(self) -> bool:
        """Whether everything is done; ends the workers when the tasks are."""
        if self._closing and (self._broken or self._schedule.idle):
            for worker in self.workers.values():
                if worker.state != ENDING and not worker.tasks.closed:
                    # Said, too: a process that was forked from this one may hold the channel open.
                    worker.tell(_call.END_FRAME)
                    worker.tasks.close()
                if worker.state == OPEN:
                    worker.state = ENDING
            return not self.workers
        return False

    def _release(self) -> None:
        """Close what the engine owns; once."""
        _engines.discard(self)
        if self._commons is not None:
            self._commons.close()

    def disown(self) -> None:
        """In a forked child, which has neither the thread nor the workers: close all that is the parent's."""
        self._lock = threading.RLock()
        self._thread = None
        workers = list(self.workers.values())
        self.workers = {}
        self._schedule = Schedule()
        if self._commons is not None:
            self._commons.disown()
        for worker in workers:
            worker.close()


#: The most log records handled before tasks have their turn.
_MOST_RECORDS = 256


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
