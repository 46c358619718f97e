"""Watching a child while waiting for something of it: whether it is still there to come."""

from __future__ import annotations

import os
import select
from multiprocessing.process import BaseProcess
from subprocess import Popen
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Self

#: What can be watched: a started child, of ``multiprocessing`` (any context) or ``subprocess``.
Mortal: TypeAlias = "BaseProcess | Popen[Any]"


class Watch:
    """Tells whether a process has ended; where there is none to watch, never."""

    __slots__ = ("_dead", "_pidfd", "_process", "fds")

    def __init__(self, process: Mortal | None) -> None:
        self._process = process
        #: Readable when it has ended.
        self.fds: tuple[int, ...] = ()
        self._pidfd = -1
        self._dead = False
        if process is None:
            return
        if isinstance(process, BaseProcess):
            if process.pid is None:
                raise ValueError(f"{process!r} has not been started")
            self.fds = (process.sentinel,)
        elif isinstance(process, Popen):
            self._dead = process.poll() is not None
            if not self._dead:
                self._pidfd = os.pidfd_open(process.pid)
                self.fds = (self._pidfd,)
        else:
            raise TypeError(f"process is one of multiprocessing or a subprocess.Popen, not {process!r}")

    def ended(self) -> bool:
        if self.fds and not self._dead:
            poller = select.poll()
            poller.register(self.fds[0], select.POLLIN)
            self._dead = bool(poller.poll(0))
        return self._dead

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def __str__(self) -> str:
        return repr(self._process)
