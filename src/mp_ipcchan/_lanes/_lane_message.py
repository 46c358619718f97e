"""Messages between lanes, sockets and processes: endpoints of lanes have no descriptor to go beside them.

What an end of a lane does when it travels depends on the way that its message takes, which is known when
that leaves, not when it is encoded:

- into a stream: it *crosses*, named in the message's trailer by a stream of its own;
- into a lane whose receiver is in this process: it *stays*, and is handed over as it is;
- anywhere else: it is asked for a descriptor, and has that of a real channel, bridged by this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .._link import Link, User
from .._message import (
    PACKET_SIZE,
    PLAIN_SIZE,
    Buffer,
    Descriptors,
    Handle,
    HandleKind,
    Incoming,
    Message,
    Outgoing,
    Parcel,
    ParcelHandle,
)
from ..errors import ProtocolError
from . import _switchboard
from ._lane_frame import DATA, HEAVY, OVERHEAD, TRAILER, Crossing, ending, weigh

if TYPE_CHECKING:
    from .._endpoint import Endpoint
    from ._trunk import Trunk


class LaneLink(Link):
    """One end of a lane, where a link is expected; it has no socket of its own."""

    __slots__ = ()

    kind: HandleKind

    def parting(self) -> Callable[[], None]:
        """What gives up a use of it, called with the switchboard's lock held. Interrupted, it is called again."""
        raise NotImplementedError

    def release(self) -> None:
        _switchboard.post(self.parting())

    def let_go(self, user: User) -> None:
        parting = self.parting()
        append = _switchboard.posted.append
        try:
            if user._link is self:
                # No signal's handler comes between these two: the end is open, or is being closed.
                user._link = None
                append(parting)
            _switchboard.settle()
        except BaseException:
            _switchboard.settle_later()
            raise

    def lend(self, endpoint: Endpoint | None) -> LaneHandle:
        """A handle that takes this end along: ``endpoint``'s, or, without one, the use of it that was the caller's."""
        raise NotImplementedError


class LaneHandle:
    """An end of a lane on its way. Of ``fileno``, ``cross`` and ``stay`` the last that was called counts."""

    __slots__ = ()

    kind: HandleKind

    def fileno(self) -> int:
        """The descriptor of a real channel, in this end's place."""
        raise NotImplementedError

    def cross(self, trunk: Trunk) -> int:
        """The stream on ``trunk`` that will be this end on the other side."""
        raise NotImplementedError

    def stay(self) -> LaneLink:
        """This end itself, which the caller hands over."""
        raise NotImplementedError

    def back(self) -> None:
        """The message did not leave that way: what ``cross`` or ``stay`` did is undone."""
        raise NotImplementedError

    def sent(self) -> None:
        raise NotImplementedError

    def unsent(self) -> None:
        raise NotImplementedError

    def arrive(self) -> None:
        raise NotImplementedError


class LaneParcel(Parcel):
    """A parcel that brings ends of lanes, which are this parcel's until they are taken."""

    __slots__ = ("_slots",)

    def __init__(self, parcel: Parcel, body: Buffer, links: Mapping[int, LaneLink]) -> None:
        _share(self, parcel, body)
        kinds = bytearray(parcel.kinds)
        slots: list[int | LaneLink | None] = list(range(len(kinds)))
        for position, link in sorted(links.items()):
            kinds.insert(position, link.kind)
            slots.insert(position, link)
        self.kinds = bytes(kinds)
        #: By position among all handles: the place of a descriptor, a link, or nothing any more.
        self._slots: list[int | LaneLink | None] = slots

    def take(self, first: int, count: int) -> tuple[bytes, list[Any]]:
        slots = self._slots[first : first + count]
        if first < 0 or len(slots) != count or None in slots:
            raise ProtocolError("the message refers to handles which it doesn't carry or has handed out before")
        self._slots[first : first + count] = [None] * count
        taken: list[Any] = []
        for slot in slots:
            taken += [slot] if isinstance(slot, LaneLink) else super().take(slot or 0, 1)[1]
        return self.kinds[first : first + count], taken

    def handles(self) -> list[Handle]:
        """Handles for all of it, to send it on."""
        slots, self._slots = self._slots, []
        held = self.filenos()
        return [
            slot.lend(None) if isinstance(slot, LaneLink) else ParcelHandle(self, kind, held[slot or 0])
            for kind, slot in zip(self.kinds, slots, strict=True)
        ]

    def is_spent(self) -> bool:
        return not any(slot is not None for slot in self._slots)

    def forget(self) -> None:
        """Give the ends of lanes up, without closing them."""
        self._slots = []

    def close(self) -> None:
        super().close()
        slots, self._slots = self._slots, []
        for slot in slots:
            if isinstance(slot, LaneLink):
                slot.release()

    def __del__(self) -> None:
        if any(isinstance(slot, LaneLink) for slot in getattr(self, "_slots", ())):
            self.close()


class Lost(Parcel):
    """Stands for a message that was dropped, because this process had no memory for it, until its receiver hears so."""

    __slots__ = ("size",)

    def __init__(self, size: int | None) -> None:
        super().__init__(b"", (), b"", [])
        self.size = size


def cost(message: Outgoing | Incoming) -> int:
    """What a message on the socket takes of its stream's window."""
    if isinstance(message, bytes):
        return len(message) + OVERHEAD
    if isinstance(message, Message):
        return weigh(len(message), bool(message.handles))
    if isinstance(message, Lost):
        # It was large.
        return HEAVY
    return weigh(len(message.body) + sum(map(len, message.buffers)), bool(message.filenos()))


def _share(copy: Parcel, parcel: Parcel, body: Buffer) -> None:
    copy.body = body
    copy.buffers = parcel.buffers
    copy.kinds = parcel.kinds
    # One owner of the descriptors, that both hold: an interrupted call may go on with either.
    copy._fds = parcel._fds


def shorten(parcel: Parcel, size: int) -> Parcel:
    """A parcel with only the first ``size`` bytes of the body, and all else."""
    shorter = Parcel(b"", (), b"", [])
    _share(shorter, parcel, memoryview(parcel.body)[:size])
    return shorter


class _Framed(Message):
    """A message with a trailer. Its handles are its own while it is on its way; unsent, they are the item's again."""

    __slots__ = ("_all", "_item")

    def __init__(self, item: Message, trunk: Trunk, stream: int) -> None:
        self._item = item
        self._all = item.handles
        crossings = [
            Crossing(position, handle.kind, handle.cross(trunk))
            for position, handle in enumerate(item.handles)
            if isinstance(handle, LaneHandle)
        ]
        rest = [handle for handle in item.handles if not isinstance(handle, LaneHandle)]
        super().__init__([*item.body, ending(stream, crossings)], item.buffers, rest)
        item.handles = ()

    def sent(self) -> None:
        self.handles = ()
        told, self._all = self._all, ()
        for handle in told:
            handle.sent()

    def unsent(self) -> None:
        self.handles = ()
        returned, self._all = self._all, ()
        # Told twice, it has nothing to return.
        if returned:
            self._item.handles = returned
        for handle in returned:
            if isinstance(handle, LaneHandle):
                handle.back()


def frame(item: Outgoing, trunk: Trunk, stream: int) -> Outgoing:
    """What goes over the trunk for ``item``."""
    if not isinstance(item, bytes):
        return _Framed(item, trunk, stream)
    if len(item) + TRAILER.size <= PACKET_SIZE:
        return item + TRAILER.pack(stream, DATA)
    return Message([memoryview(item)[PLAIN_SIZE:], ending(stream, ())])


class _Lent:
    """A handle that is its owner's as long as it may not leave."""

    __slots__ = ("_handle", "kind")

    def __init__(self, handle: Handle) -> None:
        self.kind = handle.kind
        self._handle = handle

    def fileno(self) -> int:
        return self._handle.fileno()

    def sent(self) -> None:
        self._handle.sent()

    def unsent(self) -> None:
        """The owner tells it, or tries again."""


def lend(item: Outgoing) -> Outgoing:
    """``item`` for another outlet, where it may wait longer than here."""
    if isinstance(item, bytes):
        return item
    return Message(item.body, item.buffers, [_Lent(handle) for handle in item.handles])


def as_message(incoming: Incoming) -> Outgoing:
    """What came, to be sent on."""
    if isinstance(incoming, bytes):
        return incoming
    if isinstance(incoming, LaneParcel):
        handles = incoming.handles()
    else:
        handles = [
            ParcelHandle(incoming, kind, fd) for kind, fd in zip(incoming.kinds, incoming.filenos(), strict=True)
        ]
    return Message([incoming.body], incoming.buffers, handles)


def as_parcel(item: Message) -> Parcel:
    """What is sent, for a receiver in this process; ``item`` keeps its handles, to be told. Raises ``OSError``."""
    fds = Descriptors([])
    links: dict[int, LaneLink] = {}
    staying: list[LaneHandle] = []
    kinds = bytearray()
    try:
        for position, handle in enumerate(item.handles):
            if isinstance(handle, LaneHandle):
                links[position] = handle.stay()
                staying.append(handle)
            else:
                fds.fds.extend(map(os.dup, (handle.fileno(),)))
                kinds.append(handle.kind)
    except BaseException:
        for handle in staying:
            handle.back()
        raise
    body = b"".join(item.body)
    parcel = Parcel(body, [bytearray(buffer) for buffer in item.buffers], bytes(kinds), [])
    parcel._fds = fds
    return LaneParcel(parcel, body, links) if links else parcel
