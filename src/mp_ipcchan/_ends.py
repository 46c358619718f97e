"""The two ends of a queue's socket pair, as every process holds them both."""

from __future__ import annotations

import os
import socket
import struct
from itertools import starmap

from ._connection import Connection
from ._inlet import EndOfStream, ShutMark, Spill
from ._link import Link, LinkHandle
from ._message import CHANNEL_BUFFER, Handle, HandleKind, Incoming
from ._transport._spill import lower_limit

#: How long (seconds) anybody waits for a message without looking up.
LOOK_EVERY = 1.0
_TIMEVAL = struct.Struct("ll")


class Ends:
    __slots__ = ("reader", "writer")

    def __init__(self, reader: Connection, writer: Connection) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    def new(cls) -> Ends:
        receiving, sending = Link.pair(CHANNEL_BUFFER)
        # Whoever waits in the kernel comes back now and then, to see what no packet tells: the process
        # that was to wake it, because the queue was shut down, may have been killed.
        receiving.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(int(LOOK_EVERY), 0))
        return cls(Connection(receiving, writable=False), Connection(sending, readable=False))

    def take(self, wait: bool) -> Incoming | ShutMark:
        """One message. Raises ``BlockingIOError``, and ``EOFError`` where nobody can put any more."""
        self.reader._check_closed()
        inlet = self.reader._link.inlet
        try:
            taken = inlet.take(wait)
        except EndOfStream:
            raise EOFError("no process can put anything into this queue any more") from None
        # Asked without a call: a signal's handler that raises here would lose the message.
        if taken.__class__ is not Spill:
            return taken  # type: ignore[return-value]
        return self._unroll(taken)

    def _unroll(self, taken: Spill) -> Incoming:
        """Of the messages of a process that ended, the first; the rest goes back, for anybody to take."""
        held: list[Incoming] = []
        try:
            held.extend(starmap(taken.pop, ((),)))
            self._put_back(taken)
        except BaseException:
            # A signal's handler raised: what it interrupted stays with this process.
            self.reader._link.inlet.put_back(*held, *(taken,) * bool(taken.left))
            raise
        return held[0]

    def _put_back(self, spill: Spill) -> None:
        if spill.left and not self.writer.closed:
            sock = self.writer._link.sock
            try:
                lower_limit(sock)
                spill.forward(sock)
                if spill.left:
                    spill.send_last(sock)
                    spill.close()
            except OSError:
                # There is no room even for this; it stays with this process.
                pass
        if spill.left:
            self.reader._link.inlet.put_back(spill)
        else:
            spill.close()

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
