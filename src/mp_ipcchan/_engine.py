"""The engine of a pool: workers, and one thread that hears from them.

Who submits a task gives it to an idle worker at once, in the same thread; what finds none waits in the
schedule (``_schedule``, which decides everything about who gets what) until a worker answers. The
thread waits for outcomes, deaths and deadlines, completes futures, and replaces workers.

Locks: ``_lock`` is held for the schedule and the workers' records, never while anything of the
user's runs (decoding a result, a future's callbacks).
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

from . import _call, _segment
from ._channel import channel
from ._deadline import remaining
from ._fd import Fd
from ._inlet import EndOfStream
from ._message import Incoming
from ._schedule import TARGET, Schedule
from ._task import Task, TaskTimeoutError, WorkerLostError
from ._worker import BUSY, CELL_WORDS, INITIALIZING, READY, STARTED, TAKEN_FROM, TAKEN_TO, map_cells, work
from .errors import ProtocolError, SerializationError

#: How many workers in a row may fail to start, or in their initializer; then the pool is broken.
_MOST_FALSE_STARTS = 4
#: One that somebody killed while it started counts so much less.
_KILLED_COUNTS = 1 / 64
#: A task that waits behind another for longer than this (seconds) is given to an idle worker instead.
_PATIENCE = 2 * TARGET
#: The most outcomes taken from one worker before others have their turn.
_MOST_AT_ONCE = 512

STARTING, OPEN, CLOSING, GONE = range(4)


class _Worker:
    """The parent's record of a worker. Owns its channel ends and its pidfd."""

    __slots__ = ("busy", "fault", "head_since", "pidfd", "process", "results", "slot", "state", "tasks")

    def __init__(self, process: Any, pidfd: int, tasks: Any, results: Any, slot: int) -> None:
        self.process = process
        self.pidfd = pidfd
        self.tasks = tasks
        self.results = results
        self.slot = slot
        self.state = STARTING
        #: Since when (monotonic seconds) its first unanswered task has been that.
        self.head_since = 0.0
        #: Nanoseconds of work that it had reported when last looked at.
        self.busy = 0
        #: What the task that ran is to fail with, where we killed the worker for it.
        self.fault: BaseException | None = None

    def close(self) -> None:
        self.tasks.close()
        self.results.close()
        os.close(self.pidfd)


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
        remote_traceback: type[Exception],
    ) -> None:
        self._context = context
        self._size = size
        self._initializer = (initializer, initargs) if initializer is not None else None
        self._max_tasks = max_tasks
        self._remote_traceback = remote_traceback
        self._schedule: Schedule[Task] = Schedule()
        self.workers: dict[int, _Worker] = {}
        self._next_key = 0
        self._free_slots = list(range(size))
        self._lock = threading.RLock()
        #: All workers have as many tasks as they may: no use in asking the schedule until one answers.
        self._saturated = False
        self._false_starts = 0.0
        self._closing = False
        #: Set once nothing can be run any more, to what every task fails with.
        self._broken: str | None = None
        self._thread: threading.Thread | None = None
        self._cells = Fd._own(_segment.create_blank(size * CELL_WORDS * 8))
        self._words = map_cells(self._cells.fileno(), size)
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        #: What a readable descriptor tells: a worker, and whether it is its death.
        self._events: dict[int, tuple[int, bool]] = {}
        #: How many unfinished tasks have a deadline.
        self._timed = 0
        _engines.add(self)

    # -- for those who submit ----------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Run ``task`` some time. ``BrokenProcessPool``, or ``RuntimeError`` after ``close``."""
        task.future._task, task.future._abandon = task, self._abandon
        with self._lock:
            self.check()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mp_ipcchan-pool", daemon=True)
                self._thread.start()
            if task.timeout is not None:
                self._timed += 1
            self._schedule.pending.append(task)
            if not self._saturated:
                self._dispatch()
            if self._schedule.pending and len(self.workers) < self._size:
                self._start_worker()

    @property
    def usable(self) -> bool:
        """Whether it takes tasks."""
        return not self._broken and not self._closing

    def check(self) -> None:
        """Raise what ``submit`` would raise."""
        if self._broken:
            raise BrokenProcessPool(self._broken)
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _abandon(self, task: Task) -> None:
        """``task`` was cancelled: don't begin it, or stop it."""
        with self._lock:
            try:
                self._schedule.pending.remove(task)
                return
            except ValueError:
                pass
            for key, lane in self._schedule.lanes.items():
                if lane.given and lane.given[0] is task:
                    self._kill(self.workers[key])

    def close(self, cancel: bool = False) -> None:
        """Take no more tasks. Those that wait are run, or with ``cancel`` cancelled; then the workers end."""
        dropped: list[Task] = []
        with self._lock:
            self._closing = True
            if cancel:
                dropped.extend(self._schedule.pending)
                self._schedule.pending.clear()
            self._notify()
        for task in dropped:
            task.future.cancel()

    def kill(self, kill: Callable[[Any], None]) -> None:
        """End every worker by ``kill(process)``; what was not finished fails with ``BrokenProcessPool``."""
        with self._lock:
            self._closing = True
            self._break("the workers were ended by terminate_workers or kill_workers")
            for worker in self.workers.values():
                kill(worker.process)

    def join(self) -> None:
        """Wait until all is done and every worker has ended, after ``close``."""
        thread = self._thread
        if thread is None:
            with self._lock:
                self._release()
        elif thread is not threading.current_thread():
            thread.join()

    def _notify(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # -- workers, with the lock held ---------------------------------------------------------

    def _start_worker(self) -> None:
        tasks_tx, tasks_rx = channel()
        results_tx, results_rx = channel()
        slot = self._free_slots.pop()
        words = self._words[slot * CELL_WORDS : (slot + 1) * CELL_WORDS]
        for word in range(CELL_WORDS):
            words[word] = 0
        process = self._context.Process(
            target=work,
            args=(tasks_rx, results_tx, self._cells, slot, self._size, os.getpid(), self._initializer),
        )
        try:
            with results_tx, tasks_rx:
                process.start()
            pidfd = os.pidfd_open(process.pid)
        except BaseException:
            tasks_tx.close()
            results_rx.close()
            self._free_slots.append(slot)
            raise
        key, self._next_key = self._next_key, self._next_key + 1
        self.workers[key] = _Worker(process, pidfd, tasks_tx, results_rx, slot)
        results_fd = results_rx._open_link().fileno()
        self._events[results_fd] = (key, False)
        self._events[pidfd] = (key, True)
        self._epoll.register(results_fd, select.EPOLLIN)
        self._epoll.register(pidfd, select.EPOLLIN)

    def _dispatch(self) -> None:
        now = time.monotonic()
        for key, tasks in self._schedule.assign():
            worker = self.workers[key]
            lane = self._schedule.lanes[key]
            if len(lane.given) == len(tasks):
                worker.head_since = now
            frames: list[bytes] = []
            outlet = worker.tasks._open_link().outlet
            try:
                for task in tasks:
                    task.begin()
                    if isinstance(task.item, bytes):
                        frames.append(task.item)
                    else:
                        outlet.send_all(frames)
                        frames = []
                        outlet.send(task.item)
                outlet.send_all(frames)
            except OSError:
                # It has died; its death tells what becomes of them.
                pass
            if lane.room == 0:
                # Its last ones: it ends by itself after them.
                worker.tasks.close()
        self._saturated = bool(self._schedule.pending)

    def _kill(self, worker: _Worker, fault: BaseException | None = None) -> None:
        worker.fault = fault
        worker.process.kill()

    def _break(self, reason: str) -> list[Task]:
        """Nothing can be run any more. The tasks that this concerns fail."""
        self._broken = reason
        tasks = list(self._schedule.pending)
        self._schedule.pending.clear()
        for lane in self._schedule.lanes.values():
            tasks += [task for task in lane.given if task is not None]
            lane.given.clear()
        for task in tasks:
            task.fail(BrokenProcessPool(reason))
        self._notify()
        return tasks

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            # Nobody who waits for a future may wait for ever.
            with self._lock:
                self._closing = True
                self._break(f"the pool's thread failed: {error!r}")
                for worker in self.workers.values():
                    worker.process.kill()
            raise

    def _serve(self) -> None:
        while True:
            events = self._epoll.poll(self._patience())
            deaths: list[int] = []
            for fd, _ in events:
                if fd == self._wake:
                    os.eventfd_read(fd)
                    continue
                key, died = self._events.get(fd, (-1, False))
                if died:
                    deaths.append(key)
                elif key >= 0:
                    self._hear(key)
            for key in deaths:
                self._bury(key)
            with self._lock:
                self._look_after()
                if self._finished():
                    self._release()
                    return

    def _patience(self) -> float | None:
        """How long to wait for events (seconds)."""
        with self._lock:
            deadlines = []
            if self._timed:
                for key, lane in self._schedule.lanes.items():
                    head = lane.given[0] if lane.given else None
                    if head is not None and head.timeout is not None:
                        deadlines.append(self.workers[key].head_since + head.timeout)
            lane_behind = self._schedule.waiting_elsewhere()
            if lane_behind is not None:
                deadlines.append(self.workers[lane_behind.key].head_since + _PATIENCE)
        return remaining(min(deadlines)) if deadlines else None

    def _hear(self, key: int) -> None:
        """Take the outcomes that a worker has sent."""
        worker = self.workers[key]
        incoming = self._receive(worker)
        if incoming and worker.state == STARTING:
            self._begin(key, worker, incoming.popleft())
        if not incoming:
            return
        with self._lock:
            if self._broken:
                return
            tasks = [self._schedule.answer(key) for _ in incoming]
            worker.head_since = time.monotonic()
            busy = self._words[worker.slot * CELL_WORDS + BUSY]
            self._schedule.measure(len(tasks), (busy - worker.busy) / 1e9)
            worker.busy = busy
            self._timed -= sum(task is not None and task.timeout is not None for task in tasks)
            self._dispatch()
        for task, outcome in zip(tasks, incoming, strict=True):
            if task is not None:
                self._complete(task, outcome)

    def _receive(self, worker: _Worker) -> deque[Incoming]:
        found: deque[Incoming] = deque()
        inlet = worker.results._open_link().inlet
        try:
            while True:
                if len(found) >= _MOST_AT_ONCE:
                    break
                taken = inlet.take(False)
                if isinstance(taken, bytes) or hasattr(taken, "kinds"):
                    found.append(taken)
                else:
                    # The rest of a worker that has ended; it unrolls in its place.
                    inlet.put_back(taken)
        except BlockingIOError:
            pass
        except EndOfStream:
            fd = worker.results._open_link().fileno()
            if self._events.pop(fd, None):
                self._epoll.unregister(fd)
        except ProtocolError:
            # A task wrote to descriptors that are not its own; nothing it sends can be trusted.
            worker.process.kill()
        return found

    def _begin(self, key: int, worker: _Worker, incoming: Incoming) -> None:
        """A worker's first words."""
        said = _call.decode(incoming)
        with self._lock:
            if said == READY:
                worker.state = OPEN
                self._false_starts = 0.0
                self._schedule.open(key, self._max_tasks)
                self._dispatch()
            else:
                self._break(f"the initializer of a worker failed: {said[1]}")

    def _complete(self, task: Task, incoming: Incoming) -> None:
        try:
            kind, *rest = _call.decode(incoming)
        except Exception as error:
            wrapped = SerializationError(f"the result of {task.name} can't be unpickled: {error}")
            wrapped.__cause__ = error
            task.fail(wrapped)
            return
        if kind == _call.DONE:
            task.succeed(rest[0])
        elif kind == _call.SKIPPED:
            # It was about to begin when it was taken back, so it was left with this worker: neither ran it.
            self._submit_again(task)
        elif kind == _call.UNDECODED and not task.by_value and task.repeatable:
            self._submit_by_value(task, rest)
        else:
            task.fail(self.revive(*rest))

    def _submit_by_value(self, task: Task, outcome: list[Any]) -> None:
        """The worker doesn't know the function by its name: it was defined after the worker was started."""
        try:
            task.encode_by_value()
        except Exception:
            task.fail(self.revive(*outcome))
            return
        self._submit_again(task)

    def _submit_again(self, task: Task) -> None:
        with self._lock:
            self._schedule.pending.appendleft(task)
            if task.timeout is not None:
                self._timed += 1
            self._dispatch()

    def revive(self, text: str, pickled: bytes | None) -> BaseException:
        """The exception that a task raised, with the traceback of the worker as its cause."""
        error: BaseException
        if pickled is None:
            error = SerializationError("the task raised an exception that can't be pickled; its traceback is the cause")
        else:
            try:
                error = _call.decode(pickled)
            except Exception as reason:
                error = SerializationError(f"the task raised an exception that can't be unpickled ({reason})")
        error.__cause__ = self._remote_traceback(text)
        return error

    def _bury(self, key: int) -> None:
        """A worker has died: take what it has sent, settle its tasks, replace it."""
        self._hear_out(key)
        with self._lock:
            worker = self.workers.pop(key)
            started = self._words[worker.slot * CELL_WORDS + STARTED]
            worker.process.join()
            exitcode = worker.process.exitcode
            for fd in (worker.results._open_link().fileno(), worker.pidfd):
                if self._events.pop(fd, None):
                    self._epoll.unregister(fd)
            worker.close()
            self._free_slots.append(worker.slot)
            lane = self._schedule.lanes.get(key)
            answered = lane.answered if lane else 0
            given = self._schedule.close(key) if lane else []
            lost: list[Task] = []
            again: list[Task] = []
            for number, task in enumerate(given, answered):
                if task is None:
                    continue
                if number < started or not task.repeatable:
                    lost.append(task)
                else:
                    again.append(task)
            if lane is None and not self._broken:
                initializing = self._words[worker.slot * CELL_WORDS + INITIALIZING]
                self._false_starts += 1 if initializing or (exitcode or 0) >= 0 else _KILLED_COUNTS
                if self._false_starts >= _MOST_FALSE_STARTS:
                    self._break(
                        f"{_MOST_FALSE_STARTS} workers in a row ended before they were ready, exit code {exitcode}"
                    )
            failed: list[tuple[Task, BaseException]] = []
            for task in reversed(lost):
                if worker.fault is None and task.retries > 0 and task.repeatable and not task.future.cancelled():
                    task.retries -= 1
                    again.insert(0, task)
                    continue
                self._timed -= task.timeout is not None
                failed.append((task, worker.fault or WorkerLostError(worker.process.pid, exitcode, task.name)))
            self._schedule.pending.extendleft(task for task in reversed(again) if not task.future.cancelled())
            self._saturated = False
            self._dispatch()
            if not self._broken and (not self._closing or self._schedule.pending):
                self._start_worker()
        for task, error in failed:
            task.fail(error)

    def _hear_out(self, key: int) -> None:
        """Everything that a dead worker has sent."""
        worker = self.workers[key]
        while True:
            before = worker.state, self._answered(key)
            self._hear(key)
            if (worker.state, self._answered(key)) == before:
                return

    def _answered(self, key: int) -> int:
        lane = self._schedule.lanes.get(key)
        return lane.answered if lane else -1

    def _look_after(self) -> None:
        """Stop what takes too long, and let no task wait behind a long one while a worker is idle."""
        now = time.monotonic()
        if self._timed:
            for key, lane in self._schedule.lanes.items():
                head = lane.given[0] if lane.given else None
                worker = self.workers[key]
                if head is None or head.timeout is None or worker.fault is not None:
                    continue
                if now >= worker.head_since + head.timeout:
                    self._kill(worker, TaskTimeoutError(f"{head.name} took longer than {head.timeout} seconds"))
        for key, lane in self._schedule.lanes.items():
            head = lane.given[0] if lane.given else None
            if head is not None and head.future.cancelled() and self.workers[key].fault is None:
                self._kill(self.workers[key], TaskTimeoutError("cancelled"))
        lane_behind = self._schedule.waiting_elsewhere()
        if lane_behind is not None and now >= self.workers[lane_behind.key].head_since + _PATIENCE:
            self._take_back(lane_behind.key)

    def _take_back(self, key: int) -> None:
        worker, lane = self.workers[key], self._schedule.lanes[key]
        base = worker.slot * CELL_WORDS
        first = lane.answered + 1
        if lane.answered < self._words[base + TAKEN_TO]:
            # It has not come past those that were taken back before; what came behind them joins them.
            first = self._words[base + TAKEN_FROM]
            if lane.answered >= first:
                return
        self._words[base + TAKEN_FROM] = first
        self._words[base + TAKEN_TO] = lane.answered + len(lane.given)
        # Asked after it was told, as the worker tells before it asks; the lock that is held is the fence.
        with self._lock:
            first = max(first, self._words[base + STARTED])
        self._schedule.take_back(key, first)
        self._dispatch()

    def _finished(self) -> bool:
        """Whether everything is done; ends the workers when the tasks are."""
        if self._closing and (self._broken or self._schedule.idle):
            for worker in self.workers.values():
                worker.tasks.close()
                worker.state = CLOSING if worker.state == OPEN else worker.state
            return not self.workers
        return bool(self._broken) and not self.workers and self._closing

    def _release(self) -> None:
        """Close what the engine owns; once."""
        _engines.discard(self)
        wake, self._wake = self._wake, -1
        if wake >= 0:
            self._epoll.close()
            os.close(wake)
            self._words.release()
            self._cells.close()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _end() -> None:
    """The interpreter ends: what was submitted is done first, as the stdlib's executors do."""
    for engine in list(_engines):
        engine.close()
        engine.join()


_register_end: Final[Callable[[Callable[[], None]], None]] = threading._register_atexit  # type: ignore[attr-defined]
_register_end(_end)
# A forked child has neither the thread nor the workers.
os.register_at_fork(after_in_child=_engines.clear)
