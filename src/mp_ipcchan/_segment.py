"""Segments: anonymous memory (memfd) for the bytes of a message that doesn't fit a packet.

The sender writes the bytes once; the reader maps them, so nothing is copied on its side, and
the memory lives exactly as long as what was decoded from it. A segment is sealed against
shrinking before it leaves, and the reader checks that before it maps: a peer that truncated
it would otherwise kill the reader with SIGBUS.

For now each message has a segment of its own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence

from ._message import Buffer
from .errors import ProtocolError

#: Buffers begin at multiples of this (bytes): the cache line, and what vector instructions like.
ALIGNMENT = 64

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: writev takes at most this many pieces (the kernel's UIO_MAXIOV).
_MOST_PIECES = 1024


def layout(body_size: int, buffer_sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where each buffer begins behind a body of ``body_size`` bytes, and the size of the whole."""
    offsets = []
    end = body_size
    for size in buffer_sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + size
    return offsets, end


def create(body: Sequence[Buffer], buffers: Sequence[Buffer], owned: list[int]) -> int:
    """Write ``body`` and the aligned ``buffers`` into a new sealed segment.

    Its descriptor is appended to ``owned``, the caller's to close, by the C call that makes it.
    """
    pieces = [memoryview(piece).cast("B") for piece in body if len(piece)]
    body_size = sum(len(piece) for piece in pieces)
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    offsets, _ = layout(body_size, [len(view) for view in views])
    end = body_size
    for start, view in zip(offsets, views, strict=True):
        if start > end:
            pieces.append(memoryview(bytes(start - end)))
        if len(view):
            pieces.append(view)
        end = start + len(view)
    owned.extend(map(os.memfd_create, ("mp_ipcchan",), (os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING,)))
    fd = owned[-1]
    _write_all(fd, pieces)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def create_with_position(pieces: Sequence[Buffer], owned: list[int]) -> int:
    """Write ``pieces`` into a segment whose position (``lseek``), 0 at first, processes can share and move.

    As for ``create``, its descriptor is appended to ``owned``. Readers must reckon with its being truncated.
    """
    fd = create(pieces, (), owned)
    # Opened once more: only a file that was opened, not one of memfd_create, has a position that the kernel
    # guards against two processes that move it at a time.
    owned.extend(map(os.open, (f"/proc/self/fd/{fd}",), (os.O_RDWR | os.O_CLOEXEC,)))
    owned.remove(fd)
    os.close(fd)
    return owned[-1]


def create_blank(size: int) -> int:
    """A new sealed segment of ``size`` zero bytes, to be shared; the caller owns the descriptor."""
    fd = os.memfd_create("mp_ipcchan", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, pieces: list[memoryview]) -> None:
    at = 0
    while at < len(pieces):
        written = os.writev(fd, pieces[at : at + _MOST_PIECES])
        # A write of more than 2 GiB is cut short by the kernel, as is one that a signal interrupts.
        while at < len(pieces) and written >= len(pieces[at]):
            written -= len(pieces[at])
            at += 1
        if written:
            pieces[at] = pieces[at][written:]


def map_whole(fd: int, size: int) -> memoryview:
    """The first ``size`` bytes of a received segment, writable. ``fd`` stays the caller's.

    Raises ``ProtocolError`` where it isn't a segment, is smaller, or could still be truncated.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError as error:
        raise ProtocolError("a message names a segment, but its descriptor is not one") from error
    if not sealed:
        raise ProtocolError("a message names a segment that its sender could still truncate")
    if os.fstat(fd).st_size < size:
        raise ProtocolError(f"a message names {size} bytes in a segment of {os.fstat(fd).st_size}")
    return memoryview(mmap.mmap(fd, size)) if size else memoryview(bytearray())
