"""Receivers: messages from the kernel, and these to objects, or bytes."""

from __future__ import annotations

import operator
import pickle
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar, final

from . import _async, _codec
from ._deadline import deadline_in
from ._delivery import Decoding, Delivery
from ._endpoint import ReceivingEnd
from ._inlet import EndOfStream
from ._link import Link
from ._message import PLAIN_SIZE, Incoming, Parcel
from ._opaque import OpaqueReceiver, Origin
from ._typed_codec import TypedCodec
from .errors import Disconnected, Empty, ProtocolError, SerializationError

T_co = TypeVar("T_co", covariant=True)


class ReceiverBase(Delivery, ReceivingEnd, Generic[T_co]):
    __slots__ = ()

    _typed: TypedCodec | None = None

    def recv(self, timeout: float | None = None) -> T_co:
        """The next message; waits for it, at most ``timeout`` seconds.

        Raises ``Disconnected`` once every sender is gone and everything they sent was received,
        ``Empty`` when the time is over, ``SerializationError`` for a message that can't be decoded
        (it is gone, the channel goes on), ``ProtocolError`` for a packet that is none of ours.
        """
        inlet = (self._link or self._open_link()).inlet
        ready = inlet.ready
        if ready and inlet.waker is None:
            # Came packed with others. Nothing is called between this look and ``popleft``, which takes ``first``.
            first = ready[0]
            if first.__class__ is bytes:
                try:
                    obj = self._loads(ready.popleft())  # type: ignore[arg-type]
                except BaseException as error:
                    try:
                        undecodable = self._is_undecodable(inlet, first, error, True)
                    except BaseException:
                        # Another signal's handler, before anything was done.
                        undecodable = self._is_undecodable(inlet, first, error, True)
                    if undecodable:
                        self._report(error, first)  # type: ignore[arg-type]
                    raise
                return obj  # type: ignore[no-any-return]
        deadline = None if timeout is None else deadline_in(timeout)
        return self._deliver(inlet, True, True, deadline, True)  # type: ignore[no-any-return]

    def try_recv(self) -> T_co:
        """The next message, if there is one now, else ``Empty``; otherwise as ``recv``."""
        return self._deliver(self._open_link().inlet, True, False, None, True)  # type: ignore[no-any-return]

    def recv_many(self, max_items: int, timeout: float | None = None) -> list[T_co]:
        """Wait for a message as ``recv`` does, and return it with those that are there, 1 to ``max_items``."""
        most = min(operator.index(max_items), sys.maxsize)
        if most < 1:
            raise ValueError(f"max_items must be at least 1, not {max_items}")
        return self._deliver_many(self._open_link().inlet, most, deadline_in(timeout), True)

    def __iter__(self) -> Iterator[T_co]:
        """Receive until every sender is gone."""
        while True:
            try:
                yield self.recv()
            except Disconnected:
                return

    async def recv_async(self) -> T_co:
        """The next message, awaited in a task of asyncio or trio. Being cancelled loses no message.

        Raises what ``recv`` does. Any number of tasks may wait for one receiver.
        """
        return await _async.receive(self)

    def __aiter__(self) -> AsyncIterator[T_co]:
        """Receive in a task of asyncio or trio, until every sender is gone."""
        return _async.Messages(self)

    def _take(self, block: bool, deadline: float | None) -> Incoming:
        inlet = self._open_link().inlet
        while True:
            try:
                return inlet.take_message(block and deadline is None)
            except BlockingIOError:
                if not block or not inlet.await_readable(deadline):
                    raise Empty("there is no message") from None
            except EndOfStream:
                raise Disconnected("every sender is gone, and all messages have been received") from None

    def _report(self, error: Exception, incoming: Incoming) -> None:
        super()._report(error, incoming)
        if isinstance(error, (ProtocolError, MemoryError)):
            return
        why = ""
        if self._typed is None and not _codec.is_pickle(incoming):
            why = " (it is no pickle: has only its sender's end of the channel a type?)"
        elif self._typed is not None and _codec.is_pickle(incoming):
            why = " (it is a pickle: only this end of the channel has a type)"
        raise SerializationError(f"can't decode a message{why}: {error}") from error

    def to_opaque(self) -> OpaqueReceiver:
        """The same end, without what it says of its messages; this handle has moved then."""
        return OpaqueReceiver(self._claim(), Origin(type(self), self._typed), self._decoding)


@final
class Receiver(ReceiverBase[T_co]):
    """The receiving end of a channel. Sent in a message, it moves, with all that waits in it.

    One thread receives at a time; others wait for their turn.
    """

    __slots__ = ("_decoder", "_loads", "_typed")

    def __init__(self, link: Link = None, typed: TypedCodec | None = None) -> None:  # type: ignore[assignment]
        super().__init__(link)
        #: Of a typed channel, what decodes its messages; else they are pickles.
        self._typed = typed
        if typed is None:
            self._loads, self._decoder = pickle.loads, _codec.decoder
        else:
            self._loads, self._decoder = typed.loads, typed.decoder
            link.inlet.largest = typed.max_size

    @property
    def _decoding(self) -> Decoding:
        typed = self._typed
        return Decoding(self._loads, self._decoder, self._report, None if typed is None else typed.type)


@final
class BytesReceiver(ReceiverBase[bytes]):
    """The receiving end of a channel of buffers."""

    __slots__ = ()

    _loads = operator.itemgetter(slice(PLAIN_SIZE, None))

    @staticmethod
    def _decoder(parcel: Parcel) -> Iterator[bytes]:
        return map(bytes, (view_bytes(parcel),))

    def recv_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> int:
        """Receive a message into the start of a writable ``buffer``; how many bytes it has.

        Raises ``ValueError`` where the message is larger than the buffer; it is still there then.
        """
        deadline = deadline_in(timeout)
        target = memoryview(buffer).cast("B")

        def copy(incoming: Incoming) -> int:
            source = view_bytes(incoming)
            if len(source) > len(target):
                raise ValueError(f"a message of {len(source)} bytes doesn't fit a buffer of {len(target)}; still there")
            target[: len(source)] = source
            return len(source)

        return self._deliver_by(self._open_link().inlet, copy, deadline, True)


def view_bytes(incoming: Incoming) -> memoryview:
    """The bytes that ``encode_bytes`` was given, uncopied."""
    if isinstance(incoming, bytes):
        return memoryview(incoming)[PLAIN_SIZE:]
    if incoming.kinds or incoming.buffers:
        incoming.close()
        raise ProtocolError("a message that carries objects beside its bytes can't be received as bytes")
    return memoryview(incoming.body)
