"""The ledger of a queue: who has put and taken how much, in memory that all its processes share.

There is no lock in it. Every process has a cell of its own, the only one it writes to; sums over the
cells give the queue's counts. An entry is changed by a statement without a call in it: neither another thread of the
process nor a signal's handler comes between. Which cells are in use the kernel knows: a process holds a record lock
on the byte of the same number in the ledger's file, through an open file description that nobody
else has, so the lock ends with the process, however it ends.

A cell says what its process owes: messages begun and not yet delivered to the kernel, and those
that it is taking at this instant. When a process is killed, whoever notices first takes over the
lock of its cell and settles what it owed (``reclaim``). Being killed while settling, or between
a deed and its entry, gives a slot back twice, or counts a task as done that is not: a bound is
loosened by one, never lost.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable

from .._segments import _segment

#: Cells in a ledger, hence processes that may use one queue at a time. Cell 0 is the head.
CELLS = 1024
#: Words of eight bytes in a cell: a cache line, so that processes don't slow each other down.
_WORDS = 8
SIZE = CELLS * _WORDS * 8

BEGUN, DELIVERED, TAKEN, _TAKING, _FORGIVEN = range(5)
STATE, DETOUR = 0, 1
#: struct flock, as F_OFD_SETLK takes it on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")

OPEN, SHUT, DISCARDED = range(3)


def create() -> int:
    """The descriptor of a new, empty ledger; the caller owns it."""
    return _segment.create_blank(SIZE)


_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


class Ledger:
    """One process's view of a queue's ledger. Owns its descriptor."""

    __slots__ = ("__weakref__", "_fd", "_lock_fd", "_reclaimed_at", "_settle", "ahead", "base", "lock", "words")

    def __init__(self, fd: int, settle: Callable[[int, int], None]) -> None:
        self._fd = fd
        self._lock_fd = -1
        #: Where this process's cell begins; 0 while it has none. The first entry claims one, for which it
        #: needs a descriptor.
        self.base = 0
        #: Slots that this process gave back for messages that then stayed in the queue after all.
        self.ahead = 0
        #: Called for a dead process: how many messages it had begun and not delivered, and was taking.
        self._settle = settle
        #: Held while a cell is claimed or settled. Reentrant: a signal's handler may use the queue.
        self.lock: threading.RLock = threading.RLock()
        #: When this process last looked for dead ones (monotonic seconds).
        self._reclaimed_at = -math.inf
        #: The entries of all cells.
        self.words: memoryview = _segment.map_whole(fd, SIZE).cast("Q")
        _ledgers.add(self)

    def fileno(self) -> int:
        return self._fd

    # -- this process's cell -----------------------------------------------------------------

    def join(self) -> None:
        """Claim a cell, if there is none yet."""
        with self.lock:
            if not self.base:
                self._claim()

    def own_cell(self) -> memoryview:
        """This process's cell, from ``BEGUN`` on."""
        base = self.base or self._claim()
        return self.words[base : base + _WORDS]

    def put(self, send: Callable[[bytes, int], int], frame: bytes, flags: int) -> bool:
        """Enter a message and hand it to the kernel by ``send(frame, flags)``, the usual case at one go.

        False, and nothing entered, where the queue was shut down. Raises what ``send`` raises, and
        nothing is entered then; or what a signal's handler raises, with the entries as they should be.
        """
        words, base = self.words, self.base or self._claim()
        sent = 0
        # Entered before the state is looked at: whoever shuts the queue down looks the other way round.
        words[base + BEGUN] += 1
        try:
            if not words[STATE]:
                [sent] = map(send, (frame,), (flags,))
                words[base + DELIVERED] += 1
                return True
        finally:
            if not sent:
                words[base + BEGUN] -= 1
        return False

    def deliver(self, count: int = 1) -> None:
        """The kernel has ``count`` messages that were begun."""
        self.words[(self.base or self._claim()) + DELIVERED] += count

    def cancel(self) -> None:
        """A message that was begun is not put after all."""
        self.words[self.base + BEGUN] -= 1

    def take(self, taking: int, taken: int = 0) -> None:
        """Enter that this process is about to take so many messages more (or fewer), and has taken so many.

        Where a signal's handler raises, nothing is entered.
        """
        words, base = self.words, self.base or self._claim()
        # Both at once: no call comes between.
        words[base + _TAKING] += taking
        words[base + TAKEN] += taken

    def _claim(self) -> int:
        """Find a cell that no living process holds, settle what its last owner owed, and make it ours."""
        with self.lock:
            return self.base or self._claim_anew()

    def _claim_anew(self) -> int:
        if self._lock_fd < 0:
            # Another open file description: the lock must be this process's alone.
            opened: list[int] = []
            try:
                opened.extend(map(os.open, (f"/proc/self/fd/{self._fd}",), (os.O_RDWR | os.O_CLOEXEC,)))
                self._lock_fd = opened[0]
            finally:
                # A signal's handler raised before it was kept.
                if opened and self._lock_fd != opened[0]:
                    os.close(opened[0])
        for cell in range(1, CELLS):
            if self._lock_cell(cell):
                self._settle_cell(cell)
                self.base = cell * _WORDS
                return self.base
        raise OSError(f"{CELLS - 1} processes use this queue already, which is as many as can")

    def _lock_cell(self, cell: int, kind: int = fcntl.F_WRLCK) -> bool:
        try:
            fcntl.fcntl(self._lock_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, cell, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    # -- all cells ---------------------------------------------------------------------------

    def reclaim(self) -> None:
        """Settle what processes owed that are dead."""
        self._reclaimed_at = time.monotonic()
        with self.lock:
            own = (self.base or self._claim()) // _WORDS
            for cell in range(1, CELLS):
                self._reclaim_cell(cell, own)

    def _reclaim_cell(self, cell: int, own: int) -> None:
        if cell != own and self._owes(cell) and self._lock_cell(cell):
            self._settle_cell(cell)
            self._lock_cell(cell, fcntl.F_UNLCK)

    def reclaim_again(self, after: float) -> bool:
        """``reclaim``, if that was last done more than ``after`` seconds ago; whether it was done now."""
        if time.monotonic() - self._reclaimed_at < after:
            return False
        self.reclaim()
        return True

    def _owes(self, cell: int) -> bool:
        base = cell * _WORDS
        return self.words[base + BEGUN] != self.words[base + DELIVERED] or self.words[base + _TAKING] != 0

    def _settle_cell(self, cell: int) -> None:
        words, base = self.words, cell * _WORDS
        undelivered = words[base + BEGUN] - words[base + DELIVERED]
        taking = words[base + _TAKING]
        if undelivered or taking:
            # Before: who finds a task less meanwhile looks whether some were.
            words[base + _FORGIVEN] += undelivered
            self._settle(undelivered, taking)
            words[base + BEGUN] = words[base + DELIVERED]
            words[base + TAKEN] += taking
            words[base + _TAKING] = 0

    @property
    def forgiven(self) -> int:
        """How many messages dead processes have not delivered, as far as is known: some may have been."""
        return sum(self._column(_FORGIVEN))

    def count(self) -> int:
        """Messages in the queue: put by anybody, and taken by nobody yet. Exact while nobody is at it."""
        return max(0, sum(self._column(BEGUN)) - sum(self._column(TAKEN)))

    def undelivered(self) -> int:
        """Messages that wait in the backlogs of living processes."""
        self.reclaim()
        return sum(max(0, b - d) for b, d in zip(self._column(BEGUN), self._column(DELIVERED), strict=True))

    def _column(self, word: int) -> memoryview:
        return self.words[_WORDS + word :: _WORDS]

    @property
    def state(self) -> int:
        """``OPEN``, ``SHUT`` or ``DISCARDED``."""
        return self.words[STATE]

    def set_state(self, state: int) -> None:
        self.words[STATE] = state

    @property
    def detour(self) -> int:
        """Whether older messages may wait in the queue's front lane; a hint, which may be wrong."""
        return self.words[DETOUR]

    def set_detour(self, detour: bool) -> None:
        self.words[DETOUR] = detour

    # -- ends --------------------------------------------------------------------------------

    def close(self) -> None:
        self._leave()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _leave(self) -> None:
        """Give the cell up; its counts stay in the sums, and its next owner counts on."""
        lock_fd, self._lock_fd = self._lock_fd, -1
        self.base = 0
        if lock_fd >= 0:
            os.close(lock_fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def reset_after_fork(self) -> None:
        """The cell is the parent's, and our copy of its lock would outlive it."""
        self.lock = threading.RLock()
        self.ahead = 0
        self._leave()


def _reset_after_fork() -> None:
    for ledger in list(_ledgers):
        ledger.reset_after_fork()


os.register_at_fork(after_in_child=_reset_after_fork)
