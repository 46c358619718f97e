"""Packets over AF_UNIX SOCK_SEQPACKET sockets: the backend for Linux.

Guarantees: a packet is sent whole or not at all, and received whole by one reader, so nothing
here locks anything. No call changes the socket itself: whether it may block is said call by call,
because O_NONBLOCK lies in the open file description, which other processes share.
"""

from __future__ import annotations

import _thread
import array
import os
import resource
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import starmap
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from .._message import PACKET_SIZE, PLAIN, Buffer, Descriptors, Incoming, Message, Outgoing, Parcel
from .._segments import _segment, _segment_pool
from .._segments._segment_cache import SegmentCache
from .._segments._segment_pool import SegmentPool
from ..errors import ProtocolError
from ._carrier import MAX_IN_PACKET, descriptors_in, load, rights, too_many, unload
from ._carrier import SEND_FLAGS as SEND_FLAGS
from ._carrier import NoRoom as NoRoom
from ._frame import CARRIER_FLAG, HEADER_SIZE, SEGMENT_FLAG, Frame, FrameKind, head, parse, slices, unpack
from ._spill import Spill

#: Asked for on a pipe: as much as an unprivileged process gets by default, and more than the stdlib's holds.
PIPE_BUFFER = 212992

# Plain ints: the socket module's flags are enums, whose operators cost more than a system call.
MSG_NOSIGNAL = int(socket.MSG_NOSIGNAL)
_FAMILY, _KIND = int(socket.AF_UNIX), int(socket.SOCK_SEQPACKET)

#: More pieces than this are joined before they are sent (the kernel takes 1024).
_MOST_PARTS = 64

_SPACE = socket.CMSG_SPACE(MAX_IN_PACKET * array.array("i").itemsize)
#: Arguments of ``recvmsg``: one set that waits as long as it takes, one that never does.
WAITING = (PACKET_SIZE, _SPACE, int(socket.MSG_CMSG_CLOEXEC))
AT_ONCE = (PACKET_SIZE, _SPACE, int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT))
#: Look at the next packet, and leave it there: at it all; at its descriptors; at whether it has any (the kernel
#: says that it cut them off, and opens none), one that waits as long as it takes and one that doesn't.
PEEK_ALL = ((PACKET_SIZE, _SPACE, int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT | socket.MSG_PEEK)),)
_PEEK = ((1, _SPACE, PEEK_ALL[0][2]),)
_GLANCE_WAITING = (1, 0, int(socket.MSG_PEEK))
_GLANCE = (1, 0, int(socket.MSG_PEEK | socket.MSG_DONTWAIT))
#: Flags of a packet that did not arrive whole; of one whose descriptors did not.
CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
CUT_RIGHTS = int(socket.MSG_CTRUNC)

#: What ``recvmsg`` returns: data, ancillary data, flags, address.
Packet: TypeAlias = tuple[bytes, list[tuple[int, int, bytes]], int, object]


class EndOfStream(Exception):
    """Every copy of the other end is closed, and all it sent has been received."""


class ShutMark:
    """Stands for the packet that tells of a queue's shutdown."""


#: Held while a process forks, and while it has copies of descriptors for a moment: a child would keep them for good,
#: and whoever waits for the end of what they refer to would not see it.
_forking = threading.RLock()
os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_forking.release)

#: What a packet turns out to hold.
Opened: TypeAlias = Incoming | Spill | ShutMark


# The part of ``socket.socket`` that is written in C: making one is one C call.
if TYPE_CHECKING:
    _BareSocket = socket.socket
else:
    _BareSocket = socket.SocketType


class _Socket(_BareSocket):
    """A socket whose owner closes it, or lets go of it.

    Of what it finds at the end of the interpreter, or in a cycle, the garbage collector may finalize sockets before
    their owners. That is no mistake of the program's, so there is no warning of an unclosed socket.
    """

    __slots__ = ()

    def __del__(self) -> None:
        self.close()


def make_pair(send_buffer: int) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, not inheritable across exec; the caller owns both."""
    first, second = map(_own, map(_BareSocket.detach, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)))
    for end in (first, second):
        prepare(end, send_buffer)
    return first, second


def prepare(sock: socket.socket, send_buffer: int) -> None:
    """Give a new socket, which will send, our buffer size; and ``let_wait``."""
    let_wait(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)


def make_socket() -> socket.socket:
    """A socket, not connected to anything.

    Of the type that ``socket.socket`` extends: what that adds isn't needed, and costs as much as a system call.
    """
    return _Socket(_FAMILY, _KIND)


def let_wait(sock: socket.socket) -> None:
    """Undo what ``socket.setdefaulttimeout`` did to a new socket."""
    if sock.gettimeout() is not None:
        sock.settimeout(None)


def accept(listener: socket.socket, into: deque[socket.socket]) -> None:
    """Append the next connection to ``into``, in one C call: a signal's handler can't come between.

    Raises what ``accept`` raises. ``let_wait`` must follow.
    """
    into.extend(map(_own, map(itemgetter(0), map(_accept, (listener,)))))


#: Functions of C, unlike ``socket.socket`` and its ``accept``: the next connection's descriptor, and its owner.
_accept: Callable[[socket.socket], tuple[int, object]] = socket.socket._accept  # type: ignore[attr-defined]
_own: Callable[[int], Any] = partial(_Socket, _FAMILY, _KIND, 0)


def adopt(fd: int) -> socket.socket:
    """A socket object that owns ``fd`` from here on. ``ProtocolError`` where ``fd`` is no socket of ours."""
    try:
        sock = _Socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise ProtocolError("a descriptor that was sent as an endpoint is not a socket") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
        sock.close()
        raise ProtocolError("a descriptor that was sent as an endpoint is a socket of another kind")
    let_wait(sock)
    return sock


def transmit(sock: socket.socket, item: Outgoing, segments: SegmentPool, noted: list[object]) -> None:
    """Send one message as one packet, now. Raises ``BlockingIOError`` or another ``OSError``; nothing left then.

    What doesn't fit the packet goes into one of ``segments``.

    ``noted`` gets an element in the C call that sends: where a signal's handler raises behind it, that tells.
    """
    if isinstance(item, bytes):
        noted.extend(map(sock.send, (item,), (SEND_FLAGS,)))
    else:
        _transmit_message(sock, item, segments, noted)


def _transmit_message(sock: socket.socket, message: Message, segments: SegmentPool, noted: list[object]) -> None:
    kinds = bytes([handle.kind for handle in message.handles])
    sizes = [*map(len, message.buffers)]
    body_size = sum(map(len, message.body))
    fds = [handle.fileno() for handle in message.handles]
    # What is made here is closed with these two, even if a signal's handler keeps us from doing it.
    segment = Descriptors([])
    thread = _thread.get_ident()
    carrier = None
    flags = 0
    payload: list[Buffer] = []
    try:
        if HEADER_SIZE + len(kinds) + 8 * len(sizes) + body_size + sum(sizes) > PACKET_SIZE:
            flags |= SEGMENT_FLAG
            _segment_pool.leaving[thread] = segment
            segments.write(message.body, message.buffers, segment.fds)
        else:
            payload = [*message.body, *message.buffers]
            if len(payload) > _MOST_PARTS:
                payload = [b"".join(payload)]
        if len(segment.fds) + len(fds) > MAX_IN_PACKET:
            flags |= CARRIER_FLAG
            carrier = load(fds)
            fds = [carrier.fileno()]
        parts = (head(FrameKind.ENVELOPE, flags, kinds, sizes, body_size), *payload)
        noted.extend(map(sock.sendmsg, (parts,), (rights(segment.fds + fds),), (SEND_FLAGS,)))
    finally:
        segment.close()
        _segment_pool.leaving.pop(thread, None)
        if carrier is not None:
            carrier.close()


def has_one(spare: Iterator[None]) -> bool:
    """Whether this process may open one more descriptor. ``spare`` opens one and closes it, in one C call."""
    try:
        with _forking:
            for _ in spare:
                break
    except OSError:
        return False
    return True


def has_plenty(fd: int) -> bool:
    """Whether this process may certainly open as many descriptors as any packet brings. ``fd`` is one of its own."""
    found: list[int] = []
    closing = map(os.close, found)
    with _forking:
        try:
            found.extend(map(os.dup, (fd,)))
        except OSError:
            return False
        finally:
            # Opened and closed with no call in between: a signal's handler that raises leaves none open.
            for _ in closing:
                pass
    # The kernel gives out the lowest that is free.
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return found[0] + MAX_IN_PACKET < soft or soft == resource.RLIM_INFINITY


def await_next(recvmsg: Callable[[int, int, int], Packet]) -> None:
    """Wait for a packet, which stays where it is."""
    recvmsg(*_GLANCE_WAITING)


def check_next(recvmsg: Callable[[int, int, int], Packet]) -> None:
    """Raise ``NoRoom`` where there is none for the descriptors of the next packet, which stays where it is."""
    if not recvmsg(*_GLANCE)[2] & CUT_RIGHTS:
        return
    peeked: list[Packet] = []
    # Closed with this, even if a signal's handler keeps us from doing it.
    copies = Descriptors([])
    with _forking:
        try:
            peeked.extend(starmap(recvmsg, _PEEK))
            copies.fds = descriptors_in(peeked[0][1])
        except BaseException:
            if peeked:
                copies.fds = descriptors_in(peeked[0][1])
            raise
        copies.close()
    if peeked[0][2] & CUT_RIGHTS:
        raise NoRoom


def open_packet(packet: Packet, opened: deque[Opened], spent: list[int], segments: SegmentCache) -> None:
    """Append the messages of a received packet to ``opened``, in one C call; they own its descriptors then.

    But for those in ``spent``, which have served: the caller closes them then. Segments are mapped by ``segments``.

    Raises ``EndOfStream``, ``ProtocolError`` or ``OSError``; ``close_packet`` must follow. Where it raises ``NoRoom``
    or something else interrupts it, a signal's handler, the packet can be opened again.
    """
    data, ancillary, flags, _ = packet
    fds = descriptors_in(ancillary)
    if not data and not fds:
        raise EndOfStream
    if flags & CUT:
        if flags & socket.MSG_TRUNC:
            raise ProtocolError(f"a packet is larger than {PACKET_SIZE} bytes")
        raise too_many()
    if data.startswith(PLAIN):
        if fds:
            raise ProtocolError("a plain packet brings descriptors")
        opened.append(data)
        return
    frame = parse(data, len(fds))
    if frame.kind is FrameKind.PACK:
        opened.extend(unpack(frame, data))
    elif frame.kind is FrameKind.SHUT:
        opened.append(ShutMark())
    elif frame.kind is FrameKind.SPILL:
        table, count = frame.lengths
        make = partial(Spill, fds[0], frame.body_size, table, count)
        opened.extend(map(make, (fds[1:],)))
    else:
        _open_envelope(frame, data, fds, opened, spent, segments)


def _open_envelope(
    frame: Frame, data: bytes, fds: list[int], opened: deque[Opened], spent: list[int], segments: SegmentCache
) -> None:
    body: Buffer
    buffers: list[Buffer]
    inside = _handles(frame, fds)
    if frame.in_segment:
        try:
            offsets, size = _segment.layout(frame.body_size, frame.lengths)
            view = segments.view(fds[0], size)
        except BaseException:
            if frame.in_carrier:
                close_all(inside)
            raise
        body = view[: frame.body_size]
        buffers = [view[start : start + length] for start, length in zip(offsets, frame.lengths, strict=True)]
    else:
        view = memoryview(data)
        body, *rest = (view[where] for where in slices(frame.start, (frame.body_size, *frame.lengths)))
        buffers = [bytearray(buffer) for buffer in rest]
    spent += fds[: frame.in_segment + frame.in_carrier]
    opened.extend(map(Parcel, (body,), (buffers,), (frame.kinds,), (inside,)))


def _handles(frame: Frame, fds: list[int]) -> list[int]:
    """The descriptors of the message itself: those behind the segment, or what is in the carrier."""
    rest = fds[frame.in_segment :]
    return unload(rest[0], len(frame.kinds)) if frame.in_carrier else rest


def end_of_body(packet: Packet, most: int) -> bytes:
    """The last bytes of a message that could not be opened for want of memory, as it lies in a segment.

    Raises ``ProtocolError`` for any other packet.
    """
    data, ancillary, _, _ = packet
    fds = descriptors_in(ancillary)
    frame = parse(data, len(fds))
    if frame.kind is not FrameKind.ENVELOPE or not frame.in_segment:
        raise ProtocolError("a packet could not be opened, and it was not for want of memory")
    size = min(most, frame.body_size)
    return os.pread(fds[0], size, frame.body_size - size)


def close_all(fds: list[int]) -> None:
    """Empty ``fds``; each is closed by the C call that takes it out, so no signal's handler can come between."""
    list(map(os.close, map(fds.pop, [-1] * len(fds))))


def close_packet(packet: Packet) -> None:
    """Close the descriptors of a packet that could not be opened."""
    close_all(descriptors_in(packet[1]))
