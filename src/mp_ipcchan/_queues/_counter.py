"""Counters that travel: a number that processes share without a lock, as an eventfd."""

from __future__ import annotations

import os
import select

from .._deadline import wait_for


class Counter:
    """A number, readable for ``poll`` while it is not zero. Owns its descriptor."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def of(cls, value: int) -> Counter:
        """A counter that is taken from one by one."""
        return cls(os.eventfd(value, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE))

    @classmethod
    def flag(cls) -> Counter:
        """A counter that is emptied by one ``take``."""
        return cls(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def fileno(self) -> int:
        return self._fd

    def add(self, number: int) -> None:
        if number:
            os.eventfd_write(self._fd, number)

    def take(self) -> bool:
        """Take one (of a flag: all) away; False where there is none."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return False
        return True

    def await_some(self, deadline: float | None) -> bool:
        """Wait until it is not zero; False at the deadline (monotonic seconds)."""
        return wait_for(self._fd, select.POLLIN, deadline)

    @property
    def is_zero(self) -> bool:
        return not self.await_some(0.0)

    def __del__(self) -> None:
        os.close(self._fd)
