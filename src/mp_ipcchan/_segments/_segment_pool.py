"""Segments that a sender keeps and uses again, because memory that was used before is fast.

To write to fresh memory costs many times what copying does, since the kernel has to find every page. So
the outlet of a channel keeps some of its segments, mapped. It has to know when a reader is done with one,
be that killed or the message never be read, and asks the kernel, by a lock that needs no release:

- A message doesn't take the segment's descriptor along but a *lease*: the memory opened once more, as an
  open file description of its own, with a shared ``flock`` on it. The sender closes its descriptor at once.
- What is received holds the lease by a mapping of it. Descriptors in flight and mappings that a forked
  child inherits count as well. When the last is gone, so is the lock.
- The sender gets an exclusive lock on the segment exactly if no lease is left. It lets go of that again before it
  lends.

Nothing is counted, so nothing is left over from a process that is killed. A forked child drops what it inherits:
it shares the parent's open file descriptions, so the lock would tell it nothing.

Bounds, for a process in all: ``MOST_BYTES``, and ``_MOST_SEGMENTS`` descriptors, or an eighth of what ``ulimit -n``
allows. Beyond them a message has a segment of its own, which is closed once it is sent, as it has where
there is no /proc to open the lease through. Segments are given back when the channel is closed, and when they weren't
used for ``IDLE_AFTER``. That is noticed without a thread: by whoever sends something large, on any
channel, and by whoever waits for a message for that long (``_inlet``).

A segment is used again by its own channel only. Whoever has read from that may have it mapped still, and could
see what is written to it later. Those who send pickles to each other trust each other; for a channel between
those who don't, ``recycles`` is to be false.
"""

from __future__ import annotations

import _thread
import errno
import fcntl
import os
import resource
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from .._message import Buffer, Descriptors
from . import _segment
from ._memory import PAGE, map_shared

#: What a process keeps at most (bytes). Three messages of 64 MiB: one written, one on its way, one being read.
MOST_BYTES = 256 << 20
#: How many segments, and so descriptors, a process and a channel keep at most.
_MOST_SEGMENTS = 64
_MOST_PER_CHANNEL = 16
#: After how long without use (seconds) a segment is given back.
IDLE_AFTER = 1.0
#: How many segments are asked for whether they are free: the last ones used, whose bytes may still be in the
#: processor's cache, and then those used longest ago, which are most likely free.
_LATEST, _ASKED = 3, 8
#: How long (seconds) a sender whose segments are all lent waits for one: about what a fresh one costs, and long enough
#: for a reader to have its turn on a processor that they share.
_PATIENCE, _PATIENCE_PER_BYTE = 0.001, 0.35e-9
#: For how long of that it doesn't sleep, and how long it then sleeps at a time.
_SPIN = 50e-6
#: After it did so in vain, for how many messages it doesn't: nobody may be reading. Each time, for twice as many.
_IMPATIENT, _MOST_IMPATIENT = 8, 256
_TRY, _LEASE = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB
#: How much is copied at a time (bytes): meanwhile no other thread runs.
_STRETCH = 4 << 20

#: The descriptors of messages that are just being sent, by thread: a forked child must not hold their leases.
leaving: dict[int, Descriptors] = {}
#: The pools that have segments.
_pools: dict[SegmentPool, None] = {}
#: When segments that weren't used are next looked for (monotonic seconds).
_look_at = 0.0


class _Segment:
    """A segment and its descriptor, closed with this object. Used by whoever has acquired ``claim``."""

    __slots__ = ("_fd", "_fds", "_path", "_view", "claim", "room", "used_at")

    def __init__(self, fds: Descriptors, room: int) -> None:
        self._fds = fds
        self._fd = fds.fds[0]
        self._path = f"/proc/self/fd/{self._fd}"
        self._view: memoryview | None = None
        self.claim = _thread.allocate_lock()
        #: How much it takes (bytes).
        self.room = room
        #: Monotonic seconds.
        self.used_at = time.monotonic()

    def abandon(self) -> None:
        """Close it, though threads that were not forked along may seem to use it."""
        self._view = None
        self._fds.close()

    def claim_if_free(self) -> bool:
        """Take it for this thread alone, which must release the claim, if no lease is left."""
        if not self.claim.acquire(False):
            return False
        try:
            fcntl.flock(self._fd, _TRY)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        except OSError:
            self.claim.release()
            return False
        return True

    def lend(self, owned: list[int]) -> bool:
        """Append a lease to ``owned``. False where there can't be one; the segment itself is in ``owned`` then."""
        before = len(owned)
        try:
            owned.extend(map(os.open, (self._path,), (os.O_RDWR | os.O_CLOEXEC,)))
            fcntl.flock(owned[-1], _LEASE)
        except OSError:
            # No /proc, no descriptor left, no memory for a lock. Nobody has a lease: give it away.
            list(map(os.close, map(owned.pop, [-1] * (len(owned) - before))))
            owned.extend(map(self._fds.fds.pop, (0,)))
            return False
        return True

    def fill(self, pieces: Sequence[Buffer]) -> None:
        """Copy ``pieces`` to the start."""
        if self._view is None:
            try:
                # Not of the lease: a mapping holds it.
                self._view = memoryview(map_shared(self._fd, self.room, entirely=True))
            except OSError:
                # No address space for it. It can be done without, if slower.
                os.lseek(self._fd, 0, os.SEEK_SET)
                _segment.write(self._fd, pieces)
                return
        view, at = self._view, 0
        for piece in pieces:
            for part in (piece,) if len(piece) <= _STRETCH else _stretches(piece):
                end = at + len(part)
                view[at:end] = part
                at = end


def _stretches(piece: Buffer) -> Iterator[memoryview]:
    view = memoryview(piece)
    return (view[start : start + _STRETCH] for start in range(0, len(view), _STRETCH))


class SegmentPool:
    """The segments of one outlet. Safe from several threads."""

    __slots__ = ("_impatience", "_impatient", "_kept", "recycles")

    def __init__(self) -> None:
        #: In the order in which they were last used.
        self._kept: list[_Segment] = []
        #: For how many messages not to wait for a segment, and for how many next.
        self._impatient = 0
        self._impatience = _IMPATIENT
        #: Whether a segment may be used again: see above.
        self.recycles: bool = True

    def write(self, body: Sequence[Buffer], buffers: Sequence[Buffer], owned: list[int]) -> None:
        """Write a message's bytes into a segment. Its descriptor is appended to ``owned``, to be sent and closed."""
        pieces, size = _segment.arrange(body, buffers)
        room = _room_for(size)
        segment = self._claim(size)
        try:
            # Only now, or one that comes seldom would never find its segment.
            _look_for_unused(segment)
            if segment is None:
                if self.recycles and len(self._kept) < _MOST_PER_CHANNEL and _has_room(room):
                    self._write_new(pieces, room, owned)
                    return
                segment = self._await_free(size)
                if segment is None:
                    _create(pieces, owned)
                    return
            if segment.lend(owned):
                self._move_last(segment)
            else:
                self._forget(segment)
            # Lent first: from the lease on, nobody else takes it for free.
            segment.fill(pieces)
        finally:
            if segment is not None:
                segment.claim.release()

    def _claim(self, size: int) -> _Segment | None:
        """A free segment that fits, for this thread alone until it releases the claim."""
        fitting = self._fitting(size)
        for segment in islice(chain(reversed(fitting[-_LATEST:]), fitting[:-_LATEST]), _ASKED):
            if segment.claim_if_free():
                return segment
        return None

    def _await_free(self, size: int) -> _Segment | None:
        """As ``_claim``, but wait for the segment lent longest ago, which the reader is about to be done with.

        Not much longer than a fresh one takes to write: that is never a loss to speak of, and mostly a gain.
        """
        fitting = self._fitting(size)
        if not fitting or self._impatient:
            self._impatient = max(0, self._impatient - 1)
            return None
        began = now = time.monotonic()
        while now < began + max(_PATIENCE, size * _PATIENCE_PER_BYTE):
            if fitting[0].claim_if_free():
                self._impatience = _IMPATIENT
                return fitting[0]
            if now > began + _SPIN:
                time.sleep(_SPIN)
            now = time.monotonic()
        self._impatient = self._impatience
        self._impatience = min(2 * self._impatience, _MOST_IMPATIENT)
        return None

    def _fitting(self, size: int) -> list[_Segment]:
        return [segment for segment in self._kept if size <= segment.room <= 2 * size]

    def _write_new(self, pieces: Sequence[Buffer], room: int, owned: list[int]) -> None:
        """Write into a new segment, and keep it."""
        made = Descriptors([])
        try:
            _create(pieces, made.fds, room)
        except OSError:
            # Not so much, and be it only by what makes it fit others, too.
            made.close()
            _create(pieces, owned)
            return
        segment = _Segment(made, room)
        if segment.lend(owned):
            self._kept.append(segment)
            _pools[self] = None

    def _move_last(self, segment: _Segment) -> None:
        try:
            self._kept.remove(segment)
        except ValueError:
            # Given back by another thread meanwhile.
            return
        self._kept.append(segment)

    def _forget(self, segment: _Segment) -> None:
        try:
            self._kept.remove(segment)
        except ValueError:
            pass

    def give_back(self, unused_since: float) -> None:
        """Let go of the segments that weren't used since then (monotonic seconds)."""
        for segment in list(self._kept):
            if segment.used_at <= unused_since:
                self._forget(segment)
        if not self._kept:
            _pools.pop(self, None)

    def close(self) -> None:
        """Let go of all segments. What was sent stays."""
        self._kept.clear()
        _pools.pop(self, None)

    @property
    def kept(self) -> list[int]:
        """How much each segment takes (bytes)."""
        return [segment.room for segment in list(self._kept)]


def is_empty() -> bool:
    """Whether this process keeps no segments."""
    return not _pools


def _look_for_unused(used: _Segment | None) -> None:
    """Now and then, let go of what isn't used; ``used`` just was."""
    now = time.monotonic()
    if used is not None:
        used.used_at = now
    if now >= _look_at:
        give_back(now)


def give_back(now: float) -> None:
    """Let go of all segments of this process that weren't used for ``IDLE_AFTER``."""
    global _look_at
    _look_at = now + IDLE_AFTER
    for pool in list(_pools):
        pool.give_back(now - IDLE_AFTER)


def _has_room(room: int) -> bool:
    """Whether another segment of ``room`` bytes is within this process's bounds."""
    kept = [one for pool in list(_pools) for one in pool.kept]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_SEGMENTS if soft == resource.RLIM_INFINITY else min(_MOST_SEGMENTS, soft // 8)
    return len(kept) < most and sum(kept) + room <= MOST_BYTES


def _room_for(size: int) -> int:
    """A bit more than ``size``, so that messages of about the same size fit: four steps to a doubling."""
    step = 1 << max(PAGE.bit_length() - 1, size.bit_length() - 3)
    return -(-size // step) * step


def _create(pieces: Sequence[Buffer], owned: list[int], room: int = 0) -> None:
    """A new segment. Where this process has used up its descriptors, kept segments make way."""
    # What is behind the room is never touched. It makes the size of the file tell it from others (``_segment_cache``).
    size = room + int.from_bytes(os.urandom(3), "little") % _segment.MOST_BEHIND if room else 0
    try:
        _segment.create(pieces, owned, size, room)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE) or is_empty():
            raise
        release_all()
        _segment.create(pieces, owned, size, room)


def release_all() -> None:
    """Let go of all segments of this process, and of their descriptors."""
    for pool in list(_pools):
        pool.close()


def _reset_after_fork() -> None:
    for thread, descriptors in leaving.items():
        if thread != _thread.get_ident():
            descriptors.close()
    leaving.clear()
    for pool in list(_pools):
        for segment in pool._kept:
            segment.abandon()
        pool.close()


os.register_at_fork(after_in_child=_reset_after_fork)
