"""Senders: objects, or bytes, to messages, and these to the kernel or the backlog."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from . import _async, _codec
from ._backlog import PACK_SIZE
from ._deadline import deadline_in
from ._endpoint import Endpoint
from ._interrupt import raised_by_handler
from ._link import Link
from ._message import INLINE_SIZE, PLAIN, HandleKind, Message, Outgoing
from ._opaque import OpaqueSender, Origin
from ._outlet import LARGE
from ._transport.unix import SEND_FLAGS
from ._typed_codec import TypedCodec
from .errors import EndpointClosed, EndpointMoved, Full, ReceiverGone, SerializationError

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

T_contra = TypeVar("T_contra", contravariant=True)


class SenderBase(Endpoint, Generic[T_contra]):
    __slots__ = ()

    #: Makes the message for an object.
    _encode: Callable[[Any], Outgoing]
    _typed: TypedCodec | None = None

    def _report(self, obj: T_contra, error: Exception) -> None:
        """Raise what an object that can't be encoded is to raise, if not ``error`` itself."""

    def _message(self, obj: T_contra) -> Outgoing:
        try:
            item = self._encode(obj)
        except Exception as error:
            self._report(obj, error)
            raise
        if isinstance(item, Message):
            self._check_way(item)
        return item

    def _check_way(self, message: Message) -> None:
        """Refuse what brings this very channel's receiver: there would be none left to receive it."""
        link = self._link
        for handle in message.handles:
            if handle.kind is HandleKind.RECEIVER and link and link.leads_to(getattr(handle, "end", None)):
                message.unsent()
                raise SerializationError("can't send a receiver through its own channel: nobody could receive it then")

    def send(self, obj: T_contra, timeout: float | None = None) -> None:
        """Send ``obj``; without ``timeout`` this never waits for the receiver, however far behind it is.

        With ``timeout`` (seconds) it waits until the kernel takes the message, and raises ``Full``
        if that doesn't happen in time; nothing was sent then. Safe from several threads. Raises
        ``ReceiverGone``; ``SerializationError`` (nothing was sent, the channel goes on);
        ``EndpointMoved`` and ``EndpointClosed``, for this endpoint or one in ``obj``.
        """
        outlet = (self._link or self._open_link()).outlet
        try:
            item = self._encode(obj)
        except Exception as error:
            self._report(obj, error)
            raise
        try:
            if timeout is None:
                if item.__class__ is not bytes:
                    self._check_way(item)  # type: ignore[arg-type]
                    outlet.send(item)
                    return
                size = len(item)
                backlog = outlet.backlog
                if not backlog:
                    # The usual case, without further calls.
                    try:
                        outlet.send_raw(item, SEND_FLAGS)
                    except BlockingIOError:
                        outlet.send(item)
                elif size < outlet.room and outlet.open_ended and backlog:
                    # Somebody is about to send what waits, and will find this behind it: there is no call, and no
                    # jump, since it was seen to wait (again), so no other thread has taken it away meanwhile.
                    outlet.room -= size
                    backlog.append(item)
                elif size < LARGE:
                    outlet.defer(item)
                else:
                    outlet.send(item)
                return
            if item.__class__ is not bytes:
                self._check_way(item)  # type: ignore[arg-type]
            sent = outlet.send_by(item, deadline_in(timeout))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ReceiverGone(error.errno, "the receiver is gone") from error
        if not sent:
            raise Full(f"the receiver has not made room within {timeout} seconds; nothing was sent")

    def try_send(self, obj: T_contra) -> None:
        """Send ``obj`` if the kernel takes it now, else raise ``Full``; otherwise as ``send``."""
        outlet = self._open_link().outlet
        try:
            # What waits may only be the rest of a burst.
            outlet.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ReceiverGone(error.errno, "the receiver is gone") from error
        item = self._message(obj)
        try:
            sent = outlet.try_send(item)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ReceiverGone(error.errno, "the receiver is gone") from error
        if not sent:
            if isinstance(item, Message):
                item.unsent()
            raise Full("the kernel can't take the message now; nothing was sent")

    def send_many(self, objs: Iterable[T_contra]) -> None:
        """Send each of ``objs`` as a message of its own, in order, in as few packets as they fit.

        Raises what ``send`` raises; the messages before the one that failed are sent.
        """
        outlet = self._open_link().outlet
        encode = self._encode
        batch: list[bytes] = []
        size = 0
        try:
            try:
                for obj in objs:
                    try:
                        item = encode(obj)
                    except Exception as error:
                        self._report(obj, error)
                        raise
                    plain = item.__class__ is bytes
                    size += len(item)
                    if size > PACK_SIZE or not plain:
                        # Forgotten first: where a signal's handler raises, it may have been sent.
                        full, batch, size = batch, [], len(item)
                        outlet.send_all(full)
                    if plain:
                        batch.append(item)  # type: ignore[arg-type]
                    else:
                        self._check_way(item)  # type: ignore[arg-type]
                        outlet.send(item)
                        size = 0
            finally:
                outlet.send_all(batch)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ReceiverGone(error.errno, "the receiver is gone") from error

    async def send_async(self, obj: T_contra) -> None:
        """Send ``obj`` in a task of asyncio or trio once the kernel takes it, which may be when the receiver has read.

        Being cancelled, it sends nothing, and endpoints in ``obj`` still work. Raises what ``send`` does.
        """
        await _async.send(self._open_link, partial(self._message, obj))

    def clone(self) -> Self:
        """Another handle on the channel, to be closed by itself. Takes no descriptor."""
        return self._on(self._open_link().retain())

    def _on(self, link: Link) -> Self:
        """A sender like this one on ``link``, which is taken over."""
        return type(self)(link)

    def __copy__(self) -> Self:
        return self.clone()

    def to_opaque(self) -> OpaqueSender:
        """The same handle, without what it says of its messages; this one has moved then."""
        return OpaqueSender(self._give_up(), Origin(type(self), self._typed))


@final
class Sender(SenderBase[T_contra]):
    """The sending end of a channel. Sent in a message, it is copied."""

    __slots__ = ("_encode", "_typed")

    def __init__(self, link: Link = None, typed: TypedCodec | None = None) -> None:  # type: ignore[assignment]
        super().__init__(link)
        #: Of a typed channel, what encodes its messages; else they are pickles.
        self._typed = typed
        if typed is None:
            self._encode = _codec.encode
        else:
            self._encode = typed.encode
            # The reader may be anybody: it must not see what a segment holds next.
            link.outlet.segments.recycles = False

    def _on(self, link: Link) -> Self:
        return type(self)(link, self._typed)

    def _report(self, obj: T_contra, error: Exception) -> None:
        if not isinstance(error, (EndpointMoved, EndpointClosed)) and not raised_by_handler(error):
            raise SerializationError(f"can't serialize {type(obj).__name__!r} object: {error}") from error


def encode_bytes(buffer: Buffer) -> Outgoing:
    """The message that carries the bytes of ``buffer`` (any contiguous buffer, any item size)."""
    view = memoryview(buffer)
    if not view.nbytes:
        # An object of its own: a backlog tells its items apart by identity.
        return bytes(bytearray(PLAIN))
    if view.nbytes <= INLINE_SIZE:
        return PLAIN + view.tobytes()
    return Message([view.cast("B") if view.c_contiguous else view.tobytes()])


@final
class BytesSender(SenderBase["Buffer"]):
    """The sending end of a channel of buffers, which are sent as they are."""

    __slots__ = ()

    _encode = staticmethod(encode_bytes)
