"""Small outcomes in memory that a worker and its parent share: neither makes a system call for them.

A ring of records, each its number, its size and a frame. One process writes, the other reads. A head and a tail
count the bytes written and read, and only grow; a record counts once the head is past it, so a writer that is
killed leaves none half-written. What has no room goes another way, and the numbers tell the reader whose turn it is.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Final

#: Bytes of a ring; a multiple of 8, as everything in it.
SIZE = 65536
#: No frame is larger (bytes): copying costs more than the system call from there on.
LARGEST = 4096
#: In place of a size: the rest up to the end of the ring is unused.
_WRAP = 0xFFFFFFFF
#: Numbers count modulo 2**32: one that is further ahead than this is behind.
_FAR = 0x7FFFFFFF

#: In place of the memory, where that is no more.
BLANK: Final = memoryview(bytearray(256)).cast("Q")

_fence = threading.Lock()
# A thread that isn't in a forked child may have been between the two instructions.
os.register_at_fork(after_in_child=_fence._at_fork_reinit)  # type: ignore[attr-defined]


def fence() -> None:
    """Let all that was written before be seen before what is written after, and likewise for reading."""
    # The lock's atomic instruction is a barrier, on every machine; nobody ever waits for it.
    with _fence:
        pass


class Writer:
    def __init__(self, ring: memoryview, cell: memoryview, head: int, tail: int) -> None:
        self._bytes = ring
        self._words = ring.cast("Q")
        self._cell = cell
        #: Which words of the cell are the ring's.
        self._head, self._tail = head, tail
        self._at = 0

    def put(self, number: int, frame: bytes) -> bool:
        """Append a record; False where there is no room for it."""
        size = len(frame)
        if size > LARGEST:
            return False
        begin = self._at
        position = begin % SIZE
        need = 8 + (size + 7 & ~7)
        skip = SIZE - position if position + need > SIZE else 0
        if begin + skip + need - self._cell[self._tail] > SIZE:
            return False
        if skip:
            self._words[position >> 3] = _WRAP
            position = 0
        self._words[position >> 3] = (number & 0xFFFFFFFF) << 32 | size
        self._bytes[position + 8 : position + 8 + size] = frame
        self._at = begin + skip + need
        fence()
        self._cell[self._head] = self._at
        return True


class Reader:
    def __init__(self, ring: memoryview, cell: memoryview, head: int, tail: int) -> None:
        self._bytes = ring
        self._words = ring.cast("Q")
        self._cell = cell
        self._head, self._tail = head, tail
        self._at = 0

    def __bool__(self) -> bool:
        """Whether there is anything to read."""
        return self._cell[self._head] != self._at

    def _front(self) -> tuple[int, int] | None:
        """Where the next record begins (as ``_at``), and its first word; None where there is none."""
        # The views first: another thread may put others in their place, which have nothing there.
        cell, words, at = self._cell, self._words, self._at
        if cell[self._head] == at or words is BLANK:
            return None
        fence()
        word = words[at % SIZE >> 3]
        if word & 0xFFFFFFFF == _WRAP:
            at += SIZE - at % SIZE
            word = words[0]
        return at, word

    def peek(self, number: int) -> bytes | None:
        """The next record, if it is this one; it stays. Another thread may ``take`` meanwhile, or ``close``."""
        before, data = self._at, self._bytes
        front = self._front()
        if front is None or front[1] >> 32 != number & 0xFFFFFFFF:
            return None
        at, word = front
        begin = at % SIZE + 8
        frame = bytes(data[begin : begin + (word & 0xFFFFFFFF)])
        # Else the writer may have begun to write there.
        return frame if self._at == before else None

    def skip(self, number: int) -> None:
        """Drop the records before ``number``."""
        while (front := self._front()) and (front[1] >> 32) - number & 0xFFFFFFFF > _FAR:
            at, word = front
            self._at = at + 8 + ((word & 0xFFFFFFFF) + 7 & ~7)
        fence()
        self._cell[self._tail] = self._at

    def take(self, number: int, into: deque[bytes]) -> None:
        """Read the records from ``number`` on, as long as they follow each other without a gap; drop older ones."""
        head, at = self._cell[self._head], self._at
        if at == head:
            return
        fence()
        words, copied, begin = self._words, b"", 0
        while at < head:
            position = at % SIZE
            if not copied or not position:
                # At once: a slice of bytes costs a third of a view's.
                copied, begin = bytes(self._bytes[position : position + head - at]), position - 8
            word = words[position >> 3]
            size = word & 0xFFFFFFFF
            if size == _WRAP:
                at += SIZE - position
                continue
            ahead = (word >> 32) - number & 0xFFFFFFFF
            if not ahead:
                into.append(copied[position - begin : position - begin + size])
                number += 1
            elif ahead <= _FAR:
                break
            at += 8 + (size + 7 & ~7)
        self._at = at
        fence()
        self._cell[self._tail] = at

    def close(self) -> None:
        """Let go of the memory. There is nothing to read from then on, for threads that still look, too."""
        self._at, self._cell, self._words, self._bytes = 0, BLANK, BLANK, BLANK
