"""What a pool shares with its workers, and what wakes its thread."""

from __future__ import annotations

import os
import select
import threading

from . import _segment
from ._channel import channel
from ._fd import Fd
from ._lifeline import Lifeline
from ._worker import CELL_WORDS, map_cells


class Commons:
    """Owns all of it; made with the first task, closed with the last worker, and in forked children."""

    def __init__(self, size: int) -> None:
        self.cells = Fd._own(_segment.create_blank(size * CELL_WORDS * 8))
        self._words = map_cells(self.cells.fileno(), size)
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

    def cell(self, slot: int) -> memoryview:
        """The words of one cell."""
        return self._words[slot * CELL_WORDS : (slot + 1) * CELL_WORDS]

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
            self._words.release()
            self.cells.close()
