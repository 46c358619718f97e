"""A worker as its parent knows it: the process, the channels to and from it, and the cell that both share."""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from typing import Any

from .._channel import channel
from .._inlet import EndOfStream, NoRoom
from .._interrupt import raised_by_handler
from .._message import Incoming, Outgoing
from .._receiver import Receiver
from .._sender import Sender
from ..errors import ProtocolError
from . import _call, _ring
from ._lifeline import interrupts_held_back
from ._ring import Reader, fence
from ._task import Task
from ._worker import ANSWERED, BUSY, HEAD, LOGGED, STARTED, TAIL, TAKEN_FROM, TAKEN_TO, Cells, work

#: How long to wait (seconds) for an exit code that another thread is just collecting, or the fork server.
_EXIT_PATIENCE = 1.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.00005, 0.001

STARTING, OPEN, ENDING = range(3)


class Member:
    """Owns the channels' ends, the pidfd, and the words of its cell."""

    __slots__ = (
        "_cell",
        "_ring",
        "busy",
        "fault",
        "head_since",
        "levels",
        "logged",
        "pid",
        "pidfd",
        "process",
        "results",
        "slot",
        "state",
        "tasks",
    )

    def __init__(
        self, process: Any, pidfd: int, tasks: Sender[Any], results: Receiver[Any], cells: Cells, slot: int
    ) -> None:
        self.process = process
        self.pid: int = process.pid
        self.pidfd = pidfd
        self.tasks = tasks
        self.results = results
        self.slot = slot
        self._cell = cells.cell(slot)
        self._ring = Reader(cells.ring(slot), self._cell, HEAD, TAIL)
        self.state = STARTING
        #: Since when (monotonic seconds) its first unanswered task has been that.
        self.head_since = 0.0
        #: Nanoseconds of work that it had reported when last looked at.
        self.busy = 0
        #: How many log records it had sent when last looked at, and which levels it knows.
        self.logged = 0
        self.levels: object = None
        #: What the task that ran is to fail with, where we killed the worker for it.
        self.fault: BaseException | None = None

    @classmethod
    def start(cls, context: Any, kind: str, cells: Cells, slot: int, *args: Any) -> Member:
        """Start a worker; ``args`` are what ``work`` takes behind the slot. Raises what starting a process raises.

        ``kind``: what its name has in place of "Process".
        """
        cell = cells.cell(slot)
        for word in range(len(cell)):
            cell[word] = 0
        tasks_tx, tasks_rx = channel()
        results_tx, results_rx = channel()
        process = context.Process(target=work, args=(tasks_rx, results_tx, slot, *args))
        process.name = process.name.replace("Process", kind)
        try:
            with results_tx, tasks_rx, interrupts_held_back(context.get_start_method()):
                process.start()
            pidfd = os.pidfd_open(process.pid)
        except BaseException:
            tasks_tx.close()
            results_rx.close()
            raise
        return cls(process, pidfd, tasks_tx, results_rx, cells, slot)

    @property
    def results_fd(self) -> int:
        return self.results._open_link().fileno()

    # -- tasks and outcomes ------------------------------------------------------------------

    def send(self, tasks: list[Task]) -> bool:
        """Send ``tasks`` in order; False where one could not be, by its own fault, and all behind it were not.

        A worker that has died takes everything: its death tells what becomes of it.
        """
        outlet = self.tasks._open_link().outlet
        frames: list[bytes] = []
        leaving = 0
        try:
            for number, task in enumerate(tasks):
                item = task.item
                if item.__class__ is bytes:
                    frames.append(item)
                    continue
                outlet.send_all(frames)
                frames = []
                leaving = number
                outlet.send(item)
                leaving += 1
            outlet.send_all(frames)
        except OSError as error:
            if raised_by_handler(error):
                raise
            if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
                # No descriptors or no memory left for a message that needs its own.
                tasks[leaving].refused = error
                return False
        return True

    def tell(self, item: Outgoing) -> None:
        """Send a message, if the worker is there to hear it."""
        try:
            self.tasks._open_link().outlet.send(item)
        except OSError as error:
            if raised_by_handler(error):
                raise

    def end(self) -> None:
        """Let it end by itself, after what it was sent. Once, though it may be called again."""
        if not self.tasks.closed:
            # Said, too: a process that was forked from this one may hold the channel open.
            self.tell(_call.END_FRAME)
            self.tasks.close()

    def catch_up(self, total: int) -> None:
        """``total`` tasks were meant for it, over its life: let it answer for those that were never sent."""
        if not self.tasks.closed:
            self.tell(_call.order_to_catch_up(total))

    def receive(self, readable: bool, answered: int) -> tuple[deque[Incoming], bool]:
        """What it has sent, in order, and whether that was the end. ``readable``: whether its channel is.

        ``answered``: how many outcomes have been received before.
        """
        found: deque[Any] = deque()
        ended = False
        while True:
            before = len(found)
            self._ring.take(answered, found)
            answered += len(found) - before
            # A gap in the ring: the next one came by the channel.
            if not readable and not self._ring:
                break
            packets, ended = self._receive_packets()
            if not packets:
                break
            if packets[0] == _call.WAKE_FRAME:
                # The one that it is beside was in the ring; another may be behind it.
                continue
            readable = False
            found.extend(packets)
            if self.state != STARTING:
                answered += len(packets)
        self._cell[ANSWERED] = answered
        return found, ended

    def peek(self, answered: int) -> bytes | None:
        """The next outcome, after so many, if it is in the ring, and nothing was logged before it; it stays."""
        return None if self._cell[LOGGED] != self.logged else self._ring.peek(answered)

    def drop(self, answered: int) -> None:
        """So many outcomes have been seen to, with one that ``peek`` found."""
        self._ring.skip(answered)
        self._cell[ANSWERED] = answered

    def _receive_packets(self) -> tuple[deque[Any], bool]:
        """The next that came by the channel, and whether there was the end instead."""
        found: deque[Any] = deque()
        inlet = self.results._open_link().inlet
        try:
            inlet.take_what_is_there(found, 1)
        except EndOfStream:
            return found, True
        except ProtocolError:
            # A task wrote to descriptors that are not its own; nothing it sends can be trusted.
            self.kill()
        except OSError as error:
            # This process has no room for the descriptors of a result: its task fails with that.
            if isinstance(error, NoRoom):
                inlet.drop_next()
            found.append(_call.failure(_call.RAISED, error))
        return found, False

    @property
    def has_more(self) -> bool:
        """Whether there is something to receive that nothing wakes for."""
        return bool(self._ring)

    @property
    def keeps_memory(self) -> bool:
        """Whether this process keeps memory of large tasks or results, for those that may follow."""
        return self.results._open_link().inlet.keeps_memory

    def give_back(self) -> None:
        """Nothing has come for a while: let go of memory that wasn't used for long."""
        self.results._open_link().inlet.give_back()

    # -- the cell ----------------------------------------------------------------------------

    @property
    def started(self) -> int:
        """How many tasks it has begun."""
        return self._cell[STARTED]

    def newly_busy(self) -> float:
        """The seconds it has worked since this was asked last."""
        before, self.busy = self.busy, self._cell[BUSY]
        return (self.busy - before) / 1e9

    def busy_seconds(self) -> float:
        """The seconds it has worked."""
        return self._cell[BUSY] / 1e9

    def has_logged(self) -> bool:
        """Whether it has sent log records since this was asked last."""
        before, self.logged = self.logged, self._cell[LOGGED]
        return self.logged != before

    def recall(self, answered: int, first: int, total: int) -> int:
        """Tell it not to begin the tasks from number ``first`` up to ``total`` (counted over its life).

        ``answered`` tasks are. The number of the first that it will really not begin.
        """
        if answered < self._cell[TAKEN_TO]:
            # It has not come past those that were taken back before; it knows one stretch, so what is between joins.
            first = self._cell[TAKEN_FROM]
        self._cell[TAKEN_FROM] = first
        self._cell[TAKEN_TO] = total
        # Asked after it was told, as the worker tells before it asks.
        fence()
        return max(first, self._cell[STARTED])

    # -- its end -----------------------------------------------------------------------------

    def kill(self) -> None:
        """End it at once. By the pidfd: its number may be another's under forkserver."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def join(self) -> int | None:
        """Wait for its death. The exit code; None where somebody else has it, and doesn't tell.

        Not by the process's ``join``: that waits for who collects it, and the fork server may be stopped, or dead.
        """
        death = select.poll()
        death.register(self.pidfd, select.POLLIN)
        death.poll()
        deadline = time.monotonic() + _EXIT_PATIENCE
        pause = _SHORTEST_PAUSE
        code: int | None = self.process.exitcode
        while code is None and time.monotonic() < deadline:
            # ``multiprocessing.active_children`` in another thread, perhaps: it has it in a moment.
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            code = self.process.exitcode
        if code is not None:
            self.process.close()
        return code

    def close(self) -> None:
        """Give everything up at once: a traceback that somebody keeps may keep this object."""
        self.tasks.close()
        self.results.close()
        self._ring.close()
        self._cell = _ring.BLANK
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)
