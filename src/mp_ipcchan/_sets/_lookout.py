"""What a set waits for: descriptors, all in one epoll descriptor, and a bell in it for what none of them shows.

The bell is an eventfd. It is rung for messages that wait in user space, for what another thread does to the set,
and by members without a descriptor, which call (``call``), from whatever thread, when something has come for them.

Relies on: a descriptor leaves before it is closed or moves. One that is open elsewhere would go on firing, and could
not be taken out by anybody. All but ``call``, ``ring`` and ``wait`` are for one thread at a time.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Lookout(Generic[T]):
    __slots__ = ("_bell", "_called", "_epoll", "_rung")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell = -1
        try:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll.register(self._bell, select.EPOLLIN)
        except BaseException:
            self.close()
            raise
        #: Whether the bell is rung, or just about to be. Known to be so, it isn't rung again.
        self._rung = False
        #: Who has called, and wasn't heard yet.
        self._called: deque[T] = deque()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def enter(self, fd: int) -> None:
        """Look out for ``fd``. Raises what ``epoll.register`` does."""
        self._epoll.register(fd, select.EPOLLIN)

    def leave(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except OSError:
            # Its owner has closed it: then the kernel has done this. Or it was never in.
            pass

    def wait(self, seconds: float) -> bool:
        """Wait until anything happens; False when the time is over."""
        return bool(self._epoll.poll(seconds, 1))

    def ready(self, most: int) -> list[int]:
        """Descriptors that have something now, those first whose turn is next."""
        fds = [fd for fd, _ in self._epoll.poll(0, most)]
        if self._bell in fds:
            fds.remove(self._bell)
            self._rung = True
        return fds

    def call(self, who: T) -> None:
        """Something has come for ``who``."""
        self._called.append(who)
        self.ring()

    def callers(self) -> Iterable[T]:
        """Those who have called; each is told once."""
        return self._take_callers() if self._called else ()

    def _take_callers(self) -> Iterator[T]:
        while self._called:
            yield self._called.popleft()

    def ring(self) -> None:
        """End a wait, or the next one."""
        if not self._rung and self._bell >= 0:
            # In this order: who calls, and finds it rung, relies on ``hush``.
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def hush(self) -> None:
        """Let the next wait last until something happens; unless somebody has called meanwhile."""
        if not self._rung:
            return
        self._rung = False
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            pass
        if self._called:
            # Perhaps rung between the two, and not heard now.
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        self._epoll.close()
        fd, self._bell = self._bell, -1
        if fd >= 0:
            os.close(fd)
