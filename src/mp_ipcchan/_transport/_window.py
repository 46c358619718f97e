"""A window on a file: what lies there is read in stretches, with few system calls."""

from __future__ import annotations

import os

from ..errors import ProtocolError

#: How much is read ahead (bytes).
_AHEAD = 8192
#: No more than this is kept (bytes): something large is not held longer than its reader does.
_MOST_KEPT = 1 << 17


class Window:
    """Reads stretches of a file, mostly each a bit further on, with few system calls."""

    __slots__ = ("_fd", "_held", "_size")

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        #: Where what was read begins, and what it is. Replaced at one go: several threads may be reading.
        self._held = (0, b"")

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to before ``end``. ``ProtocolError`` where there are fewer."""
        at, data = self._held
        if not at <= start <= end <= at + len(data):
            if end <= self._size:
                data = _read_at(self._fd, start, max(end - start, min(_AHEAD, self._size - start)))
            if start + len(data) < end or end > self._size:
                raise ProtocolError("the last packet of a process is shorter than it says")
            at = start
            self._held = (at, data) if len(data) <= _MOST_KEPT else (0, b"")
        return data[start - at : end - at]


def _read_at(fd: int, position: int, size: int) -> bytes:
    """Up to ``size`` bytes, less only where the file ends. One system call reads 2 GiB at most."""
    pieces = []
    while size:
        piece = os.pread(fd, size, position)
        if not piece:
            break
        pieces.append(piece)
        position += len(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
