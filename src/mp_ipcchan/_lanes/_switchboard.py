"""The switchboard: who listens to the sockets that many lanes share, and how others hear of what came.

No thread is needed for it as a rule: whoever waits for a message listens, to all the sockets, hands
out whatever comes, and wakes those whose it is. Of several who wait one *leads*, that is, listens; when
it leaves, it wakes another to lead. A thread of the process listens while something is to be done that
nobody may be waiting for (``need``): a backlog that waits for the other side's grant, a lane that was
passed on to another process, a descriptor that somebody polls.

Guarantees: everything about lanes changes under one lock, ``lock``, which is never held while anything
waits. Finalisers and what a message tells its handles come with locks of others held: they ``post`` what is
to be done, and it is done at once if the lock is free, else by its holder.
Relies on: whoever holds the lock when something is posted in the same thread calls ``settle`` when it has let go.
Where another thread has the lock, one that is started for that waits for it.
Locks are taken in one order: ``lock``, then those of outlets, then the drainer's.
"""

from __future__ import annotations

import _thread
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from .._deadline import deadline_in, wait_for
from .._interrupt import raised_by_handler
from .._message import TooLargeError

#: How long to wait (seconds) before something is tried again that no event tells of.
_PAUSE = 0.02

lock = threading.RLock()
#: To be done under the lock, by whoever gets it. What a signal's handler interrupts is done again, from its beginning.
posted: deque[Callable[[], None]] = deque()


class Source(Protocol):
    """Something to listen to."""

    def fileno(self) -> int: ...

    @property
    def holding(self) -> bool:
        """Whether something has come that waits in user space, as a signal's handler came between."""

    def pump(self) -> object:
        """Hand out what has come, without waiting. Raises ``OSError`` where that can't be done now."""


class _Waiter:
    """Who waits in a thread of its own: an eventfd to wake it by."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self) -> None:
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class _Board:
    """What the process has, replaced as a whole in a forked child."""

    def __init__(self) -> None:
        self.epoll: select.epoll | None = None
        self.sources: dict[int, Source] = {}
        #: Who waits, and for what.
        self.waiting: dict[_Waiter, object] = {}
        self.leader: _Waiter | None = None
        #: Whether a thread is about to do what was posted.
        self.settling = False
        #: Waiters that nobody uses now.
        self.spare: list[_Waiter] = []
        #: What the thread is there for.
        self.needs: set[object] = set()
        #: To be called again and again until that is true.
        self.retries: list[Callable[[], bool]] = []
        #: The thread's, as long as there is one.
        self.thread: _Waiter | None = None


_board = _Board()


# -- things to be done under the lock, by those who must not wait for it -----------------------


def post(action: Callable[[], None]) -> None:
    """Have ``action`` called under the lock: now, or as soon as its holder lets go.

    Where a signal's handler raises in it, it is called again.
    """
    try:
        posted.append(action)
        settle()
    except BaseException:
        settle_later()
        raise


def settle() -> None:
    """Do what was posted while this thread held the lock."""
    while posted:
        if lock._is_owned():  # type: ignore[attr-defined]
            return
        held: list[bool] = []
        try:
            # Taken and noted in one C call, so that a signal's handler can't leave it locked.
            held.extend(map(lock.acquire, (False,)))
            if held[0]:
                for _ in range(len(posted)):
                    _do_first()
        except BaseException:
            settle_later()
            raise
        finally:
            if held and held[0]:
                lock.release()
        if not held[0]:
            settle_later()
            return


def _do_first() -> None:
    try:
        posted[0]()
    except BaseException as error:
        if not raised_by_handler(error):
            posted.popleft()
        raise
    # Not before: where a handler comes between, it is done again.
    posted.popleft()


def post_again(action: Callable[[], None]) -> None:
    """As ``post``, but later: a signal's handler has raised in the middle of ``action``, which may be begun anew."""
    posted.append(action)


def settle_later() -> None:
    """Have a thread wait for the lock, and ``settle``; who is here must not, or was interrupted."""
    if posted and not _board.settling:
        _board.settling = True
        try:
            _thread.start_new_thread(_settle_in_thread, ())
        except RuntimeError:
            # The interpreter is shutting down: whatever it is about ends with the process.
            _board.settling = False


def _settle_in_thread() -> None:
    with lock:
        _board.settling = False
    settle()


# -- listening ---------------------------------------------------------------------------------


def listen(source: Source, active: bool = True) -> None:
    """Hand out what comes from ``source`` from now on; not ``active``: not now. Raises ``OSError``."""
    with lock:
        fd = source.fileno()
        prepare()
        assert _board.epoll is not None
        events = select.EPOLLIN if active else 0
        if _board.sources.get(fd) is source:
            _board.epoll.modify(fd, events)
        else:
            _board.epoll.register(fd, events)
            _board.sources[fd] = source


def prepare() -> None:
    """Have what ``listen`` needs. Raises ``OSError`` where no descriptor is left for it."""
    with lock:
        if _board.epoll is None:
            _board.epoll = select.epoll()


def forget(source: Source) -> None:
    """Listen to ``source`` no longer; its descriptor is still open."""
    with lock:
        fd = source.fileno()
        if _board.sources.get(fd) is source:
            del _board.sources[fd]
            if _board.epoll is not None:
                _board.epoll.unregister(fd)
        _tidy()


def _tidy() -> None:
    """Close what nobody uses. The lock is held."""
    if not _board.sources and not _board.waiting and _board.thread is None and _board.epoll is not None:
        epoll, _board.epoll = _board.epoll, None
        epoll.close()
        for waiter in _board.spare:
            waiter.close()
        _board.spare.clear()


def come_back() -> None:
    """Have somebody look for sources that are ``holding``, which the kernel doesn't know of."""
    with lock:
        for waiter in filter(None, (_board.leader, _board.thread)):
            waiter.wake()


def pump_all() -> bool:
    """Hand out what has come, from whatever source; False where some of it can't be now."""
    good = True
    try:
        with lock:
            ready = _board.epoll.poll(0) if _board.epoll is not None else []
            fds = {fd for fd, _ in ready}
            for source in [one for fd, one in _board.sources.items() if fd in fds or one.holding]:
                try:
                    source.pump()
                except OSError:
                    good = False
    finally:
        settle()
    return good


def wait(key: object, done: Callable[[], bool], deadline: float | None) -> bool:
    """Wait until ``done`` (called with the lock held) is true, which ``wake(key)`` announces; listen meanwhile.

    False at the deadline (monotonic seconds). True also where something came that can't be handed out, for the
    caller to run into.
    """
    if deadline is not None and deadline <= monotonic():
        with lock:
            return done()
    try:
        waiter = _board.spare.pop()
    except IndexError:
        waiter = _Waiter()
    try:
        while True:
            with lock:
                _board.waiting[waiter] = key
                if done():
                    return True
                if _board.leader is None:
                    _board.leader = waiter
                leads = _board.leader is waiter
                others = (_board.epoll.fileno(),) if leads and _board.epoll is not None else ()
            settle()
            in_time = wait_for(waiter.fd, select.POLLIN, deadline, *others)
            waiter.clear()
            if leads and not pump_all():
                return True
            if not in_time:
                with lock:
                    return done()
    finally:
        with lock:
            _board.waiting.pop(waiter, None)
            if _board.leader is waiter:
                _board.leader = None
                for other in _board.waiting:
                    other.wake()
                    break
            waiter.clear()
            _board.spare.append(waiter)
            _tidy()
        settle()


def wake(key: object) -> None:
    """Wake those who wait for ``key``. The lock is held."""
    for waiter, other in _board.waiting.items():
        if other is key:
            waiter.wake()


# -- the thread --------------------------------------------------------------------------------


def need(reason: object) -> bool:
    """See to it that somebody listens, until ``done_with(reason)``; False where no thread can be started."""
    with lock:
        _board.needs.add(reason)
        if _board.thread is not None:
            _board.thread.wake()
            return True
        board, waiter, started = _board, _Waiter(), list[int]()
        # Asked again and said with no call in between: a signal's handler may have started one.
        if board.thread is not None:
            waiter.close()
            board.thread.wake()
            return True
        board.thread = waiter
        try:
            started.extend(map(_thread.start_new_thread, (_run,), ((board, waiter),)))
        except RuntimeError:
            # The interpreter is shutting down, or the process has too many.
            return False
        finally:
            if not started:
                board.thread = None
                board.needs.discard(reason)
        return True


def done_with(reason: object) -> None:
    """The opposite of ``need``."""
    with lock:
        _board.needs.discard(reason)
        if not _board.needs and _board.thread is not None:
            _board.thread.wake()
    settle()


def retry(action: Callable[[], bool]) -> None:
    """Have the thread call ``action`` every now and then until that is true. Needed by somebody, it is there."""
    with lock:
        if action not in _board.retries:
            _board.retries.append(action)
        if _board.thread is not None:
            _board.thread.wake()


def _run(board: _Board, waiter: _Waiter) -> None:
    while True:
        with lock:
            if not board.needs:
                board.thread = None
                waiter.close()
                _tidy()
                break
            epoll = (board.epoll.fileno(),) if board.epoll is not None else ()
            pending = bool(board.retries)
        settle()
        wait_for(waiter.fd, select.POLLIN, deadline_in(_PAUSE) if pending else None, *epoll)
        waiter.clear()
        try:
            good = pump_all()
        except TooLargeError:
            # Of what an ended process left behind: nobody here can be told.
            good = True
        if not good:
            time.sleep(_PAUSE)
        if pending:
            with lock:
                again, board.retries = board.retries, []
                board.retries += [action for action in again if not action()]
    settle()


def _reset_after_fork() -> None:
    """In a forked child: what was listened to is the parent's."""
    global lock, _board
    lock = threading.RLock()
    posted.clear()
    old, _board = _board, _Board()
    if old.epoll is not None:
        old.epoll.close()
    for waiter in [*old.waiting, *old.spare, old.thread]:
        if waiter is not None:
            waiter.close()


def _acquire() -> None:
    lock.acquire()


def _release() -> None:
    lock.release()


# Held over a fork: what finalisers post in the child, before it is reset, is not done there.
os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_reset_after_fork)
