"""A spill: what a process had not sent when it ended, as one last packet.

The messages lie in a segment, record behind record, and the packet that brings it has room even
on a full socket, because its sender raises the socket's limit for a moment. So the end of a
process never waits for a reader, and nothing is lost.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from .. import _segment
from .._message import INLINE_SIZE, PLAIN, PLAIN_SIZE, Handle, Message, Outgoing, Parcel
from ..errors import ProtocolError
from ._carrier import MAX_IN_PACKET, load
from ._frame import CARRIER_FLAG, RECORD_SIZE, SEGMENT_FLAG, FrameKind, head, parse_record, record, slices

#: Asked for while the last packet goes out (bytes); the kernel gives what net.core.wmem_max allows.
_RAISED = 1 << 22
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
#: How much is read at a time (bytes).
_CHUNK = 8192
#: How much is read at a time to be sent on: more than any message that goes in a packet.
_FORWARD_CHUNK = 1 << 17


class Spill:
    """The messages of a process that has ended, taken one by one. Owns its descriptors."""

    __slots__ = ("_chunk", "_chunk_start", "_fds", "_kinds", "_position", "_segment_fd", "_size", "left")

    def __init__(self, segment_fd: int, size: int, position: int, left: int, kinds: bytes, fds: list[int]) -> None:
        self._segment_fd = segment_fd
        self._size = size
        self._position = position
        self.left: int = left
        self._kinds = kinds
        self._fds = fds
        self._chunk = b""
        self._chunk_start = 0

    @classmethod
    def of(cls, items: Sequence[Outgoing]) -> Spill:
        """Lay ``items`` out in a new segment. Their handles stay theirs: the spill duplicates the descriptors."""
        pieces: list[bytes | bytearray | memoryview] = []
        handles: list[Handle] = []
        for item in items:
            message = item if isinstance(item, Message) else Message([memoryview(item)[PLAIN_SIZE:]])
            body = b"".join(message.body)
            kinds = bytes(handle.kind for handle in message.handles)
            pieces += (record(len(body), [memoryview(b).nbytes for b in message.buffers], kinds), body)
            pieces += message.buffers
            handles += message.handles
        segment_fd = _segment.create(pieces, ())
        fds: list[int] = []
        try:
            fds += (os.dup(handle.fileno()) for handle in handles)
            size = os.fstat(segment_fd).st_size
            return cls(segment_fd, size, 0, len(items), bytes(handle.kind for handle in handles), fds)
        except BaseException:
            for fd in (segment_fd, *fds):
                os.close(fd)
            raise

    def pop(self) -> bytes | Parcel:
        """Take the next message out. ``ProtocolError``, and nothing left, where the segment is not as it should be."""
        try:
            body, buffers, kinds, end = self._parse()
        except ProtocolError:
            self.close()
            raise
        fds = self._fds[: len(kinds)]
        rest = self._fds[len(kinds) :], self._kinds[len(kinds) :]
        message: list[bytes | Parcel] = []
        if not kinds and not buffers:
            message.append(PLAIN + body)
        else:
            message.extend(map(Parcel, (body,), ([bytearray(buffer) for buffer in buffers],), (kinds,), (fds,)))
        # Taken from here on: no call follows, hence no signal's handler.
        self._fds, self._kinds = rest
        self._position = end
        self.left -= 1
        return message[0]

    def forward(self, sock: socket.socket) -> None:
        """Send messages as packets of their own, as many as the kernel takes now and nothing special is about."""
        while self.left:
            chunk = _read_at(self._segment_fd, self._position, _FORWARD_CHUNK)
            at = 0
            while self.left and at + RECORD_SIZE <= len(chunk):
                found = parse_record(chunk[at : at + RECORD_SIZE])
                start = at + RECORD_SIZE
                at = start + found.body_size
                if found.table_size or found.body_size > INLINE_SIZE or at > len(chunk):
                    break
                try:
                    sock.send(PLAIN + chunk[start:at], _SEND_FLAGS)
                except BlockingIOError:
                    return
                self._position += at - start + RECORD_SIZE
                self.left -= 1
            else:
                continue
            if found.table_size or found.body_size > INLINE_SIZE or start == RECORD_SIZE:
                # Not for a packet of its own, or cut off though it is the first of the chunk: not a whole message.
                return

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

    def send_last(self, sock: socket.socket) -> None:
        """Send what is left as one packet, past the socket's usual limit.

        Raises ``BlockingIOError`` where even the raised limit is reached; the spill is whole then.
        """
        usual = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, max(_RAISED, usual))
        try:
            self._send(sock)
        finally:
            # Lowered again, or the next process to end would find no room to raise it by.
            # The kernel doubles what it is told.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, usual // 2)

    def _send(self, sock: socket.socket) -> None:
        fds = [self._segment_fd]
        flags = SEGMENT_FLAG
        carrier = -1
        if len(self._fds) >= MAX_IN_PACKET:
            carrier = load(self._fds)
            fds.append(carrier)
            flags |= CARRIER_FLAG
        else:
            fds += self._fds
        try:
            frame = head(FrameKind.SPILL, flags, self._kinds, (self._position, self.left), self._size)
            socket.send_fds(sock, [frame], fds, _SEND_FLAGS)
        finally:
            if carrier >= 0:
                os.close(carrier)

    def close(self) -> None:
        self.left = 0
        if self._segment_fd >= 0:
            segment_fd, self._segment_fd = self._segment_fd, -1
            os.close(segment_fd)
        fds, self._fds = self._fds, []
        for fd in fds:
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
