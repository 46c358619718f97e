"""Which worker gets which task, and when. Pure: no processes, no descriptors, no clock.

A *lane* stands for a worker. Tasks are given to it in order and answered in the same order, so the
first unanswered one is the one that runs, or is about to. A lane is given a few tasks at a time where
they are short, so that the worker need not wait for the parent after each; where they are long, one.

A signal's handler may raise while tasks are assigned. A task goes from those that wait to its lane in one C call, so
it is always in one of the two, and once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice, repeat, starmap
from typing import Generic, TypeVar

T = TypeVar("T")

#: How much work (seconds) a worker is given at a time.
TARGET = 0.001
#: The most tasks that a worker has at a time, however short they are.
_MOST = 256
#: The most bytes of tasks that a worker has at a time, but for one larger: what its socket takes without a backlog.
_MOST_BYTES = 32768
#: The weight of what must be alone with a worker: it goes where nothing is, and nothing follows until it is answered.
ALONE = _MOST_BYTES + 1
#: The weight of the newest measurement in the estimate of a task's length.
_WEIGHT = 0.25


class Lane(Generic[T]):
    """A worker, as far as scheduling goes."""

    __slots__ = ("answered", "given", "key", "leaving", "load", "room")

    def __init__(self, key: int, room: int | None) -> None:
        self.key = key
        #: Unanswered tasks, in order; None for one that was taken back.
        self.given: deque[T | None] = deque()
        #: How many were answered so far: the number of the first one in ``given``, counted from 0.
        self.answered = 0
        #: The task that is being taken from ``given``, and ``answered`` behind that.
        self.leaving: tuple[T | None, int] | None = None
        #: How many more it may be given before it is replaced; None for any number.
        self.room = room
        #: The weight of the tasks in ``given`` that were not taken back.
        self.load = 0


class Schedule(Generic[T]):
    """The tasks that wait, the lanes, and who has what.

    ``weight``: of a task, in bytes. ``dropped``: whether a task is of no use any more; it is never given then.
    """

    def __init__(
        self, weight: Callable[[T], int] = lambda _: 0, dropped: Callable[[T], bool] = lambda _: False
    ) -> None:
        self._weight = weight
        self._dropped = dropped
        self.pending: deque[T] = deque()
        #: Whether some of those that wait may have to be dropped; else that is not asked.
        self.any_dropped = False
        self.lanes: dict[int, Lane[T]] = {}
        #: How long a task takes (seconds), as far as known.
        self.estimate: float | None = None

    def open(self, key: int, room: int | None = None) -> None:
        """A worker is ready, for ``room`` tasks."""
        self.lanes[key] = Lane(key, room)

    def shut(self, key: int) -> None:
        """Give the worker, if it is there, nothing more."""
        if key in self.lanes:
            self.lanes[key].room = 0

    def close(self, key: int) -> list[T | None]:
        """A worker has gone: its unanswered tasks, in order."""
        return list(self.lanes.pop(key).given)

    def measure(self, tasks: int, seconds: float) -> None:
        """``tasks`` tasks took ``seconds`` altogether."""
        each = seconds / tasks
        if self.estimate is None or each > self.estimate:
            # Believed at once: a short task behind a long one waits, a long one alone costs little.
            self.estimate = each
        else:
            self.estimate += _WEIGHT * (each - self.estimate)

    @property
    def window(self) -> int:
        """How many tasks a lane may have."""
        if self.estimate is None:
            return 1
        return max(1, min(_MOST, int(TARGET / max(self.estimate, 1e-9))))

    def assign(self, refill: bool = True) -> list[tuple[int, list[T]]]:
        """Give waiting tasks to lanes: which lane gets which, in order.

        Without ``refill`` only those get some that have nothing to do.
        """
        given: list[tuple[int, list[T]]] = []
        if self.pending:
            open_lanes = [lane for lane in self.lanes.values() if lane.room != 0]
            self._share([lane for lane in open_lanes if not lane.given], given)
        if self.pending and refill:
            # One that is still half full is let alone, so that tasks go several at a time.
            half = self.window // 2
            self._share([lane for lane in open_lanes if 0 < len(lane.given) <= half], given)
        return given

    def _share(self, lanes: list[Lane[T]], given: list[tuple[int, list[T]]]) -> None:
        """Fill ``lanes`` up, in equal shares where there is not enough."""
        window = self.window
        for position, lane in enumerate(lanes):
            count = min(-(-len(self.pending) // (len(lanes) - position)), window - len(lane.given))
            if lane.room is not None:
                count = min(count, lane.room)
            tasks = self._next(lane, count)
            if tasks:
                if lane.room is not None:
                    lane.room -= len(tasks)
                lane.given.extend(starmap(self.pending.popleft, repeat((), len(tasks))))
                given.append((lane.key, tasks))

    def _next(self, lane: Lane[T], most: int) -> list[T]:
        """The next tasks for a lane, as many as it has room for; they still wait, ahead of all others."""
        tasks = [*islice(self.pending, max(0, most))]
        weight = sum(map(self._weight, tasks))
        if not self.any_dropped and lane.load + weight <= _MOST_BYTES:
            lane.load += weight
            return tasks
        tasks.clear()
        while len(tasks) < most and len(tasks) < len(self.pending):
            task = self.pending[len(tasks)]
            if self._dropped(task):
                del self.pending[len(tasks)]
                continue
            weight = self._weight(task)
            if lane.load + weight > _MOST_BYTES and (tasks or lane.given):
                break
            lane.load += weight
            tasks.append(task)
        self.any_dropped = self.any_dropped and len(tasks) < len(self.pending)
        return tasks

    def answer(self, key: int, count: int) -> list[T | None]:
        """The lane has answered ``count`` times: which tasks; None for one that was taken back."""
        lane = self.lanes[key]
        tasks = [lane.given.popleft() for _ in range(count)]
        lane.answered += count
        lane.load -= sum(self._weight(task) for task in tasks if task is not None)
        return tasks

    def answer_one(self, key: int) -> None:
        """As ``answer``, where a signal's handler may raise: ``finish_answer`` mends what that interrupts."""
        lane = self.lanes[key]
        lane.leaving = lane.given[0], lane.answered + 1
        self.finish_answer(key)

    def finish_answer(self, key: int) -> None:
        """Do the rest of an ``answer_one`` that was interrupted, if there was one."""
        lane = self.lanes[key]
        if lane.leaving is not None:
            task, answered = lane.leaving
            if lane.given and lane.given[0] is task:
                lane.given.popleft()
            lane.answered = answered
            lane.leaving = None
        self.weigh(key)

    def insert(self, key: int, behind: int) -> None:
        """Something that nobody waits for goes to the lane, ahead of the last ``behind`` it was given."""
        given = self.lanes[key].given
        given.insert(len(given) - behind, None)

    def sole(self, task: T) -> int | None:
        """The lane that has ``task`` and nothing else, if nothing waits either."""
        if not self.pending:
            for lane in list(self.lanes.values()):
                if [*islice(lane.given, 2)] == [task]:
                    return lane.key
        return None

    def waiting_elsewhere(self) -> Lane[T] | None:
        """The lane with most tasks that wait behind another, if some lane has nothing to do and nothing else waits."""
        longest, most, idle = None, 1, False
        for lane in self.lanes.values():
            count = len(lane.given)
            # One that must be alone may have an order ahead of it, and stays all the same.
            if count > most and lane.load < ALONE:
                longest, most = lane, count
            elif not count and lane.room != 0:
                idle = True
        if longest is None or not idle or self.pending:
            return None
        return longest if any(task is not None for task in islice(longest.given, 1, None)) else None

    def take_back(self, key: int, first: int) -> list[T]:
        """Tasks from the ``first``-th on (counted from 0 over the lane's life) wait again, ahead of all others."""
        lane = self.lanes[key]
        at = max(0, first - lane.answered)
        taken = [task for task in list(lane.given)[at:] if task is not None]
        for position in range(at, len(lane.given)):
            lane.given[position] = None
        lane.load -= sum(map(self._weight, taken))
        self.pending.extendleft(reversed(taken))
        return taken

    def weigh(self, key: int) -> None:
        """Take the weight of what a lane has anew, where assigning to it was interrupted."""
        lane = self.lanes[key]
        lane.load = sum(self._weight(task) for task in lane.given if task is not None)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, and nothing is unanswered but what was taken back."""
        while self.pending and self._dropped(self.pending[0]):
            self.pending.popleft()
        return not self.pending and all(task is None for lane in self.lanes.values() for task in lane.given)
