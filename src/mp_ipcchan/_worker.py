"""What runs in a pool's worker: tasks come in one by one, and each outcome leaves before the next task begins.

So the first task without an outcome is the one that ran when a worker dies. Beside the channels,
parent and worker share a *cell*, a few words of memory: how many tasks were begun, which are taken
back, and how long the worker was busy. Each word has one writer.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from . import _call, _logs, _resident, _segment
from ._fd import Fd
from ._lifeline import end_with, ignore_interrupts
from ._message import Incoming
from ._receiver import Receiver
from ._sender import Sender
from .errors import Disconnected

#: Words of eight bytes in a cell: a cache line. Two are the parent's to write, the others the worker's.
CELL_WORDS = 8
STARTED, TAKEN_FROM, TAKEN_TO, BUSY, INITIALIZING, LOGGED = range(6)

#: What a worker sends first: it is ready, or not, and why.
READY = ("ready",)


class Setup(NamedTuple):
    """What all workers of a pool are started with."""

    initializer: tuple[Callable[..., Any], tuple[Any, ...]] | None
    #: Bytes; None for any number.
    max_memory: int | None


def map_cells(fd: int, count: int) -> memoryview:
    """The words of ``count`` cells."""
    return _segment.map_whole(fd, count * CELL_WORDS * 8).cast("Q")


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
        words = map_cells(cells.fileno(), count)
    cell = words[slot * CELL_WORDS : (slot + 1) * CELL_WORDS]

    def logged() -> None:
        cell[LOGGED] += 1

    # The link, not the endpoint: processes that a task forks close that, and may log, too.
    _logs.forward(logs._open_link().retain(), levels, logged)
    # A forked worker has the context of whoever happened to start it: the tasks of others have nothing to do with that.
    contextvars.Context().run(_initialize_and_serve, tasks, results, cell, setup)


def _initialize_and_serve(tasks: Receiver[Any], results: Sender[Any], cell: memoryview, setup: Setup) -> None:
    try:
        if setup.initializer is not None:
            function, args = setup.initializer
            cell[INITIALIZING] = 1
            try:
                function(*args)
            except BaseException as error:
                results.send(("failed", f"the initializer of a worker failed: {type(error).__name__}: {error}"))
                raise
        if setup.max_memory is not None and (size := _resident.resident()) > setup.max_memory:
            results.send(("failed", _too_large_from_the_start(size, setup.max_memory)))
            return
        results.send(READY)
        _serve(tasks, results, cell, setup.max_memory)
    except (Disconnected, BrokenPipeError, ConnectionResetError):
        # The pool has ended, or has no use for this worker any more.
        pass


def _too_large_from_the_start(size: int, limit: int) -> str:
    return (
        f"a worker has {_resident.readable(size)} before its first task, more than max_memory_per_child="
        f"{_resident.readable(limit)}: allow more, or start workers by spawn or forkserver, which inherit nothing"
    )


def _serve(tasks: Receiver[Any], results: Sender[Any], cell: memoryview, max_memory: int | None) -> None:
    send = results._open_link().outlet.send_now
    fence = threading.Lock()
    now = time.perf_counter_ns
    number = 0
    while True:
        incoming: Incoming | None = tasks._take(True, None)
        if incoming == _call.END_FRAME:
            return
        cell[STARTED] = number + 1
        # Told before asked: the parent asks after it has told. The lock's atomic instruction keeps the order.
        with fence:
            pass
        if cell[TAKEN_FROM] <= number < cell[TAKEN_TO]:
            # It was not begun after all, should this process die now.
            cell[STARTED] = number
            outcome = _call.SKIPPED_FRAME
        else:
            begun = now()
            assert incoming is not None
            outcome = _call.outcome_of(incoming)
            cell[BUSY] += now() - begun
        # Not kept while waiting for the next.
        incoming = None
        try:
            # Waits until the kernel has it: then it counts, whatever the next task does to this process.
            send(outcome)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except OSError as error:
            # No descriptors or memory left for a large result. The text of it needs neither.
            send(_call.failure(_call.RAISED, error))
        del outcome
        number += 1
        if max_memory is not None and _resident.resident() > max_memory:
            # What is kept from task to task would count against the next one: a fresh worker takes it.
            return
