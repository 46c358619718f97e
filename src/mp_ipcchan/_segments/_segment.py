"""Segments: anonymous memory (memfd) for the bytes of a message that doesn't fit a packet.

The sender writes the bytes once; the reader maps them, so nothing is copied on its side, and
the memory lives exactly as long as what was decoded from it. A segment is sealed against
shrinking before it leaves, and the reader checks that before it maps: a peer that truncated
it would otherwise kill the reader with SIGBUS.

A sender that can will use a segment again (``_segment_pool``); those made here serve one message.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import tempfile
from collections.abc import Iterable, Sequence

from .._message import Buffer, TooLargeError
from ..errors import ProtocolError

#: Buffers begin at multiples of this (bytes): the cache line, and what vector instructions like.
ALIGNMENT = 64

#: Of every segment: its size is what it is for ever.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FINAL = SEALS | fcntl.F_SEAL_WRITE
#: Segments that are used again are up to so much (bytes) larger than they need to be; no memory is behind that.
MOST_BEHIND = 1 << 20
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


def arrange(body: Sequence[Buffer], buffers: Sequence[Buffer]) -> tuple[list[Buffer], int]:
    """``body`` and the aligned ``buffers`` as pieces that lie back to back, and their size."""
    pieces = list(body)
    end = sum(map(len, pieces))
    for buffer in buffers:
        gap = -end % ALIGNMENT
        if gap:
            pieces.append(bytes(gap))
        pieces.append(buffer)
        end += gap + len(buffer)
    return pieces, end


def create(pieces: Sequence[Buffer], owned: list[int], size: int = 0, blank: int = 0, *, final: bool = False) -> int:
    """Write ``pieces`` into a new sealed segment of their size, or of ``size`` bytes if that is more.

    The first ``blank`` bytes have memory of their own then, so that writing to them can't fail. The
    descriptor is appended to ``owned``, the caller's to close, by the C call that makes it. ``final``: nobody
    can ever write to it again.
    """
    try:
        owned.extend(map(os.memfd_create, ("mp_ipcchan",), (os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING,)))
    except OSError as error:
        raise _no_room(error.errno or 0, sum(map(len, pieces))) from error
    fd = owned[-1]
    # Written, not mapped: where there is no memory for it, that is an error, not a SIGBUS. It is twice as
    # fast, too, as the kernel needn't clear what is written.
    written = write(fd, pieces)
    if blank > written:
        os.posix_fallocate(fd, written, blank - written)
    if size > written:
        os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FINAL if final else SEALS)
    return fd


def create_with_position(pieces: Sequence[Buffer], owned: list[int]) -> int:
    """Write ``pieces`` into a segment whose position (``lseek``), 0 at first, processes can share and move.

    As for ``create``, its descriptor is appended to ``owned``. Readers must reckon with its being truncated.
    """
    fd = create(pieces, owned)
    # Opened once more: only a file that was opened, not one of memfd_create, has a position that the kernel
    # guards against two processes that move it at a time.
    try:
        owned.extend(map(os.open, (f"/proc/self/fd/{fd}",), (os.O_RDWR | os.O_CLOEXEC,)))
    except (FileNotFoundError, PermissionError):
        # /proc is not mounted, or closed to this process since it changed its user: a file without a name.
        with tempfile.TemporaryFile() as file:
            owned.extend(map(os.dup, (file.fileno(),)))
        write(owned[-1], pieces)
        os.lseek(owned[-1], 0, os.SEEK_SET)
    list(map(os.close, map(owned.pop, (owned.index(fd),))))
    return owned[-1]


def create_blank(size: int) -> int:
    """A new sealed segment of ``size`` zero bytes, to be shared; the caller owns the descriptor."""
    fd = os.memfd_create("mp_ipcchan", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write(fd: int, pieces: Sequence[Buffer]) -> int:
    """Write ``pieces`` at the file's position; how many bytes that was."""
    rest = [memoryview(piece) for piece in pieces if len(piece)]
    size = sum(map(len, rest))
    at = 0
    while at < len(rest):
        try:
            written = os.writev(fd, rest[at : at + _MOST_PIECES])
        except OSError as error:
            raise _no_room(error.errno or 0, size) from error
        # A write of more than 2 GiB is cut short by the kernel, as is one that a signal interrupts.
        while at < len(rest) and written >= len(rest[at]):
            written -= len(rest[at])
            at += 1
        if written:
            rest[at] = rest[at][written:]
    return size


def check_limit(size: int) -> None:
    """Raise ``OSError`` where this process may not make a segment of ``size`` bytes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY and size > soft:
        raise _no_room(errno.EFBIG, size)


_REASONS = {
    errno.EFBIG: "this process may not write so large a file; raise the limit (ulimit -f)",
    errno.EMFILE: "this process may open no more descriptors; close some, or raise the limit (ulimit -n)",
    errno.ENOSPC: "there is no memory for it",
    errno.ENOMEM: "there is no memory for it",
}


def _no_room(number: int, size: int) -> OSError:
    """What to raise where a segment can't be made."""
    return OSError(number, f"can't send a message of {size} bytes: {_REASONS.get(number, os.strerror(number))}")


def map_whole(fd: int, size: int) -> memoryview:
    """The first ``size`` bytes of a received segment, writable. ``fd`` stays the caller's.

    Raises ``ProtocolError`` as ``check`` does.
    """
    check(fd, size, os.fstat(fd).st_size)
    return memoryview(mmap.mmap(fd, size)) if size else memoryview(bytearray())


def check(fd: int, size: int, present: int, *, final: bool = False) -> None:
    """Whether ``fd``, of ``present`` bytes, can be mapped without fear.

    Raises ``ProtocolError`` where it isn't a segment, is smaller than ``size``, or could still be truncated, or
    written to where it is to be ``final``.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError("a message names a segment, but its descriptor is not one") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ProtocolError("a message names a segment that its sender could still truncate")
    if final and not seals & fcntl.F_SEAL_WRITE:
        raise ProtocolError("a message names a segment that its sender could still write to")
    if present < size:
        raise ProtocolError(f"a message names {size} bytes in a segment of {present}")


def read(fd: int, size: int, start: int = 0) -> memoryview:
    """A copy of ``size`` bytes of a segment that was checked, from ``start`` on. Raises ``TooLargeError``."""
    try:
        copy = memoryview(bytearray(size))
    except MemoryError:
        raise TooLargeError(size) from None
    at = 0
    while at < size:
        at += os.preadv(fd, [copy[at:]], start + at)
    return copy


def plenty() -> int:
    """Up to which descriptor this process has plenty left: the kernel gives out the lowest."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else soft // 4
