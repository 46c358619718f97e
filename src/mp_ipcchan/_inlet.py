"""The receiving half of a link: packets from the kernel, and messages that wait in user space.

Most messages wait in the kernel only. Three kinds wait here, always ahead of the kernel's: those
that came packed in one packet, those of a process that ended, and a packet whose receiver was
interrupted (Ctrl-C) after the kernel had given it out.
"""

from __future__ import annotations

import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from itertools import islice, repeat, starmap, takewhile
from typing import Any, ClassVar, TypeAlias

from ._deadline import wait_for
from ._interrupt import raised_by_handler
from ._message import PLAIN, Incoming, Parcel, TooLargeError
from ._packets import Packets
from ._segments import _segment_pool
from ._segments._segment_cache import SegmentCache
from ._transport._spill import Spill
from ._transport.unix import (
    CUT,
    EndOfStream,
    NoRoom,
    Opened,
    Packet,
    ShutMark,
    close_all,
    close_packet,
    open_packet,
)
from ._waker import Waker, wait_for_either
from .errors import ProtocolError

__all__ = ["EndOfStream", "Inlet", "NoRoom", "ShutMark", "Spill"]

#: How often a receiver looks before it sleeps; about a microsecond each.
_MOST_LOOKS = 16
#: After how many times in vain it looks as often again.
_LOOK_AGAIN = 32

#: How many messages of an ended process are read at a time, at most.
_MOST_READ = 512

#: What ``take`` gives: a message, or what only a queue understands.
Taken: TypeAlias = Incoming | Spill | ShutMark


def _forget_look(error: BaseException) -> None:
    """Let a traceback of ``error``, Ctrl-C most likely, begin where this waited, not with the look before, in vain."""
    look = error.__context__
    if isinstance(look, BlockingIOError):
        error.__context__ = look.__context__


class Inlet:
    __slots__ = (
        "_looks",
        "_sock",
        "_vain_looks",
        "detour",
        "ends",
        "front",
        "inbox",
        "largest",
        "lock",
        "packets",
        "ready",
        "receiving",
        "segments",
        "shared",
        "turns",
        "waker",
    )

    #: Has what comes for several inlets handed out to them; none where each has a source of its own.
    hand_out: Callable[[], object] | None = None
    #: Whether there is no ``source``, and ``announce`` takes its place.
    announces: ClassVar[bool] = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.packets: Packets = Packets(sock)
        self._begin()

    def _begin(self) -> None:
        #: Packets of interrupted calls, as received.
        self.inbox: deque[Packet] = deque()
        #: Messages that wait here, the oldest first. A Spill stands for all that it still holds.
        self.ready: deque[Incoming | Spill] = deque()
        #: There once somebody has asked for ``fileno``.
        self.waker: Waker | None = None
        self._make_lock()
        #: Whether older messages may wait in the front lane of the queue that this is part of.
        self.detour: bool = False
        #: Of an ended process, no message is read that has more bytes than this.
        self.largest: int = sys.maxsize
        #: The reading end of that lane, and the first spill in it, once it was seen.
        self.front: socket.socket | None = None
        self.shared: Spill | None = None
        #: What of the senders' memory stays mapped here.
        self.segments: SegmentCache = SegmentCache()
        #: How often ``await_packet`` looks before it sleeps, and how often that was in vain.
        self._looks = _MOST_LOOKS
        self._vain_looks = 0

    def _make_lock(self) -> None:
        #: For those who must be the only reader (a Receiver: what it unpacks is for itself).
        #: Reentrant, so that a signal's handler which receives, too, is told off and doesn't wait for itself.
        self.lock: threading.RLock = threading.RLock()
        #: Acquires it at each step, if it is free, and says whether it was. ``for turn in turns: break`` acquires and
        #: stores that in one C call: whoever a signal's handler interrupts knows whether to release it. ``ends``
        #: releases it in the same way, with None.
        self.turns: Iterator[bool] = starmap(self.lock.acquire, repeat((False,)))
        self.ends: Iterator[Any] = starmap(self.lock.release, repeat(()))
        #: Whether somebody is receiving; changed by whoever holds the lock.
        self.receiving: bool = False

    def take(self, wait: bool) -> Taken:
        """The next message. Raises ``BlockingIOError`` where there is none and ``wait`` is false,
        ``EndOfStream`` at the end, and what ``open_packet`` raises.

        A spill is given out as it is, once; whoever takes it unrolls it or puts it back.
        """
        while True:
            # Lists of this call's own: several threads may be receiving. What is in them is safe from
            # a signal's handler that raises, because it gets there in one C call.
            box: list[Packet] = []
            opened: deque[Opened] = deque()
            spent: list[int] = []
            try:
                if self.ready:
                    return self._take_ready()
                if self.inbox:
                    box = [*starmap(self.inbox.popleft, ((),))]
                    if self.waker and not self.holding:
                        self.waker.clear()
                else:
                    box = self.await_packet() if wait else [*islice(self.packets.now, 1)]
                data, ancillary, flags, _ = box[0]
                if data.startswith(PLAIN) and not ancillary and not flags & CUT:
                    return data
                if ancillary:
                    self.packets.expect_more(len(ancillary[0][2]))
                open_packet(box[0], opened, spent, self.segments)
                if spent:
                    close_all(spent)
                if len(opened) == 1:
                    return opened[0]
                # From one queue straight into the other, so that there is one place to rescue them from.
                del box[0]
                self.ready.extend(starmap(opened.popleft, repeat((), len(opened))))  # type: ignore[arg-type]
            except ConnectionResetError:
                # A peer that closed with packets of ours unread makes the kernel report this once,
                # ahead of what that peer sent before; only the empty packet is the end.
                continue
            except BaseException as error:
                # A signal's handler, most likely, and at the first call in here another may follow: so first what
                # was interrupted is kept, without a call.
                if opened:
                    self.ready += opened  # type: ignore[arg-type]
                    close_all(spent)
                elif box:
                    self.inbox += box
                    if isinstance(error, (EndOfStream, OSError, TooLargeError)) and not (
                        isinstance(error, NoRoom) or raised_by_handler(error)
                    ):
                        self._discard(box[0])
                elif isinstance(error, IndexError):
                    # Another thread was faster.
                    continue
                if self.waker and self.holding:
                    self.waker.set()
                raise
            if self.waker:
                self.waker.set()

    def take_message(self, wait: bool) -> Incoming:
        """As ``take``, for who receives alone: what an ended process left is a row of messages, and nothing is shut."""
        while True:
            taken = self.take(wait)
            # Asked without a call: a signal's handler that raises here would lose the message.
            if taken.__class__ is not Spill and taken.__class__ is not ShutMark:
                return taken  # type: ignore[return-value]
            if isinstance(taken, ShutMark):
                raise ProtocolError("a packet for queues came through a channel or pipe")
            self.put_back(taken)

    def take_what_is_there(self, into: deque[Incoming], most: int) -> None:
        """Take what there is without waiting: plain messages, ``most`` at most, or one that is more.

        For one thread that alone reads, and that no signal's handler interrupts. Raises ``EndOfStream`` and whatever
        ``take`` raises; what came before that is in ``into``.
        """
        if not self.ready and not self.inbox:
            self.take_plain(into, most)
        try:
            while True:
                if not self.ready and not self.inbox:
                    return
                into.append(self.take_message(False))
        except BlockingIOError:
            pass

    def take_plain(self, into: MutableSequence[Incoming], most: int) -> None:
        """Take plain messages from the socket until ``into`` has ``most``, none is there, or something else comes."""
        packet: Packet | None = None
        try:
            for packet in islice(self.packets.now, most - len(into)):
                data, ancillary, flags, _ = packet
                if ancillary or flags & CUT or not data.startswith(PLAIN):
                    break
                # Without a call, as below: a signal's handler finds it there, or in ``packet``.
                into += (data,)
                packet = None
        except (BlockingIOError, ConnectionResetError, NoRoom) as error:
            # What there is no room for comes again when there is nothing else.
            if raised_by_handler(error) or (isinstance(error, NoRoom) and not into):
                raise
        finally:
            if packet is not None:
                self.inbox += (packet,)

    def await_packet(self) -> list[Packet]:
        """Receive a packet, and wait for it.

        Looks a few times before it sleeps. Going to sleep and being woken takes tens of microseconds, most of
        all on another core; a peer that is about to send needs a few. It stops looking where that is in vain.
        """
        for _ in range(self._looks):
            try:
                box = [*islice(self.packets.now, 1)]
            except BlockingIOError:
                continue
            self._looks = _MOST_LOOKS
            return box
        self._looked_in_vain()
        self._rest(None)
        try:
            return [*islice(self.packets.waiting, 1)]
        except BaseException as error:
            _forget_look(error)
            if self.front is not None:
                # It has waited for the queue alone.
                self.detour = True
            raise

    def expect(self, looks: int) -> None:
        """The next packet is about to come: look for it that often before sleeping."""
        self._looks = looks

    def drop_next(self) -> None:
        """Drop what ``NoRoom`` was raised for: a packet, or the rest of what an ended process left."""
        if self.ready and isinstance(self.ready[0], Spill):
            self.ready.popleft().close()  # type: ignore[union-attr]
            return
        if not self.inbox:
            self.inbox.extend(islice(self.packets.unasked, 1))
        close_packet(self.inbox.popleft())

    def _looked_in_vain(self) -> None:
        self._vain_looks = (self._vain_looks + 1) % _LOOK_AGAIN
        self._looks = self._looks // 2 if self._vain_looks else _MOST_LOOKS

    def _rest(self, deadline: float | None) -> bool:
        """Wait for a packet, and give back the memory that this process has kept if none comes for a while.

        Whether there is more to wait for: no packet, and not the deadline.
        """
        if self.keeps_memory:
            ends = time.monotonic() + _segment_pool.IDLE_AFTER
            if deadline is not None and deadline <= ends:
                return True
            if self._await(ends):
                return False
            self.give_back()
        return True

    @property
    def keeps_memory(self) -> bool:
        """Whether this process keeps segments, or mappings of those that came here."""
        return not _segment_pool.is_empty() or not self.segments.is_empty

    def give_back(self) -> None:
        """Nothing has come for a while: let go of memory that wasn't used for long."""
        now = time.monotonic()
        self.segments.give_back(now - _segment_pool.IDLE_AFTER)
        _segment_pool.give_back(now)

    def _discard(self, packet: Packet) -> None:
        """Drop a packet that can't be opened; it was kept for the case that it can."""
        try:
            self.inbox.remove(packet)
        except ValueError:  # another thread is at it
            return
        close_packet(packet)

    def _take_ready(self) -> Incoming:
        """The oldest of the messages that wait here. ``IndexError`` where there is none after all."""
        while True:
            if self.ready[0].__class__ is Spill:
                self._unroll()
            held: list[Incoming | Spill] = []
            try:
                held = [*starmap(self.ready.popleft, ((),))]
                if self.waker and not self.holding:
                    self.waker.clear()
            except BaseException:
                self.put_back(*held)
                raise
            if held[0].__class__ is not Spill:
                return held[0]  # type: ignore[return-value]
            # Another thread was faster.
            self.put_back(*held)

    def _unroll(self) -> None:
        """Put the next messages of the spill that is first in front of it; drop it where it is used up."""
        with self.lock:
            while True:
                spill = self.ready[0] if self.ready else None
                if not isinstance(spill, Spill):
                    return
                if not spill.messages:
                    spill.read(_MOST_READ, spill.messages, self.largest)
                if spill.messages:
                    self.ready.extendleft(starmap(spill.messages.pop, repeat((), len(spill.messages))))
                else:
                    # Not by its finaliser: what a signal's handler raises in that, nobody hears, and nobody closes it.
                    spill.close()
                    self.ready.popleft()

    def take_packed(self, into: list[Incoming], most: int) -> bool:
        """Take plain messages that wait here until ``into`` has ``most``; False where there are none.

        For the only reader.
        """
        waiting = [*islice(self.ready, most - len(into))]
        plain = (
            len(waiting) if {bytes}.issuperset(map(type, waiting)) else sum(1 for _ in takewhile(_is_plain, waiting))
        )
        into.extend(starmap(self.ready.popleft, repeat((), plain)))  # type: ignore[arg-type]
        if self.waker and not self.holding:
            self.waker.clear()
        return plain > 0

    def put_back(self, *messages: Incoming | Spill) -> None:
        """Let ``messages`` wait here, ahead of all others, in their order."""
        self.take_back(list(messages))

    def take_back(self, messages: list[Incoming | Spill]) -> None:
        """As ``put_back``, for a list, which they leave as they get there: interrupted, it can be called again."""
        self.ready.extendleft(starmap(messages.pop, repeat((), len(messages))))
        if self.waker and self.ready:
            self.waker.set()

    def await_readable(self, deadline: float | None) -> bool:
        """Wait until ``take`` would not block; False at the deadline (monotonic seconds)."""
        if (self.ready or self.inbox) and self.holding:
            return True
        if not self._rest(deadline) or self._await(deadline):
            return True
        self.give_back()
        return False

    def _await(self, deadline: float | None) -> bool:
        """Wait until something comes from elsewhere; False at the deadline."""
        try:
            if self.front is None:
                return wait_for(self._sock.fileno(), select.POLLIN, deadline)
            return wait_for_either(self._sock.fileno(), self.front.fileno(), deadline)
        except BaseException as error:
            _forget_look(error)
            raise

    @property
    def holding(self) -> bool:
        """Whether messages wait here, where ``poll`` on the socket doesn't see them."""
        if self.inbox:
            return True
        try:
            if self.ready[0].__class__ is not Spill:
                return True
        except IndexError:
            return False
        # Of a copy: a signal's handler may take some meanwhile.
        return any(not isinstance(one, Spill) or one.left for one in tuple(self.ready))

    def fileno(self) -> int:
        """A descriptor that is readable whenever ``take`` would not block.

        The socket itself would not do once messages wait here; so this is an epoll descriptor
        over the socket and an eventfd, made when somebody first asks.
        """
        if self.waker is None:
            made = Waker(self._sock, self.front)
            # Asked again with no call in between: another thread may have made one, which somebody waits for already.
            if self.waker is None:
                self.waker = made
            else:
                made.close()
            if self.holding:
                self.waker.set()
        return self.waker.epoll.fileno()

    def source(self) -> int:
        """A descriptor for those who ask for ``holding``, too: it tells of what comes from elsewhere."""
        return self._sock.fileno()

    def announce(self, call: Callable[[], object] | None) -> None:
        """Have ``call`` called, by any thread, whenever something has come; None: no more."""
        raise NotImplementedError

    def unload(self) -> list[Incoming]:
        """Take out all that waits here, for a receiver that moves."""
        messages: list[Incoming] = []
        try:
            while True:
                if not self.holding:
                    return messages
                # Nothing of the kernel's: while something is held, that comes first.
                messages.extend(map(self.take, (False,)))  # type: ignore[arg-type]
        except BaseException:
            self.put_back(*messages)
            raise

    def close(self) -> None:
        """Drop what waits here. The socket is the link's to close."""
        self.shared = None
        self.segments.clear()
        if self.waker:
            self.waker.close()
            self.waker = None
        while self.ready:
            waiting = self.ready.popleft()
            if isinstance(waiting, (Parcel, Spill)):
                waiting.close()
        while self.inbox:
            close_packet(self.inbox.popleft())

    def reset_after_fork(self) -> None:
        """What waits here belongs to the parent; so does the epoll set, which both would share."""
        self._make_lock()
        self.close()


def _is_plain(one: Incoming | Spill) -> bool:
    return one.__class__ is bytes
