"""The workers of a pool, and who has what: given, taken back, watched, and what becomes of it when one dies.

What ``_schedule`` decides is carried out here. There is no thread here, and no lock: the engine holds its lock
for every call. Nothing of the user's runs; tasks that fail are returned to the caller, who lets them fail
without the lock.

Who submits does some of it in the main thread, where a signal's handler may raise at any instant. Tasks are
either waiting or in a lane all the time, in the order in which they are sent; a mark (``_torn``) is set while that
is being changed. Whoever finds it set leaves everything as it is to the engine's thread, which no handler
interrupts: it asks the workers to answer for all that never came to them (``_mend``).
"""

from __future__ import annotations

import operator
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from .._fd import Fd
from .._interrupt import handlers_put_off, raised_by_handler
from ..errors import TaskTimeoutError
from . import _call, _logs, _resident
from ._commons import Commons
from ._future import begin
from ._member import ENDING, STARTING, Member
from ._schedule import TARGET, Lane, Schedule
from ._task import Task, WorkerLostError
from ._worker import Setup

#: How many workers in a row may end by themselves before they are ready; then the pool is broken.
_MOST_FALSE_STARTS = 4
#: How many may be killed. That may be somebody else's doing, who stops some time; so the next one is started after a
#: pause, which grows (seconds): it takes some five to be sure.
_MOST_KILLED_STARTS, _FIRST_PAUSE, _LONGEST_PAUSE = 12, 0.01, 1.0
#: What a worker dies of that is killed by somebody else, or by its own code that nobody can tell from that.
_KILLS = (-signal.SIGKILL, -signal.SIGTERM)
#: A task that waits behind another for longer than this (seconds) is given to an idle worker instead.
_PATIENCE = 2 * TARGET
#: How often (seconds) the memory of workers is looked at, where it is limited. A look costs some 10 us; memory that is
#: written to for the first time grows by some 20 MB in the time.
_MEMORY_INTERVAL = 0.02
#: How long (seconds) the thread sleeps at most where something is due some time: epoll counts milliseconds in a C int.
_LONGEST_SLEEP = 86400.0
#: When to try again (seconds) where a worker could not be started, and others go on.
_START_AGAIN = 1.0
#: What starting a process raises where that, or the fork server, is killed meanwhile.
_KILLED_AT_ONCE = (BrokenPipeError, ConnectionResetError, ConnectionRefusedError, EOFError)
_NOT_REPEATABLE: Final = "not run again: the endpoints or descriptors among its arguments went with the worker"
_SEE_STDERR: Final = "what they died of, if Python knows, is on standard error"
_GUARD: Final = (
    "; under spawn and forkserver each of them imports the main program, which must start its workers "
    'under if __name__ == "__main__": alone'
)
_OUT_OF_MEMORY: Final = "by the kernel, for want of memory: the control group's count of such kills went up"


class Crew:
    """``size`` workers at most."""

    #: What the names of workers have in place of "Process".
    _kind = "Process"

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
        #: How many workers in a row have ended before they were ready: by themselves, and killed.
        self._false_starts = self._killed_starts = 0
        #: How many workers are to be started by the thread, as soon as it may.
        self._missing = 0
        #: Not before this (monotonic seconds) is another worker to be started.
        self._start_at = 0.0
        #: Set once nothing can be run any more, to what every task fails with.
        self._broken: str | None = None
        #: Set while tasks are handed out, and workers entered: where nobody has the lock, that was interrupted.
        self._torn = False
        #: Tasks that were cancelled, which a worker may have.
        self._abandoned: deque[Task] = deque()
        #: Of these, those for which the thread has to do what ``cancel`` has left.
        self._half_cancelled: deque[Task] = deque()
        #: Whether any task ever had a deadline.
        self._timed = False
        self._commons: Commons | None = None
        #: The kernel's count of what it killed for want of memory, as last seen.
        self._out_of_memory = _resident.OutOfMemoryKills()
        #: What a readable descriptor tells: a worker, and whether it is its death.
        self._events: dict[int, tuple[int, bool]] = {}

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

    @handlers_put_off()
    def _start_worker(self) -> None:
        """Start a worker; or see to it that one is started later, where this one was killed at once."""
        commons = self._commons
        assert commons is not None
        slot = commons.free_slots[-1]
        levels = _logs.levels()
        torn, self._torn = self._torn, True
        try:
            # Duplicates: a forked child closes what is the pool's own.
            with Fd(commons.cells_fd) as cells, commons.lifeline.end() as lifeline, commons.logs_sender.clone() as logs:
                shared = (cells, self._size, lifeline, logs, levels, self._setup)
                worker = Member.start(self._context, self._kind, commons.cells, slot, *shared)
        except BaseException as error:
            # Nothing has changed. A process that was started all the same finds its channels closed, and ends.
            self._torn = torn
            if isinstance(error, _KILLED_AT_ONCE) and not raised_by_handler(error):
                self._note_false_start(-signal.SIGKILL)
                return
            raise
        worker.levels = levels
        commons.free_slots.pop()
        key, self._next_key = self._next_key, self._next_key + 1
        self.workers[key] = worker
        self._watch(key, worker)
        self._torn = torn

    def _watch(self, key: int, worker: Member) -> None:
        """Hear of what the worker sends, and of its death."""
        assert self._commons is not None
        for fd, died in ((worker.results_fd, False), (worker.pidfd, True)):
            if fd not in self._events:
                try:
                    self._commons.epoll.register(fd, select.EPOLLIN)
                except FileExistsError:
                    # A signal's handler raised when that was done.
                    pass
                self._events[fd] = (key, died)

    def _start_for(self, task: Task) -> None:
        """Start a worker for what waits, if there may be another; ``task`` is the last.

        Raises why there can't be one, where there is none at all and nothing else has waited for one.
        """
        pending = self._schedule.pending
        if len(self.workers) >= self._size:
            return
        if time.monotonic() < self._start_at:
            self._missing = max(1, self._missing)
            return
        try:
            self._start_worker()
        except Exception as error:
            if raised_by_handler(error) or (not self.workers and pending and pending[-1] is task):
                raise
            self._start_again_later()

    def _start_missing(self) -> float | None:
        """Start the workers that are missing; that none can be breaks the pool, if it has no other.

        When to try again (monotonic seconds), where it is too early now.
        """
        while self._missing:
            if len(self.workers) >= self._size or self._broken:
                self._missing = 0
                break
            if time.monotonic() < self._start_at:
                return self._start_at
            self._missing -= 1
            try:
                self._start_worker()
            except Exception as error:
                self._start_again_later()
                if not self.workers:
                    self._break(f"no worker can be started: {type(error).__name__}: {error}")
        return None

    def _start_again_later(self, pause: float = _START_AGAIN) -> None:
        self._missing += 1
        self._start_at = time.monotonic() + pause
        self._notify()

    def _note_false_start(self, exitcode: int | None) -> None:
        """A worker has ended before it was ready. Start another, unless there have been too many such in a row."""
        if exitcode in _KILLS and not self._out_of_memory.grew():
            self._killed_starts += 1
            self._start_again_later(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._killed_starts - 1)))
            if self._killed_starts >= _MOST_KILLED_STARTS:
                self._break(f"{_MOST_KILLED_STARTS} workers in a row were killed before they were ready")
        else:
            self._false_starts += 1
            self._missing += 1
            if self._false_starts >= _MOST_FALSE_STARTS:
                self._break(
                    f"{_MOST_FALSE_STARTS} workers in a row ended before they were ready, exit code {exitcode}: "
                    f"{_SEE_STDERR}{'' if self._context.get_start_method() == 'fork' else _GUARD}"
                )

    def _dispatch(self, refill: bool = True) -> None:
        """Hand out what waits; nothing where that was interrupted, and the thread has yet to mend it."""
        if self._torn:
            self._notify()
            return
        self._torn = True
        pending = self._schedule.pending
        while True:
            for key, tasks in self._schedule.assign(refill):
                self._give(key, tasks)
            self._saturated = bool(pending)
            if self._saturated or not pending:
                break
        self._torn = False

    def _give(self, key: int, tasks: list[Task]) -> None:
        """Send a worker what it was assigned."""
        worker, lane = self.workers[key], self._schedule.lanes[key]
        if len(lane.given) == len(tasks):
            worker.head_since = time.monotonic()
        levels = _logs.levels()
        if worker.levels is not levels:
            worker.levels = levels
            self._schedule.insert(key, len(tasks))
            worker.tell(_call.encode_call(_logs.set_levels, (levels,), {}))
        begin(tasks)
        if not worker.send(tasks):
            self._catch_up(key)
        if lane.room == 0:
            # Its last ones.
            worker.end()

    def _catch_up(self, key: int) -> None:
        """Let a worker answer for what it was assigned and what never came; then that waits again, or fails."""
        lane = self._schedule.lanes[key]
        self.workers[key].catch_up(lane.answered + len(lane.given))

    def _mend(self) -> None:
        """Put in order what a signal's handler has interrupted by raising, wherever it was. In the thread."""
        assert self._commons is not None
        taken = {worker.slot for worker in self.workers.values()}
        self._commons.free_slots[:] = [slot for slot in range(self._size) if slot not in taken]
        for key, worker in self.workers.items():
            self._watch(key, worker)
        for key, lane in self._schedule.lanes.items():
            self._schedule.finish_answer(key)
            self.workers[key].drop(lane.answered)
            self.workers[key].head_since = time.monotonic()
            self._catch_up(key)
            if lane.room == 0:
                self.workers[key].end()
        self._torn = False
        self._dispatch()
        self._missing = max(self._missing, min(self._size - len(self.workers), len(self._schedule.pending)))

    def _break(self, reason: str) -> None:
        """Nothing can be run any more; the thread lets all tasks fail."""
        self._broken = reason
        self._saturated = False
        self._notify()

    def _take_all(self) -> list[Task]:
        """Every task that there is."""
        tasks = [task for lane in self._schedule.lanes.values() for task in lane.given if task is not None]
        for lane in self._schedule.lanes.values():
            lane.given.clear()
        tasks += self._take_waiting()
        return tasks

    def _take_waiting(self) -> list[Task]:
        """The tasks that wait."""
        pending = self._schedule.pending
        # More may be appended meanwhile.
        return [pending.popleft() for _ in range(len(pending))]

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

    def _drop(self, task: Task) -> None:
        """Stop a cancelled task, if a worker has it. One that only waits is never given."""
        for key, lane in self._schedule.lanes.items():
            if task in lane.given:
                self._stop(key, task, _always(TaskTimeoutError("cancelled")))
                return
        task.let_go()

    def _remove(self, key: int) -> list[tuple[Task, BaseException]]:
        """A worker has died, and been heard out: the tasks that are lost."""
        worker = self.workers.pop(key)
        started = worker.started
        exitcode = worker.join()
        for fd in (worker.results_fd, worker.pidfd):
            self._ignore(fd)
        worker.close()
        assert self._commons is not None
        self._commons.free_slots.append(worker.slot)
        lane = self._schedule.lanes.get(key)
        failed: list[tuple[Task, BaseException]] = []
        if lane is not None:
            failed = self._settle_lost(worker, lane, started, exitcode)
            self._schedule.close(key)
            self._missing += 1
        elif not self._broken:
            self._note_false_start(exitcode)
        self._saturated = False
        self._dispatch()
        return failed

    def _settle_lost(
        self, worker: Member, lane: Lane[Task], started: int, exitcode: int | None
    ) -> list[tuple[Task, BaseException]]:
        """What a dead worker had: those it had not begun wait again; the one that ran fails, or is tried again."""
        failed: list[tuple[Task, BaseException]] = []
        again: list[Task] = []
        killed = _OUT_OF_MEMORY if exitcode == -signal.SIGKILL and self._out_of_memory.grew() else ""
        for number, task in enumerate(lane.given, lane.answered):
            if task is None or task.future.cancelled():
                continue
            ran = number < started
            runs = task.note_loss() if ran else ""
            if task.repeatable and (not ran or (task.retries > 0 and worker.fault is None)):
                task.retries -= ran
                again.append(task)
            else:
                alone = _NOT_REPEATABLE if task.retries > 0 and not task.repeatable else ""
                hint = "; ".join(filter(None, (killed, runs, alone)))
                fault = worker.fault or task.refused or WorkerLostError(worker.pid, exitcode, task.name, hint)
                failed.append((task, fault))
        self._schedule.pending.extendleft(reversed(again))
        return failed

    def _look_after(self) -> float | None:
        """Stop what takes too long or too much, and let no task wait behind a long one while a worker is idle.

        How long until there is something to look after again (seconds); None where only an event can bring it.
        """
        at: list[float] = []
        for _ in range(len(self._abandoned)):
            task = self._abandoned.popleft()
            if task.future.cancelled():
                # Said again, under the lock: an assignment may just have found nothing more to drop.
                self._schedule.any_dropped = True
                self._drop(task)
                self._half_cancelled.append(task)
        if self._timed:
            for key, head in list(self._heads()):
                if head.timeout is not None and self.workers[key].fault is None:
                    deadline = self.workers[key].head_since + head.timeout
                    if time.monotonic() < deadline:
                        at.append(deadline)
                    else:
                        error = TaskTimeoutError(f"{head.described} took longer than {head.timeout} seconds")
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
        start_at = self._start_missing()
        if start_at is not None:
            at.append(start_at)
        return min(_LONGEST_SLEEP, max(0.0, min(at) - time.monotonic())) if at else None

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
