"""What runs in a pool's worker: tasks come in one by one, and each outcome leaves before the next task begins.

So the first task without an outcome is the one that ran when a worker dies. Beside the channels,
parent and worker share a *cell*, a few words of memory: how many tasks were begun, which are taken
back, and how long the worker was busy. Each word has one writer.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from . import _call, _segment
from ._fd import Fd
from ._message import Incoming
from ._receiver import Receiver
from ._sender import Sender
from .errors import Disconnected

#: Words of eight bytes in a cell: a cache line. Those in the middle are the parent's to write, the others the worker's.
CELL_WORDS = 8
STARTED, TAKEN_FROM, TAKEN_TO, BUSY, INITIALIZING = range(5)

#: What a worker sends first: it is ready, or its initializer failed and how.
READY = ("ready",)


def map_cells(fd: int, count: int) -> memoryview:
    """The words of ``count`` cells."""
    return _segment.map_whole(fd, count * CELL_WORDS * 8).cast("Q")


def work(
    tasks: Receiver[Any],
    results: Sender[Any],
    cells: Fd,
    slot: int,
    count: int,
    parent: int,
    initializer: tuple[Callable[..., Any], tuple[Any, ...]] | None,
) -> None:
    """Run tasks until their sender is closed. The target of a worker's process."""
    _end_with(parent)
    # Ctrl-C is the parent's to handle. A handler, not SIG_IGN, which programs that a task starts would inherit.
    signal.signal(signal.SIGINT, _ignore)
    with cells:
        words = map_cells(cells.fileno(), count)
    cell = words[slot * CELL_WORDS : (slot + 1) * CELL_WORDS]
    if initializer is not None:
        function, args = initializer
        cell[INITIALIZING] = 1
        try:
            function(*args)
        except BaseException as error:
            results.send(("failed", f"{type(error).__name__}: {error}"))
            raise
    try:
        results.send(READY)
        _serve(tasks, results, cell)
    except (Disconnected, BrokenPipeError, ConnectionResetError):
        # The pool has ended, or has no use for this worker any more.
        pass


def _serve(tasks: Receiver[Any], results: Sender[Any], cell: memoryview) -> None:
    send = results._open_link().outlet.send_now
    fence = threading.Lock()
    number = 0
    while True:
        incoming: Incoming | None = tasks._take(True, None)
        cell[STARTED] = number + 1
        # Told before asked: the parent asks after it has told. The lock's atomic instruction keeps the order.
        with fence:
            pass
        if cell[TAKEN_FROM] <= number < cell[TAKEN_TO]:
            outcome = _call.SKIPPED_FRAME
        else:
            begun = time.perf_counter_ns()
            assert incoming is not None
            outcome = _call.outcome_of(incoming)
            cell[BUSY] += time.perf_counter_ns() - begun
        # Not kept while waiting for the next.
        incoming = None
        # Waits until the kernel has it: then it counts, whatever the next task does to this process.
        send(outcome)
        del outcome
        number += 1


def _ignore(*_: object) -> None: ...


def _end_with(parent: int) -> None:
    """See to it that this process ends with process ``parent``, in the middle of a task if need be."""
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)
    threading.Thread(target=_watch, args=(pidfd,), name="mp_ipcchan-parent", daemon=True).start()


def _watch(pidfd: int) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll()
    os.kill(os.getpid(), signal.SIGKILL)
