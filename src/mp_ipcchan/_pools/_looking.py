"""A thread that waits for a short task looks for its outcome itself, for a moment.

To be woken by the pool's thread, which has to be woken first, takes several times as long as such a task. So who waits
says that the pool is awake, and looks into the ring of the worker that has the task; the worker, for its part, gives
it some microseconds to come. All else stays the thread's: what failed, what others wait for, what comes too late, and
what runs code of the user's to be decoded.

A signal's handler may raise at any instant in here. The outcome stays in the ring until everything else is done, so
the thread finds it there.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from itertools import islice, repeat, starmap
from typing import Any

from . import _call
from ._commons import Commons
from ._crew import Crew
from ._future import Future
from ._member import Member
from ._task import Task
from ._worker import Setup

#: For how long (seconds) to look, where tasks take up to ``_SHORT``.
_LOOK, _SHORT = 0.0001, 0.00005
#: Where it takes longer than that (seconds), other processes keep the cores busy, and worker and parent take turns on
#: one: nobody looks for the next outcomes then. For twice as many each time, and half as many after one that was quick.
_WORTH, _MOST_OFF = 0.00004, 256
#: How often (seconds) the thread wakes as long as somebody looks now and then: two handlers in a row may have kept
#: that one from telling it to go on.
_PULSE = 1.0


class Looking(Crew):
    """A crew that those who wait for its tasks may hear from. Its lock is held for everything of ``Crew``."""

    def __init__(self, context: Any, size: int, setup: Setup, max_tasks: int | None) -> None:
        super().__init__(context, size, setup, max_tasks)
        self._make_lock()
        #: No more tasks are taken.
        self._closing = False
        #: A call of those who submit or look was interrupted: everything is looked at once.
        self._interrupted = False
        #: For how many outcomes nobody is to look, and for how many more the next time.
        self._looks_off, self._next_off = 0, 1
        #: Until when (seconds) somebody looks, and the thread need not be woken; and when somebody began to, last.
        self._looking_until = self._looked_at = -math.inf
        #: Whether the thread wakes now and then, most likely.
        self._pulsing = False

    def _make_lock(self) -> None:
        self._lock = threading.RLock()
        #: Acquires it at each step, if it is free, and says whether it was.
        self._turns: Iterator[bool] = starmap(self._lock.acquire, repeat((False,)))

    @property
    def is_looking(self) -> bool:
        """Whether somebody looks, most likely, and lets the thread know of what comes meanwhile."""
        return time.perf_counter() < self._looking_until

    def longest_sleep(self) -> float | None:
        """For how long (seconds) the thread may sleep at most."""
        for _ in range(2):
            if time.perf_counter() < self._looked_at + _PULSE:
                return _PULSE
            # Asked once more then: who looks says so before asking for this.
            self._pulsing = False
        return None

    def _expect_looks(self, expected: bool) -> None:
        if self._commons is not None:
            self._commons.expect_looks(expected)

    def look_for(self, task: Task, future: Future[Any]) -> None:
        """Look for the outcome of ``task``, ``future``'s, where it is short and all that its worker has."""
        commons, estimate = self._commons, self._schedule.estimate
        key = self._schedule.sole(task)
        worker = self.workers.get(key) if key is not None else None
        if commons is None or key is None or worker is None or estimate is None or estimate > _SHORT:
            return
        if self._looks_off:
            self._looks_off -= 1
            return
        begun = time.perf_counter()
        try:
            self._looked_at = begun
            self._looking_until = until = begun + _LOOK
            if not self._pulsing:
                self._notify()
                self._pulsing = True
            commons.expect_looks(True)
            commons.is_awake()
            if self._await_outcome(worker, future, until):
                self._take_outcome(key, worker, task, future)
        except BaseException:
            self._interrupted = True
            self._notify()
            raise
        finally:
            self._stop_looking(commons)
            self._judge(time.perf_counter() - begun)

    def _await_outcome(self, worker: Member, future: Future[Any], until: float) -> bool:
        """Whether it comes in time."""
        while True:
            if worker.has_more:
                return True
            if future.done() or time.perf_counter() > until:
                return False
            # Lets other threads run, too.
            os.sched_yield()

    def _take_outcome(self, key: int, worker: Member, task: Task, future: Future[Any]) -> None:
        """Settle ``task`` by what its worker has sent, if it went well and nobody else waits for it."""
        lane = self._schedule.lanes.get(key)
        if lane is None:
            return
        # Without the lock: what the thread takes meanwhile isn't there any more.
        number = lane.answered
        frame = worker.peek(number) if self._schedule.sole(task) == key else None
        if frame is None or not _call.is_plain(frame):
            return
        kind, *rest = _call.decode(frame)
        if kind != _call.DONE or not future.settle_alone(rest[0]):
            return
        turn = False
        try:
            # Acquired and noted in one C call. Not waited for: the thread may hold it while it starts a worker.
            [turn] = islice(self._turns, 1)
            if turn and not self._torn and self.workers.get(key) is worker and self._schedule.sole(task) == key:
                self._torn = True
                self._schedule.answer_one(key)
                worker.drop(number + 1)
                self._torn = False
                self._schedule.measure(1, worker.newly_busy())
                self._saturated = False
                self._dispatch()
        finally:
            if turn:
                self._lock.release()
        if self._closing:
            self._notify()

    def _stop_looking(self, commons: Commons) -> None:
        """The thread sleeps, for all we know: of what has come meanwhile it has not been told."""
        # First, for the thread looks at this once it has said that it is awake.
        self._looking_until = -math.inf
        commons.falls_asleep()
        if any(worker.has_more for worker in list(self.workers.values())):
            self._notify()

    def _judge(self, seconds: float) -> None:
        """Whether to look the next time, where this time took so long."""
        if seconds < _WORTH:
            self._next_off = max(1, self._next_off // 2)
        else:
            self._looks_off = self._next_off
            self._next_off = min(2 * self._next_off, _MOST_OFF)
            self._expect_looks(False)
