"""Endpoints: what a Sender and a Receiver have in common, a handle on a link."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from . import _codec
from ._link import Closable, Link
from ._message import MovingHandle
from .errors import EndpointClosed, EndpointMoved

if TYPE_CHECKING:
    from typing_extensions import Self

#: Every open sender, receiver and set of this process, for a forked child to close those it wasn't given.
endpoints: weakref.WeakSet[Closable] = weakref.WeakSet()
#: Those that were closed so in this process, whose user may wonder.
withheld: weakref.WeakSet[Closable] = weakref.WeakSet()


class Endpoint:
    """One handle on a link: closed by itself, and with it its use of the link."""

    __slots__ = ("__weakref__", "_link", "_moved")

    def __init__(self, link: Link = None) -> None:  # type: ignore[assignment]
        if not isinstance(link, Link):
            raise TypeError(
                f"a {type(self).__name__} is not made by hand: channel() and bytes_channel() make both ends of a "
                f"channel, connect() gives a Sender, a server's accept() a Receiver"
            )
        self._link: Link | None = link
        self._moved = False
        endpoints.add(self)

    def _open_link(self) -> Link:
        link = self._link
        if link is None:
            if self._moved:
                raise EndpointMoved(f"this {type(self).__name__} has moved: whoever has got it owns it now")
            why = (
                ": it was not passed to this process; give it to it when it starts (args=)" if self in withheld else ""
            )
            raise EndpointClosed(f"this {type(self).__name__} is closed{why}")
        return link

    def _give_up(self) -> Link:
        """Take the link out for another handle, which this one becomes."""
        link = self._open_link()
        self._link, self._moved = None, True
        return link

    def _moving(self) -> Sequence[MovingHandle]:
        """What must be told when this is given to a forked child."""
        lent = self._open_link().lend(self)
        return () if lent is None else (lent,)

    def close(self) -> None:
        """Give this handle up. Closing twice, or after a move, does nothing."""
        link = self._link
        if link is not None:
            link.let_go(self)

    @property
    def closed(self) -> bool:
        """Whether this handle can't be used any more: closed, or moved away."""
        return self._link is None

    def fileno(self) -> int:
        """The descriptor to ``poll``; it stays ours. Raises ``EndpointClosed`` or ``EndpointMoved``."""
        return self._open_link().fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_link", None) is not None:
            try:
                self.close()
            finally:
                if self._link is not None:
                    # A signal's handler has raised, which nobody hears of here.
                    self.close()

    def __repr__(self) -> str:
        link = self._link
        state = f"fd={link.fileno()}" if link is not None else "moved" if self._moved else "closed"
        return f"<mp_ipcchan.{type(self).__name__} {state}>"

    def __reduce__(self) -> Any:
        self._open_link()
        return _codec.refuse_bare_pickle(self)


class ReceivingEnd(Endpoint):
    """A receiving end, of whatever is received: there is one of a channel, so it moves and isn't copied."""

    __slots__ = ()

    def fileno(self) -> int:
        """A descriptor that is readable whenever there is a message, or the end of the stream."""
        return self._open_link().inlet.fileno()

    def __copy__(self) -> Self:
        raise TypeError(f"a {type(self).__name__} can't be copied: a channel has one receiver, which moves when sent")

    def __deepcopy__(self, memo: object) -> Self:
        return self.__copy__()

    def _claim(self) -> Link:
        """Take the link out, for a message or another owner; ``_restore`` or the link's ``release`` must follow."""
        link = self._open_link()
        turn = False
        try:
            # Acquired and noted in one C call: a signal's handler may raise behind it.
            [turn] = islice(link.inlet.turns, 1)
            if not turn:
                raise ValueError(f"another thread is receiving from this {type(self).__name__}: it can't be moved now")
            if link.inlet.receiving:
                raise ValueError(f"this {type(self).__name__} is being received from: it can't be moved now")
            self._link, self._moved = None, True
        finally:
            if turn:
                link.inlet.lock.release()
        return link

    def _restore(self, link: Link) -> None:
        self._link, self._moved = link, False
