"""Trunks: the one socket that many lanes between two processes share.

Each lane that crosses it is a *stream* there, in one direction, with a number that is never used again: the two
sides number theirs even and odd, so that both make lanes without asking. What comes is handed out at once
to the lanes, whoever looks (``_lane_intake``), so no lane waits for the reader of another; the streams' windows keep
it small. The socket's end is the end of all streams, after what came before.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections import deque

from .. import _drainer
from .._link import Link
from .._outlet import Outlet
from . import _switchboard
from ._lane import Tail
from ._lane_feed import Sink
from ._lane_frame import Op, control
from ._lane_intake import Intake, StreamFeed, TrunkInlet

_trunks: weakref.WeakSet[Trunk] = weakref.WeakSet()


class _TrunkOutlet(Outlet):
    """The shared socket's. Under the lock of the lanes: handles are told under it."""

    __slots__ = ()

    def drain(self, leave: int = 0) -> bool:
        try:
            return super().drain(leave)
        finally:
            _switchboard.settle()


class Trunk:
    """Owns one use of a link. ``side`` is 0 or 1, and the other side is the other."""

    __slots__ = (
        "__weakref__",
        "_link",
        "_next",
        "_untold",
        "dead",
        "held",
        "intake",
        "link",
        "receiving",
        "reserved",
        "sending",
        "side",
    )

    def __init__(self, link: Link, side: int) -> None:
        self.link: Link = link.retain()
        #: None once its use was given up.
        self._link: Link | None = link
        outlet = _TrunkOutlet(link.sock, link._emptied)
        outlet.lock = _switchboard.lock
        outlet.packs = True
        link.outlet = outlet
        # Nobody receives from it before it is in use.
        link.inlet = TrunkInlet(link.sock)
        self.side = side
        #: What goes and what comes, by stream.
        self.sending: dict[int, Tail] = {}
        self.receiving: dict[int, StreamFeed] = {}
        #: Streams of receivers that are under way, and whether the other side has dropped them already.
        self.reserved: dict[int, bool] = {}
        #: Streams 0 and 1 are the first ones, of the two sides.
        self._next = 2 + side
        #: Messages about streams that found no descriptor for the drainer.
        self._untold: deque[bytes] = deque()
        #: Whether the user still has it.
        self.held = True
        self.dead = False
        try:
            self.intake: Intake = Intake(self)
            _switchboard.listen(self.intake)
        except BaseException:
            link.release()
            raise
        _trunks.add(self)

    def fileno(self) -> int:
        return self.link.fileno()

    # -- streams -----------------------------------------------------------------------------

    def _number(self) -> int:
        stream = self._next
        self._next += 2
        return stream

    def expect(self, sink: Sink) -> StreamFeed:
        """A new stream from the other side to ``sink``."""
        return StreamFeed(self, self._number(), sink)

    def reserve(self) -> int:
        """A new stream to the other side, for a receiver that is about to go there."""
        stream = self._number()
        self.reserved[stream] = False
        return stream

    def unreserve(self, stream: int) -> None:
        self.reserved.pop(stream, None)

    def use_reserved(self, tail: Tail, stream: int) -> None:
        """The receiver has gone: ``tail`` sends to it."""
        dropped = self.reserved.pop(stream, True)
        tail.bind(self, stream)
        if dropped or self.dead:
            self.sending.pop(stream, None)
            tail.lose()

    def end(self, stream: int) -> None:
        """Nothing more will be sent on ``stream``."""
        if stream in self.sending:
            self.tell(Op.END, stream)
            self.sending.pop(stream, None)
            self.close_if_unused()

    def tell(self, op: Op, stream: int, total: int = 0) -> None:
        """Send a message about a stream."""
        if self.dead:
            return
        self._untold.append(control(op, stream, total))
        for _ in range(len(self._untold)):
            noted: list[object] = []
            try:
                self.link.outlet.send(self._untold[0], noted)
            except OSError as error:
                # Where the other side is gone, the end of the stream will tell.
                if error.errno in (errno.EPIPE, errno.ECONNRESET):
                    noted.append(None)
                else:
                    return
            finally:
                if noted:
                    self._untold.popleft()

    def release(self) -> None:
        """The user has no more use for it; the lanes may have."""
        self.held = False
        self.close_if_unused()

    def close_if_unused(self) -> None:
        if not (self.held or self.sending or self.receiving or self.reserved or self.dead):
            self.die()

    def die(self) -> None:
        """No message comes or goes any more."""
        if not self.dead:
            self._bury()

    def _bury(self) -> None:
        try:
            # Not before the try: a signal's handler that comes between would leave it dead, and its socket open.
            self.dead = True
            _switchboard.forget(self.intake)
            for stream, feed in list(self.receiving.items()):
                feed.sink.unfeed(feed)
                self.receiving.pop(stream, None)
            for stream, tail in list(self.sending.items()):
                tail.lose()
                self.sending.pop(stream, None)
            self.link.let_go(self)
        except BaseException:
            _switchboard.post_again(self._bury)
            raise

    def abandon(self) -> None:
        """In a forked child: the lanes are the parent's."""
        self.dead = True
        self.receiving.clear()
        self.sending.clear()
        self.link._forget()
        self.link._close()

    def hand_on(self) -> None:
        """What lanes have waiting for the other side to read becomes the socket's."""
        for tail in list(self.sending.values()):
            if tail.outlet.backlog:
                tail.outlet.spill()


def _hand_on_all() -> None:
    """When the process ends: what lanes have waiting for the other sides to read becomes the sockets'."""
    _switchboard.pump_all()
    with _switchboard.lock:
        for trunk in list(_trunks):
            trunk.hand_on()
    _switchboard.settle()


def _abandon_all() -> None:
    for trunk in list(_trunks):
        if not trunk.dead:
            trunk.abandon()
    _trunks.clear()


_drainer.before_rest.append(_hand_on_all)
os.register_at_fork(after_in_child=_abandon_all)
