"""``Fd``: any open file, socket or pipe, sent along in a message."""

from __future__ import annotations

import os
from typing import IO, Any, Protocol, final

from . import _codec
from ._message import HandleKind
from .errors import EndpointClosed


class HasFileno(Protocol):
    def fileno(self) -> int: ...


@final
class Fd:
    """Owns one descriptor; sent in a message, the receiver gets an ``Fd`` on the same open file.

    Made from an ``int`` or anything with ``fileno()``, it owns a duplicate: the original stays the
    caller's. It travels by copy, so it can be used and sent again.
    """

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, file: HasFileno | int) -> None:
        self._fd = -1
        try:
            number = file if isinstance(file, int) else file.fileno()
        except AttributeError:
            raise TypeError(f"an Fd is made of an open file or the number of a descriptor, not of {file!r}") from None
        self._fd = os.dup(number)

    @classmethod
    def _own(cls, fd: int) -> Fd:
        owner = cls.__new__(cls)
        owner._fd = fd
        return owner

    def fileno(self) -> int:
        """The descriptor, still owned here. Raises ``EndpointClosed`` after ``close`` or ``detach``."""
        if self._fd < 0:
            raise EndpointClosed("this Fd is closed, or its descriptor was detached")
        return self._fd

    def detach(self) -> int:
        """Give the descriptor away: the caller closes it."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def open(self, mode: str = "rb", **options: Any) -> IO[Any]:
        """A file object, as the builtin ``open`` makes it, that owns the descriptor from here on."""
        return open(self.detach(), mode, **options)

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; closing twice does nothing."""
        # Forgotten before it is closed: the number is free for anybody from then on.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"<mp_ipcchan.Fd {'closed' if self._fd < 0 else self._fd}>"

    def __reduce__(self) -> Any:
        return _codec.refuse_bare_pickle(self)


class FdHandle:
    """A duplicate that a message owns: the user may close the original before a backlog is sent."""

    __slots__ = ("_fd", "kind")

    def __init__(self, kind: HandleKind, fd: int) -> None:
        self.kind = kind
        self._fd = Fd(fd)

    def fileno(self) -> int:
        return self._fd.fileno()

    def sent(self) -> None:
        self._fd.close()

    unsent = sent


@_codec.rebuilds
def _rebuild_fd(kinds: bytes, fds: list[int]) -> Fd:
    (fd,) = _codec.expect((HandleKind.FILE,), kinds, fds)
    return Fd._own(fd)


def _pack_fd(fd: Fd) -> _codec.Packed:
    return _rebuild_fd, (), [FdHandle(HandleKind.FILE, fd.fileno())]


_codec.register(Fd, _pack_fd)
