"""Opaque endpoints: a channel's ends that don't say what goes through, for who only passes them on.

They can be sent, closed and, receivers, be members of a ReceiverSet; ``to`` makes them what they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, final, overload

from ._delivery import Decoding
from ._endpoint import Endpoint, ReceivingEnd
from ._link import Link
from ._typed_codec import TypedCodec

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._receiver import Receiver
    from ._sender import Sender

T = TypeVar("T")


class Origin(NamedTuple):
    """What an endpoint is, or was: its class, and the codec where its channel is typed."""

    cls: type[Any]
    typed: TypedCodec | None = None

    def make(self, link: Link) -> Any:
        return self.cls(link) if self.typed is None else self.cls(link, self.typed)

    def check(self, wanted: Any) -> None:
        """Raise ``TypeError`` where it is of a channel for messages of another type than ``wanted``."""
        if wanted is not None and self.typed is not None and wanted != self.typed.type:
            raise TypeError(f"this end is of a channel of {self.typed.type!r}, not of {wanted!r}")


@final
class OpaqueSender(Endpoint):
    """A sending end that can be cloned, sent (by copy) and closed, not sent through: ``to()`` first."""

    __slots__ = ("_origin",)

    def __init__(self, link: Link, origin: Origin) -> None:
        super().__init__(link)
        #: What this was made of.
        self._origin = origin

    @overload
    def to(self, type: None = None) -> Any: ...
    @overload
    def to(self, type: type[T]) -> Sender[T]: ...
    def to(self, type: type[Any] | None = None) -> Any:  # noqa: A002  (the contract's name)
        """The sender that this was made of, a ``Sender`` or ``BytesSender``; this handle has moved then.

        ``type``: what messages are to be. ``TypeError`` where the channel is for another type; where it is for pickles,
        it is a note for the type checker.
        """
        self._origin.check(type)
        return self._origin.make(self._give_up())

    def clone(self) -> Self:
        """Another handle on the channel, to be closed by itself. Takes no descriptor."""
        return self.__class__(self._open_link().retain(), self._origin)

    def __copy__(self) -> Self:
        return self.clone()


@final
class OpaqueReceiver(ReceivingEnd):
    """A receiving end that can be sent (it moves), added to a ReceiverSet and closed: to receive, ``to()`` first."""

    __slots__ = ("_decoding", "_origin")

    def __init__(self, link: Link, origin: Origin, decoding: Decoding) -> None:
        super().__init__(link)
        self._origin = origin
        #: How what it was made of decodes messages.
        self._decoding = decoding

    @overload
    def to(self, type: None = None) -> Any: ...
    @overload
    def to(self, type: type[T]) -> Receiver[T]: ...
    def to(self, type: type[Any] | None = None) -> Any:  # noqa: A002
        """The receiver that this was made of, a ``Receiver`` or ``BytesReceiver``; this handle has moved then.

        ``type`` as in ``OpaqueSender.to``.
        """
        self._origin.check(type)
        return self._origin.make(self._claim())
