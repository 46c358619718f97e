"""Messages on their way out, parcels on their way in, and who owns the descriptors meanwhile.

A plain message is no object at all: it is one ``bytes`` frame, header and pickle together (see
``_transport._frame``). ``Message`` and ``Parcel`` exist for what carries more: descriptors, or
bytes that don't fit a packet.

Guarantees: a ``Handle`` is told exactly once how its journey ended (``sent`` or ``unsent``); a
``Parcel`` closes every descriptor that nobody has taken from it.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from .errors import ProtocolError

#: A plain frame is this and the payload. It is itself a stretch of pickle that pushes a constant and
#: pops it again, so a plain frame with a pickle in it is unpickled as it stands, without a slice.
PLAIN = b"C\x04ipc10"
PLAIN_SIZE = len(PLAIN)
#: No packet of ours is larger (bytes); receivers make room for this much. An array of 64 KiB fits.
PACKET_SIZE = 69632
#: The largest payload that goes in a plain frame (bytes); above it, it goes in a segment.
INLINE_SIZE = PACKET_SIZE - PLAIN_SIZE
#: Asked for as the send buffer of a channel's socket (bytes; the kernel doubles it): small enough that a
#: process that ends can raise it.
CHANNEL_BUFFER = 65536
#: Asked for once large packets had to wait: the kernel tells of room when a quarter is left, which is one of the
#: largest then, so that the reader never runs dry. Still less than a process that ends can raise it to.
LARGE_BUFFER = 148480
#: The most handles and the most buffers in one message: their tables must fit into the packet.
MAX_HANDLES = 16384
MAX_BUFFERS = 1024

#: Of bytes, contiguous, and of one dimension: its ``len`` is its size.
Buffer: TypeAlias = bytes | bytearray | memoryview


class TooLargeError(MemoryError):
    """A message is dropped, because this process has no memory for it: kept, it would be in the way for good."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size
        what = "a message" if size is None else f"a message of {size} bytes"
        super().__init__(
            f"{what} was dropped: this process has no memory for it; free some, or raise its limit (ulimit -v)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size,)


class HandleKind(enum.IntEnum):
    """What a travelling descriptor is; it goes beside the descriptor, so nobody has to guess."""

    SENDER = 1
    RECEIVER = 2
    CONNECTION = 3
    FILE = 4
    LEDGER = 5
    EVENT = 6
    MEMORY = 7
    SEGMENT = 8


#: The same numbers as a set of bytes, to check a received table at one go.
KNOWN_KINDS = frozenset(int(kind) for kind in HandleKind)


class Handle(Protocol):
    """A descriptor that a message takes along. It stays open until ``sent`` or ``unsent``."""

    kind: HandleKind

    def fileno(self) -> int: ...

    def sent(self) -> None:
        """The kernel has its own reference now: let go of ours."""

    def unsent(self) -> None:
        """The message will never leave: put things back as they were."""


class MovingHandle(Handle, Protocol):
    """One that a forked child can be given as well."""

    def arrive(self) -> None:
        """In that child, which inherits what a message would bring: put things as they are to be there."""


class Message:
    """What one ``send`` is to deliver: the pickle in pieces, buffers beside it, descriptors."""

    __slots__ = ("body", "buffers", "handles")

    def __init__(self, body: Sequence[Buffer], buffers: Sequence[Buffer] = (), handles: Sequence[Handle] = ()) -> None:
        self.body: Sequence[Buffer] = body
        self.buffers: Sequence[Buffer] = buffers
        self.handles: Sequence[Handle] = handles
        if len(handles) > MAX_HANDLES:
            self.unsent()
            raise ValueError(f"a message carries at most {MAX_HANDLES} descriptors, not {len(handles)}: send several")

    def __len__(self) -> int:
        return sum(map(len, self.body)) + sum(map(len, self.buffers))

    def sent(self) -> None:
        handles, self.handles = self.handles, ()
        for handle in handles:
            handle.sent()

    def unsent(self) -> None:
        handles, self.handles = self.handles, ()
        # Backwards, so that a receiver which moved last is restored first.
        for handle in reversed(handles):
            handle.unsent()

    def own(self) -> None:
        """Copy what still belongs to the caller of ``send``, who may change it once that returns."""
        self.body = [piece if isinstance(piece, bytes) else bytes(piece) for piece in self.body]
        self.buffers = [bytes(piece) for piece in self.buffers]


class Parcel:
    """A received message with descriptors, or with its bytes in a segment; not decoded yet.

    ``buffers`` are writable, and nobody else's. The raw descriptors in it are ours to close.
    """

    __slots__ = ("_fds", "body", "buffers", "kinds")

    def __init__(self, body: Buffer, buffers: Sequence[Buffer], kinds: bytes, fds: list[int]) -> None:
        self.body: Buffer = body
        self.buffers: Sequence[Buffer] = buffers
        self.kinds: bytes = kinds
        self._fds = Descriptors(fds) if fds else None

    def filenos(self) -> list[int]:
        """The descriptors, which stay the parcel's."""
        return self._fds.fds if self._fds else []

    def take(self, first: int, count: int) -> tuple[bytes, list[Any]]:
        """The kinds and descriptors from ``first`` on; the caller owns them from here on.

        In place of a descriptor there may be a link, where an endpoint came without one (``_lane_message``).
        """
        held = self.filenos()
        fds = held[first : first + count]
        if first < 0 or len(fds) != count or -1 in fds:
            raise ProtocolError(
                f"the message refers to descriptors {first} to {first + count - 1}, "
                f"which it doesn't carry or has handed out before"
            )
        held[first : first + count] = [-1] * count
        return self.kinds[first : first + count], fds

    def close(self) -> None:
        if self._fds:
            self._fds.close()

    def is_spent(self) -> bool:
        """Whether all that it brought has been taken."""
        return not any(fd >= 0 for fd in self.filenos())


def release_all(brought: list[Any]) -> None:
    """Empty ``brought``, what ``Parcel.take`` gave: descriptors are closed, links released.

    Each descriptor is closed by the C call that takes it out, so no signal's handler can come between.
    """
    links = [one for one in brought if not isinstance(one, int)]
    brought[:] = [one for one in brought if isinstance(one, int)]
    list(map(os.close, map(brought.pop, [-1] * len(brought))))
    for link in links:
        link.release()


class ParcelHandle:
    """A descriptor in a parcel that is sent on."""

    __slots__ = ("_fd", "_parcel", "kind")

    def __init__(self, parcel: Parcel, kind: int, fd: int) -> None:
        self.kind = HandleKind(kind)
        self._parcel = parcel
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def sent(self) -> None:
        self._parcel.close()

    def unsent(self) -> None:
        pass

    arrive = unsent


class Descriptors:
    """Raw descriptors, closed together: by ``close``, or with this object."""

    __slots__ = ("fds",)

    def __init__(self, fds: list[int]) -> None:
        #: Those that were handed out are -1.
        self.fds: list[int] = fds

    def close(self) -> None:
        # Each is closed by the C call that takes it out, so no signal's handler can come between.
        self.fds = [fd for fd in self.fds if fd >= 0]
        list(map(os.close, map(self.fds.pop, [-1] * len(self.fds))))

    def __del__(self) -> None:
        if getattr(self, "fds", None):
            self.close()


#: What a receiver holds until somebody decodes it: a plain frame, or a parcel.
Incoming: TypeAlias = bytes | Parcel

#: What a sender hands to the transport.
Outgoing: TypeAlias = bytes | Message
