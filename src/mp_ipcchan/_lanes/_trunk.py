"""Trunks: the one socket that many lanes between two processes share.

Each lane that crosses it is a *stream* there, in one direction, with a number that is never used again: the two
sides number theirs even and odd, so that both make lanes without asking. What comes is handed out at once
to the lanes, whoever looks, so no lane waits for the reader of another; the streams' windows keep it small.

An end of a lane that was sent over the trunk is known to the other side from the moment its message came, not
when that is decoded: its own messages may be next. Where that message is dropped, so is the end, and its
other side is told. The socket's end is the end of all streams, after what came before.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections import deque
from itertools import islice
from time import monotonic

from .. import _drainer
from .._inlet import EndOfStream, Inlet, NoRoom, ShutMark, Spill
from .._link import Link
from .._message import PLAIN_SIZE, HandleKind, Incoming, Parcel
from .._outlet import Outlet
from ..errors import ProtocolError
from . import _switchboard
from ._lane import Head, Tail
from ._lane_feed import MOST_PACKETS, Feed, Sink
from ._lane_frame import DATA, OVERHEAD, TRAILER, WINDOW, Crossing, Op, control, split, split_crossings, total_of
from ._lane_inlet import parcels_held
from ._lane_message import LaneLink, LaneParcel, cost, shorten

#: With more unread messages than this that hold descriptors, it is looked ahead whether there is room for more.
_FEW_PARCELS = 8
#: How many descriptors must be free then.
_SPARE = 4
#: How often (seconds) a sender looks whether the receiver is still there.
_LOOK_EVERY = 0.001

_trunks: weakref.WeakSet[Trunk] = weakref.WeakSet()


class StreamFeed(Feed):
    """The receiving end of a stream."""

    __slots__ = ("_trunk", "stream")

    def __init__(self, trunk: Trunk, stream: int, sink: Sink) -> None:
        super().__init__(sink)
        self._trunk = trunk
        self.stream = stream
        trunk.receiving[stream] = self

    def link(self) -> Link:
        return self._trunk.link

    def look(self, until: Inlet | None) -> None:
        self._trunk.look(until)

    def grant(self, total: int) -> None:
        if total - self.granted >= WINDOW // 2:
            self._trunk.tell(Op.GRANT, self.stream, total)
            # Not before: where a signal's handler comes between, it is told once more.
            self.granted = total

    def refuse(self) -> None:
        if self.stream in self._trunk.receiving:
            # In this order: what a signal's handler interrupts is begun anew, and may be told twice.
            self._trunk.tell(Op.GONE, self.stream)
            self.forget()
            self._trunk.close_if_unused()

    def forget(self) -> bool:
        return self._trunk.receiving.pop(self.stream, None) is not None


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
        "_ahead",
        "_looked",
        "_next",
        "_pumping",
        "_reserved",
        "_untold",
        "_uses_link",
        "dead",
        "held",
        "link",
        "receiving",
        "sending",
        "side",
    )

    def __init__(self, link: Link, side: int) -> None:
        self.link: Link = link.retain()
        self._uses_link = True
        outlet = _TrunkOutlet(link.sock, link._emptied)
        outlet.lock = _switchboard.lock
        outlet.packs = True
        link.outlet = outlet
        self.side = side
        #: What goes and what comes, by stream.
        self.sending: dict[int, Tail] = {}
        self.receiving: dict[int, StreamFeed] = {}
        #: Streams of receivers that are under way, and whether the other side has dropped them already.
        self._reserved: dict[int, bool] = {}
        #: Streams 0 and 1 are the first ones, of the two sides.
        self._next = 2 + side
        #: Messages about streams that found no descriptor for the drainer.
        self._untold: deque[bytes] = deque()
        self._looked = 0.0
        #: Whether it is being handed out just now, by whoever holds the lock.
        self._pumping = False
        #: How many packets are received when the first brings what is waited for.
        self._ahead = 0
        #: Whether the user still has it.
        self.held = True
        self.dead = False
        try:
            _switchboard.listen(self)
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
        self._reserved[stream] = False
        return stream

    def unreserve(self, stream: int) -> None:
        self._reserved.pop(stream, None)

    def use_reserved(self, tail: Tail, stream: int) -> None:
        """The receiver has gone: ``tail`` sends to it."""
        dropped = self._reserved.pop(stream, True)
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
        if not (self.held or self.sending or self.receiving or self._reserved or self.dead):
            self._die()

    def _die(self) -> None:
        """No message comes or goes any more."""
        if not self.dead:
            self.dead = True
            self._bury()

    def _bury(self) -> None:
        try:
            _switchboard.forget(self)
            for stream, feed in list(self.receiving.items()):
                feed.sink.unfeed(feed)
                self.receiving.pop(stream, None)
            for stream, tail in list(self.sending.items()):
                tail.lose()
                self.sending.pop(stream, None)
            if self._uses_link:
                self._uses_link = False
                self.link.release()
        except BaseException:
            _switchboard.post_again(self._bury)
            raise

    def abandon(self) -> None:
        """In a forked child: the lanes are the parent's."""
        self.dead = True
        for feed in self.receiving.values():
            if isinstance(feed.sink, Head):
                feed.sink.abandon()
        self.receiving.clear()
        self.sending.clear()
        self.link._forget()
        self.link._close()

    # -- what comes --------------------------------------------------------------------------

    def look_now_and_then(self) -> None:
        """Hand out what has come, if that was not done just now."""
        now = monotonic()
        if now - self._looked > _LOOK_EVERY:
            self._looked = now
            self.look()

    def look(self, until: Inlet | None = None) -> None:
        """As ``pump``, at little cost where nothing has come."""
        inlet = self.link.inlet
        try:
            if not inlet.ready and not inlet.inbox:
                try:
                    with _switchboard.lock:
                        if self._pumping:
                            return
                        if not self.dead and parcels_held() <= _FEW_PARCELS:
                            inlet.inbox.extend(islice(inlet.packets, 1))
                except BlockingIOError:
                    self._ahead = 0
                    return
                except (ConnectionResetError, NoRoom):
                    pass
            self.pump(until)
        except BaseException:
            if self.holding:
                _switchboard.come_back()
            raise

    @property
    def holding(self) -> bool:
        inlet = self.link.inlet
        return bool(inlet.ready or inlet.inbox) and not self.dead

    def pump(self, until: Inlet | None = None) -> None:
        """Hand out what has come: all that this process has, and of the kernel's a turn, or ``until`` has something.

        Raises ``OSError`` where there are no descriptors for what comes next; it stays where it is.
        """
        try:
            with _switchboard.lock:
                if self._pumping:
                    # What is handed out may look for more itself; one after the other.
                    return
                try:
                    self._pumping = True
                    self._pump(until)
                finally:
                    self._pumping = False
                    if self.holding:
                        # A signal's handler came between, and only this process knows that more has come.
                        _switchboard.come_back()
        finally:
            _switchboard.settle()

    def _pump(self, until: Inlet | None) -> None:
        inlet = self.link.inlet
        received = 0
        while True:
            if self.dead:
                return
            if not inlet.ready and not inlet.inbox:
                if received == MOST_PACKETS or (until is not None and received > self._ahead and until.holding):
                    # What comes by itself is received by itself; where more is there, more at a time.
                    self._ahead = min(2 * self._ahead + 1, MOST_PACKETS)
                    return
                received += 1
                if parcels_held() > _FEW_PARCELS:
                    self._check_room()
            taken: Incoming | Spill | ShutMark | None = None
            #: What is to be handed over, and still there; none where it is not known yet.
            box: list[Incoming] | None = None
            done = False
            try:
                taken = inlet.take(False)
                if taken.__class__ is bytes and len(taken) >= _SHORTEST and taken[-1] == DATA:
                    box = [taken[: -TRAILER.size]]
                    stream = TRAILER.unpack_from(taken, len(taken) - TRAILER.size)[0]
                    self._hand_over(stream, box, len(taken) - TRAILER.size + OVERHEAD)
                elif isinstance(taken, Spill):
                    inlet.put_back(taken)
                elif not isinstance(taken, ShutMark):
                    stream, op, end = split(taken if isinstance(taken, bytes) else taken.body)
                    if op is not Op.DATA and op is not Op.LANES:
                        self._heed(stream, op, taken)
                    else:
                        box = [self._unwrap(taken, op, end)]
                        # Of the whole of it, as its sender has counted.
                        self._hand_over(stream, box, cost(taken))
                done = True
            except BlockingIOError:
                return
            except EndOfStream:
                self._die()
                return
            except ProtocolError:
                # Whoever sends this is no peer of ours.
                done = True
                self._die()
                raise
            finally:
                if not done and taken is not None and not isinstance(taken, (Spill, ShutMark)):
                    self._rescue(taken, box)

    def _rescue(self, taken: Incoming, box: list[Incoming] | None) -> None:
        """Keep what a signal's handler interrupted, unless it was handed over."""
        if box != []:
            if box and isinstance(box[0], LaneParcel):
                # The same ends will come with it once more.
                box[0].forget()
            self.link.inlet.put_back(taken)

    def _check_room(self) -> None:
        spare: list[int] = []
        try:
            for _ in range(_SPARE):
                spare.append(os.dup(self.fileno()))  # noqa: PERF401  (each is to be closed, whatever comes)
            room = self.link.inlet.fits()
        except OSError:
            room = False
        finally:
            for fd in spare:
                os.close(fd)
        if not room:
            raise OSError(
                errno.EMFILE,
                f"no descriptors are left for what comes next on a mux: {parcels_held()} messages with descriptors or "
                f"large contents wait unread in this process; receive them, or raise the limit (ulimit -n)",
            )

    def _hand_over(self, stream: int, box: list[Incoming], charge: int) -> None:
        feed = self.receiving.get(stream)
        if feed is None:
            # Its receiver has gone, and with it what the message brings.
            for message in box:
                if isinstance(message, Parcel):
                    message.close()
            box.clear()
            return
        feed.fed += charge
        feed.sink.feed(box, feed)

    def _unwrap(self, incoming: Incoming, op: Op, end: int) -> Parcel:
        """The message in a packet that isn't a plain frame for a lane; ``end`` is where its trailer begins."""
        if isinstance(incoming, bytes):
            # So it comes out of the last packet of a process, having no descriptors.
            if end < PLAIN_SIZE:
                raise ProtocolError("a message on a mux is too short to say which lane it is of")
            incoming, end = Parcel(incoming[PLAIN_SIZE:], (), b"", []), end - PLAIN_SIZE
        if op is Op.DATA:
            return shorten(incoming, end)
        crossings, end = split_crossings(incoming.body, end)
        links = {one.position: self._arrive(one, len(incoming.kinds) + len(crossings)) for one in crossings}
        return LaneParcel(incoming, memoryview(incoming.body)[:end], links)

    def _heed(self, stream: int, op: Op, incoming: Incoming) -> None:
        """Do what a message about a stream says; once more does no harm."""
        tail = self.sending.get(stream)
        if op is Op.GRANT:
            if tail is not None:
                tail.outlet.allow(total_of(incoming if isinstance(incoming, bytes) else incoming.body))
        elif op is Op.END:
            feed = self.receiving.get(stream)
            if feed is not None:
                feed.sink.unfeed(feed)
                feed.forget()
        elif stream in self._reserved:
            self._reserved[stream] = True
        elif tail is not None:
            tail.lose()
            self.sending.pop(stream, None)
        if op is not Op.GRANT:
            self.close_if_unused()

    def _arrive(self, crossing: Crossing, handles: int) -> LaneLink:
        """The end of a lane that comes; the same again, where its message is given twice."""
        _, kind, stream = crossing
        if crossing.position >= handles or stream % 2 == self.side:
            raise ProtocolError("a message on a mux brings an endpoint that can't be its sender's")
        if kind == HandleKind.SENDER:
            return self.sending.get(stream) or Tail.on(self, stream)
        known = self.receiving.get(stream)
        if known is not None and isinstance(known.sink, Head):
            return known.sink
        head = Head()
        head.add_feed(StreamFeed(self, stream, head))
        return head


_SHORTEST = PLAIN_SIZE + TRAILER.size


def _hand_on_all() -> None:
    """When the process ends: what lanes have waiting for the other sides to read becomes the sockets'."""
    _switchboard.pump_all()
    with _switchboard.lock:
        for trunk in list(_trunks):
            for tail in list(trunk.sending.values()):
                if tail.outlet.backlog:
                    tail.outlet.spill()
    _switchboard.settle()


def _abandon_all() -> None:
    for trunk in list(_trunks):
        if not trunk.dead:
            trunk.abandon()
    _trunks.clear()


_drainer.before_rest.append(_hand_on_all)
os.register_at_fork(after_in_child=_abandon_all)
