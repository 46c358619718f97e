"""A spill: what a process had not sent when it ended, as one last packet.

The messages lie in a segment, one behind the other, and the packet that brings it has room even
on a full socket, because its sender raises the socket's limit for a moment. So the end of a
process never waits for a reader, and nothing is lost.

Several processes may read one spill, each its own copy of the packet: a message is taken by moving the
position of the open file, which they share, and which the kernel moves for one at a time. A reader that is
killed takes at most the messages along that it has claimed.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Sequence
from itertools import pairwise, repeat, starmap
from operator import sub

from .._message import (
    CHANNEL_BUFFER,
    MAX_BUFFERS,
    MAX_HANDLES,
    PACKET_SIZE,
    PLAIN,
    Descriptors,
    HandleKind,
    Incoming,
    Message,
    Outgoing,
    Parcel,
    TooLargeError,
)
from .._segments import _segment
from ..errors import ProtocolError
from ._cargo import Cargo, Packet, load_all, numbered
from ._carrier import MAX_IN_PACKET, send_rights, unload
from ._frame import RECORD_SIZE, SEGMENT_FLAG, FrameKind, head, parse_record, record, slices
from ._window import Window

#: Asked for while the last packet goes out (bytes), one after the other; the kernel gives what
#: net.core.wmem_max allows, by default 212992. Two steps: a process killed at the first leaves room for others to use
#: the second. A socket that was filled up to ``LARGE_BUFFER`` has room at the first.
_RAISED = (188416, 1 << 22, 1 << 22, 1 << 22)
#: Of so many messages it is noted at a time where they begin.
_MOST_KNOWN = 512
#: How much is claimed at a time (bytes, roughly) where many messages are asked for.
_STRETCH = 1 << 17
#: The most that there is beside a message's bytes (bytes).
_OVERHEAD = RECORD_SIZE + MAX_HANDLES + 8 * MAX_BUFFERS

#: In the table: where the message begins, shifted by two bits. They tell whether it is a record, else it is a plain
#: frame, and whether it has descriptors.
_ENTRY = struct.Struct("<Q")
_SHIFT, _IS_RECORD, _HAS_RIGHTS = 2, 1, 2


class Spill:
    """The messages of a process that has ended. Owns its descriptors.

    Behind the messages in the segment, from ``table`` on, is where each begins, and where the last ends.
    Plain messages lie there as frames, others as records. Two readers may find each other's descriptors (``_cargo``);
    each goes on with the message that they are of.
    """

    __slots__ = (
        "_cargo",
        "_count",
        "_fd",
        "_known",
        "_owned",
        "_records",
        "_returned",
        "_size",
        "_table",
        "_table_at",
        "drained",
        "messages",
    )

    def __init__(self, fd: int, size: int, table: int, count: int, carriers: list[int]) -> None:
        self._size = size
        self._table_at = table
        self._count = count
        self._records = Window(fd, table)
        self._table = Window(fd, size)
        #: The number of a message, and a stretch of the table from its entry on.
        self._known: tuple[int, list[int]] = (0, [])
        #: Claimed in this process, from the first to before the last, and not read after all.
        self._returned: deque[tuple[int, int]] = deque()
        self._cargo = Cargo([])
        #: Whether this process has seen that everything is claimed.
        self.drained: bool = not count
        #: Read, and not yet taken by the process that has this spill to itself.
        self.messages: deque[Incoming] = deque()
        # Behind all calls: a signal's handler that comes before finds the descriptors its packet's still.
        self._fd = fd
        self._owned = [fd]
        self._cargo.carriers = carriers

    @property
    def left(self) -> int:
        """How many messages nobody has claimed, or this process has and not taken."""
        if self._fd < 0:
            return 0
        unclaimed = max(0, self._count - os.lseek(self._fd, 0, os.SEEK_CUR))
        return unclaimed + sum(last - first for first, last in self._returned) + len(self.messages)

    @classmethod
    def of(cls, items: Sequence[Outgoing]) -> Spill:
        """Lay ``items`` out in a new segment and carriers. Their handles stay theirs."""
        pieces: list[bytes | bytearray | memoryview] = []
        table: list[int] = []
        loads: list[tuple[int, list[int]]] = []
        at = 0
        for number, item in enumerate(items):
            if not isinstance(item, Message):
                pieces.append(item)
                table.append(at << _SHIFT)
                at += len(item)
                continue
            body = b"".join(item.body)
            kinds = bytes(handle.kind for handle in item.handles)
            begins = record(len(body), [*map(len, item.buffers)], kinds)
            pieces += (begins, body)
            pieces += item.buffers
            table.append(at << _SHIFT | _IS_RECORD | (_HAS_RIGHTS if kinds else 0))
            if kinds:
                loads.append((number, [handle.fileno() for handle in item.handles]))
            at += len(begins) + len(item)
        table.append(at << _SHIFT)
        pieces.append(struct.pack(f"<{len(table)}Q", *table))
        owned = Descriptors([])
        fd = _segment.create_with_position(pieces, owned.fds)
        carriers = load_all(loads)
        owned.fds.remove(fd)
        return cls(fd, os.fstat(fd).st_size, at, len(items), carriers)

    def read(self, most: int, into: deque[Incoming], largest: int = sys.maxsize) -> None:
        """Claim messages and append them to ``into``, at most ``most``; none once all are claimed.

        No more than ``largest`` bytes are read for a message: who sent this may not be trusted.

        ``OSError`` where this process has no room for the descriptors of one; it can be read again then.
        ``TooLargeError`` where it has no memory for the next, which is dropped.
        ``ProtocolError``, and nothing left, where the segment is not as it should be.
        """
        if self._fd < 0:
            # It was not as it should be, so nothing is left.
            self.drained = True
            return
        if most > 1:
            most = max(1, min(most, _STRETCH * self._count // (self._table_at + 1)))
        before = len(into)
        claimed: list[tuple[int, int]] = []
        ends: list[int] = []
        try:
            if self._returned:
                try:
                    claimed.extend(starmap(self._returned.popleft, ((),)))
                except IndexError:
                    # Another thread was faster.
                    pass
            if not claimed:
                ends.extend(map(os.lseek, (self._fd,), (most,), (os.SEEK_CUR,)))
                claimed.append((ends[0] - most, min(ends[0], self._count)))
            first, last = claimed[0]
            if last == self._count:
                self.drained = True
            if first < last:
                self._read(first, min(last, first + most), into, largest)
            if len(into) - before < last - first:
                self._give_back(claimed, ends, most, len(into) - before)
        except ProtocolError:
            self.close()
            raise
        except BaseException as error:
            dropped = isinstance(error, MemoryError)
            try:
                self._give_back(claimed, ends, most, len(into) - before + dropped)
            except BaseException:
                # Another signal's handler.
                self._give_back(claimed, ends, most, len(into) - before + dropped)
            if dropped:
                raise TooLargeError from error
            raise

    def _give_back(self, claimed: list[tuple[int, int]], ends: list[int], most: int, done: int) -> None:
        """Let the next call read what was claimed, but for the first ``done``. Once, however often it is called."""
        if ends and not claimed:
            claimed.append((ends[0] - most, min(ends[0], self._count)))
        for first, last in claimed:
            rest = first + done, last
            if rest[0] < last and self._fd >= 0 and rest not in self._returned:
                self._returned.appendleft(rest)

    def _read(self, first: int, last: int, into: deque[Incoming], largest: int) -> None:
        """Append messages from ``first`` to before ``last``, in order, by C calls: plain ones, or one other."""
        start, known = self._known
        if last - first == 1 and start <= first < start + len(known) - 1:
            # The usual case of who takes one after the other, at half the cost.
            entry = known[first - start]
            at, end = entry >> _SHIFT, known[first - start + 1] >> _SHIFT
            if not entry & _IS_RECORD and end - at <= min(PACKET_SIZE, largest):
                frame = self._records.read(at, end)
                if frame.startswith(PLAIN):
                    into.append(frame)
                    return
        entries = self._entries(first, last)
        if largest < sys.maxsize and max(map(sub, entries[1:], entries)) >> _SHIFT > largest + _OVERHEAD:
            raise ProtocolError(f"the last packet of a process has a message of more than {largest} bytes")
        if entries[0] & _HAS_RIGHTS:
            self._read_with_descriptors(first, into)
        elif entries[0] & _IS_RECORD:
            body, copies, kinds = self._parse(*entries[:2])
            into.extend(map(Parcel, (body,), (copies,), (kinds,), ([],)))
        else:
            into.extend(self._read_plain(entries, largest))

    def _read_plain(self, entries: list[int], largest: int) -> list[bytes]:
        """The plain messages that are first among those that begin there."""
        plain = next((at for at, entry in enumerate(entries) if entry & _IS_RECORD), len(entries) - 1)
        # Of a stranger, a stretch may be longer than it is on average.
        while plain > 1 and (entries[plain] - entries[0]) >> _SHIFT > max(largest, _STRETCH):
            plain //= 2
        offsets = [entry >> _SHIFT for entry in entries[: plain + 1]]
        if max(map(sub, offsets[1:], offsets)) <= PACKET_SIZE:
            start = offsets[0]
            data = self._records.read(start, offsets[-1])
            frames = [data[at - start : end - start] for at, end in pairwise(offsets)]
            if all(map(bytes.startswith, frames, repeat(PLAIN))):
                return frames
        raise ProtocolError("the last packet of a process holds something else than messages")

    def _read_with_descriptors(self, number: int, into: deque[Incoming]) -> None:
        """Append a message with descriptors, if not ``number`` then another whose reader gets that one."""
        _, kinds, _ = self._parse_head(*self._entries(number, number + 1))
        self._cargo.check_room(len(kinds))
        before = len(into)
        taken: list[Packet] = []
        try:
            self._cargo.take(taken)
            found, fds = numbered(taken[0])
            body, copies, kinds = self._parse(*(self._entries if found == number else self._locate)(found, found + 1))
            if len(kinds) > MAX_IN_PACKET and len(fds) == 1:
                # The carrier inside is closed with the object that has it, come what may.
                inner = Descriptors(fds)
                taken.clear()
                fds = unload(inner.fds[0], len(kinds))
            if len(fds) != len(kinds):
                raise ProtocolError(f"a message has {len(kinds)} descriptors, and its packet brings {len(fds)}")
            into.extend(map(Parcel, (body,), (copies,), (kinds,), (fds,)))
        except MemoryError:
            # It will be dropped.
            Descriptors([fd for packet in taken for fd in numbered(packet)[1]])
            raise
        except BaseException:
            if len(into) == before:
                # It stays claimed by this process, and they are its own.
                self._cargo.put_back(taken)
            raise

    def _entries(self, first: int, last: int) -> list[int]:
        """The table's entries from ``first`` on to that of ``last``, with it."""
        start, known = self._known
        if not start <= first <= last < start + len(known):
            # Whoever reads one after the other asks for the next soon.
            start, known = self._known = first, self._locate(first, min(self._count, max(last, first + _MOST_KNOWN)))
        return known[first - start : last - start + 1]

    def _locate(self, first: int, last: int) -> list[int]:
        if not 0 <= first < last <= self._count:
            raise ProtocolError("the last packet of a process names a message that it doesn't have")
        data = self._table.read(self._table_at + _ENTRY.size * first, self._table_at + _ENTRY.size * (last + 1))
        entries = [entry for (entry,) in _ENTRY.iter_unpack(data)]
        if sorted(entries) != entries or entries[-1] >> _SHIFT > self._table_at:
            raise ProtocolError("the last packet of a process says wrongly where its messages begin")
        return entries

    def _parse_head(self, entry: int, following: int) -> tuple[tuple[int, ...], bytes, int]:
        """Of the message that begins and ends there: sizes of body and buffers, handles' kinds, where the body is."""
        begin, end = entry >> _SHIFT, following >> _SHIFT
        if begin + RECORD_SIZE <= end:
            found = parse_record(self._records.read(begin, begin + RECORD_SIZE))
            start = begin + RECORD_SIZE + found.table_size
            if start <= end:
                sizes, kinds = found.parse_table(self._records.read(begin + RECORD_SIZE, start))
                if start + found.body_size + sum(sizes) == end:
                    return (found.body_size, *sizes), kinds, start
        raise ProtocolError("the last packet of a process ends in the middle of a message")

    def _parse(self, entry: int, following: int) -> tuple[memoryview, list[bytearray], bytes]:
        """A message that begins and ends there: body, buffers, kinds of its handles."""
        sizes, kinds, start = self._parse_head(entry, following)
        data = memoryview(self._records.read(start, following >> _SHIFT))
        body, *buffers = (data[where] for where in slices(0, sizes))
        return body, [bytearray(buffer) for buffer in buffers], kinds

    def send_last(self, sock: socket.socket) -> None:
        """Send this as one packet, past the socket's usual limit. It stays this process's, too.

        Raises ``BlockingIOError`` where even the raised limit is reached.
        """
        carriers = self._cargo.carriers
        kinds = bytes([HandleKind.FILE] * len(carriers))
        frame = head(FrameKind.SPILL, SEGMENT_FLAG, kinds, (self._table_at, self._count), self._size)
        try:
            for raised in _RAISED:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, raised)
                try:
                    send_rights(sock, [frame], [self._fd, *carriers])
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
        while self.messages:
            message = self.messages.popleft()
            if isinstance(message, Parcel):
                message.close()
        self._returned.clear()
        self._cargo.close()
        self._fd = -1
        # Closed by the C call that takes it out: interrupted by a signal's handler, this can be called again.
        list(map(os.close, map(self._owned.pop, [-1] * len(self._owned))))

    def __del__(self) -> None:
        if getattr(self, "_owned", None):
            self.close()


def lower_limit(sock: socket.socket) -> None:
    """Undo what a process was killed in: filled up to a raised limit, a socket has no room for a last packet."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BUFFER)
