"""The ends of a queue, as every process holds them all.

A queue is a socket pair, and a second one, the *front lane*. What a process had not sent when it ended comes as
one packet, of which a reader takes the first message. The rest is older than all that was put since, so it
goes into the front lane. There a reader looks first where it has put something itself, and else when it finds
nothing in the queue, or has waited for a second.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from itertools import starmap

from ._connection import Connection
from ._inlet import EndOfStream, ShutMark, Spill
from ._link import Link, LinkHandle
from ._message import CHANNEL_BUFFER, Handle, HandleKind, Incoming
from ._transport._carrier import send_rights
from ._transport._frame import SHUT

#: How long (seconds) anybody waits for a message without looking up.
LOOK_EVERY = 1.0
_TIMEVAL = struct.Struct("ll")


class Ends:
    """The reading and the writing end. The links of both have the same end of the front lane."""

    __slots__ = ("reader", "writer")

    def __init__(self, receiving: Link, sending: Link, front_receiving: Link, front_sending: Link) -> None:
        receiving.attach(front_receiving)
        sending.attach(front_sending)
        self.reader = Connection(receiving, writable=False)
        self.writer = Connection(sending, readable=False)

    @classmethod
    def new(cls) -> Ends:
        receiving, sending = Link.pair(CHANNEL_BUFFER)
        # Whoever waits in the kernel comes back now and then, to see what no packet tells: the process
        # that was to wake it, because the queue was shut down, may have been killed.
        receiving.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(int(LOOK_EVERY), 0))
        return cls(receiving, sending, *Link.pair(CHANNEL_BUFFER))

    def take(self, wait: bool, hold: Callable[[int], None] | None = None) -> Incoming | ShutMark:
        """One message. Raises ``BlockingIOError``, and ``EOFError`` where nobody can put any more.

        With ``wait`` it waits, but comes back now and then. ``hold`` is told how many further messages, which would be
        lost if this process were killed, it has in its hands (and, as a negative number, no more).
        """
        self.reader._check_closed()
        inlet = self.reader._link.inlet
        looked = False
        while True:
            if inlet.detour and not inlet.ready:
                looked = True
                taken = self._take_in_front(hold)
                if taken is not None:
                    return taken
            try:
                found = inlet.take(wait)
            except (BlockingIOError, EndOfStream) as error:
                # Another process may have put something in front.
                inlet.detour = wait or not looked
                if not looked:
                    continue
                if isinstance(error, BlockingIOError):
                    raise
                raise EOFError("no process can put anything into this queue any more") from None
            # Asked without a call: a signal's handler that raises here would lose the message.
            if found.__class__ is not Spill:
                return found  # type: ignore[return-value]
            return self._unroll(found, hold)

    def _take_in_front(self, hold: Callable[[int], None] | None) -> Incoming | None:
        """The oldest message of the front lane, if there is one."""
        link = self.reader._link
        assert link.front
        try:
            found = link.front.inlet.take(False)
        except (BlockingIOError, EndOfStream):
            link.inlet.detour = False
            return None
        if found.__class__ is not Spill:
            return found  # type: ignore[return-value]
        return self._unroll(found, hold)

    def _unroll(self, taken: Spill, hold: Callable[[int], None] | None) -> Incoming:
        """Of the messages of a process that ended, the first; the rest goes in front, for anybody to take."""
        held: list[Incoming] = []
        further = taken.left - 1 if hold else 0
        announced = False
        try:
            if hold and further:
                hold(further)
                announced = True
            held.extend(starmap(taken.pop, ((),)))
            self._put_in_front(taken)
        except BaseException:
            # A signal's handler raised: what it interrupted stays with this process.
            self.reader._link.inlet.put_back(*held, *(taken,) * bool(taken.left))
            raise
        finally:
            if hold and announced:
                hold(-further)
        return held[0]

    def _put_in_front(self, spill: Spill) -> None:
        if spill.left and not self.writer.closed:
            front = self.writer._link.front
            assert front
            self.reader._link.inlet.detour = True
            try:
                spill.forward(front.sock)
                if spill.left:
                    spill.send_last(front.sock)
                    spill.close()
            except OSError:
                # There is no room even for this; it stays with this process.
                pass
        if spill.left:
            self.reader._link.inlet.put_back(spill)
        else:
            spill.close()

    def send_shut(self) -> None:
        """Tell a reader that the queue was shut down. On a full socket nobody waits to hear it."""
        if not self.writer.closed:
            try:
                send_rights(self.writer._link.sock, [SHUT], ())
            except OSError:
                pass

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
        links = (self.reader._link, self.writer._link)
        fronts = [link.front for link in links if link.front]
        return [LinkHandle(HandleKind.CONNECTION, link) for link in (*links, *fronts)]

    @classmethod
    def adopt(cls, fds: Sequence[int]) -> Ends:
        """The ends that ``pack`` has packed."""
        receiving, sending, front_receiving, front_sending = map(Link.adopt, fds)
        return cls(receiving, sending, front_receiving, front_sending)

    @property
    def inode(self) -> int:
        """What tells this queue from others, in whatever process."""
        return os.fstat(self.reader._link.fileno()).st_ino
