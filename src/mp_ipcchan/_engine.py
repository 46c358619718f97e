"""The engine of a pool: workers, and one thread that hears from them.

Who submits a task gives it to an idle worker at once, in the same thread; what finds none waits in the
schedule (``_schedule``, which decides everything about who gets what) until a worker answers. The
thread waits for outcomes, deaths and deadlines, completes futures, and replaces workers.

Locks: ``_lock`` is held for the schedule and the workers' records, never while anything of the
user's runs (decoding a result, a future's callbacks).
"""

from __future__ import annotations

import operator
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

from . import _call, _logs, _resident, _outcome
from ._commons import Commons
from ._deadline import remaining
from ._fd import Fd
from ._map import Mappings
from ._member import ENDING, OPEN, STARTING, Member
from ._message import Incoming
from ._schedule import TARGET, Lane, Schedule
from ._stats import WorkerStats
from ._task import Task, TaskTimeoutError, WorkerLostError
from ._worker import READY, Setup

#: How many workers in a row may fail to start, or in their initializer; then the pool is broken.
_MOST_FALSE_STARTS = 4
#: One that somebody killed while it started counts so much less.
_KILLED_COUNTS = 1 / 64
#: A task that waits behind another for longer than this (seconds) is given to an idle worker instead.
_PATIENCE = 2 * TARGET
#: How often (seconds) the memory of workers is looked at, where it is limited. A look costs some 10 us; memory that is
#: written to for the first time grows by some 20 MB in the time.
_MEMORY_INTERVAL = 0.02
#: When to try again (seconds) where a worker could not be started, and others go on.
_START_AGAIN = 1.0


class Engine:
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
        remote_traceback: type[Exception],
    ) -> None:
        self._context = context
        self._size = size
        self._setup = Setup((initializer, initargs) if initializer is not None else None, max_memory)
        self._max_tasks = max_tasks
        self._remote_traceback = remote_traceback
        self._schedule: Schedule[Task] = Schedule(operator.attrgetter("size"), _is_cancelled)
        self.workers: dict[int, Member] = {}
        self._next_key = 0
        self._lock = threading.RLock()
        #: All workers have as many tasks as they may: no use in asking the schedule until one answers.
        self._saturated = False
        self._false_starts = 0.0
        #: Not before this (monotonic seconds) is another worker to be started.
        self._start_at = 0.0
        self._closing = False
        #: Set once nothing can be run any more, to what every task fails with.
        self._broken: str | None = None
        #: Whether any task ever had a deadline.
        self._timed = False
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self.mappings = Mappings()
        self._commons: Commons | None = None
        #: The kernel's count of what it killed for want of memory, as last seen.
        self._out_of_memory = _resident.OutOfMemoryKills()
        #: What a readable descriptor tells: a worker, and whether it is its death.
        self._events: dict[int, tuple[int, bool]] = {}
        #: Tasks that could not be sent, and why; the thread fails them.
        self._unsendable: list[tuple[Task, BaseException]] = []

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
            if pending and len(self.workers) < self._size and time.monotonic() >= self._start_at:
                try:
                    self._start_worker()
                except Exception:
                    if self.workers or not pending or pending[-1] is not task:
                        self._start_at = time.monotonic() + _START_AGAIN
                        return
                    pending.pop()
                    raise

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
            for key, lane in self._schedule.lanes.items():
                if task in lane.given:
                    self._stop(key, task, _always(TaskTimeoutError("cancelled")))
                    self._notify()
                    return
            if self._closing:
                # It may be the last that the end has waited for.
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

    def kill(self, kill: Callable[[Any], None]) -> None:
        """End every worker by ``kill(process)``; what was not finished fails with ``BrokenProcessPool``."""
        with self._lock:
            self._closing = True
            tasks = self._break("the workers were ended by terminate_workers or kill_workers")
            for worker in self.workers.values():
                kill(worker.process)
        self._fail_broken(tasks)

    def join(self) -> None:
        """Wait until all is done and every worker has ended, after ``close``."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def stats(self) -> list[WorkerStats]:
        """What each worker is doing, those that are starting included."""
        with self._lock:
            found = []
            for key, worker in self.workers.items():
                lane = self._schedule.lanes.get(key)
                if worker.state == STARTING:
                    state = "starting"
                elif lane is not None and lane.given:
                    state = "busy"
                else:
                    state = "ending" if worker.state == ENDING else "idle"
                found.append((worker, state, lane.answered if lane else 0, worker.busy_seconds()))
        return [
            WorkerStats(worker.pid, state, done, busy, _resident.resident(worker.pid))
            for worker, state, done, busy in found
        ]

    def revive(self, text: str, pickled: bytes | None) -> BaseException:
        """The exception that a task raised, with the traceback of the worker as its cause."""
        return _outcome.revive(text, pickled, self._remote_traceback)

    def _open(self) -> None:
        self._commons = Commons(self._size)
        self._thread = threading.Thread(target=self._run, name="mp_ipcchan-pool", daemon=True)
        _engines.add(self)
        try:
            self._thread.start()
        except BaseException:
            self._thread = None
            self._release()
            raise

    def _notify(self) -> None:
        if self._commons is not None:
            self._commons.notify()

    # -- workers, with the lock held ---------------------------------------------------------

    def _start_worker(self) -> None:
        commons = self._commons
        assert commons is not None
        slot = commons.free_slots[-1]
        levels = _logs.levels()
        # Duplicates: a forked child closes what is the pool's own.
        with Fd(commons.cells_fd) as cells, commons.lifeline.end() as lifeline, commons.logs_sender.clone() as logs:
            shared = (cells, self._size, lifeline, logs, levels, self._setup)
            worker = Member.start(self._context, commons.cells, slot, *shared)
        worker.levels = levels
        commons.free_slots.pop()
        key, self._next_key = self._next_key, self._next_key + 1
        self.workers[key] = worker
        for fd, died in ((worker.results_fd, False), (worker.pidfd, True)):
            self._events[fd] = (key, died)
            commons.epoll.register(fd, select.EPOLLIN)

    def _try_to_start(self) -> list[Task]:
        """Start a worker; the tasks that fail because none can be."""
        try:
            self._start_worker()
        except Exception as error:
            self._start_at = time.monotonic() + _START_AGAIN
            if not self.workers:
                return self._break(f"no worker can be started: {type(error).__name__}: {error}")
        return []

    def _dispatch(self, refill: bool = True) -> None:
        pending = self._schedule.pending
        while True:
            given = self._schedule.assign(refill)
            again = False
            for key, tasks in given:
                again |= self._give(key, tasks)
            if again:
                continue
            self._saturated = bool(pending)
            if self._saturated or not pending:
                return

    def _give(self, key: int, tasks: list[Task]) -> bool:
        """Send a worker what it was assigned; whether some of it has to be assigned anew."""
        worker, lane = self.workers[key], self._schedule.lanes[key]
        if len(lane.given) == len(tasks):
            worker.head_since = time.monotonic()
        levels = _logs.levels()
        if worker.levels is not levels:
            worker.levels = levels
            self._schedule.insert(key, len(tasks))
            worker.tell(_call.encode_call(_logs.set_levels, (levels,), {}))
        for task in tasks:
            task.future._begin()
        sent, error = worker.send(tasks)
        if error is not None:
            refused, *rest = self._schedule.retract(key, len(tasks) - sent)
            self._schedule.pending.extendleft(task for task in reversed(rest) if task is not None)
            assert refused is not None
            self._unsendable.append((refused, error))
            self._notify()
        if lane.room == 0:
            # Its last ones: it ends by itself after them.
            worker.tell(_call.END_FRAME)
            worker.tasks.close()
        return error is not None

    def _break(self, reason: str) -> list[Task]:
        """Nothing can be run any more; the tasks that this concerns, which the caller lets fail without the lock."""
        self._broken = reason
        self._saturated = False
        tasks = list(self._schedule.pending)
        self._schedule.pending.clear()
        for lane in self._schedule.lanes.values():
            tasks += [task for task in lane.given if task is not None]
            lane.given.clear()
        self._notify()
        return tasks

    def _recall(self, key: int, first: int) -> int:
        """Take back what a worker has not begun, from number ``first`` on; how many are with it that stay."""
        lane = self._schedule.lanes[key]
        first = self.workers[key].recall(lane.answered, first, lane.answered + len(lane.given))
        self._schedule.take_back(key, first)
        self._saturated = False
        return first

    def _stop(self, key: int, task: Task, fault: Callable[[Member], BaseException]) -> None:
        """End the worker if it runs ``task``, and no other: what it has behind that is taken back before."""
        worker, lane = self.workers[key], self._schedule.lanes[key]
        if worker.fault is None:
            staying = self._recall(key, lane.answered)
            if task in lane.given and lane.answered + lane.given.index(task) == staying - 1:
                worker.fault = fault(worker)
                worker.kill()
            self._dispatch()

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

    def _heads(self) -> Iterator[tuple[int, Task]]:
        """Workers that have something to do, and the task that each runs or is about to."""
        for key, lane in self._schedule.lanes.items():
            head = lane.given[0] if lane.given else None
            if head is not None:
                yield key, head

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
            if task is not None and not _outcome.settle(task, outcome, self._remote_traceback)
        ]
        if again:
            with self._lock:
                self._schedule.pending.extendleft(reversed(again))
                self._dispatch()

    def _hear_logs(self) -> None:
        commons = self._commons
        assert commons is not None
        found: deque[Incoming] = deque()
        try:
            commons.logs._open_link().inlet.take_what_is_there(found, _MOST_RECORDS)
        except OSError:
            # Not from us, or it carries descriptors that there is no room for.
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
            worker = self.workers.pop(key)
            started, initializing = worker.started, worker.initializing
            exitcode = worker.join()
            for fd in (worker.results_fd, worker.pidfd):
                self._ignore(fd)
            worker.close()
            commons = self._commons
            assert commons is not None
            commons.free_slots.append(worker.slot)
            lane = self._schedule.lanes.get(key)
            broken: list[Task] = []
            failed: list[tuple[Task, BaseException]] = []
            if lane is not None:
                failed = self._settle_lost(worker, lane, started, exitcode)
                self._schedule.close(key)
            elif not self._broken:
                self._false_starts += 1 if initializing or (exitcode or 0) >= 0 else _KILLED_COUNTS
                if self._false_starts >= _MOST_FALSE_STARTS:
                    broken = self._break(
                        f"{_MOST_FALSE_STARTS} workers in a row ended before they were ready, exit code {exitcode}"
                    )
            self._saturated = False
            self._dispatch()
            if not self._broken and (not self._closing or not self._schedule.idle):
                broken += self._try_to_start()
        _outcome.fail(failed)
        self._fail_broken(broken)

    def _settle_lost(
        self, worker: Member, lane: Lane[Task], started: int, exitcode: int | None
    ) -> list[tuple[Task, BaseException]]:
        """What a dead worker had: those it had not begun wait again; the one that ran fails, or is tried again."""
        failed: list[tuple[Task, BaseException]] = []
        again: list[Task] = []
        hint = _OUT_OF_MEMORY if exitcode == -signal.SIGKILL and self._out_of_memory.grew() else ""
        for number, task in enumerate(lane.given, lane.answered):
            if task is None or task.future.cancelled():
                continue
            ran = number < started
            if task.repeatable and (not ran or (task.retries > 0 and worker.fault is None)):
                task.retries -= ran
                again.append(task)
            else:
                fault = worker.fault or WorkerLostError(worker.pid, exitcode, task.name, hint)
                failed.append((task, fault))
        self._schedule.pending.extendleft(reversed(again))
        return failed

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

    def _ignore(self, fd: int) -> None:
        """Wait for ``fd`` no more."""
        assert self._commons is not None
        if self._events.pop(fd, None):
            self._commons.epoll.unregister(fd)

    def _look_after(self) -> float | None:
        """Stop what takes too long or too much, and let no task wait behind a long one while a worker is idle.

        How long until there is something to look after again (seconds); None where only an event can bring it.
        """
        at: list[float] = []
        if self._timed:
            for key, head in list(self._heads()):
                if head.timeout is not None and self.workers[key].fault is None:
                    deadline = self.workers[key].head_since + head.timeout
                    if time.monotonic() < deadline:
                        at.append(deadline)
                    else:
                        error = TaskTimeoutError(f"{head.name} took longer than {head.timeout} seconds")
                        self._stop(key, head, _always(error))
        if self._setup.max_memory is not None and next(self._heads(), None):
            self._limit_memory(self._setup.max_memory)
            at.append(time.monotonic() + _MEMORY_INTERVAL)
        lane_behind = self._schedule.waiting_elsewhere()
        if lane_behind is not None:
            taken_at = self.workers[lane_behind.key].head_since + _PATIENCE
            if time.monotonic() < taken_at:
                at.append(taken_at)
            else:
                self._recall(lane_behind.key, lane_behind.answered + 1)
                self._dispatch()
        if self._schedule.pending and len(self.workers) < self._size and self._start_at:
            if time.monotonic() < self._start_at:
                at.append(self._start_at)
            else:
                self._unsendable += self._broken_tasks(self._try_to_start())
        return remaining(min(at)) if at else None

    def _limit_memory(self, limit: int) -> None:
        for key, _ in list(self._heads()):
            worker, lane = self.workers[key], self._schedule.lanes[key]
            started = worker.started
            size = _resident.resident(worker.pid)
            position = started - 1 - lane.answered
            if size > limit and 0 <= position < len(lane.given):
                task = lane.given[position]
                # Looked at before and after: it is this one's, a worker begins none while it has more than the limit.
                if task is not None and worker.started == started:
                    self._stop(key, task, _too_much_memory(task, size, limit))

    def _broken_tasks(self, tasks: list[Task]) -> list[tuple[Task, BaseException]]:
        return [(task, BrokenProcessPool(self._broken)) for task in tasks]

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
_OUT_OF_MEMORY: Final = "by the kernel, for want of memory: the control group's count of such kills went up"


def _always(error: BaseException) -> Callable[[Member], BaseException]:
    return lambda _: error


def _too_much_memory(task: Task, size: int, limit: int) -> Callable[[Member], BaseException]:
    hint = f"it had {_resident.readable(size)}, more than max_memory_per_child={_resident.readable(limit)}"
    return lambda worker: WorkerLostError(worker.pid, -signal.SIGKILL, task.name, hint)


def _is_cancelled(task: Task) -> bool:
    return task.future.cancelled()


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
            engine.mappings.read_rest()
            engine.close()
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
