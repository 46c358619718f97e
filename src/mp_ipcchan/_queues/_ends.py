"""The ends of a queue, as every process holds them all.

A queue is a socket pair, and a second one, the *front lane*. What a process had not sent when it ended comes as one
packet, a spill, whose messages are older than all that was put since. So the reader that gets it puts it into
the front lane, where it stays, and from which everybody takes, message by message, until there is none left.
There a reader looks first where that was noted, and else when it finds nothing in the queue, or has waited for a
while.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from itertools import starmap

from .._connection import Connection
from .._inlet import EndOfStream, ShutMark, Spill
from .._interrupt import raised_by_handler
from .._link import Link, LinkHandle
from .._message import CHANNEL_BUFFER, Handle, HandleKind, Incoming
from .._transport._carrier import send_rights
from .._transport._frame import SHUT
from .._transport.unix import PEEK_ALL, Opened, Packet, close_packet, open_packet
from ..errors import ProtocolError
from ._ledger import Ledger

#: How long (seconds) anybody waits for a message without looking up.
LOOK_EVERY = 1.0
#: How long (microseconds) a reader waits for the queue alone, in the kernel; then for the front lane, too.
_SLEEP = 50_000
_TIMEVAL = struct.Struct("ll")


class Ends:
    """The reading and the writing end. The links of both have the same end of the front lane."""

    __slots__ = ("ledger", "reader", "writer")

    def __init__(self, receiving: Link, sending: Link, front_receiving: Link, front_sending: Link) -> None:
        receiving.attach(front_receiving)
        sending.attach(front_sending)
        self.reader = Connection(receiving, writable=False)
        self.writer = Connection(sending, readable=False)
        #: Where it is noted for all processes that something is in the front lane, if anywhere.
        self.ledger: Ledger | None = None

    @classmethod
    def new(cls) -> Ends:
        receiving, sending = Link.pair(CHANNEL_BUFFER)
        # Whoever waits in the kernel comes back now and then, to see what no packet tells: something was put in
        # front; or the queue was shut down, and the process that was to wake this one was killed.
        receiving.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, _SLEEP))
        return cls(receiving, sending, *Link.pair(CHANNEL_BUFFER))

    def take(self, wait: bool) -> Incoming | ShutMark:
        """One message. Raises ``BlockingIOError``, and ``EOFError`` where nobody can put any more.

        With ``wait`` it waits, but comes back now and then.
        """
        self.reader._check_closed()
        inlet = self.reader._link.inlet
        looked = False
        while True:
            waiting = bool(inlet.ready)
            if (inlet.detour or (self.ledger and self.ledger.detour)) and not waiting and not inlet.inbox:
                looked = True
                taken = self._take_in_front()
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
            sent: list[None] = []
            # Into it without a call: a signal's handler that raised there would lose what was found.
            try:
                if found.__class__ is Spill:
                    self._put_in_front(found, sent)
                elif found.__class__ is bytes and not waiting and self.ledger and self.ledger.detour:
                    # Slept, and woken by what is newer than something that another has put in front meanwhile.
                    # (What has descriptors keeps its order only while one process reads.)
                    self._put_in_front(Spill.of([found]), sent)
            except BaseException:
                if not sent:
                    inlet.put_back(found)  # type: ignore[arg-type]
                raise
            if not sent:
                if found.__class__ is not Spill:
                    return found  # type: ignore[return-value]
                inlet.put_back(found)

    def _put_in_front(self, spill: Spill, sent: list[None]) -> None:
        """Let everybody read what a process left behind. ``sent`` stays empty where there is no room for that.

        A reader that is killed between receiving it and this takes all of it along.
        """
        if self.writer.closed:
            return
        front = self.writer._link.front
        assert front
        try:
            sent.extend(map(spill.send_last, (front.sock,)))
        except OSError as error:
            if raised_by_handler(error):
                raise
            return
        self._note(True)
        spill.close()

    def _note(self, detour: bool) -> None:
        self.reader._link.inlet.detour = detour
        if self.ledger:
            self.ledger.set_detour(detour)

    def _take_in_front(self) -> Incoming | None:
        """The oldest message that the front lane has, if any."""
        inlet = self.reader._link.inlet
        while True:
            spill = inlet.shared
            if spill is None:
                # Before it looks: another process may put something there and note that, in between.
                self._note(False)
                spill = self._look_in_front()
                if spill is None:
                    return None
                self._note(True)
            held: deque[Incoming] = deque()
            try:
                spill.read(1, held)
                if spill.drained:
                    self._retire(spill)
            except BaseException as error:
                inlet.put_back(*held)
                if isinstance(error, ProtocolError):
                    self._retire(spill)
                raise
            if held:
                return held[0]

    def _look_in_front(self) -> Spill | None:
        """The spill that is first in the front lane. It stays there, for others."""
        inlet = self.reader._link.inlet
        assert inlet.front
        box: list[Packet] = []
        opened: deque[Opened] = deque()
        try:
            box.extend(starmap(inlet.front.recvmsg, PEEK_ALL))
            open_packet(box[0], opened, [], inlet.segments)
        except (BlockingIOError, EndOfStream):
            return None
        except BaseException:
            if box and not opened:
                close_packet(box[0])
            raise
        [spill] = opened
        if not isinstance(spill, Spill):
            raise ProtocolError("something else than what a process left behind is in a queue's front lane")
        inlet.shared = spill
        return spill

    def _retire(self, spill: Spill) -> None:
        """Take a spill of which everything is claimed out of the front lane."""
        link = self.reader._link
        assert link.front
        if link.inlet.shared is not spill:
            return
        link.inlet.shared = None
        try:
            found = link.front.inlet.take(False)
        except (BlockingIOError, EndOfStream):
            # Another process was faster.
            return
        sent: list[None] = []
        try:
            if found.__class__ is Spill and found.left:
                # Much faster: this is the next one.
                self._put_in_front(found, sent)
            else:
                sent = [None]
                if found.__class__ is Spill:
                    found.close()
        finally:
            if not sent:
                link.inlet.put_back(found)  # type: ignore[arg-type]

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
        self.reader._check_closed()
        inlet = self.reader._link.inlet
        while (spill := inlet.shared or self._look_in_front()) and not spill.left:
            # Whoever took the last was killed before it could do this.
            self._retire(spill)
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
