"""A spill: what a process had not sent when it ended, as one last packet.

The messages lie in a segment, record behind record, and the packet that brings it has room even
on a full socket, because its sender raises the socket's limit for a moment. So the end of a
process never waits for a reader, and nothing is lost.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Sequence
from itertools import starmap
from typing import Any

from .. import _segment
from .._message import CHANNEL_BUFFER, PLAIN_SIZE, Descriptors, HandleKind, Message, Outgoing, Parcel
from ..errors import ProtocolError
from ._carrier import MAX_IN_PACKET, SEND_FLAGS, Carrier, check_room, load, send_rights, unload
from ._frame import RECORD_SIZE, SEGMENT_FLAG, FrameKind, head, parse_record, plain_records, record, slices

#: Asked for while the last packet goes out (bytes), one after the other; the kernel gives what
#: net.core.wmem_max allows. Two steps: a process killed at the first leaves room for others to use the second.
_RAISED = (131072, 1 << 22, 1 << 22, 1 << 22)
#: How much is read at a time (bytes).
_CHUNK = 8192
#: How much is read at a time (bytes) where plain messages are about: more than any of them has.
_PLAIN_CHUNK = 1 << 17
#: How many of them are read at a time.
_MOST_READ = 2048


class Spill:
    """The messages of a process that has ended, taken one by one. Owns its descriptors.

    Those of the messages lie in carriers, in order, and are taken out message by message: a
    reader needs no more descriptors than it would if each had come by itself.
    """

    __slots__ = ("_carriers", "_chunk", "_chunk_start", "_position", "_segment_fd", "_size", "_unread", "messages")

    def __init__(self, segment_fd: int, size: int, position: int, left: int, carriers: list[int]) -> None:
        self._segment_fd = segment_fd
        self._size = size
        #: Where in the segment the messages begin that were not read yet, and how many they are.
        self._position = position
        self._unread = left
        #: Read and not yet taken: plain messages, or a single other one.
        self.messages: deque[bytes | Parcel] = deque()
        self._carriers = carriers
        self._chunk = b""
        self._chunk_start = 0

    @property
    def left(self) -> int:
        """How many messages were not taken yet."""
        return self._unread + len(self.messages)

    @classmethod
    def of(cls, items: Sequence[Outgoing]) -> Spill:
        """Lay ``items`` out in a new segment and carriers. Their handles stay theirs."""
        pieces: list[bytes | bytearray | memoryview] = []
        loads: list[list[int]] = []
        for item in items:
            message = item if isinstance(item, Message) else Message([memoryview(item)[PLAIN_SIZE:]])
            body = b"".join(message.body)
            kinds = bytes(handle.kind for handle in message.handles)
            pieces += (record(len(body), [memoryview(b).nbytes for b in message.buffers], kinds), body)
            pieces += message.buffers
            if kinds:
                loads.append([handle.fileno() for handle in message.handles])
        owned = Descriptors([])
        segment_fd = _segment.create(pieces, (), owned.fds)
        carriers = _load_all(loads)
        owned.fds.clear()
        return cls(segment_fd, os.fstat(segment_fd).st_size, 0, len(items), carriers)

    def read(self, most: int = _MOST_READ) -> None:
        """Read ``messages``, where there are none: at most ``most`` plain ones, or a single other one.

        ``ProtocolError``, and nothing left, where the segment is not as it should be.
        """
        if self.messages or not self._unread:
            return
        try:
            if not self._read_plain(most):
                self._read_other()
        except ProtocolError:
            self.close()
            raise

    def _read_plain(self, most: int) -> bool:
        chunk = _read_at(self._segment_fd, self._position, min(_PLAIN_CHUNK, self._size - self._position))
        frames, end = plain_records(chunk, min(most, self._unread))
        # No call comes between these, hence no signal's handler.
        messages = deque[Any](frames)
        self.messages = messages
        self._unread -= len(frames)
        self._position += end
        return bool(frames)

    def _read_other(self) -> None:
        body, buffers, kinds, end = self._parse()
        copies = [bytearray(buffer) for buffer in buffers]
        fds = self._unload(len(kinds)) if kinds else []
        self._position = end
        self._unread -= 1
        self.messages.extend(map(Parcel, (body,), (copies,), (kinds,), (fds,)))

    def _unread_plain(self) -> None:
        """Undo ``read``, so that the position tells all that is left. Not where it read an other one."""
        sizes = sum(RECORD_SIZE + len(one) - PLAIN_SIZE for one in self.messages if isinstance(one, bytes))
        count = len(self.messages)
        nothing: deque[bytes | Parcel] = deque()
        self._position -= sizes
        self._unread += count
        self.messages = nothing

    def pop(self) -> bytes | Parcel:
        """Take the next message out; ``read`` says what it raises."""
        self.read(1)
        [message] = starmap(self.messages.popleft, ((),))
        return message

    def forward(self, sock: socket.socket) -> None:
        """Send messages as packets of their own, as many as the kernel takes now and nothing special is about."""
        while self._unread or self.messages:
            if not self.messages and not self._read_plain(_MOST_READ):
                return
            while self.messages:
                frame = self.messages[0]
                if not isinstance(frame, bytes):
                    return
                try:
                    [_] = map(sock.send, (frame,), (SEND_FLAGS,))
                except BlockingIOError:
                    return
                del self.messages[0]

    def _parse(self) -> tuple[bytes, list[bytes], bytes, int]:
        """The next message: body, buffers, kinds of its handles, and where the one behind it begins."""
        found = parse_record(self._read(0, RECORD_SIZE))
        start = RECORD_SIZE + found.table_size
        sizes, kinds = found.parse_table(self._read(RECORD_SIZE, found.table_size))
        stretch = self._read(start, found.body_size + sum(sizes))
        body, *buffers = (stretch[where] for where in slices(0, (found.body_size, *sizes)))
        return body, buffers, kinds, self._position + start + len(stretch)

    def _read(self, offset: int, size: int) -> bytes:
        """``size`` bytes of the segment, ``offset`` behind the position. Read, not mapped: most are small."""
        start = self._position + offset - self._chunk_start
        if not 0 <= start <= start + size <= len(self._chunk):
            self._chunk_start = self._position + offset
            if self._chunk_start + size > self._size:
                raise ProtocolError("the last packet of a process ends in the middle of a message")
            self._chunk = _read_at(self._segment_fd, self._chunk_start, max(size, _CHUNK))
            start = 0
        if len(self._chunk) < start + size:
            raise ProtocolError("the last packet of a process ends in the middle of a message")
        return self._chunk[start : start + size]

    def _unload(self, count: int) -> list[int]:
        """The next message's descriptors. ``OSError`` where this process has no room; they are still there then."""
        while self._carriers:
            check_room(self._carriers[0], count)
            try:
                return unload(self._carriers[0], count)
            except ProtocolError:
                # Empty. Each message's are in one carrier.
                os.close(self._carriers.pop(0))
        raise ProtocolError("the last packet of a process brings too few descriptors")

    def send_last(self, sock: socket.socket) -> None:
        """Send what is left as one packet, past the socket's usual limit.

        Raises ``BlockingIOError`` where even the raised limit is reached; the spill is whole then.
        """
        self._unread_plain()
        kinds = bytes([HandleKind.FILE] * len(self._carriers))
        frame = head(FrameKind.SPILL, SEGMENT_FLAG, kinds, (self._position, self._unread), self._size)
        try:
            for raised in _RAISED:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, raised)
                try:
                    send_rights(sock, [frame], [self._segment_fd, *self._carriers])
                    return
                except BlockingIOError:
                    # Or another process has lowered it meanwhile.
                    continue
        finally:
            # Lowered again, or the next process to end would find no room to raise it by. Not to what it
            # was: a process may have been killed before it came here.
            lower_limit(sock)
        raise BlockingIOError(errno.EAGAIN, "not even the last packet has room")

    def close(self) -> None:
        self._unread = 0
        while self.messages:
            message = self.messages.popleft()
            if isinstance(message, Parcel):
                message.close()
        if self._segment_fd >= 0:
            segment_fd, self._segment_fd = self._segment_fd, -1
            os.close(segment_fd)
        carriers, self._carriers = self._carriers, []
        for fd in carriers:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_segment_fd", -1) >= 0:
            self.close()


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


def lower_limit(sock: socket.socket) -> None:
    """Undo what a process was killed in: filled up to a raised limit, a socket has no room for a last packet."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BUFFER)


def _load_all(loads: Sequence[Sequence[int]]) -> list[int]:
    """Carriers with every one of ``loads``, in order, each of them in a single carrier."""
    carriers: list[int] = []
    current: Carrier | None = None
    try:
        for fds in loads:
            if len(fds) <= MAX_IN_PACKET and current is not None and current.add(fds):
                continue
            if current is not None:
                carriers.append(current.detach())
                current = None
            if len(fds) > MAX_IN_PACKET:
                carriers.append(load(fds).detach())
            else:
                current = Carrier()
                current.add(fds)
        if current is not None:
            carriers.append(current.detach())
    except BaseException:
        for fd in carriers:
            os.close(fd)
        if current is not None:
            current.close()
        raise
    return carriers
