"""``Mux``: as many channels between two processes as they like, over one socket."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, final, overload

from .. import _codec, _reduction
from .._endpoint import Endpoint, endpoints
from .._link import Link
from .._message import CHANNEL_BUFFER, HandleKind, MovingHandle
from .._receiver import BytesReceiver, Receiver
from .._sender import BytesSender, Sender
from .._typed_codec import MAX_SIZE, codec_for
from . import _switchboard
from ._lane import Head, Tail
from ._lane_intake import StreamFeed
from ._lane_message import LaneLink
from ._trunk import Trunk

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_in_use: weakref.WeakSet[Mux] = weakref.WeakSet()


@final
class Mux(Endpoint):
    """One end of a socket that carries any number of channels between two processes.

    ``Mux.pair()`` makes both ends. One goes to the other process, as an argument or in a message; it moves, as a
    Receiver does, until it is first used. Each end has a sender ``tx`` to the other and a receiver ``rx`` from it.
    ``channel()`` makes further channels, which take no descriptor: send one of its two ends to the
    other process, in a message on any channel of this mux. They are channels like all others, each with its own order
    and end. With the process at either end of the mux they end.

    Safe from several threads. After a bare ``os.fork``, the child's copies of what was in use are closed.
    """

    __slots__ = ("_rx", "_side", "_trunk", "_tx")

    def __init__(self, link: Link = None, side: int = 0) -> None:  # type: ignore[assignment]
        if not isinstance(link, Link):
            raise TypeError("a Mux is not made by hand: Mux.pair() makes both ends")
        super().__init__(link)
        self._side = side
        self._trunk: Trunk | None = None
        self._tx: Sender[Any] | None = None
        self._rx: Receiver[Any] | None = None

    @classmethod
    def pair(cls) -> tuple[Mux, Mux]:
        """Both ends of a new mux. Raises ``OSError`` where no descriptors are left."""
        first, second = Link.pair(CHANNEL_BUFFER)
        return cls(first, 0), cls(second, 1)

    @property
    def tx(self) -> Sender[Any]:
        """The sender to the other end's ``rx``. It closes with this mux, or by itself."""
        self._use()
        assert self._tx is not None
        return self._tx

    @property
    def rx(self) -> Receiver[Any]:
        """The receiver of what the other end's ``tx`` sends. It closes with this mux, or by itself."""
        self._use()
        assert self._rx is not None
        return self._rx

    @overload
    def channel(self, type: None = None) -> tuple[Sender[Any], Receiver[Any]]: ...
    @overload
    def channel(self, type: type[T], *, max_size: int = MAX_SIZE) -> tuple[Sender[T], Receiver[T]]: ...
    @overload
    def channel(self, type: Any, *, max_size: int = MAX_SIZE) -> tuple[Sender[Any], Receiver[Any]]: ...
    def channel(self, type: Any = None, *, max_size: int = MAX_SIZE) -> tuple[Sender[Any], Receiver[Any]]:  # noqa: A002
        """A new channel: ``(sender, receiver)``, both here. It takes no descriptor where its other end is sent
        over this mux. ``type`` and ``max_size`` as the function ``channel`` takes them.

        Raises ``EndpointClosed`` and ``EndpointMoved``, and what ``channel`` does for a type.
        """
        typed = codec_for(type, max_size)
        tail, head = self._lane()
        return Sender(tail, typed), Receiver(head, typed)

    def bytes_channel(self) -> tuple[BytesSender, BytesReceiver]:
        """As ``channel``, for buffers, without serialization."""
        tail, head = self._lane()
        return BytesSender(tail), BytesReceiver(head)

    def _lane(self) -> tuple[Tail, Head]:
        self._use()
        tail, head = Tail(), Head()
        head.attach(tail)
        return tail, head

    def _use(self) -> None:
        """From its first use on this end belongs to this process."""
        link = self._open_link()
        if self._trunk is not None:
            return
        with _switchboard.lock:
            if self._trunk is None:
                trunk = Trunk(link, self._side)
                head = Head()
                head.add_feed(StreamFeed(trunk, 1 - self._side, head))
                self._tx, self._rx = Sender(Tail.on(trunk, self._side)), Receiver(head)
                _in_use.add(self)
                self._trunk = trunk

    def close(self) -> None:
        """Close ``tx`` and ``rx``. Channels made by ``channel`` go on; the socket closes with the last of them."""
        trunk = self._trunk
        if trunk is not None:
            for end in (self._tx, self._rx):
                if end is not None:
                    end.close()
            _switchboard.post(trunk.release)
            self._trunk = None
        # Last: what a signal's handler interrupts can be done again.
        super().close()

    def _claim(self) -> Link:
        link = self._open_link()
        if self._trunk is not None:
            raise ValueError("this Mux is in use: its channels are in this process, and it can't be sent any more")
        self._link, self._moved = None, True
        return link

    def _moving(self) -> Sequence[MovingHandle]:
        return (_MuxHandle(self),)

    def _restore(self, link: Link) -> None:
        self._link, self._moved = link, False

    def __copy__(self) -> Self:
        raise TypeError("a Mux can't be copied: its ends are in one process each")

    def __deepcopy__(self, memo: object) -> Self:
        return self.__copy__()


class _MuxHandle:
    """A mux on its way: gone once the message has left, restored if it never does."""

    __slots__ = ("_link", "_mux", "kind")

    def __init__(self, mux: Mux) -> None:
        self.kind = HandleKind.CONNECTION
        self._mux = mux
        self._link = mux._claim()

    def fileno(self) -> int:
        return self._link.fileno()

    def sent(self) -> None:
        self._link.release()

    def unsent(self) -> None:
        self._mux._restore(self._link)

    arrive = unsent


def _pack_mux(mux: Mux) -> _codec.Packed:
    handle = _MuxHandle(mux)
    return _rebuild_mux, (mux._side,), [handle]


@_codec.rebuilds
def _rebuild_mux(side: int, kinds: bytes, fds: list[int]) -> Mux:
    (fd,) = _codec.expect((HandleKind.CONNECTION,), kinds, fds)
    return Mux(Link.adopt(fd), side)


_codec.register(Mux, _pack_mux)
_reduction.register(Mux)


def _abandon_after_fork() -> None:
    """In a forked child: what is in use is the parent's."""
    for endpoint in list(endpoints):
        if isinstance(endpoint, Endpoint) and isinstance(endpoint._link, LaneLink):
            endpoint._link = None
    for mux in list(_in_use):
        mux._link = mux._trunk = None


os.register_at_fork(after_in_child=_abandon_after_fork)
