"""Channels: a Sender and a Receiver over one socket pair, and how these travel in messages.

A channel is a one-way FIFO with many senders and one receiver. A Sender that is sent is copied, a
Receiver that is sent moves, in two steps: packing it claims it, so that nobody else can use or send
it meanwhile; it is gone once the message has left, and restored if that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

from . import _codec
from ._endpoint import ReceivingEnd
from ._link import Link, LinkHandle, in_transit
from ._message import (
    CHANNEL_BUFFER,
    Descriptors,
    Handle,
    HandleKind,
    Incoming,
    MovingHandle,
    Parcel,
    ParcelHandle,
    release_all,
)
from ._opaque import OpaqueReceiver, OpaqueSender, Origin
from ._receiver import BytesReceiver, Receiver, ReceiverBase
from ._sender import BytesSender, Sender, SenderBase
from ._typed_codec import MAX_SIZE, codec_for, codec_of
from .errors import ProtocolError

T = TypeVar("T")


@overload
def channel(type: None = None) -> tuple[Sender[Any], Receiver[Any]]: ...
@overload
def channel(type: type[T], *, max_size: int = MAX_SIZE) -> tuple[Sender[T], Receiver[T]]: ...
@overload
def channel(type: Any, *, max_size: int = MAX_SIZE) -> tuple[Sender[Any], Receiver[Any]]: ...
def channel(type: Any = None, *, max_size: int = MAX_SIZE) -> tuple[Sender[Any], Receiver[Any]]:  # noqa: A002
    """A new channel: ``(sender, receiver)``. Raises ``OSError`` where no descriptors are left.

    Without a type, messages are pickles: for processes that trust each other. With one, they are
    encoded as MessagePack and checked against it by msgspec (extra ``mp_ipcchan[msgspec]``), where they
    are sent and where they are received; one that doesn't fit is a ``SerializationError`` and the channel
    goes on. Fields of the type may be endpoints: ``Sender[U]`` and ``Receiver[U]`` (of a typed channel of U),
    ``BytesSender``, ``BytesReceiver``, ``Fd``, ``SharedMemory``, and ``Sender`` and ``Receiver`` (of a channel of
    pickles: a ``Receiver`` is for whoever trusts its senders). ``max_size`` bounds a message (bytes), so
    that a peer can't make the receiver allocate what it likes. Raises ``TypeError`` for a type that
    msgspec can't check, ``ImportError`` where msgspec is missing.
    """
    typed = codec_for(type, max_size)
    sending, receiving = _pair()
    return Sender(sending, typed), Receiver(receiving, typed)


def bytes_channel() -> tuple[BytesSender, BytesReceiver]:
    """A new channel for buffers, without serialization: ``(sender, receiver)``."""
    sending, receiving = _pair()
    return BytesSender(sending), BytesReceiver(receiving)


def _pair() -> tuple[Link, Link]:
    sending, receiving = Link.pair(CHANNEL_BUFFER)
    sending.outlet.packs = True
    return sending, receiving


_CLASSES: dict[str, type[Any]] = {cls.__name__: cls for cls in (Sender, BytesSender, Receiver, BytesReceiver)}


def _describe(endpoint: SenderBase[Any] | ReceiverBase[Any] | OpaqueSender | OpaqueReceiver) -> tuple[Any, ...]:
    """What to send for an endpoint's class: its name, its codec if it is typed, and whether it is opaque."""
    if isinstance(endpoint, (OpaqueSender, OpaqueReceiver)):
        (cls, typed), opaque = endpoint._origin, True
    else:
        cls, typed, opaque = type(endpoint), endpoint._typed, False
    return cls.__name__, None if typed is None else (typed.type, typed.max_size), opaque


def _origin(name: str, typed: tuple[Any, int] | None, fds: list[int]) -> Origin:
    """The origin that was described. Where that raises, ``fds`` are let go of."""
    try:
        return Origin(_CLASSES[name], None if typed is None else codec_of(*typed))
    except BaseException:
        release_all(fds)
        raise


def _pack_sender(sender: SenderBase[Any] | OpaqueSender) -> _codec.Packed:
    return _rebuild_sender, _describe(sender), [copying_handle(sender)]


def copying_handle(sender: SenderBase[Any] | OpaqueSender) -> Handle:
    link = sender._open_link()
    return link.lend(sender) or LinkHandle(HandleKind.SENDER, link)


def sending_link(kinds: bytes, fds: list[int]) -> Link:
    """The link of a sender that was sent. Owns ``fds``."""
    (fd,) = _codec.expect((HandleKind.SENDER,), kinds, fds)
    link = Link.adopt(fd)
    link.outlet.packs = True
    return link


@_codec.rebuilds
def _rebuild_sender(
    name: str, typed: tuple[Any, int] | None, opaque: bool, kinds: bytes, fds: list[int]
) -> SenderBase[Any] | OpaqueSender:
    origin = _origin(name, typed, fds)
    sender: SenderBase[Any] = origin.make(sending_link(kinds, fds))
    return sender.to_opaque() if opaque else sender


class _MovingHandle:
    """A receiver on its way: gone once the message has left, restored if it never does."""

    __slots__ = ("__weakref__", "_receiver", "_waiting", "end", "kind")

    def __init__(self, receiver: ReceivingEnd, link: Link, waiting: list[Incoming]) -> None:
        self.kind = HandleKind.RECEIVER
        #: None once the journey has ended.
        self._receiver: ReceivingEnd | None = receiver
        #: This process's, which is given up.
        self.end = link
        self._waiting = waiting
        in_transit.add(self)

    def fileno(self) -> int:
        return self.end.fileno()

    def sent(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self.end.release()

    def unsent(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self.end.inlet.put_back(*self._waiting)
            receiver._restore(self.end)

    arrive = unsent


def pack_receiver(receiver: ReceiverBase[Any] | OpaqueReceiver) -> _codec.Packed:
    described = _describe(receiver)
    waiting, handles = detach(receiver)
    return _rebuild_receiver, (*described, waiting), handles


def detach(receiver: ReceivingEnd) -> tuple[list[object], list[MovingHandle]]:
    """Claim a receiver for a message: what waits in it, as plain objects, and the descriptors of it all."""
    link = receiver._claim()
    lent = link.lend(receiver)
    if lent is not None:
        # What waits in it follows it.
        return [], [lent]
    waiting: list[Incoming] = []
    handles: list[MovingHandle] = [_MovingHandle(receiver, link, waiting)]
    described: list[object] = []
    try:
        waiting += link.inlet.unload()
        for message in waiting:
            if isinstance(message, bytes):
                described.append(message)
            else:
                described.append((bytes(message.body), [bytes(one) for one in message.buffers], message.kinds))
                handles += [ParcelHandle(message, *pair) for pair in zip(message.kinds, message.filenos(), strict=True)]
    except BaseException:
        handles[0].unsent()
        raise
    return described, handles


def attach(
    make: Callable[[Link], ReceiverBase[Any]], waiting: Sequence[Any], kinds: bytes, fds: list[int]
) -> ReceiverBase[Any]:
    """The receiver that was detached. Owns ``fds``; ``ProtocolError`` where they are not what ``waiting`` says."""
    _codec.expect((HandleKind.RECEIVER, *kinds[1:]), kinds, fds)
    own = b"".join(one[2] for one in waiting if not isinstance(one, bytes))
    if own != kinds[1:] or not all(isinstance(fd, int) for fd in fds[1:]):
        release_all(fds)
        raise ProtocolError("a receiver was sent with other descriptors than the messages in it have")
    of_messages = Descriptors(fds[1:])
    try:
        receiver = make(Link.adopt(fds[0]))
    except BaseException:
        of_messages.close()
        raise
    messages: list[Incoming] = []
    for described in waiting:
        if isinstance(described, bytes):
            messages.append(described)
        else:
            body, buffers, of = described
            taken, of_messages.fds = of_messages.fds[: len(of)], of_messages.fds[len(of) :]
            messages.append(Parcel(body, [bytearray(one) for one in buffers], of, taken))
    receiver._open_link().inlet.put_back(*messages)
    return receiver


@_codec.rebuilds
def _rebuild_receiver(
    name: str, typed: tuple[Any, int] | None, opaque: bool, waiting: list[Any], kinds: bytes, fds: list[int]
) -> ReceiverBase[Any] | OpaqueReceiver:
    receiver = attach(_origin(name, typed, fds).make, waiting, kinds, fds)
    return receiver.to_opaque() if opaque else receiver


_codec.register(Sender, _pack_sender)
_codec.register(BytesSender, _pack_sender)
_codec.register(OpaqueSender, _pack_sender)
_codec.register(Receiver, pack_receiver)
_codec.register(BytesReceiver, pack_receiver)
_codec.register(OpaqueReceiver, pack_receiver)
