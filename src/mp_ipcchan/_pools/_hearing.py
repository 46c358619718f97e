"""What the thread of a pool does: it hears outcomes, deaths and log records, and sees to it that all go on.

``_lock`` is held for everything of ``_crew``, never while anything of the user's runs (decoding a result, a
future's callbacks).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .._inlet import NoRoom
from .._message import Incoming
from .._segments._segment_pool import IDLE_AFTER
from . import _call, _logs, _outcome
from ._looking import Looking
from ._member import ENDING, OPEN, STARTING, Member
from ._worker import READY, Setup

#: The most log records handled before tasks have their turn.
_MOST_RECORDS = 256
#: Where others wait and so many tasks or more are given to a worker at a time, outcomes are let gather for a moment
#: (seconds), a part of the time that those take: to be woken for each costs more than to settle it.
_MANY, _NAP = 32, 0.0002


class Hearing(Looking):
    """A crew, and who hears from it."""

    def __init__(
        self,
        context: Any,
        size: int,
        setup: Setup,
        max_tasks: int | None,
        remote_traceback: Callable[[Any], BaseException],
        unsendable: _outcome.Unsendable | None,
    ) -> None:
        super().__init__(context, size, setup, max_tasks)
        self._remote_traceback = remote_traceback
        self._unsendable_result = unsendable
        #: What waits is to be cancelled.
        self._cancelling = False

    def _serve(self) -> None:
        commons = self._commons
        assert commons is not None
        while True:
            if self._cancelling:
                self._cancel_waiting()
            if self._broken:
                self._fail_all()
            with self._lock:
                if self._torn or self._interrupted:
                    self._interrupted = False
                    self._mend()
                patience = self._look_after()
                finished = self._finished()
            while self._half_cancelled:
                self._half_cancelled.popleft().future.conclude_cancel()
            if finished:
                if self._broken:
                    self._fail_all()
                elif self._schedule.pending:
                    self._cancel_waiting()
                self._release()
                return
            longest = self.longest_sleep()
            if longest is not None:
                patience = longest if patience is None else min(patience, longest)
            if self._saturated and self._schedule.window >= _MANY:
                time.sleep(_NAP)
                patience = 0
            elif not self.is_looking:
                commons.falls_asleep()
            if any(worker.has_more for worker in list(self.workers.values())):
                patience = 0
            resting = patience is None and any(worker.keeps_memory for worker in list(self.workers.values()))
            events = commons.epoll.poll(IDLE_AFTER if resting else patience)
            commons.is_awake()
            if resting and not events:
                for worker in list(self.workers.values()):
                    worker.give_back()
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

    def _cancel_waiting(self) -> None:
        """Cancel what waits, as ``close`` was asked to."""
        self._cancelling = False
        with self._lock:
            waiting = self._take_waiting()
        _outcome.cancel(waiting)

    def _fail_all(self) -> None:
        """Nothing can be run any more: let every task fail."""
        with self._lock:
            tasks = self._take_all()
        _outcome.fail([(task, BrokenProcessPool(self._broken)) for task in tasks])

    def _hear(self, key: int, readable: bool = True) -> None:
        """Take the outcomes that a worker has sent. ``readable``: whether its channel is."""
        worker = self.workers[key]
        with self._lock:
            if self._torn:
                self._mend()
            incoming, ended = worker.receive(readable, self._answered(key))
            if ended:
                self._ignore(worker.results_fd)
            if incoming and worker.state == STARTING:
                self._begin(key, worker, incoming.popleft())
            if not incoming:
                return
            if self._broken:
                # Those that it had have failed.
                self._schedule.lanes[key].answered += len(incoming)
                return
            if not self.is_looking:
                self._expect_looks(False)
            tasks = self._schedule.answer(key, len(incoming))
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
        if said == READY:
            # It may have been told to end while it started.
            told = worker.tasks.closed
            worker.state = ENDING if told else OPEN
            self._false_starts = self._killed_starts = 0
            self._schedule.open(key, 0 if told else self._max_tasks)
            self._dispatch()
        elif not self._broken:
            self._break(said[1])

    def _bury(self, key: int) -> None:
        """A worker has died: take what it has sent, settle its tasks, replace it."""
        self._hear_out(key)
        with self._lock:
            failed = self._remove(key)
            if self._closing and self._schedule.idle:
                self._missing = 0
        _outcome.fail(failed)

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
        return lane.answered if lane else 0

    def _finished(self) -> bool:
        """Whether everything is done; ends the workers when the tasks are."""
        if self._closing and (self._broken or self._schedule.idle):
            for key, worker in self.workers.items():
                worker.end()
                # Who submits puts a task among those that wait, and only then sees that it is too late.
                self._schedule.shut(key)
                if worker.state == OPEN:
                    worker.state = ENDING
            return not self.workers
        return False

    def _release(self) -> None:
        """Close what the pool owns; once."""
        if self._commons is not None:
            self._commons.close()
