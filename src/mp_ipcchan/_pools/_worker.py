"""What runs in a pool's worker: tasks come in one by one, and each outcome leaves before the next task begins.

So the first task without an outcome is the one that ran when a worker dies. Beside the channels,
parent and worker share a *cell*, a few words of memory: how many tasks were begun, which are taken
back, and how long the worker was busy. Each word has one writer.
"""

from __future__ import annotations

import contextvars
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from .._fd import Fd
from .._message import Incoming, Outgoing
from .._receiver import Receiver
from .._segments import _segment
from .._sender import Sender
from ..errors import Disconnected
from . import _call, _logs, _resident, _ring
from ._lifeline import end_with, ignore_interrupts

#: Words of eight bytes in a cell, two cache lines: the worker writes to the first, the parent to the other.
CELL_WORDS = 16
STARTED, BUSY, LOGGED, HEAD = range(4)
TAKEN_FROM, TAKEN_TO, TAIL, ANSWERED = range(8, 12)
#: Words of the cell behind all others: whether the parent's thread sleeps, or is about to; and whether the thread that
#: waits for an outcome has come in time, last, to take it itself.
ASLEEP, LOOKED_FOR = range(2)
#: For how long (nanoseconds) a worker waits for that one, before it wakes the other.
_COURTESY = 20_000
#: And how often it looks for its next task then, before it sleeps; about a microsecond each.
_EAGER = 64

#: What a worker sends first: it is ready, or not, and why.
READY = ("ready",)
#: A worker that, between two tasks, has grown by so much of what it may is replaced: not a task for what others left.
_GROWTH = 0.75


class Setup(NamedTuple):
    """What all workers of a pool are started with."""

    initializer: tuple[Callable[..., Any], tuple[Any, ...]] | None
    #: Bytes; None for any number.
    max_memory: int | None


class Cells:
    """The memory that a parent shares with ``count`` workers: a cell and a ring for each, and a cell for all."""

    def __init__(self, fd: int, count: int) -> None:
        self._all = _segment.map_whole(fd, self.size(count))
        self._count = count

    @staticmethod
    def size(count: int) -> int:
        """The bytes it takes."""
        return (count + 1) * CELL_WORDS * 8 + count * _ring.SIZE

    def cell(self, slot: int) -> memoryview:
        """The words of a worker."""
        return self._all[slot * CELL_WORDS * 8 : (slot + 1) * CELL_WORDS * 8].cast("Q")

    def ring(self, slot: int) -> memoryview:
        """The ring that a worker writes its outcomes to."""
        begin = (self._count + 1) * CELL_WORDS * 8 + slot * _ring.SIZE
        return self._all[begin : begin + _ring.SIZE]

    @property
    def common(self) -> memoryview:
        """The words that concern all."""
        return self.cell(self._count)

    def close(self) -> None:
        """Forget the memory; it goes with the last view of it."""
        self._all.release()


def work(
    tasks: Receiver[Any],
    results: Sender[Any],
    slot: int,
    cells: Fd,
    count: int,
    lifeline: Fd,
    logs: Sender[Any],
    levels: _logs.Levels,
    setup: Setup,
) -> None:
    """Run tasks until there are no more. The target of a worker's process."""
    ignore_interrupts()
    end_with(lifeline)
    with cells:
        memory = Cells(cells.fileno(), count)
    cell = memory.cell(slot)

    def logged() -> None:
        cell[LOGGED] += 1

    # The link, not the endpoint: processes that a task forks close that, and may log, too.
    _logs.forward(logs._open_link().retain(), levels, logged)
    # A forked worker has the context of whoever happened to start it: the tasks of others have nothing to do with that.
    outbox = _Outbox(results, cell, memory.ring(slot), memory.common)
    contextvars.Context().run(_initialize_and_serve, tasks, results, cell, outbox, setup)


class _Outbox:
    """Where outcomes leave: by the ring while the parent is awake, else by the channel, which wakes it.

    It is woken once: until it has taken notice, the ring will do, for it looks there before it sleeps again.
    """

    def __init__(self, results: Sender[Any], cell: memoryview, ring: memoryview, common: memoryview) -> None:
        self._send = results._open_link().outlet.send_now
        self._ring = _ring.Writer(ring, cell, HEAD, TAIL)
        self._cell = cell
        self._common = common
        #: How many answers the parent has when it has taken notice of what was sent last by the channel.
        self._noticed = 0

    def send(self, number: int, outcome: Outgoing) -> None:
        """Hand over the outcome of a task. Then it counts, whatever the next task does to this process."""
        common = self._common
        asleep = common[ASLEEP] and self._cell[ANSWERED] >= self._noticed
        if (not asleep or common[LOOKED_FOR]) and outcome.__class__ is bytes and self._ring.put(number, outcome):
            # It may have gone to sleep meanwhile. It says so before it looks, as we write before we ask.
            _ring.fence()
            if common[ASLEEP] and self._cell[ANSWERED] >= self._noticed and not self._is_awaited():
                self._noticed = number + 1
                self._send(_call.WAKE_FRAME)
            return
        self._noticed = number + 1
        try:
            self._send(outcome)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except OSError as error:
            # No descriptors or memory left for a large result. The text of it needs neither.
            self._send(_call.failure(_call.RAISED, error))

    def is_looked_for(self) -> int:
        """Whether who waits for an outcome takes it at once, as far as known."""
        return self._common[LOOKED_FOR]

    def _is_awaited(self) -> bool:
        """Whether somebody comes in a moment for what was put in the ring."""
        common = self._common
        until = time.perf_counter_ns() + _COURTESY
        while True:
            if not common[ASLEEP]:
                return True
            if not common[LOOKED_FOR] or time.perf_counter_ns() > until:
                return False


def _initialize_and_serve(
    tasks: Receiver[Any], results: Sender[Any], cell: memoryview, outbox: _Outbox, setup: Setup
) -> None:
    try:
        if setup.initializer is not None:
            function, args = setup.initializer
            try:
                function(*args)
            except BaseException as error:
                results.send(("failed", f"the initializer of a worker failed: {type(error).__name__}: {error}"))
                raise
        enough: float | None = None
        if setup.max_memory is not None:
            size = _resident.resident()
            if size > setup.max_memory:
                results.send(("failed", _too_large_from_the_start(size, setup.max_memory)))
                return
            enough = size + _GROWTH * (setup.max_memory - size)
        results.send(READY)
        _serve(tasks, outbox, cell, enough)
    except (Disconnected, BrokenPipeError, ConnectionResetError):
        # The pool has ended, or has no use for this worker any more.
        pass


def _too_large_from_the_start(size: int, limit: int) -> str:
    return (
        f"a worker has {_resident.readable(size)} before its first task, more than max_memory_per_child="
        f"{_resident.readable(limit)}: allow more, or start workers by spawn or forkserver, which inherit nothing"
    )


def _leave(outcome: Outgoing) -> NoReturn:
    """End a process that a task forked and that has come back from it: it is no worker, and must not answer."""
    kind, *rest = _call.decode(outcome) if isinstance(outcome, bytes) else (_call.DONE,)
    if kind != _call.DONE:
        os.write(2, f"in a process that a task forked:\n{rest[0]}".encode())
    os._exit(kind != _call.DONE)


def _serve(tasks: Receiver[Any], outbox: _Outbox, cell: memoryview, enough: float | None) -> None:
    now = time.perf_counter_ns
    own = os.getpid()
    expect = tasks._open_link().inlet.expect
    number = 0
    while True:
        incoming: Incoming | None = tasks._take(True, None)
        if isinstance(incoming, bytes) and incoming.startswith(_call.ORDER):
            total = _call.ordered(incoming)
            if total < 0:
                return
            # A signal's handler has interrupted the parent as it sent tasks: those that it counts and that have not
            # come never will.
            for missing in range(number, total):
                outbox.send(missing, _call.SKIPPED_FRAME)
            number = max(number, total)
            continue
        cell[STARTED] = number + 1
        # Told before asked: the parent asks after it has told.
        _ring.fence()
        if cell[TAKEN_FROM] <= number < cell[TAKEN_TO]:
            # It was not begun after all, should this process die now.
            cell[STARTED] = number
            outcome = _call.SKIPPED_FRAME
        else:
            begun = now()
            assert incoming is not None
            outcome = _call.outcome_of(incoming)
            if os.getpid() != own:
                _leave(outcome)
            cell[BUSY] += now() - begun
        # Not kept while waiting for the next.
        incoming = None
        outbox.send(number, outcome)
        if outbox.is_looked_for():
            # Who has got it may send the next one at once.
            expect(_EAGER)
        del outcome
        number += 1
        if enough is not None and _resident.resident() > enough:
            # What is kept from task to task would count against the next one: a fresh worker takes that.
            return
