"""What the kernel hasn't taken: messages that wait in a process until it does, in their order.

Appended by whoever sends, sent by a thread (``_drainer``), and by the senders, who lend it a hand. When the process
ends, what is left goes out as one last packet (``_transport._spill``).

Guarantees: a message is removed after it was sent, not before, or a later one could overtake it. A forked child
starts with nothing: what waits is the parent's to send.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from itertools import accumulate, islice, repeat, starmap, takewhile
from typing import ClassVar

from . import _drainer
from ._deadline import deadline_in, remaining, wait_for
from ._message import INLINE_SIZE, Message, Outgoing
from ._segments._segment import check_limit
from ._segments._segment_pool import SegmentPool, release_all
from ._transport._frame import pack
from ._transport._spill import Spill
from ._transport.unix import SEND_FLAGS, transmit

#: What waits is packed into packets of about this size (bytes). Measured: larger ones gain nothing.
PACK_SIZE = 16384
#: No more messages than this are packed together, however small.
_MOST_PACKED = 2048
#: How much more must wait (bytes) before a sender tries again: an attempt costs a system call.
_STEP = 16384
#: How many messages go out one packet each in one go.
_MOST_IN_A_RUN = 64
#: A sender who sends at least so many at once is taken to send many more.
_BUSY = 8
#: How long to wait (seconds) where the kernel can't tell when to try again.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05

#: "Not now": the socket is full, or this user has too many descriptors in flight.
NOT_NOW = frozenset((errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS))
#: What ``send`` tells its caller at once, but a message that was accepted must wait out.
SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EFBIG))


class Backlog:
    __slots__ = (
        "_acks",
        "_busy",
        "_emptied",
        "_pause",
        "_refusal",
        "_sock",
        "_staged",
        "backlog",
        "delivered",
        "helped",
        "lock",
        "packs",
        "room",
        "segments",
        "send_raw",
    )

    #: Whether a sender may append to what waits without the lock: whoever removes something looks again, so it is sent.
    #: Not where several messages go into the backlog one after the other, and none may come between.
    open_ended: ClassVar[bool] = True

    def __init__(self, sock: socket.socket, emptied: Callable[[], None]) -> None:
        self._sock = sock
        self.send_raw: Callable[[bytes, int], int] = sock.send
        self._begin(emptied)

    def _begin(self, emptied: Callable[[], None]) -> None:
        self._emptied = emptied
        #: Messages that the kernel hasn't taken, the oldest first.
        self.backlog: deque[Outgoing] = deque()
        #: Whether the backlog is being sent, by whoever holds the lock.
        self._busy = False
        #: Has an element for each packet of what is staged that was sent, and not yet removed from the backlog.
        self._acks: list[object] = []
        #: What ``_next`` said. A packet is kept when the kernel refuses: it needn't be packed again.
        self._staged: tuple[list[Outgoing], Outgoing | None] | None = None
        #: How many bytes more may be appended before whoever does that tries to send again.
        self.room: int = _STEP
        self._pause = _SHORTEST_PAUSE
        #: Why the kernel refused last (errno).
        self._refusal = 0
        #: Whether the reader understands packed messages (a Receiver does).
        self.packs: bool = False
        #: Whether a sender sends so much that what waits need not be seen to: it does that itself, in packs.
        self.helped: bool = False
        #: For what doesn't fit a packet.
        self.segments: SegmentPool = SegmentPool()
        #: Called with the number of messages that have left the backlog, sent or dropped.
        self.delivered: Callable[[int], None] | None = None
        #: Held while the backlog changes, but see ``open_ended``. Reentrant: a signal's handler may send, too.
        self.lock: threading.RLock = threading.RLock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def defer(self, item: Outgoing, accepted: list[object] | None = None) -> None:
        """Let ``item`` wait for its turn; it counts as sent. ``accepted`` is filled when it does.

        Raises ``OSError``, and ``item`` does not wait, where nobody could be got to send it.
        """
        size = len(item)
        if item.__class__ is not bytes:
            assert isinstance(item, Message)
            if size > INLINE_SIZE // 2:
                # It may need a segment. Better now than when it is its turn, and others wait behind it.
                check_limit(size)
            item.own()
        with self.lock:
            # First somebody who sends it: an item that waits must never be without.
            served = self.backlog or self._serve()
            if accepted is None:
                self.backlog.append(item)
            else:
                accepted.extend(map(self.backlog.append, (item,)))
            if served and len(self.backlog) == 1:
                # It is the first; or a signal's handler has sent all others since, and nobody may be there to send it.
                served = self._serve()
            self.room -= size
            if not served:
                self.spill()
            elif self.room <= 0:
                # The sender lends a hand, or it would keep the interpreter to itself while the reader starves. Where
                # messages are packed it leaves the last: what it sends next then waits for the next pack, and doesn't
                # cost a packet each. When it stops, the thread sends what is left. Large ones gain nothing by that.
                try:
                    self.drain(leave=1 if self.packs and size < _STEP else 0)
                except OSError:
                    # The receiver is gone; the next ``send`` will say so.
                    pass
                self.room = _STEP

    def drain(self, leave: int = 0) -> bool:
        """Send what the kernel takes now, but for the last ``leave`` messages; whether nothing waits any more.

        Raises ``OSError`` where the receiver is gone; what waited is dropped then.
        """
        if not self.backlog:
            return True
        with self.lock:
            if self._busy:
                # A signal's handler, or a finaliser, interrupted just this: it may add, not send.
                return False
            gone = 0
            self._busy = True
            try:
                if self._acks:
                    self._recover()
                while True:
                    if len(self.backlog) <= leave:
                        break
                    try:
                        self._send_first(leave)
                    finally:
                        if self._acks:
                            gone += self._remove_sent()
            except OSError as error:
                if error.errno in NOT_NOW or error.errno in SHORTAGE:
                    self._refusal = error.errno
                    return False
                self._drop_all()
                raise
            finally:
                self._busy = False
                if gone:
                    self._pause = _SHORTEST_PAUSE
                    if self.delivered:
                        self.delivered(gone)
                    if leave and gone >= _BUSY:
                        self.helped = True
            if self.backlog:
                return False
            self._finish()
        return True

    def _send_first(self, leave: int) -> None:
        """Send the packet, or the packets, that are next; ``_acks`` has how many went, whatever is raised."""
        if self._staged is None:
            self._staged = self._next(leave)
        # Sent and noted in one C call: where a signal's handler raises behind it, the note tells.
        items, packet = self._staged
        if packet is None:
            self._acks.extend(map(self.send_raw, items, repeat(SEND_FLAGS)))  # type: ignore[arg-type]
        else:
            self._transmit(packet, self._acks)

    def _remove_sent(self) -> int:
        """Remove what was sent from the backlog; how many messages."""
        items, packet = self._staged or ([], None)
        count = len(self._acks) if packet is None else len(items)
        if not 0 < count <= len(self.backlog) or self.backlog[count - 1] is not items[count - 1]:
            # A signal's handler raised when it was removed already.
            count = 0
        self._remove(count)
        self._staged = None
        self._acks.clear()
        if isinstance(packet, Message):
            packet.sent()
        return count

    def _remove(self, count: int) -> None:
        """Drop the first ``count`` items of the backlog, in one C call: all of them or none."""
        deque(starmap(self.backlog.popleft, repeat((), count)), maxlen=0)

    def _recover(self) -> None:
        """A signal's handler raised when a packet had been sent and not been removed: remove it now."""
        count = self._remove_sent()
        if count and self.delivered:
            self.delivered(count)

    def _finish(self) -> None:
        self._unserve()
        if self.backlog:
            # A signal's handler has sent more meanwhile.
            self._serve()
        self._emptied()

    def _next(self, leave: int) -> tuple[list[Outgoing], Outgoing | None]:
        """What to send next: messages, and the packet that they make, or None where each makes one."""
        most = min(len(self.backlog) - leave, _MOST_PACKED if self.packs else _MOST_IN_A_RUN)
        items = self._first(most)
        if not _all_plain(items):
            plain = [*takewhile(_is_plain, items)]
            if not plain:
                return items[:1], items[0]
            items = plain
        if not self.packs:
            return items, None
        # As many as fit, and one at least.
        del items[max(1, bisect_right([*accumulate(map(len, items))], PACK_SIZE)) :]
        return items, items[0] if len(items) == 1 else pack(items)  # type: ignore[arg-type]

    def _serve(self) -> bool:
        """See to it that the backlog is sent; False where no thread can do it. Raises ``OSError``."""
        return _drainer.add(self)

    def _unserve(self) -> None:
        """There is nothing to send any more."""
        _drainer.remove(self)

    def _transmit(self, item: Outgoing, noted: list[object]) -> None:
        """Send one message now, as ``unix.transmit`` does."""
        transmit(self._sock, item, self.segments, noted)

    def _first(self, most: int | None) -> list[Outgoing]:
        """The first items of the backlog, as a copy: a handler or a finaliser may append to it meanwhile."""
        while True:
            try:
                return list(islice(self.backlog, most))
            except RuntimeError:
                # It did while this was copied, which took memory, so that garbage was collected.
                continue

    def _drop_all(self) -> None:
        if not self.backlog:
            return
        dropped = len(self.backlog)
        self._staged = None
        while self.backlog:
            item = self.backlog.popleft()
            if isinstance(item, Message):
                # ``send`` returned: what moved with it is gone.
                item.sent()
        if self.delivered:
            self.delivered(dropped)
        self._finish()

    def _await_room(self, deadline: float | None) -> bool:
        """Wait until trying again makes sense; False at the deadline."""
        pause = self.pause()
        if pause is None:
            return wait_for(self._sock.fileno(), select.POLLOUT, deadline)
        left = remaining(deadline)
        time.sleep(pause if left is None else min(pause, left))
        return left is None or left > 0

    def pause(self) -> float | None:
        """How long to wait (seconds) before trying again; None where the socket tells, by becoming writable."""
        if self._refusal == errno.EAGAIN:
            return None
        # No event tells when the shortage ends.
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return pause

    def spill(self) -> None:
        """Send all that waits as one last packet, or as few as this process may write so large a file.

        It waits for the reader only where even that has no room, or where the messages carry more
        descriptors than this user may have in flight.
        """
        most = None
        while self.backlog:
            try:
                with self.lock:
                    if self._busy or self.drain():
                        return
                    self._busy = True
                    try:
                        self._spill(most)
                    finally:
                        self._busy = False
            except OSError as error:
                if error.errno in NOT_NOW or error.errno in SHORTAGE:
                    self._refusal = error.errno
                    if error.errno == errno.EFBIG and most != 1:
                        most = max(1, (most or len(self.backlog)) // 2)
                        continue
                    if error.errno == errno.EMFILE:
                        release_all()
                        _drainer.close_reserve()
                else:
                    # The reader is gone, and with it everybody who could miss something.
                    self._drop_all()
                    return
                # Not for long: it may only be that another process, which ends as well, has lowered
                # the limit meanwhile, and nobody reads.
                self._await_room(deadline_in(self._pause))
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _spill(self, most: int | None) -> None:
        items = self._first(most)
        rest = Spill.of(items)
        try:
            rest.send_last(self._sock)
        finally:
            rest.close()
        self._remove(len(items))
        self._staged = None
        for item in items:
            if isinstance(item, Message):
                item.sent()
        if self.delivered:
            self.delivered(len(items))
        if not self.backlog:
            self._finish()

    def close(self) -> None:
        # Breaks the cycle with the link, so that neither waits for the garbage collector.
        self._emptied = _nothing
        self.segments.close()

    def reset_after_fork(self) -> None:
        self.lock = threading.RLock()
        self._busy = self.helped = False
        while self.backlog:
            item = self.backlog.popleft()
            if not isinstance(item, bytes):
                item.sent()
        self._staged = None
        self._acks.clear()


def _nothing() -> None: ...


def _is_plain(item: Outgoing) -> bool:
    return item.__class__ is bytes


def _all_plain(items: Iterable[Outgoing]) -> bool:
    # No step of it in Python.
    return {bytes}.issuperset(map(type, items))
