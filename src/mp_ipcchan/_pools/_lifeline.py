"""Workers end with the process that has them, whatever they are doing.

The parent keeps the writing end of a pipe, and nobody else has it. Each worker opens the reading end
anew, so that the open file is its own, and asks the kernel to send it SIGKILL when something happens
there (O_ASYNC); what happens is the end of the parent. That needs no thread in the worker, nor
the interpreter's lock, which a task in C code may hold for hours.

Parent-death signals (PR_SET_PDEATHSIG) would not do: they come when the *thread* ends that started the
worker, and under forkserver for the wrong process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

from .._fd import Fd

#: The fcntl module has no name for it (Linux, all architectures).
_F_SETSIG = 10


class Lifeline:
    """What a parent keeps. Closed in forked children, or they would keep the workers alive."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self._reading = Fd._own(reading)
        self._writing = Fd._own(writing)

    def end(self) -> Fd:
        """For a worker to call ``end_with`` with; the caller closes it once the worker is started."""
        return Fd(self._reading)

    def close(self) -> None:
        """Workers that are left end now."""
        self._writing.close()
        self._reading.close()


def end_with(end: Fd) -> None:
    """See to it that this process is killed when the one ends that made the lifeline. Closes ``end``."""
    with end:
        own = os.open(f"/proc/self/fd/{end.fileno()}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(own, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    poller = select.poll()
    poller.register(own, 0)
    if poller.poll(0):
        # It ended before we asked.
        os._exit(1)


@contextlib.contextmanager
def interrupts_held_back(method: str) -> Iterator[None]:
    """Ctrl-C waits while a worker is started, which inherits that and lets it come once it ignores it.

    Not so under forkserver: all of the server's children would inherit it, if we are the ones who start it.
    """
    if method == "forkserver":
        yield
        return
    if method == "spawn":
        # First: it lets SIGINT through as it is started.
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """Ctrl-C is the parent's to handle. A handler, not SIG_IGN, which programs that a task starts would inherit."""
    signal.signal(signal.SIGINT, _ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))


def _ignore(*_: object) -> None: ...
