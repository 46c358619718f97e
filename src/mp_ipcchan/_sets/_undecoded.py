"""Messages that were received and not decoded yet: whoever gets one decides whether it is worth it."""

from __future__ import annotations

from typing import Any, TypeVar, final, get_origin, overload

from .._delivery import Decoding, is_intact
from .._interrupt import raised_by_handler
from .._message import PLAIN_SIZE, Incoming, Parcel
from ..errors import EndpointClosed, SerializationError

T = TypeVar("T")
#: By another name, because a parameter has this.
_CLASS = type

#: How much of the data ``repr`` shows (bytes).
_SHOWN = 32


@final
class UndecodedMessage:
    """A message as it came. The descriptors in it are open until ``to`` or ``close``, or until this is dropped."""

    __slots__ = ("_decoding", "_error", "_incoming")

    def __init__(self, incoming: Incoming | None, decoding: Decoding, error: Exception | None = None) -> None:
        #: None once it was decoded or closed.
        self._incoming = incoming
        #: Decodes it as its receiver would have.
        self._decoding = decoding
        #: Stands for a message that could not be received.
        self._error = error

    @overload
    def to(self, type: None = None) -> Any: ...
    @overload
    def to(self, type: type[T]) -> T: ...
    def to(self, type: type[Any] | None = None) -> Any:  # noqa: A002  (the contract's name)
        """The object that was sent; what ``recv`` would have returned or raised. It can be had once.

        ``type``: what it is to be. Where the channel is for another type, ``TypeError``; the message is still there.
        Of a pickle, the class is checked: ``SerializationError`` where it is another, and the object is gone.
        Raises ``EndpointClosed`` the second time, and after ``close``.
        """
        of = self._decoding.of
        if type is not None and of is not None and type != of:
            raise TypeError(f"this message came through a channel of {of!r}, not of {type!r}")
        obj = self._decode()
        cls = get_origin(type) or type
        if of is None and isinstance(cls, _CLASS) and not isinstance(obj, cls):
            raise SerializationError(f"the message is a {obj.__class__.__name__!r}, not of {type!r}")
        return obj

    def _decode(self) -> Any:
        incoming = self._intact()
        decoded: list[Any] = []
        loads, decoder, report, _ = self._decoding
        try:
            self._incoming = None
            decoded.extend(map(loads, (incoming,)) if isinstance(incoming, bytes) else decoder(incoming))
        except BaseException as error:
            if isinstance(error, Exception) and not decoded and not raised_by_handler(error):
                report(error, incoming)
            elif is_intact(incoming):
                # A signal's handler raised: the next call decodes it.
                self._incoming = incoming
            raise
        return decoded[0]

    def _intact(self) -> Incoming:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._incoming is None:
            raise EndpointClosed("this message was decoded already, or closed")
        return self._incoming

    @property
    def data(self) -> bytes:
        """The bytes that would be decoded (a copy); large buffers that travel beside a pickle are not in them."""
        incoming = self._intact()
        return incoming[PLAIN_SIZE:] if isinstance(incoming, bytes) else bytes(incoming.body)

    @property
    def holds_descriptors(self) -> bool:
        """Whether descriptors may be open for it: of what it brings, or of the memory that it lies in."""
        return isinstance(self._incoming, Parcel)

    def close(self) -> None:
        """Drop the message, with the endpoints and files in it; their peers hear of it. Closing twice does nothing."""
        incoming, self._incoming = self._incoming, None
        self._error = None
        if isinstance(incoming, Parcel):
            incoming.close()

    def __repr__(self) -> str:
        incoming = self._incoming
        if incoming is None:
            return f"<mp_ipcchan.UndecodedMessage {'broken' if self._error else 'used up'}>"
        view = memoryview(incoming)[PLAIN_SIZE:] if isinstance(incoming, bytes) else memoryview(incoming.body)
        more = "..." if len(view) > _SHOWN else ""
        handles = len(incoming.kinds) if isinstance(incoming, Parcel) else 0
        carries = f" and {handles} descriptors" if handles else ""
        return f"<mp_ipcchan.UndecodedMessage {len(view)} bytes{carries}: {bytes(view[:_SHOWN])!r}{more}>"
