"""One thread a process that sends what waits, on every outlet with a backlog, and ends with the last.

Relies on: an outlet is added while its lock is held and its backlog has just become non-empty. The
thread leaves only while it holds ``_lock`` and finds nothing to do, so an outlet that is added
meanwhile either is seen by it or finds no thread and starts one. Locks are taken in one order: an
outlet's, then ours.
"""

from __future__ import annotations

import _thread
import os
import select
import threading
import time
from collections.abc import Callable
from multiprocessing import parent_process, util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._backlog import Backlog

#: How long to wait (seconds) when the kernel refuses though the socket has room: too many descriptors
#: in flight, or memory ran short; no event tells when that ends.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05

#: How long (seconds) a sender that has sent a pack by itself is left alone.
_BREATH = 0.0003

_lock = threading.RLock()
#: Who has, or is about to have, something to send; and the descriptor to poll.
_waiting: dict[Backlog, int] = {}
#: Whether the thread was started, and has not decided to end.
_running = False
#: Who it is (threading.get_ident).
_ident = 0
#: Wakes the thread; open as long as there is one.
_wake = -1
#: Descriptors kept, as long as there is a thread, for the last packets of a process that has used up all others.
_reserve: list[int] = []
_RESERVED = 4
#: Called when a process ends, before what waits is sent: there may be more, waiting elsewhere.
before_rest: list[Callable[[], None]] = []
#: Set when the interpreter ends: from then on what can't be sent at once goes as a last packet.
_ending = False


def add(outlet: Backlog) -> bool:
    """See to it that ``outlet``'s backlog, whose lock is held, is sent; it may still be empty.

    False where no thread can do it. Raises ``OSError`` where there is no descriptor for one.
    """
    if outlet in _waiting:
        return True
    with _lock:
        if _ending:
            return False
        if not _running and not _start():
            return False
        _waiting[outlet] = outlet.fileno()
        if _wake >= 0:
            os.eventfd_write(_wake, 1)
        return True


def _start() -> bool:
    """Start the thread; False where there can't be one. ``_lock`` is held.

    A signal's handler may come in between and call ``add`` itself, or raise. What calls in C return is
    kept by them in ``made`` and ``started``, so that it can't get lost.
    """
    global _running, _wake
    # Asked and said with nothing in between, not even a jump: from here on nobody else starts one.
    if not _running:
        _running = True
    else:
        # A handler has, since the caller asked.
        return True
    made: list[int] = []
    started: list[int] = []
    try:
        made.extend(map(os.eventfd, (0,), (os.EFD_CLOEXEC | os.EFD_NONBLOCK,)))
        _wake = made[0]
        made.extend(map(os.dup, (_wake,) * _RESERVED))
        _reserve.extend(made[1:])
        started.extend(map(_thread.start_new_thread, (_run,), ((),)))
    except RuntimeError:
        # The interpreter is shutting down, or the process has too many.
        return False
    finally:
        if not started:
            _running, _wake = False, -1
            _reserve.clear()
            for fd in made:
                os.close(fd)
    return True


def remove(outlet: Backlog) -> None:
    """``outlet`` has nothing to send any more.

    The thread must hear of it at once: while it polls a socket, the kernel keeps that socket open,
    and its peer would wait for the end of the stream.
    """
    with _lock:
        if _waiting.pop(outlet, None) is not None and _wake >= 0 and threading.get_ident() != _ident:
            os.eventfd_write(_wake, 1)


def _close_wake() -> None:
    global _wake
    fd, _wake = _wake, -1
    if fd >= 0:
        os.close(fd)
    close_reserve()


def close_reserve() -> None:
    """Let go of the descriptors that are kept for the end."""
    list(map(os.close, map(_reserve.pop, [-1] * len(_reserve))))


def _run() -> None:
    global _ident, _running
    _ident = threading.get_ident()
    pause = _SHORTEST_PAUSE
    while True:
        with _lock:
            if not _waiting:
                _running = False
                _ident = 0
                _close_wake()
                return
            outlets = {fd: outlet for outlet, fd in _waiting.items()}
        stalled = busy = False
        for fd in _writable(outlets):
            outlet = outlets[fd]
            if outlet.helped:
                # Its sender keeps sending, and the reader is supplied: for a moment, nothing to do.
                outlet.helped = False
                busy = True
                continue
            before = len(outlet.backlog)
            try:
                stalled |= not outlet.drain() and len(outlet.backlog) >= before
            except OSError:
                # The receiver is gone; the next ``send`` will say so.
                pass
            with outlet.lock:
                if not outlet.backlog:
                    remove(outlet)
        if stalled:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            pause = _SHORTEST_PAUSE
            if busy:
                time.sleep(_BREATH)


def _writable(fds: dict[int, Backlog]) -> list[int]:
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


def send_rest() -> None:
    """What waits leaves now, in one packet a channel."""
    _collect_rest()
    with _lock:
        outlets = list(_waiting)
    for outlet in outlets:
        outlet.spill()


def _collect_rest() -> None:
    for collect in before_rest:
        collect()


def _end() -> None:
    """When the interpreter ends, or a child's target has: before its own children are joined, who may wait for it."""
    global _ending
    _collect_rest()
    # A child of multiprocessing goes on to wait for its threads, and sends what they add when it really ends.
    _ending = parent_process() is None
    send_rest()


def _register_end(_: object = None) -> None:
    util.Finalize(None, _end, exitpriority=5)


def _reset_after_fork() -> None:
    global _ident, _lock, _running, _ending
    _lock = threading.RLock()
    _waiting.clear()
    _running = False
    _ident = 0
    _close_wake()
    _ending = False
    _register_end()


_register_end()
os.register_at_fork(after_in_child=_reset_after_fork)
# A child that multiprocessing starts forgets the finalizers that it inherited, after the hook above.
util.register_after_fork(_register_end, _register_end)
