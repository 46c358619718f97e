"""One thread a process that sends what waits, on every outlet with a backlog, and ends with the last.

Relies on: an outlet is added while its lock is held and its backlog has just become non-empty. The
thread leaves only while it holds ``_lock`` and finds nothing to do, so an outlet that is added
meanwhile either is seen by it or finds no thread and starts one. Locks are taken in one order: an
outlet's, then ours.
"""

from __future__ import annotations

import os
import select
import threading
import time
from multiprocessing import util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._outlet import Outlet

#: How long to wait (seconds) when the kernel refuses though the socket has room: too many descriptors
#: in flight, or memory ran short; no event tells when that ends.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05

_lock = threading.RLock()
_waiting: dict[Outlet, int] = {}
_thread: threading.Thread | None = None
_wake = -1
#: Set when the process ends: from then on what can't be sent at once goes as a last packet.
_ending = False


def add(outlet: Outlet) -> None:
    """See to it that ``outlet``'s backlog is sent."""
    global _thread, _wake
    with _lock:
        if not _ending:
            _waiting[outlet] = outlet.fileno()
            if _thread is not None:
                os.eventfd_write(_wake, 1)
                return
            _wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            _thread = threading.Thread(target=_run, name="mp_ipcchan-drainer", daemon=True)
            try:
                _thread.start()
                return
            except RuntimeError:
                # No thread can be started: the interpreter is shutting down, or the process has too many.
                os.close(_wake)
                _thread = None
                del _waiting[outlet]
    outlet.spill()


def remove(outlet: Outlet) -> None:
    """``outlet`` has nothing to send any more.

    The thread must hear of it at once: while it polls a socket, the kernel keeps that socket open,
    and its peer would wait for the end of the stream.
    """
    with _lock:
        if _waiting.pop(outlet, None) is not None and threading.current_thread() is not _thread:
            os.eventfd_write(_wake, 1)


def _run() -> None:
    global _thread
    pause = _SHORTEST_PAUSE
    while True:
        with _lock:
            if not _waiting:
                _thread = None
                os.close(_wake)
                return
            outlets = {fd: outlet for outlet, fd in _waiting.items()}
        stalled = False
        for fd in _writable(outlets):
            outlet = outlets[fd]
            before = len(outlet.backlog)
            try:
                stalled |= not outlet.drain() and len(outlet.backlog) >= before
            except OSError:
                # The receiver is gone; the next ``send`` will say so.
                pass
        if stalled:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            pause = _SHORTEST_PAUSE


def _writable(fds: dict[int, Outlet]) -> list[int]:
    """Wait until some of the sockets take something, or until woken; those that do."""
    poller = select.poll()
    poller.register(_wake, select.POLLIN)
    for fd in fds:
        poller.register(fd, select.POLLOUT)
    events = poller.poll()
    try:
        os.eventfd_read(_wake)
    except BlockingIOError:
        pass
    return [fd for fd, _ in events if fd != _wake]


def _send_rest() -> None:
    """At the end of the process: everything that waits leaves now, in one packet a channel."""
    global _ending
    with _lock:
        _ending = True
        outlets = list(_waiting)
    for outlet in outlets:
        outlet.spill()


def _register_end(_: object = None) -> None:
    # Before multiprocessing joins this process's children, which may be waiting for our messages.
    util.Finalize(None, _send_rest, exitpriority=5)


def _reset_after_fork() -> None:
    global _lock, _thread, _ending
    _lock = threading.RLock()
    _waiting.clear()
    if _thread is not None:
        os.close(_wake)
        _thread = None
    _ending = False
    _register_end()


_register_end()
os.register_at_fork(after_in_child=_reset_after_fork)
# A child that multiprocessing starts forgets the finalizers that it inherited, after the hook above.
util.register_after_fork(_register_end, _register_end)
