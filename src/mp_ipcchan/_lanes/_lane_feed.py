"""Feeds: where the messages of a lane come from, other than senders of this process.

A feed gives messages to a *sink* and is told how much of that was passed on, so that it has no more under way
than the window allows. There are two: the receiving end of a stream (``_trunk``), and, here, a bridge.
"""

from __future__ import annotations

from typing import Protocol

from .._inlet import EndOfStream, Inlet, ShutMark, Spill
from .._link import Link
from .._message import Incoming, TooLargeError
from ..errors import ProtocolError
from . import _switchboard
from ._lane_frame import WINDOW
from ._lane_message import Lost, cost

#: How many packets are handed out before others have a turn.
MOST_PACKETS = 256


class Sink(Protocol):
    """The end of a lane that a feed gives to. All of it is called with the switchboard's lock held."""

    def feed(self, box: list[Incoming], feed: Feed) -> None:
        """Take the message out of ``box``; what is still in there when this raises was not taken."""

    def unfeed(self, feed: Feed) -> None:
        """``feed`` has ended."""


class Feed:
    __slots__ = ("fed", "granted", "sink")

    def __init__(self, sink: Sink) -> None:
        self.sink: Sink = sink
        #: The cost of all that it gave, and of what of that it was told to be passed on.
        self.fed: int = 0
        self.granted: int = 0

    def link(self) -> Link:
        """The socket's that it comes through."""
        raise NotImplementedError

    def look(self, until: Inlet | None) -> None:
        """Hand out what has come from there, at most until ``until`` has something."""
        raise NotImplementedError

    def grant(self, total: int) -> None:
        """``total`` of ``fed`` is passed on."""
        raise NotImplementedError

    def refuse(self) -> None:
        """Nobody is there any more who could receive."""
        raise NotImplementedError


class Bridge(Feed):
    """The receiving end of a real channel, whose senders are in processes that the lane doesn't reach."""

    __slots__ = ("_ended", "_link", "_paused")

    def __init__(self, link: Link, sink: Sink) -> None:
        super().__init__(sink)
        self._link = link
        self._ended = False
        self._paused = False
        _switchboard.listen(self)
        _switchboard.need(self)

    def fileno(self) -> int:
        return self._link.fileno()

    def link(self) -> Link:
        return self._link

    def look(self, until: Inlet | None) -> None:  # noqa: ARG002  (what it has is all for one)
        try:
            with _switchboard.lock:
                self.pump()
        finally:
            _switchboard.settle()

    def pump(self) -> None:
        inlet = self._link.inlet
        received = 0
        while True:
            if self._paused or (received >= MOST_PACKETS and not inlet.holding):
                return
            received += 1
            taken: object = None
            box: list[Incoming] = []
            try:
                try:
                    taken = inlet.take(False)
                except TooLargeError as error:
                    taken = Lost(error.size)
                if isinstance(taken, Spill):
                    inlet.put_back(taken)
                elif not isinstance(taken, ShutMark):
                    box.append(taken)
                    self.fed += cost(taken)
                    self.sink.feed(box, self)
                    # What is not passed on waits in the kernel, and then with the senders.
                    if self.fed - self.granted >= WINDOW:
                        self._pause(True)
            except BlockingIOError:
                return
            except ProtocolError:
                continue
            except EndOfStream:
                self.refuse()
                self.sink.unfeed(self)
                return
            except BaseException:
                inlet.put_back(*box)
                _switchboard.come_back()
                raise

    @property
    def holding(self) -> bool:
        return bool(self._link.inlet.ready or self._link.inlet.inbox) and not self._paused

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        _switchboard.listen(self, not paused)

    def grant(self, total: int) -> None:
        self.granted = total
        if self._paused and not self._ended and self.fed - total < WINDOW // 2:
            self._pause(False)
            # What waits in user space doesn't show.
            _switchboard.post(self.pump)

    def refuse(self) -> None:
        if not self._ended:
            self._ended = self._paused = True
            _switchboard.done_with(self)
            _switchboard.forget(self)
            self._link.release()
