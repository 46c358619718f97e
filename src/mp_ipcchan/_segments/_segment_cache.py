"""The mappings that a reader keeps of segments that come again, because mapping is what costs it most.

A page that is touched for the first time in a mapping costs more than copying it. So a segment that is seen a
second time (senders use them again, ``_segment_pool``) is mapped for good, through an open file
description of its own, which leases nothing. What is decoded from it lies in that mapping, and holds
the message's lease by another, of one page that is never touched.

It is told from others by its inode, which no other has while it is mapped, and its size. Inode numbers
come from a counter of 32 bits that goes round; the last 20 bits of the size are random.
"""

from __future__ import annotations

import mmap
import os
import select
import time
from collections import OrderedDict
from typing import Any

from .._message import Descriptors
from . import _segment
from ._memory import PAGE, map_shared

#: What is kept at most, for each channel. Memory that the sender has given back isn't free before this is, too.
_MOST_SEGMENTS = 64
_MOST_BYTES = 256 << 20
#: How many segments are remembered that were seen once.
_MOST_SEEN = 256

_Key = tuple[int, int]


class SegmentCache:
    """The segments of one inlet. Safe from several threads."""

    __slots__ = ("_mapped", "_seen", "_used_at")

    def __init__(self) -> None:
        #: Monotonic seconds.
        self._used_at = 0.0
        self._mapped: OrderedDict[_Key, _Mapping] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()

    def view(self, fd: int, size: int) -> memoryview:
        """The first ``size`` bytes of a received segment, writable. It is leased until the view is collected.

        ``fd`` stays the caller's. Raises ``ProtocolError`` as ``_segment.check`` does, and ``TooLargeError``.
        """
        status = os.fstat(fd)
        key = (status.st_ino, status.st_size)
        self._used_at = time.monotonic()
        mapping = self._mapped.get(key)
        if mapping is None or status.st_size < size:
            _segment.check(fd, size, status.st_size)
            if not size:
                return memoryview(bytearray())
            mapping = self._map(key, fd)
        try:
            return memoryview(map_shared(fd, size)) if mapping is None else mapping.lease(fd, size)
        except OSError:
            # This process has all the mappings that it may have.
            return _segment.read(fd, size)

    def _map(self, key: _Key, fd: int) -> _Mapping | None:
        """A mapping for good, if this is not the first time that the segment is seen."""
        if key not in self._seen:
            self._seen[key] = None
            while len(self._seen) > _MOST_SEEN:
                _drop_first(self._seen)
            return None
        try:
            mapping = _Mapping(fd, key[1])
        except OSError:
            # No /proc, no descriptor, no memory: it can be done without.
            return None
        self._mapped[key] = mapping
        while len(self._mapped) > _MOST_SEGMENTS or sum(one for _, one in list(self._mapped)) > _MOST_BYTES:
            _drop_first(self._mapped)
        return mapping

    @property
    def is_empty(self) -> bool:
        return not self._mapped

    def give_back(self, unused_since: float) -> None:
        """Let go of all mappings, if none was used since then (monotonic seconds)."""
        if self._mapped and self._used_at <= unused_since:
            self.clear()

    def clear(self) -> None:
        self._mapped.clear()
        self._seen.clear()


def _drop_first(entries: OrderedDict[Any, Any]) -> None:
    try:
        entries.popitem(last=False)
    except KeyError:  # another thread was faster
        pass


class _Mapping:
    __slots__ = ("_address", "_memory", "_plenty", "_type")

    def __init__(self, fd: int, size: int) -> None:
        import ctypes

        again = Descriptors([])
        try:
            # Kept by the C call that opens it: a signal's handler may raise behind that.
            again.fds.extend(map(os.open, (f"/proc/self/fd/{fd}",), (os.O_RDWR | os.O_CLOEXEC,)))
            self._memory: mmap.mmap = map_shared(again.fds[0], size)
        finally:
            again.close()
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._type: Any = ctypes.c_ubyte * size
        self._plenty = _segment.plenty()

    def lease(self, fd: int, size: int) -> memoryview:
        # A descriptor costs less time than a mapping. An epoll object closes any that it is given, and does so in C
        # when it is collected, as a mapping does: no signal's handler can interrupt that.
        lease: list[Any] = [*map(select.epoll.fromfd, map(os.dup, (fd,)))]
        if lease[0].fileno() >= self._plenty:
            lease = [map_shared(fd, PAGE)]
        loan = self._type.from_address(self._address)
        loan.held = self._memory, lease
        return memoryview(loan).cast("B")[:size]
