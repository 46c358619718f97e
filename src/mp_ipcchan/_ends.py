"""The two ends of a queue's socket pair, as every process holds them both."""

from __future__ import annotations

import os

from ._connection import Connection
from ._inlet import EndOfStream, ShutMark, Spill
from ._link import Link, LinkHandle
from ._message import Handle, HandleKind, Incoming
from ._transport.unix import CHANNEL_BUFFER


class Ends:
    __slots__ = ("reader", "writer")

    def __init__(self, reader: Connection, writer: Connection) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    def new(cls) -> Ends:
        receiving, sending = Link.pair(CHANNEL_BUFFER)
        return cls(Connection(receiving, writable=False), Connection(sending, readable=False))

    def take(self, wait: bool) -> Incoming | ShutMark:
        """One message. Raises ``BlockingIOError``, and ``EOFError`` where nobody can put any more."""
        self.reader._check_closed()
        inlet = self.reader._link.inlet
        try:
            taken = inlet.take(wait)
        except EndOfStream:
            raise EOFError("no process can put anything into this queue any more") from None
        if isinstance(taken, Spill):
            return self._take_from(taken)
        return taken

    def _take_from(self, spill: Spill) -> Incoming:
        """The first message of a process that ended; the rest goes back, for anybody to take."""
        message = spill.pop()
        if spill.left:
            try:
                if self.writer.closed:
                    raise BlockingIOError
                sock = self.writer._link.sock
                spill.forward(sock)
                if spill.left:
                    spill.send_last(sock)
                    spill.close()
            except OSError:
                # It can't go back, so it stays with this process.
                self.reader._link.inlet.put_back(spill)
        return message

    def await_readable(self, deadline: float | None) -> bool:
        self.reader._check_closed()
        return self.reader._link.inlet.await_readable(deadline)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is there to take, and nothing of this process waits to get there."""
        return not self.await_readable(0.0) and (self.writer.closed or not self.writer._link.outlet.backlog)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def pack(self) -> list[Handle]:
        return [LinkHandle(HandleKind.CONNECTION, end._link) for end in (self.reader, self.writer)]

    @classmethod
    def adopt(cls, reader_fd: int, writer_fd: int) -> Ends:
        reader = Connection(Link.adopt(reader_fd), writable=False)
        return cls(reader, Connection(Link.adopt(writer_fd), readable=False))

    @property
    def inode(self) -> int:
        """What tells this queue from others, in whatever process."""
        return os.fstat(self.reader.fileno()).st_ino
