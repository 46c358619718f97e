"""Ends of lanes on their way: what each does once it is known how far its message goes (see ``_lane_message``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._endpoint import Endpoint
from .._link import Link
from .._message import CHANNEL_BUFFER, HandleKind
from . import _switchboard
from ._lane_feed import Bridge
from ._lane_message import LaneHandle, LaneLink

if TYPE_CHECKING:
    from ._lane import Head, Tail
    from ._lane_intake import StreamFeed
    from ._trunk import Trunk


class TravellingLane(LaneHandle):
    """What both ends have in common on their way: perhaps a real channel in their place."""

    __slots__ = ("_endpoint", "_far", "_near", "_told")

    def __init__(self, endpoint: Endpoint | None) -> None:
        #: What is sent; none where it is only passed on.
        self._endpoint = endpoint
        #: This process's end of the channel, and the one that goes.
        self._near: Link | None = None
        self._far: Link | None = None
        #: Whether it was told how its message ended: what is posted may be done again.
        self._told = False

    def _make(self) -> tuple[Link, Link]:
        """Both ends: the sending and the receiving one."""
        _switchboard.prepare()
        return Link.pair(CHANNEL_BUFFER)

    def arrive(self) -> None:
        """In a forked child, which has the channel already: the endpoint is on that from now on."""
        assert self._near is not None
        assert self._far is not None
        assert self._endpoint is not None
        self._near.release()
        self._endpoint._link = self._far
        self._endpoint._moved = False

    def sent(self) -> None:
        # Told with locks of others held, as may be.
        _switchboard.post(self._sent)

    def unsent(self) -> None:
        _switchboard.post(self._unsent)

    def _sent(self) -> None:
        raise NotImplementedError

    def _unsent(self) -> None:
        self._told = True
        for link in (self._near, self._far):
            if link is not None:
                link.release()


class SenderHandle(TravellingLane):
    """A sender that travels, by copy. One use of the tail is its, until it is where it goes."""

    __slots__ = ("_feed", "_stays", "_tail", "_use")

    kind = HandleKind.SENDER

    def __init__(self, tail: Tail, endpoint: Endpoint | None) -> None:
        super().__init__(endpoint)
        self._tail = tail.retain() if endpoint is not None else tail
        self._use = self._tail.parting()
        #: What brings the copy's messages, once that crosses.
        self._feed: StreamFeed | None = None
        self._stays = False

    def fileno(self) -> int:
        if self._far is None:
            self._far, self._near = self._make()
        return self._far.fileno()

    def cross(self, trunk: Trunk) -> int:
        # Known before the message leaves: the other side may be quick.
        self._feed = trunk.expect(self._tail)
        self._tail.add_feed(self._feed)
        return self._feed.stream

    def stay(self) -> LaneLink:
        self._stays = True
        return self._tail

    def back(self) -> None:
        self._stays = False
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.forget()
            self._tail.feeders.discard(feed)

    def _sent(self) -> None:
        if self._near is not None and self._far is not None:
            if not self._told:
                self._told = True
                self._far.release()
                self._tail.add_feed(Bridge(self._near, self._tail))
        elif self._feed is None and not self._stays:
            self._use()

    def _unsent(self) -> None:
        if not self._told:
            super()._unsent()
        self._use()


class ReceiverHandle(TravellingLane):
    """A receiver that moves: its head has been taken out of it, and is put back if the message never leaves."""

    __slots__ = ("_stays", "_stream", "_trunk", "end")

    kind = HandleKind.RECEIVER

    def __init__(self, head: Head, endpoint: Endpoint | None) -> None:
        super().__init__(endpoint)
        #: This process's, which is given up.
        self.end = head
        self._trunk: Trunk | None = None
        self._stream = -1
        self._stays = False

    def fileno(self) -> int:
        if self._far is None:
            self._near, self._far = self._make()
        return self._far.fileno()

    def cross(self, trunk: Trunk) -> int:
        self._trunk, self._stream = trunk, trunk.reserve()
        return self._stream

    def stay(self) -> LaneLink:
        self._stays = True
        return self.end

    def back(self) -> None:
        self._stays = False
        trunk, self._trunk = self._trunk, None
        if trunk is not None:
            trunk.unreserve(self._stream)

    def _sent(self) -> None:
        if self._told:
            return
        self._told = True
        near, trunk, stream = self._near, self._trunk, self._stream
        if trunk is not None:
            self.end.leave(lambda tail: trunk.use_reserved(tail, stream))
        elif near is not None and self._far is not None:
            self._far.release()
            self.end.leave(lambda tail: tail.bind_channel(near))
        elif not self._stays:
            self.end.close()

    def unsent(self) -> None:
        # At once: whoever tried to send the receiver goes on to use it.
        super()._unsent()
        if self._endpoint is not None:
            self._endpoint._link, self._endpoint._moved = self.end, False
        else:
            self.end.release()
