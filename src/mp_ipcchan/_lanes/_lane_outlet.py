"""The sending half of a lane's tail: an outlet whose kernel is the window of a stream.

What the window doesn't take waits in the backlog, which goes on when the other side grants more, or as
one with the socket's own when the process ends.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._backlog import SHORTAGE
from .._link import Link
from .._message import PACKET_SIZE, Incoming, Message, Outgoing
from .._outlet import Outlet
from . import _switchboard
from ._lane_frame import DATA, OVERHEAD, TRAILER, WINDOW
from ._lane_message import as_message, cost, frame, lend

if TYPE_CHECKING:
    from ._lane import Head
    from ._trunk import Trunk


class LaneOutlet(Outlet):
    """The sending half of a tail. One of ``head``, ``trunk`` and ``link`` is where messages go."""

    __slots__ = ("_call", "_trailer", "allowed", "gone", "head", "link", "passed", "stream", "trunk")

    #: What has waited in a head that moves is appended at one go.
    open_ended = False
    announces = True

    def __init__(self, emptied: Callable[[], None]) -> None:
        self._begin(emptied)
        self.lock = _switchboard.lock
        self.head: Head | None = None
        self.link: Link | None = None
        self.trunk: Trunk | None = None
        self.stream = -1
        self._trailer = b""
        #: Whom to call when there is room.
        self._call: Callable[[], object] | None = None
        #: The cost of all that was sent on the stream, and how much that may come to.
        self.passed = 0
        self.allowed = WINDOW
        #: Whether the receiver is gone.
        self.gone = False

    # -- sending -----------------------------------------------------------------------------

    def send_raw(self, item: bytes, flags: int) -> int:
        """Send a plain frame now, without the detours of ``send``; for ``Sender.send``."""
        trunk = self.trunk
        if trunk is None:
            raise BlockingIOError(errno.EAGAIN, "not to a stream")
        trunk.intake.look_now_and_then()
        with self.lock:
            if self.trunk is None or self.backlog or self.gone or self.passed >= self.allowed:
                raise BlockingIOError(errno.EAGAIN, "the other side has to read first")
            if trunk.link.outlet.backlog or len(item) + TRAILER.size > PACKET_SIZE:
                raise BlockingIOError(errno.EAGAIN, "not directly")
            sent = trunk.link.outlet.send_raw(item + self._trailer, flags)
            self.passed += len(item) + OVERHEAD
        return sent

    def bind(self, trunk: Trunk, stream: int) -> None:
        """Send on this stream from now on."""
        self.head = None
        self.trunk = trunk
        self.stream = stream
        self._trailer = TRAILER.pack(stream, DATA)

    def try_send(self, item: Outgoing, noted: list[object] | None = None) -> bool:
        self._look()
        try:
            with self.lock:
                return super().try_send(item, noted)
        finally:
            _switchboard.settle()

    def defer(self, item: Outgoing, accepted: list[object] | None = None) -> None:
        try:
            with self.lock:
                super().defer(item, accepted)
                if len(self.backlog) == 1 and self.has_room():
                    # The other side has read since this was refused, and may have no more to say.
                    self._go_on()
        finally:
            _switchboard.settle()

    def send_all(self, frames: list[bytes]) -> None:
        at = 0
        if self.trunk is not None:
            self.trunk.intake.look_now_and_then()
            with self.lock:
                at = self._send_together(frames)
        for one in frames[at:]:
            self.send(one)

    def _send_together(self, frames: list[bytes]) -> int:
        """Send as many as the window takes in few packets; how many."""
        if self.trunk is None or self.backlog or self.gone:
            return 0
        end = self._trailer
        batch: list[bytes] = []
        for one in frames:
            if self.passed >= self.allowed or len(one) + len(end) > PACKET_SIZE:
                break
            batch.append(one + end)
            self.passed += cost(one)
        self.trunk.link.outlet.send_all(batch)
        return len(batch)

    def _transmit(self, item: Outgoing, noted: list[object]) -> None:
        if self.gone:
            raise BrokenPipeError(errno.EPIPE, "the receiver is gone")
        if self.head is not None:
            self.head.take_in(item, noted)
        elif self.link is not None:
            self._tell_of_trust(self.link)
            try:
                self.link.outlet.send(lend(item), noted)
            except OSError as error:
                self.gone = error.errno not in SHORTAGE
                raise
            finally:
                if noted and isinstance(item, Message):
                    # They are the link's to tell now.
                    item.handles = ()
        elif self.trunk is not None:
            if self.passed >= self.allowed:
                raise BlockingIOError(errno.EAGAIN, "the other side has to read first")
            self._tell_of_trust(self.trunk.link)
            framed = frame(item, self.trunk, self.stream)
            charge = cost(framed) - TRAILER.size if isinstance(framed, bytes) else cost(framed)
            self.trunk.link.outlet.send(framed, noted)
            self.passed += charge

    def _tell_of_trust(self, link: Link) -> None:
        if not self.segments.recycles:
            # Of the socket's segments: the other side keeps them mapped, whichever lane's they were.
            link.outlet.segments.recycles = False

    def _await_room(self, deadline: float | None) -> bool:
        if self._refusal == errno.EAGAIN:
            return _switchboard.wait(self, self.has_room, deadline)
        return super()._await_room(deadline)

    def _widen(self) -> None:
        """What has no room here is beyond the stream's window, not the socket's buffer."""

    def has_room(self) -> bool:
        return self.gone or self.passed < self.allowed

    def announce(self, call: Callable[[], object]) -> None:
        with self.lock:
            self._call = call
            # Its thread hears of the room.
            _switchboard.need(call)
            if self.has_room():
                self._tell_of_room()

    def _tell_of_room(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            _switchboard.done_with(call)
            call()

    def allow(self, total: int) -> None:
        """The other side has taken this much."""
        self.allowed = max(self.allowed, total + WINDOW)
        self._go_on()
        if self.has_room():
            self._tell_of_room()
        _switchboard.wake(self)

    def pass_on(self, incoming: Incoming, noted: list[object]) -> None:
        """Send on what came, as soon as may be. The lock is held."""
        if not self.gone:
            self.defer(as_message(incoming), noted)
            self._go_on()

    # -- the backlog -------------------------------------------------------------------------

    def _look(self) -> None:
        """Maybe there is room already, and nobody has looked."""
        trunk = self.trunk
        if trunk is not None and self.passed >= self.allowed:
            trunk.intake.look()

    def drain(self, leave: int = 0) -> bool:  # noqa: ARG002  (messages are not packed, so none is left for the next pack)
        self._look()
        with self.lock:
            try:
                done = super().drain()
            except BaseException:
                # Perhaps a signal's handler: no grant may tell when to go on.
                if self.backlog:
                    _switchboard.retry(self._try_again)
                raise
            if not done and self._refusal in SHORTAGE and not self._busy:
                _switchboard.retry(self._try_again)
        return done

    def _go_on(self) -> None:
        """Send what may be sent."""
        try:
            self.drain()
        except OSError:
            # The receiver is gone; the next ``send`` will say so.
            pass

    def _try_again(self) -> bool:
        """Whether that came to something."""
        try:
            with self.lock:
                return super().drain() or self._refusal not in SHORTAGE
        except OSError:
            return True

    def _next(self, leave: int) -> tuple[list[Outgoing], Outgoing | None]:  # noqa: ARG002
        # One by one: each takes of the window, and the socket's outlet packs them.
        items = self._first(1)
        return items, items[0]

    def _serve(self) -> bool:
        return _switchboard.need(self)

    def _unserve(self) -> None:
        _switchboard.done_with(self)

    def spill(self) -> None:
        """Let all that waits be the socket's, whatever the window says: the process ends."""
        with self.lock:
            self.allowed = sys.maxsize
            self._go_on()

    def lose(self) -> None:
        """The receiver is gone, and with it what waits. The lock is held."""
        self.gone = True
        self.trunk = None
        self._drop_all()
        self._tell_of_room()
        _switchboard.wake(self)

    def close(self) -> None:
        super().close()
        self._tell_of_room()
