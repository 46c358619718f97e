"""The receiving half of a link: packets from the kernel, and messages that wait in user space.

Most messages wait in the kernel only. Three kinds wait here, always ahead of the kernel's: those
that came packed in one packet, those of a process that ended, and a packet whose receiver was
interrupted (Ctrl-C) after the kernel had given it out.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from itertools import starmap
from typing import TypeAlias

from ._deadline import wait_for
from ._message import PLAIN, Incoming, Parcel
from ._transport._spill import Spill
from ._transport.unix import AT_ONCE, CUT, WAITING, EndOfStream, Opened, Packet, ShutMark, open_packet

__all__ = ["EndOfStream", "Inlet", "ShutMark", "Spill"]

#: What ``take`` gives: a message, or what only a queue understands.
Taken: TypeAlias = Incoming | Spill | ShutMark


class Inlet:
    __slots__ = ("_inbox", "_ready", "_recvmsg", "_sock", "_waker", "lock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._recvmsg = sock.recvmsg
        #: Packets of interrupted calls, as received.
        self._inbox: deque[Packet] = deque()
        #: Messages that wait here, the oldest first. A Spill stands for all that it still holds.
        self._ready: deque[Incoming | Spill] = deque()
        self._waker: _Waker | None = None
        #: For those who must be the only reader (a Receiver: what it unpacks is for itself).
        #: Reentrant: a signal's handler may receive, too.
        self.lock = threading.RLock()

    def take(self, wait: bool) -> Taken:
        """The next message. Raises ``BlockingIOError`` where there is none and ``wait`` is false,
        ``EndOfStream`` at the end, and what ``open_packet`` raises.

        A spill is given out as it is, once; whoever takes it unrolls it or puts it back.
        """
        while True:
            if self._ready:
                return self._take_ready()
            opened: Opened | None
            if self._inbox:
                opened = self._open_oldest()
            else:
                # A list of this call's own: several threads may be receiving.
                box: list[Packet] = []
                try:
                    # Received and stored in one C call: no signal's handler can come between.
                    box.extend(starmap(self._recvmsg, WAITING if wait else AT_ONCE))
                    data, ancillary, flags, _ = box[0]
                    if data.startswith(PLAIN) and not ancillary and not flags & CUT:
                        return data
                except ConnectionResetError:
                    # A peer that closed with packets of ours unread makes the kernel report this once,
                    # ahead of what that peer sent before; only the empty packet is the end.
                    continue
                except BaseException:
                    # A signal's handler raised: the next call finds the packet.
                    self._inbox.extend(box)
                    raise
                opened = open_packet(box[0])
            if isinstance(opened, list):
                self.put_back(*opened)
            elif opened is not None:
                return opened

    def _open_oldest(self) -> Opened | None:
        try:
            return open_packet(self._inbox.popleft())
        except IndexError:  # another thread was faster
            return None

    def _take_ready(self) -> Incoming:
        message: Incoming | Spill = self._ready[0]
        if isinstance(message, Spill):
            spill, message = message, message.pop()
            if spill.left:
                return message
        self._ready.popleft()
        if self._waker and not self._ready:
            self._waker.clear()
        return message

    def put_back(self, *messages: Incoming | Spill) -> None:
        """Let ``messages`` wait here, ahead of all others, in their order."""
        self._ready.extendleft(reversed(messages))
        if self._waker and self._ready:
            self._waker.set()

    def await_readable(self, deadline: float | None) -> bool:
        """Wait until ``take`` would not block; False at the deadline (monotonic seconds)."""
        if self._ready or self._inbox:
            return True
        return wait_for(self._sock.fileno(), select.POLLIN, deadline)

    @property
    def holding(self) -> bool:
        """Whether messages wait here, where ``poll`` on the socket doesn't see them."""
        return bool(self._ready or self._inbox)

    def fileno(self) -> int:
        """A descriptor that is readable whenever ``take`` would not block.

        The socket itself would not do once messages wait here; so this is an epoll descriptor
        over the socket and an eventfd, made when somebody first asks.
        """
        if self._waker is None:
            self._waker = _Waker(self._sock)
            if self.holding:
                self._waker.set()
        return self._waker.epoll.fileno()

    def unload(self) -> list[Incoming]:
        """Take out all that waits here, for a receiver that moves."""
        messages: list[Incoming] = []
        while self._inbox:
            opened = open_packet(self._inbox.popleft())
            if isinstance(opened, list):
                self._ready.extend(opened)
            elif not isinstance(opened, ShutMark):
                self._ready.append(opened)
        while self._ready:
            messages.append(self._take_ready())
        return messages

    def close(self) -> None:
        """Drop what waits here. The socket is the link's to close."""
        if self._waker:
            self._waker.close()
            self._waker = None
        while self._ready:
            waiting = self._ready.popleft()
            if not isinstance(waiting, bytes):
                waiting.close()
        while self._inbox:
            _discard(self._inbox.popleft())

    def reset_after_fork(self) -> None:
        """What waits here belongs to the parent; so does the epoll set, which both would share."""
        self.lock = threading.RLock()
        self.close()


class _Waker:
    """Makes the messages that wait in user space visible to ``poll`` and its like."""

    def __init__(self, sock: socket.socket) -> None:
        self.epoll = select.epoll()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.epoll.register(sock.fileno(), select.EPOLLIN)
        self.epoll.register(self._event, select.EPOLLIN)

    def set(self) -> None:
        os.eventfd_write(self._event, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            pass

    def close(self) -> None:
        # The epoll set first: the socket may stay open in another process, and would go on firing.
        self.epoll.close()
        os.close(self._event)


def _discard(packet: Packet) -> None:
    try:
        opened = open_packet(packet)
    except (EndOfStream, OSError):
        return
    if isinstance(opened, (Parcel, Spill)):
        opened.close()
