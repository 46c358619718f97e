"""The workers of a pool, and who has what: given, taken back, watched, and what becomes of it when one dies.

What ``_schedule`` decides is carried out here. There is no thread here, and no lock: the engine holds its lock
for every call. Nothing of the user's runs; tasks that fail are returned to the caller, who lets them fail
without the lock.
"""

from __future__ import annotations

import operator
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

from .._deadline import remaining
from .._fd import Fd
from . import _call, _logs, _resident
from ._commons import Commons
from ._member import ENDING, STARTING, Member
from ._schedule import TARGET, Lane, Schedule
from ._task import Task, TaskTimeoutError, WorkerLostError
from ._worker import Setup

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
_OUT_OF_MEMORY: Final = "by the kernel, for want of memory: the control group's count of such kills went up"


class Crew:
    """``size`` workers at most."""

    def __init__(self, context: Any, size: int, setup: Setup, max_tasks: int | None) -> None:
        self._context = context
        self._size = size
        self._setup = setup
        self._max_tasks = max_tasks
        self._schedule: Schedule[Task] = Schedule(operator.attrgetter("size"), _is_cancelled)
        self.workers: dict[int, Member] = {}
        self._next_key = 0
        #: All workers have as many tasks as they may: no use in asking the schedule until one answers.
        self._saturated = False
        self._false_starts = 0.0
        #: Not before this (monotonic seconds) is another worker to be started.
        self._start_at = 0.0
        #: Set once nothing can be run any more, to what every task fails with.
        self._broken: str | None = None
        #: Whether any task ever had a deadline.
        self._timed = False
        self._commons: Commons | None = None
        #: The kernel's count of what it killed for want of memory, as last seen.
        self._out_of_memory = _resident.OutOfMemoryKills()
        #: What a readable descriptor tells: a worker, and whether it is its death.
        self._events: dict[int, tuple[int, bool]] = {}
        #: Tasks that could not be sent, and why; the thread fails them.
        self._unsendable: list[tuple[Task, BaseException]] = []

    def _notify(self) -> None:
        if self._commons is not None:
            self._commons.notify()

    def _describe(self) -> list[tuple[int, str, int, float]]:
        """Of each worker: the pid, what it is doing, how many tasks it has done, and for how many seconds."""
        found = []
        for key, worker in self.workers.items():
            lane = self._schedule.lanes.get(key)
            if worker.state == STARTING:
                state = "starting"
            elif lane is not None and lane.given:
                state = "busy"
            else:
                state = "ending" if worker.state == ENDING else "idle"
            found.append((worker.pid, state, lane.answered if lane else 0, worker.busy_seconds()))
        return found

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

    def _start_for(self, task: Task) -> None:
        """Start a worker for what waits, if there may be another; ``task`` is the last.

        Where there is none and none can be started, ``task`` doesn't wait any more, and this raises why.
        """
        pending = self._schedule.pending
        if len(self.workers) >= self._size or time.monotonic() < self._start_at:
            return
        try:
            self._start_worker()
        except Exception:
            if self.workers or not pending or pending[-1] is not task:
                self._start_at = time.monotonic() + _START_AGAIN
                return
            pending.pop()
            raise

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
        if worker.fault is not None:
            return
        if task.repeatable:
            staying = self._recall(key, lane.answered)
            runs = task in lane.given and lane.answered + lane.given.index(task) == staying - 1
        else:
            # It is alone there, and can't be taken back: what it carries would not come along.
            runs = True
        if runs:
            worker.fault = fault(worker)
            worker.kill()
        self._dispatch()

    def _drop(self, task: Task) -> bool:
        """Stop a cancelled task, if a worker has it; whether one had. One that only waits is never given."""
        for key, lane in self._schedule.lanes.items():
            if task in lane.given:
                self._stop(key, task, _always(TaskTimeoutError("cancelled")))
                return True
        return False

    def _remove(self, key: int) -> tuple[list[tuple[Task, BaseException]], list[Task]]:
        """A worker has died, and been heard out: the tasks that are lost, and those that fail because all is over."""
        worker = self.workers.pop(key)
        started, initializing = worker.started, worker.initializing
        exitcode = worker.join()
        for fd in (worker.results_fd, worker.pidfd):
            self._ignore(fd)
        worker.close()
        assert self._commons is not None
        self._commons.free_slots.append(worker.slot)
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
        return failed, broken

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

    def _heads(self) -> Iterator[tuple[int, Task]]:
        """Workers that have something to do, and the task that each runs or is about to."""
        for key, lane in self._schedule.lanes.items():
            head = lane.given[0] if lane.given else None
            if head is not None:
                yield key, head

    def _ignore(self, fd: int) -> None:
        """Wait for ``fd`` no more."""
        assert self._commons is not None
        if self._events.pop(fd, None):
            self._commons.epoll.unregister(fd)


def _always(error: BaseException) -> Callable[[Member], BaseException]:
    return lambda _: error


def _too_much_memory(task: Task, size: int, limit: int) -> Callable[[Member], BaseException]:
    hint = f"it had {_resident.readable(size)}, more than max_memory_per_child={_resident.readable(limit)}"
    return lambda worker: WorkerLostError(worker.pid, -signal.SIGKILL, task.name, hint)


def _is_cancelled(task: Task) -> bool:
    return task.future.cancelled()
