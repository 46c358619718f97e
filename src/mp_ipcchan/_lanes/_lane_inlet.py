"""The receiving half of a lane's head: an inlet that the switchboard fills.

All that it has waits in user space, so its ``fileno`` costs a descriptor, made when somebody asks; sets and
coroutines have it call them instead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

from .._inlet import _MOST_LOOKS, EndOfStream, Inlet, Spill
from .._message import Incoming, TooLargeError
from .._segments._segment_cache import SegmentCache
from .._waker import Waker
from . import _switchboard
from ._lane_frame import HEAVY, OVERHEAD, WINDOW
from ._lane_message import Lost, cost

if TYPE_CHECKING:
    from ._lane import Head

#: How much is taken (a cost) before the feeds hear of it. Less than what a grant is worth, so that one who has used up
#: a window has another half when it is read, however many there are.
_GRANT_EVERY = WINDOW // 4

#: What a lane has to give back that nothing large ever came through.
NO_SEGMENTS = SegmentCache()

#: Unread messages in the lanes of this process that hold descriptors, or may, in a segment.
_parcels = 0


def parcels_held() -> int:
    return _parcels


class LaneInlet(Inlet):
    """The receiving half of a head."""

    __slots__ = ("_call", "_came", "_grant_at", "_took", "ended", "head")

    announces = True

    hand_out = staticmethod(_switchboard.pump_all)

    def __init__(self, head: Head) -> None:
        self._begin()
        self.waker = _UNASKED
        #: Whom to call when something has come.
        self._call: Callable[[], object] | None = None
        self.segments = NO_SEGMENTS
        self.head: Head | None = head
        #: Whether nothing will come any more.
        self.ended = False
        #: The cost of all that came, under the switchboard's lock, and of all that was taken, by who receives.
        self._came = 0
        self._took = 0
        #: The feeds hear of what was taken when it is as much as this.
        self._grant_at = _GRANT_EVERY
        # Nothing is received past ``take``.
        self.detour = True

    def take(self, wait: bool) -> Incoming:
        while True:
            if self.ready:
                # Ahead of it: nothing may come between the taking and its end.
                message = self.ready[0]
                if message.__class__ is bytes:
                    self._took += len(message) + OVERHEAD
                    if self._took >= self._grant_at:
                        self._grant()
                else:
                    self._note_taking(1)
                    if isinstance(message, Lost):
                        self._take_ready()
                        raise TooLargeError(message.size)
                del message
                return self._take_ready()
            if self.ended:
                raise EndOfStream
            if not self._look(self._looks if wait else 1):
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "there is no message")
                self._looked_in_vain()
                self.await_readable(None)

    def _look(self, times: int) -> bool:
        """Hand out what has come, a few times over; whether this has got something."""
        if self._took != self._came:
            self._set_right()
        for _ in range(max(times, 1)):
            for feed in list(self.head.feeds()) if self.head is not None else ():
                feed.look(self)
            if self.ready or self.ended:
                self._looks = _MOST_LOOKS
                return True
        return False

    def _set_right(self) -> None:
        """Nothing waits: what was counted wrong, as a signal's handler came between, is right again."""
        with _switchboard.lock:
            if not self.ready:
                self._took = self._came

    def _has_something(self) -> bool:
        return bool(self.ready) or self.ended

    def count(self, message: Incoming) -> None:
        """``message`` is about to wait here. The lock is held."""
        global _parcels
        charge = cost(message)
        self._came += charge
        _parcels += charge == HEAVY

    def _note_taking(self, messages: int) -> None:
        """So many are about to be taken."""
        global _parcels
        with _switchboard.lock:
            for message in islice(self.ready, messages):
                charge = cost(message)  # type: ignore[arg-type]
                self._took += charge
                _parcels -= charge == HEAVY
        if self._took >= self._grant_at:
            self._grant()

    def _grant(self) -> None:
        """Tell the feeds what they may send in place of what was taken."""
        try:
            with _switchboard.lock:
                if self.head is not None:
                    waiting = max(0, self._came - self._took)
                    for feed in list(self.head.feeds()):
                        feed.grant(feed.fed - waiting)
                # Not before: where a signal's handler comes between, it is done by the next call.
                self._grant_at = self._took + _GRANT_EVERY
        finally:
            _switchboard.settle()

    def take_packed(self, into: list[Incoming], most: int) -> bool:
        plain = 0
        for one in islice(self.ready, most - len(into)):
            if one.__class__ is not bytes:
                break
            plain += 1
        if not plain:
            return False
        self._note_taking(plain)
        return super().take_packed(into, len(into) + plain)

    def take_back(self, messages: list[Incoming | Spill]) -> None:
        held = list(messages)
        super().take_back(messages)
        with _switchboard.lock:
            for message in held:
                self.count(message)  # type: ignore[arg-type]

    def _await(self, deadline: float | None) -> bool:
        return _switchboard.wait(self, self._has_something, deadline)

    @property
    def holding(self) -> bool:
        return bool(self.ready) or self.ended

    def fileno(self) -> int:
        """A descriptor that is readable whenever ``take`` would not block: this lane's own, from now on."""
        with _switchboard.lock:
            flag = self.waker
            if not isinstance(flag, _Flag):
                self.waker = flag = _Flag(self)
                _switchboard.need(self)
                if self.holding:
                    flag.set()
            return flag.fileno()

    def announce(self, call: Callable[[], object] | None) -> None:
        with _switchboard.lock:
            if call == self._call:
                return
            self._call = call
            if call is not None:
                _switchboard.need(self)
            elif not isinstance(self.waker, _Flag):
                _switchboard.done_with(self)

    def tell(self) -> None:
        """Something has come, or the end. The lock is held."""
        if self.waker is not None:
            self.waker.set()
        if self._call is not None:
            self._call()
        _switchboard.wake(self)

    def close(self) -> None:
        global _parcels
        _switchboard.done_with(self)
        self.head = self._call = None
        self.segments = NO_SEGMENTS
        _parcels -= sum(cost(message) == HEAVY for message in self.ready)  # type: ignore[arg-type]
        super().close()

    def reset_after_fork(self) -> None:
        super().reset_after_fork()
        self.ended = True


class _Unasked(Waker):
    """Stands where nobody has asked for ``fileno``. Being there, it keeps ``recv`` from taking messages uncounted."""

    def __init__(self) -> None:
        pass

    def set(self) -> None:
        pass

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass


_UNASKED = _Unasked()


class _Flag(Waker):
    """Makes the messages of a lane visible to ``poll``."""

    def __init__(self, inlet: LaneInlet) -> None:
        self._inlet = inlet
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def clear(self) -> None:
        super().clear()
        if self._inlet.holding:
            # Handed over by another thread since the caller has looked.
            self.set()

    def fileno(self) -> int:
        return self._event

    def close(self) -> None:
        fd, self._event = self._event, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # In a forked child nobody closes it.
        self.close()
