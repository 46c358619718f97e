"""The sending half of a link: straight to the kernel, or behind what already waits.

While nothing waits, ``send`` is one system call. Once the kernel refuses, messages are appended to
the backlog; nobody waits for a reader.

Guarantees: messages of one thread arrive in the order of its calls.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import ClassVar

from ._backlog import NOT_NOW, Backlog
from ._message import INLINE_SIZE, LARGE_BUFFER, Outgoing
from ._transport._frame import pack
from ._transport.unix import MSG_NOSIGNAL

#: From which size (bytes) on a message is tried at once, and how often; about two microseconds each.
LARGE, _TRIES = 16384, 8
#: For how long (seconds) a sender waits for room: at first, and where there was some in that time.
_SHORT_PATIENCE, _LONG_PATIENCE = 0.001, 0.01
#: After it did so in vain, how many times it doesn't: nobody may be reading. Each time, for twice as many.
_IMPATIENT, _MOST_IMPATIENT = 1, 64


class Outlet(Backlog):
    __slots__ = ("_impatience", "_impatient", "_patience")

    #: Whether ``announce`` takes the place of a descriptor that tells of room.
    announces: ClassVar[bool] = False

    def announce(self, call: Callable[[], object]) -> None:
        """Have ``call`` called once, by any thread, when there is room; perhaps at once."""
        raise NotImplementedError

    def has_room(self) -> bool:
        """Whether trying again makes sense, or nobody is there any more who could make room."""
        raise NotImplementedError

    def _begin(self, emptied: Callable[[], None]) -> None:
        super()._begin(emptied)
        #: How many times ``insist`` gives in at once, and how many times it is to do so next.
        self._impatient, self._impatience = 0, _IMPATIENT
        #: For how long (seconds) it waits.
        self._patience = _SHORT_PATIENCE

    def send(self, item: Outgoing, accepted: list[object] | None = None) -> None:
        """Send without ever waiting. Raises ``OSError`` where the receiver is gone; ``item`` is unsent then.

        ``accepted``, if given, gets an element when the item is on its way, whatever is raised then.
        """
        accepted = [] if accepted is None else accepted
        if not self.try_send(item, accepted) and not self.insist(item, accepted):
            try:
                self.defer(item, accepted)
            except BaseException:
                if not accepted:
                    _unsent(item)
                raise

    def send_all(self, frames: list[bytes]) -> None:
        """As ``send``, for several plain frames, which go in one packet where the reader unpacks it."""
        if not self.packs or len(frames) == 1:
            for frame in frames:
                self.send(frame)
        elif frames:
            packet = pack(frames)
            if not self.try_send(packet) and not self.insist(packet):
                for frame in frames:
                    self.defer(frame)

    def try_send(self, item: Outgoing, noted: list[object] | None = None) -> bool:
        """Hand ``item`` to the kernel now; False, with nothing sent, where it can't take it now.

        ``noted``, if given, gets an element when the kernel has it, whatever is raised then.
        """
        if self.backlog:
            return False
        noted = [] if noted is None else noted
        try:
            self._transmit(item, noted)
        except BaseException as error:
            if noted:
                _sent(item)
            elif isinstance(error, OSError) and error.errno in NOT_NOW:
                self._refusal = error.errno
                return False
            else:
                _unsent(item)
            raise
        _sent(item)
        return True

    def insist(self, item: Outgoing, noted: list[object] | None = None) -> bool:
        """Wait for room for a moment, where ``try_send`` failed: first what waits goes out, then ``item``.

        To let it wait costs more: a thread is woken, sender and reader take turns a packet at a time, and a sender that
        runs ahead takes the processor from the reader. A reader at work makes room soon; where that was in vain, nobody
        may be reading. What is small and can be packed is better packed, and else tried once for each ``_STEP`` bytes
        behind what waits. Returns and raises what ``try_send`` does.
        """
        size = len(item)
        # What goes in a segment would be copied for each try.
        if size > INLINE_SIZE or (size < LARGE and (self.packs or (self.backlog and self.room > size))):
            return False
        if self._impatient:
            self._impatient -= 1
            return False
        try:
            if self._try_for_a_moment(item, noted):
                self._impatience, self._patience = _IMPATIENT, _LONG_PATIENCE
                return True
        except BaseException:
            _unsent(item)
            raise
        self._impatient, self._patience = self._impatience, _SHORT_PATIENCE
        self._impatience = min(2 * self._impatience, _MOST_IMPATIENT)
        return False

    def _try_for_a_moment(self, item: Outgoing, noted: list[object] | None) -> bool:
        if len(item) >= LARGE:
            for _ in range(_TRIES):
                if self.drain() and self.try_send(item, noted):
                    return True
            self._widen()
        deadline = time.monotonic() + self._patience
        while not (self.drain() and self.try_send(item, noted)):
            if time.monotonic() >= deadline or not self._await_room(deadline):
                return False
        return True

    def _widen(self) -> None:
        """Let the socket take some large packets: else its reader would sleep after each, and wait for the next."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGE_BUFFER)

    def send_by(self, item: Outgoing, deadline: float | None) -> bool:
        """Send when the kernel takes it; False, with nothing sent, at the deadline (monotonic seconds)."""
        try:
            while True:
                if self.drain() and self.try_send(item):
                    return True
                if self._await_room(deadline):
                    continue
                # The kernel reports room late (below a quarter full): try a last time.
                if self.drain() and self.try_send(item):
                    return True
                _unsent(item)
                return False
        except BaseException:
            _unsent(item)
            raise

    def send_now(self, item: Outgoing) -> None:
        """Send, and wait until the kernel has it: then it is ahead of whatever anybody sends later."""
        if isinstance(item, bytes) and not self.backlog:
            try:
                # Waits in the system call.
                self.send_raw(item, MSG_NOSIGNAL)
                return
            except BlockingIOError:  # somebody has made the socket non-blocking
                pass
        self.send_by(item, None)


def _sent(item: Outgoing) -> None:
    if not isinstance(item, bytes):
        item.sent()


def _unsent(item: Outgoing) -> None:
    if not isinstance(item, bytes):
        item.unsent()
