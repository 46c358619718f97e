"""Channels: a Sender and a Receiver over one socket pair, and how these travel in messages.

A channel is a one-way FIFO with many senders and one receiver. A Sender that is sent is copied, a
Receiver that is sent moves, in two steps: packing it claims it, so that nobody else can use or send
it meanwhile; it is gone once the message has left, and restored if that fails.
"""

from __future__ import annotations

from typing import Any

from . import _codec
from ._link import Link, LinkHandle
from ._message import CHANNEL_BUFFER, Handle, HandleKind, Incoming, Parcel
from ._receiver import BytesReceiver, Receiver, ReceiverBase
from ._sender import BytesSender, Sender, SenderBase


def channel() -> tuple[Sender[Any], Receiver[Any]]:
    """A new channel: ``(sender, receiver)``. Raises ``OSError`` where no descriptors are left."""
    sending, receiving = _pair()
    return Sender(sending), Receiver(receiving)


def bytes_channel() -> tuple[BytesSender, BytesReceiver]:
    """A new channel for buffers, without serialization: ``(sender, receiver)``."""
    sending, receiving = _pair()
    return BytesSender(sending), BytesReceiver(receiving)


def _pair() -> tuple[Link, Link]:
    sending, receiving = Link.pair(CHANNEL_BUFFER)
    sending.outlet.packs = True
    return sending, receiving


_CLASSES: dict[str, type[Any]] = {cls.__name__: cls for cls in (Sender, BytesSender, Receiver, BytesReceiver)}


def _pack_sender(sender: SenderBase[Any]) -> _codec.Packed:
    return _rebuild_sender, (type(sender).__name__,), [LinkHandle(HandleKind.SENDER, sender._open_link())]


@_codec.rebuilds
def _rebuild_sender(name: str, kinds: bytes, fds: list[int]) -> object:
    (fd,) = _codec.expect((HandleKind.SENDER,), kinds, fds)
    link = Link.adopt(fd)
    link.outlet.packs = True
    return _CLASSES[name](link)


class _MovingHandle:
    """A receiver on its way: gone once the message has left, restored if it never does."""

    __slots__ = ("_link", "_receiver", "_waiting", "kind")

    def __init__(self, receiver: ReceiverBase[Any], link: Link, waiting: list[Incoming]) -> None:
        self.kind = HandleKind.RECEIVER
        self._receiver = receiver
        self._link = link
        self._waiting = waiting

    def fileno(self) -> int:
        return self._link.fileno()

    def sent(self) -> None:
        self._link.release()

    def unsent(self) -> None:
        self._link.inlet.put_back(*self._waiting)
        self._receiver._restore(self._link)


class _ParcelHandle:
    """A descriptor in a message that waits in a receiver which moves."""

    __slots__ = ("_fd", "_parcel", "kind")

    def __init__(self, parcel: Parcel, kind: int, fd: int) -> None:
        self.kind = HandleKind(kind)
        self._parcel = parcel
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def sent(self) -> None:
        self._parcel.close()

    def unsent(self) -> None:
        pass


def pack_receiver(receiver: ReceiverBase[Any]) -> _codec.Packed:
    link = receiver._claim()
    waiting: list[Incoming] = []
    handles: list[Handle] = [_MovingHandle(receiver, link, waiting)]
    described: list[object] = []
    try:
        waiting += link.inlet.unload()
        for message in waiting:
            if isinstance(message, bytes):
                described.append(message)
            else:
                described.append((bytes(message.body), [bytes(one) for one in message.buffers], message.kinds))
                handles += [
                    _ParcelHandle(message, *pair) for pair in zip(message.kinds, message.filenos(), strict=True)
                ]
    except BaseException:
        handles[0].unsent()
        raise
    return _rebuild_receiver, (type(receiver).__name__, described), handles


@_codec.rebuilds
def _rebuild_receiver(name: str, waiting: list[Any], kinds: bytes, fds: list[int]) -> object:
    _codec.expect((HandleKind.RECEIVER, *kinds[1:]), kinds, fds)
    receiver = _CLASSES[name](Link.adopt(fds[0]))
    messages: list[Incoming] = []
    at = 1
    for described in waiting:
        if isinstance(described, bytes):
            messages.append(described)
        else:
            body, buffers, of = described
            messages.append(Parcel(body, [bytearray(one) for one in buffers], of, fds[at : at + len(of)]))
            at += len(of)
    receiver._open_link().inlet.put_back(*messages)
    return receiver


_codec.register(Sender, _pack_sender)
_codec.register(BytesSender, _pack_sender)
_codec.register(Receiver, pack_receiver)
_codec.register(BytesReceiver, pack_receiver)
