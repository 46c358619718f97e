"""Wakers: they let ``poll`` and its like see messages that wait in user space."""

from __future__ import annotations

import os
import select
import socket


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
