"""The sending half of a link: straight to the kernel, or behind what already waits.

While nothing waits, ``send`` is one system call. Once the kernel refuses, messages are appended to
the backlog; nobody waits for a reader.

Guarantees: messages of one thread arrive in the order of its calls.
"""

from __future__ import annotations

from collections.abc import Callable

from ._backlog import NOT_NOW, Backlog
from ._message import INLINE_SIZE, Outgoing
from ._transport._frame import pack
from ._transport.unix import MSG_NOSIGNAL

#: From which size (bytes) on a message is worth some tries, how many, about two microseconds each, and after
#: how many times in vain as many again.
LARGE, _MOST_TRIES, _TRY_AGAIN = 16384, 16, 32


class Outlet(Backlog):
    __slots__ = ("_tries", "_vain_tries")

    def _begin(self, emptied: Callable[[], None]) -> None:
        super()._begin(emptied)
        #: How often ``insist`` tries, and how often that was in vain.
        self._tries = _MOST_TRIES
        self._vain_tries = 0

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
        elif frames and not self.try_send(pack(frames)):
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
        """Try again a few times, where ``try_send`` failed and ``item`` is large: first what waits, then ``item``.

        To let it wait costs more: it is copied, and a thread is woken. A reader at work makes room soon;
        where that was in vain, nobody may be reading. Returns and raises what ``try_send`` does.
        """
        # What goes in a segment would be copied for each try.
        if not LARGE <= len(item) <= INLINE_SIZE:
            return False
        try:
            for _ in range(self._tries):
                if self.drain() and self.try_send(item, noted):
                    self._tries = _MOST_TRIES
                    return True
        except BaseException:
            _unsent(item)
            raise
        self._vain_tries = (self._vain_tries + 1) % _TRY_AGAIN
        self._tries = self._tries // 2 if self._vain_tries else _MOST_TRIES
        return False

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
