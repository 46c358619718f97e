"""Lanes: channels without a socket of their own.

A lane has a *tail*, where messages go in, and a *head*, where they come out; each stands where a socket's link
stands otherwise, so senders and receivers are the usual ones. A tail passes messages to

- the head, in the same process: a queue;
- a stream of a trunk: the socket that is shared, and a lane's head at the other side (``_trunk``);
- a real channel, where the receiver went to a process which the trunk doesn't reach.

Guarantees: messages of a sender arrive in the order of its calls, also where an end of the lane moves meanwhile,
as a moved receiver's messages go to where it is by way of where it was. A stream has no more than its window
under way or unread on the other side; what is beyond that waits in the backlog of its tail, in the
process that sends. So a lane that nobody reads takes a window of the reader's memory, and delays no other.
A message leaves the backlog after it was sent, and is put back where a signal's handler interrupted its taking.
Relies on: one lock for all lanes of the process (``_switchboard``); nothing waits while it is held.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from .._endpoint import Endpoint
from .._link import Link
from .._message import HandleKind, Incoming, Outgoing
from . import _switchboard
from ._lane_feed import Feed
from ._lane_inlet import LaneInlet
from ._lane_message import LaneHandle, LaneLink, Lost, as_parcel
from ._lane_outlet import LaneOutlet
from ._lane_travel import ReceiverHandle, SenderHandle

if TYPE_CHECKING:
    from ._trunk import Trunk


class Tail(LaneLink):
    """Where messages go in. Used by senders, and by feeds that pass on."""

    __slots__ = ("_ended", "feeders")

    kind = HandleKind.SENDER

    def __init__(self) -> None:
        self._uses = 1
        self.front = self.waits = None
        self.feeders: set[Feed] = set()
        self._ended = False
        self.outlet: LaneOutlet = LaneOutlet(self._emptied)

    @classmethod
    def on(cls, trunk: Trunk, stream: int) -> Tail:
        """A tail whose head is on the other side."""
        tail = cls()
        tail.bind(trunk, stream)
        return tail

    def bind(self, trunk: Trunk, stream: int) -> None:
        self.outlet.bind(trunk, stream)
        trunk.sending[stream] = self
        self._pass_on()

    def bind_channel(self, link: Link) -> None:
        """Send into a real channel from now on; ``link`` is this tail's then."""
        self.outlet.head = None
        self.outlet.link = link
        link.outlet.packs = True
        link.outlet.delivered = self._delivered
        self._pass_on()

    def _pass_on(self) -> None:
        if self.feeders and self.outlet.head is None and not self.outlet.gone:
            _switchboard.need(self)

    def fileno(self) -> int:
        trunk, link = self.outlet.trunk, self.outlet.link
        return trunk.fileno() if trunk is not None else link.fileno() if link is not None else -1

    def leads_to(self, end: object) -> bool:
        return self.outlet.head is end and end is not None

    # -- who uses it -------------------------------------------------------------------------

    def retain(self) -> Tail:
        with _switchboard.lock:
            self._uses += 1
        return self

    def parting(self) -> Parting:
        return Parting(self)

    def _release(self) -> None:
        self._uses -= 1
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self._uses or self.outlet.backlog:
            return
        try:
            self._end()
        except BaseException:
            _switchboard.post_again(self._end_if_unused)
            raise

    def _emptied(self) -> None:
        """The backlog has gone."""
        for feed in self.feeders:
            feed.grant(feed.fed)
        self._end_if_unused()

    def _end(self) -> None:
        """No sender any more, and nothing that waits."""
        if self._ended:
            return
        if self.waits:
            self.waits.close()
        outlet = self.outlet
        if outlet.head is not None:
            outlet.head.detach(self)
        elif outlet.link is not None:
            outlet.link.outlet.delivered = None
            link, outlet.link = outlet.link, None
            link.release()
        elif outlet.trunk is not None:
            outlet.trunk.end(outlet.stream)
        outlet.close()
        self._ended = True

    def lose(self) -> None:
        """The receiver is gone. The lock is held."""
        self.outlet.lose()
        _switchboard.done_with(self)
        feeders, self.feeders = self.feeders, set()
        for feed in feeders:
            feed.refuse()
            self._release()

    # -- what feeds it -----------------------------------------------------------------------

    def add_feed(self, feed: Feed) -> None:
        """Let ``feed`` give to this tail; one use is its from now on."""
        self.feeders.add(feed)
        self._pass_on()

    def feed(self, box: list[Incoming], feed: Feed) -> None:
        outlet = self.outlet
        if outlet.head is not None:
            outlet.head.feed(box, feed)
            return
        noted: list[object] = []
        try:
            if not isinstance(box[0], Lost):
                outlet.pass_on(box[0], noted)
            else:
                # Its receiver is in another process, which can't be told.
                noted.append(None)
        finally:
            if noted or outlet.gone:
                box.clear()
        if outlet.gone:
            self.lose()
            return
        if self._has_passed_on():
            feed.grant(feed.fed)

    def _has_passed_on(self) -> bool:
        return not self.outlet.backlog and (self.outlet.link is None or not self.outlet.link.outlet.backlog)

    def _delivered(self, _: int) -> None:
        # Told with the lock of the real channel's outlet held.
        _switchboard.post(self._grant_all)

    def _grant_all(self) -> None:
        if self._has_passed_on():
            for feed in self.feeders:
                feed.grant(feed.fed)

    def unfeed(self, feed: Feed) -> None:
        if feed in self.feeders:
            self.feeders.discard(feed)
            if not self.feeders:
                _switchboard.done_with(self)
            self._release()

    def lend(self, endpoint: Endpoint | None) -> LaneHandle:
        return SenderHandle(self, endpoint)


class Parting:
    """One use of a tail that ends; once, however often it is called."""

    __slots__ = ("_done", "_tail")

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._done = False

    def __call__(self) -> None:
        if not self._done:
            # No signal's handler comes between these two.
            self._done = True
            self._tail._uses -= 1
        self._tail._end_if_unused()


class Head(LaneLink):
    """Where messages come out: one receiver's."""

    __slots__ = ("_feeders", "tail")

    kind = HandleKind.RECEIVER

    def __init__(self) -> None:
        self._uses = 1
        self.front = self.waits = None
        self._feeders: set[Feed] = set()
        #: The tail in this process that passes its messages here.
        self.tail: Tail | None = None
        self.inlet: LaneInlet = LaneInlet(self)
        _heads.add(self)

    def fileno(self) -> int:
        # The socket's, for those who show it. To poll, one asks the inlet.
        return next((feed.link().fileno() for feed in self.feeds()), -1)

    def feeds(self) -> Iterator[Feed]:
        """Everything that gives to this head, if through its tail."""
        return chain(self._feeders, self.tail.feeders) if self.tail is not None else iter(self._feeders)

    def attach(self, tail: Tail) -> None:  # type: ignore[override]
        """Let ``tail`` pass its messages here."""
        self.tail = tail
        tail.outlet.head = self

    def detach(self, _: Tail) -> None:
        """The tail has ended."""
        self.tail = None
        self._note_end()

    def add_feed(self, feed: Feed) -> None:
        self._feeders.add(feed)
        # To be given back by who waits for messages here.
        self.inlet.segments = feed.link().inlet.segments

    # -- what comes --------------------------------------------------------------------------

    def feed(self, box: list[Incoming], feed: Feed) -> None:  # noqa: ARG002  (all sinks are given it)
        # Moved in one C call: what is still in the box when a signal's handler raises was not taken.
        self.inlet.count(box[0])
        self.inlet.ready.extend(map(box.pop, (0,)))
        self.inlet.tell()

    def take_in(self, item: Outgoing, noted: list[object]) -> None:
        """Take what a sender of this process sends; ``noted`` is filled then."""
        incoming = item if isinstance(item, bytes) else as_parcel(item)
        self.inlet.count(incoming)
        noted.extend(map(self.inlet.ready.append, (incoming,)))
        self.inlet.tell()

    def unfeed(self, feed: Feed) -> None:
        self._feeders.discard(feed)
        self._note_end()

    def _note_end(self) -> None:
        if not self._feeders and self.tail is None:
            self.inlet.ended = True
            self.inlet.tell()

    # -- who has it --------------------------------------------------------------------------

    def retain(self) -> Head:
        raise NotImplementedError

    def parting(self) -> Callable[[], None]:
        return self.close

    def close(self) -> None:
        """Nobody will receive any more."""
        try:
            if self.waits:
                self.waits.close()
            for feed in list(self._feeders):
                feed.refuse()
                self._feeders.discard(feed)
            tail = self.tail
            if tail is not None:
                tail.outlet.head = None
                tail.lose()
                self.tail = None
            self.inlet.close()
        except BaseException:
            _switchboard.post_again(self.close)
            raise

    def lend(self, endpoint: Endpoint | None) -> LaneHandle:
        return ReceiverHandle(self, endpoint)

    def leave(self, bind: Callable[[Tail], None]) -> None:
        """The receiver has gone where ``bind`` lets a tail send. All that waits here, and will come, follows."""
        tail = self.tail
        if tail is None:
            tail = Tail()
        else:
            # A use for this call, so that it doesn't end between two messages.
            tail._uses += 1
        for feed in self._feeders:
            tail._uses += 1
            tail.feeders.add(feed)
            feed.sink = tail
        self._feeders = set()
        self.tail = None
        if self.waits:
            self.waits.close()
        bind(tail)
        ready = self.inlet.ready
        for message in ready:
            if not isinstance(message, Lost):
                tail.outlet.pass_on(message, [])  # type: ignore[arg-type]
        # Without its parcels: their descriptors have gone along.
        ready.clear()
        self.inlet.close()
        if tail.outlet.gone:
            tail.lose()
        tail._grant_all()
        tail._release()


_heads: weakref.WeakSet[Head] = weakref.WeakSet()


def _reset_after_fork() -> None:
    """In a forked child: what came to the heads, and what comes, is the parent's. A set may have some still."""
    for head in list(_heads):
        head.inlet.reset_after_fork()


os.register_at_fork(after_in_child=_reset_after_fork)
