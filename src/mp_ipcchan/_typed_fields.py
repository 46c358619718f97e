"""What may stand in a typed message beside data: endpoints, files, shared memory.

The type says what stands where, and a peer only which descriptor it is; of that nothing is believed
but what was checked: its kind, that it is a socket or memory as ours are, and what it brings along.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from . import _codec
from ._channel import attach, copying_handle, detach, sending_link
from ._fd import Fd, FdHandle
from ._message import KNOWN_KINDS, MAX_BUFFERS, PACKET_SIZE, PLAIN, Handle, HandleKind, release_all
from ._receiver import BytesReceiver, Receiver
from ._segments import _shared_memory
from ._segments._shared_memory import SharedMemory
from ._sender import BytesSender, Sender
from ._typed_codec import TypedCodec, register
from .errors import ProtocolError


class _Field:
    """A class that has no argument."""

    def __init__(self, cls: type[Any]) -> None:
        self._cls = cls

    def check(self, obj: Any, of: TypedCodec | None) -> None:
        if type(obj) is not self._cls:
            raise TypeError(f"expected {self._cls.__name__}, got {type(obj).__name__}")
        self._check_argument(obj, of)

    def _check_argument(self, obj: Any, of: TypedCodec | None) -> None:
        pass


def _check_channel(obj: Sender[Any] | Receiver[Any], of: TypedCodec | None) -> None:
    """Raise ``TypeError`` where ``obj`` is of a channel for other messages than those of ``of``."""
    expected = "of pickles" if of is None else f"of {of.type!r}"
    typed = obj._typed
    found = "of pickles" if typed is None else f"of {typed.type!r}"
    if (of is None) != (typed is None) or (of is not None and typed is not None and of.type != typed.type):
        raise TypeError(f"expected the {type(obj).__name__} of a channel {expected}, got that of one {found}")


def _expect_nothing(payload: Any, fds: list[int]) -> None:
    if payload is not None:
        release_all(fds)
        raise ProtocolError("an endpoint arrived with something that it doesn't have")


class _SenderField(_Field):
    def _check_argument(self, obj: Any, of: TypedCodec | None) -> None:
        if self._cls is Sender:
            _check_channel(obj, of)

    def pack(self, obj: Any) -> tuple[object, Sequence[Handle]]:
        return None, [copying_handle(obj)]

    def rebuild(self, payload: Any, of: TypedCodec | None, kinds: bytes, fds: list[int]) -> Any:
        _expect_nothing(payload, fds)
        link = sending_link(kinds, fds)
        return Sender(link, of) if self._cls is Sender else self._cls(link)


class _ReceiverField(_Field):
    def _check_argument(self, obj: Any, of: TypedCodec | None) -> None:
        if self._cls is Receiver:
            _check_channel(obj, of)

    def pack(self, obj: Any) -> tuple[object, Sequence[Handle]]:
        return detach(obj)

    def rebuild(self, payload: Any, of: TypedCodec | None, kinds: bytes, fds: list[int]) -> Any:
        try:
            waiting = _check_waiting(payload)
        except BaseException:
            release_all(fds)
            raise
        make = functools.partial(Receiver, typed=of) if self._cls is Receiver else self._cls
        return attach(make, waiting, kinds, fds)


def _check_waiting(payload: Any) -> list[Any]:
    """What a stranger says that waits in a receiver, if it could: ``_channel.attach`` believes it."""
    import msgspec

    try:
        waiting = msgspec.convert(payload, list[bytes | tuple[bytes, list[bytes], bytes]])
    except msgspec.ValidationError as error:
        raise ProtocolError(f"a receiver arrived with something else than messages in it: {error}") from error
    for one in waiting:
        if isinstance(one, bytes):
            sound = one.startswith(PLAIN) and len(one) <= PACKET_SIZE
        else:
            sound = KNOWN_KINDS.issuperset(one[2]) and len(one[1]) <= MAX_BUFFERS
        if not sound:
            raise ProtocolError("a receiver arrived with messages in it that no peer of ours sends")
    return waiting


class _FdField(_Field):
    def pack(self, obj: Any) -> tuple[object, Sequence[Handle]]:
        return None, [FdHandle(HandleKind.FILE, obj.fileno())]

    def rebuild(self, payload: Any, _of: TypedCodec | None, kinds: bytes, fds: list[int]) -> Any:
        _expect_nothing(payload, fds)
        (fd,) = _codec.expect((HandleKind.FILE,), kinds, fds)
        return Fd._own(fd)


class _MemoryField(_Field):
    def pack(self, obj: Any) -> tuple[object, Sequence[Handle]]:
        return None, _shared_memory.pack(obj)

    def rebuild(self, payload: Any, _of: TypedCodec | None, kinds: bytes, fds: list[int]) -> Any:
        _expect_nothing(payload, fds)
        return _shared_memory.rebuild(kinds, fds)


register(Sender, _SenderField(Sender))
register(BytesSender, _SenderField(BytesSender))
register(Receiver, _ReceiverField(Receiver))
register(BytesReceiver, _ReceiverField(BytesReceiver))
register(Fd, _FdField(Fd))
register(SharedMemory, _MemoryField(SharedMemory))
