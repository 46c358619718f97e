"""What comes through a trunk's socket, handed out to the lanes that it is for.

An end of a lane that was sent over the trunk is known to the other side from the moment its message came, not
when that is decoded: its own messages may be next. Where that message is dropped, so is the end, and its
other side is told.
"""

from __future__ import annotations

import errno
import os
import socket
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING

from .._inlet import EndOfStream, Inlet, NoRoom, ShutMark, Spill
from .._link import Link
from .._message import PLAIN_SIZE, HandleKind, Incoming, Parcel, TooLargeError
from .._transport.unix import Packet, end_of_body
from ..errors import ProtocolError
from . import _switchboard
from ._lane import Head, Tail
from ._lane_feed import MOST_PACKETS, Feed, Sink
from ._lane_frame import (
    DATA,
    HEAVY,
    LONGEST_ENDING,
    OVERHEAD,
    TRAILER,
    WINDOW,
    Crossing,
    Op,
    split,
    split_crossings,
    total_of,
)
from ._lane_inlet import parcels_held
from ._lane_message import LaneLink, LaneParcel, Lost, cost, shorten

if TYPE_CHECKING:
    from ._trunk import Trunk

#: With more unread messages than this that hold descriptors, it is looked ahead whether there is room for more.
_FEW_PARCELS = 8
#: How many descriptors must be free then.
_SPARE = 4
#: How often (seconds) a sender looks whether the receiver is still there.
_LOOK_EVERY = 0.001
#: The shortest plain frame that a lane's message can be.
_SHORTEST = PLAIN_SIZE + TRAILER.size


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
        self._trunk.intake.look(until)

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


class TrunkInlet(Inlet):
    """The shared socket's."""

    __slots__ = ("ending",)

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        #: What stands behind the message that was discarded last, unless that is known no more.
        self.ending: bytes | None = None

    def _discard(self, packet: Packet) -> None:
        try:
            self.ending = end_of_body(packet, LONGEST_ENDING)
        except (OSError, MemoryError):
            self.ending = None
        super()._discard(packet)


class Intake:
    """Receives for a trunk. Of several who look one does, with the switchboard's lock held."""

    __slots__ = ("_ahead", "_looked", "_pumping", "_trunk")

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._looked = 0.0
        #: Whether it is being handed out just now, by whoever holds the lock.
        self._pumping = False
        #: How many packets are received when the first brings what is waited for.
        self._ahead = 0

    def fileno(self) -> int:
        return self._trunk.link.fileno()

    def look_now_and_then(self) -> None:
        """Hand out what has come, if that was not done just now."""
        now = monotonic()
        if now - self._looked > _LOOK_EVERY:
            self._looked = now
            self.look()

    def look(self, until: Inlet | None = None) -> None:
        """As ``pump``, at little cost where nothing has come."""
        inlet = self._trunk.link.inlet
        try:
            if not inlet.ready and not inlet.inbox:
                try:
                    with _switchboard.lock:
                        if self._pumping:
                            return
                        if not self._trunk.dead and parcels_held() <= _FEW_PARCELS:
                            inlet.inbox.extend(islice(inlet.packets.now, 1))
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
        inlet = self._trunk.link.inlet
        return bool(inlet.ready or inlet.inbox) and not self._trunk.dead

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
        inlet = self._trunk.link.inlet
        received = 0
        while True:
            if self._trunk.dead:
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
                try:
                    taken = inlet.take(False)
                except TooLargeError as error:
                    self._hand_over_lost(error)
                    done = True
                    continue
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
                self._trunk.die()
                return
            except ProtocolError:
                # Whoever sends this is no peer of ours.
                done = True
                self._trunk.die()
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
            self._trunk.link.inlet.put_back(taken)

    def _check_room(self) -> None:
        spare: list[int] = []
        try:
            for _ in range(_SPARE):
                spare.append(os.dup(self._trunk.fileno()))  # noqa: PERF401  (each is to be closed, whatever comes)
            room = self._trunk.link.inlet.packets.fits()
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
        feed = self._trunk.receiving.get(stream)
        if feed is None:
            # Its receiver has gone, and with it what the message brings.
            for message in box:
                if isinstance(message, Parcel):
                    message.close()
            box.clear()
            return
        feed.fed += charge
        feed.sink.feed(box, feed)

    def _hand_over_lost(self, error: TooLargeError) -> None:
        """Tell the lane whose message found no memory; raises ``error`` where it isn't known which that is."""
        inlet = self._trunk.link.inlet
        assert isinstance(inlet, TrunkInlet)
        ending, inlet.ending = inlet.ending, None
        if ending is None:
            raise error
        stream, op, end = split(ending)
        crossings = split_crossings(ending, end)[0] if op is Op.LANES else []
        for crossing in crossings:
            self._arrive(crossing, crossing.position + 1).release()
        self._hand_over(stream, [Lost(error.size)], HEAVY)

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
        tail = self._trunk.sending.get(stream)
        if op is Op.GRANT:
            if tail is not None:
                tail.outlet.allow(total_of(incoming if isinstance(incoming, bytes) else incoming.body))
        elif op is Op.END:
            feed = self._trunk.receiving.get(stream)
            if feed is not None:
                feed.sink.unfeed(feed)
                feed.forget()
        elif stream in self._trunk.reserved:
            self._trunk.reserved[stream] = True
        elif tail is not None:
            tail.lose()
            self._trunk.sending.pop(stream, None)
        if op is not Op.GRANT:
            self._trunk.close_if_unused()

    def _arrive(self, crossing: Crossing, handles: int) -> LaneLink:
        """The end of a lane that comes; the same again, where its message is given twice."""
        _, kind, stream = crossing
        if crossing.position >= handles or stream % 2 == self._trunk.side:
            raise ProtocolError("a message on a mux brings an endpoint that can't be its sender's")
        if kind == HandleKind.SENDER:
            return self._trunk.sending.get(stream) or Tail.on(self._trunk, stream)
        known = self._trunk.receiving.get(stream)
        if known is not None and isinstance(known.sink, Head):
            return known.sink
        head = Head()
        head.add_feed(StreamFeed(self._trunk, stream, head))
        return head
