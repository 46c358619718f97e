"""What a pool shares with its workers, and what wakes its thread."""

from __future__ import annotations

import os
import select
import threading

from .._channel import channel
from .._fd import Fd
from .._segments import _segment
from . import _ring
from ._lifeline import Lifeline
from ._worker import ASLEEP, LOOKED_FOR, Cells


class Commons:
    """Owns all of it; made with the first task, closed with the last worker, and in forked children."""

    def __init__(self, size: int) -> None:
        self.cells_fd = Fd._own(_segment.create_blank(Cells.size(size)))
        self.cells = Cells(self.cells_fd.fileno(), size)
        self._common = self.cells.common
        self.free_slots = list(range(size))
        self.lifeline = Lifeline()
        self.logs_sender, self.logs = channel()
        self.logs_fd = self.logs._open_link().fileno()
        self.epoll = select.epoll()
        #: Reentrant: a finaliser may notify, anywhere.
        self._wake_lock = threading.RLock()
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.epoll.register(self.wake, select.EPOLLIN)
        self.epoll.register(self.logs_fd, select.EPOLLIN)

    def falls_asleep(self) -> None:
        """The thread is about to wait: who has something for it wakes it. It looks once more, after this."""
        self._common[ASLEEP] = 1
        _ring.fence()

    def is_awake(self) -> None:
        """The thread looks at everything: nobody needs to wake it."""
        self._common[ASLEEP] = 0

    def expect_looks(self, expected: bool) -> None:
        """Whether who waits for an outcome comes for it at once, most likely, so that the thread can sleep on."""
        self._common[LOOKED_FOR] = expected

    def notify(self) -> None:
        """Wake the thread, if it is still there."""
        with self._wake_lock:
            if self.wake >= 0:
                os.eventfd_write(self.wake, 1)

    def disown(self) -> None:
        """Close what a forked child has inherited."""
        self._wake_lock = threading.RLock()
        self.close()

    def close(self) -> None:
        with self._wake_lock:
            wake, self.wake = self.wake, -1
        if wake >= 0:
            os.close(wake)
            self.epoll.close()
            self.lifeline.close()
            self.logs_sender.close()
            self.logs.close()
            self._common = _ring.BLANK
            self.cells.close()
            self.cells_fd.close()
