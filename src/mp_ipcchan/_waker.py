"""Wakers: they let ``poll`` and its like see messages that wait in user space. Waiting for one of two sockets."""

from __future__ import annotations

import os
import select
import socket

from ._deadline import LONGEST, remaining, wait_for


class Waker:
    """A descriptor, ``epoll``, that is readable while there is something in the socket, or it is ``set``."""

    def __init__(self, sock: socket.socket, front: socket.socket | None) -> None:
        self.epoll: select.epoll = select.epoll()
        if front is not None:
            self.epoll.register(front.fileno(), select.EPOLLIN)
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.epoll.register(sock.fileno(), select.EPOLLIN)
        self.epoll.register(self._event, select.EPOLLIN)

    def set(self) -> None:
        os.eventfd_write(self._event, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            pass

    def close(self) -> None:
        # The epoll set first: the socket may stay open in another process, and would go on firing.
        self.epoll.close()
        # Called again where a signal's handler came behind it: by then the number may be somebody else's.
        fd, self._event = self._event, -1
        if fd >= 0:
            os.close(fd)


#: Of threads that wait. A forked child has the descriptors, and not the threads.
_pollers: set[select.epoll] = set()


def wait_for_either(fd: int, other: int, deadline: float | None) -> bool:
    """Wait until one of two is readable; False at the deadline.

    Of several processes that wait for ``fd``, what comes there wakes one.
    """
    left = remaining(deadline)
    try:
        poller = select.epoll() if left != 0 else None
    except OSError:
        # No descriptor is free: then all are woken.
        poller = None
    if poller is None:
        return wait_for(fd, select.POLLIN, deadline, other)
    try:
        _pollers.add(poller)
        poller.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        poller.register(other, select.EPOLLIN)
        while True:
            left = remaining(deadline)
            if poller.poll(None if left is None else min(left, LONGEST / 1000)):
                return True
            if left is not None and left * 1000 <= LONGEST:
                return False
    finally:
        _pollers.discard(poller)
        poller.close()


def _reset_after_fork() -> None:
    for poller in _pollers:
        poller.close()
    _pollers.clear()


os.register_at_fork(after_in_child=_reset_after_fork)
