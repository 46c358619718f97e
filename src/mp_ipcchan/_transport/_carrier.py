"""A carrier: descriptors waiting in a socket, which is itself sent as one descriptor.

The kernel takes 253 descriptors in one packet. More are queued in a socket pair first, and the
end that they can be received from travels in their place. If nobody ever opens it, the kernel
closes what it holds.
"""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
from collections.abc import Sequence
from itertools import repeat
from typing import Any

from ..errors import ProtocolError

#: The most descriptors in one packet (SCM_MAX_FD in the Linux kernel).
MAX_IN_PACKET = 253

# A plain int: the socket module's flags are enums, whose operators cost more than a system call.
SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

_SPACE = socket.CMSG_SPACE(MAX_IN_PACKET * array.array("i").itemsize)
_BUFFER = 1 << 22


def send_rights(sock: socket.socket, frame: Sequence[bytes], fds: Sequence[int]) -> int:
    """Send one packet with references to ``fds``, now. Raises ``BlockingIOError`` or another ``OSError``.

    Not ``socket.send_fds``: up to 3.13 that takes flags and ignores them, so that it would wait.
    """
    return sock.sendmsg(frame, rights(fds), SEND_FLAGS)


def rights(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    """The ancillary data that brings references to ``fds``."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def load(fds: Sequence[int]) -> socket.socket:
    """A new carrier, the caller's to close, with references to ``fds``."""
    inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inner:
        inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        for first in range(0, len(fds), MAX_IN_PACKET):
            send_rights(inner, [b"c"], fds[first : first + MAX_IN_PACKET])
    return outer


def unload(fd: int, count: int) -> list[int]:
    """Take the ``count`` descriptors out of a carrier; ``fd`` stays the caller's.

    Raises ``NoRoom`` where this process may not open so many, and they are still in it; ``ProtocolError``
    where it holds another number. Nothing is left open then.
    """
    check_room(fd, count)
    fds: list[int] = []
    with _opened(os.dup(fd)) as carrier:
        try:
            while True:
                if len(fds) >= count:
                    break
                try:
                    _, ancillary, flags, _ = carrier.recvmsg(16, _SPACE, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                except OSError as error:
                    raise ProtocolError("a carrier holds too few descriptors") from error
                brought = descriptors_in(ancillary)
                fds += brought
                if flags & socket.MSG_CTRUNC:
                    raise too_many()
                if not brought:
                    # Its end; or a stranger, who might go on for ever.
                    raise ProtocolError("a carrier holds too few descriptors")
            if len(fds) != count:
                raise ProtocolError(f"a carrier holds {len(fds)} descriptors where {count} were announced")
        except BaseException:
            for got in fds:
                os.close(got)
            raise
    return fds


def _opened(fd: int) -> socket.socket:
    """The socket that ``fd`` is, which is taken over. ``ProtocolError`` where it isn't one."""
    try:
        return socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise ProtocolError("a message names a carrier, but its descriptor is something else") from error


def check_room(fd: int, count: int) -> None:
    """Raise ``NoRoom`` where this process may not open ``count`` descriptors more, and one for ``unload`` itself."""
    copies: list[int] = []
    try:
        copies.extend(map(os.dup, repeat(fd, count + 1)))
    except OSError as error:
        raise NoRoom from error
    finally:
        list(map(os.close, copies))


class Carrier:
    """A carrier that is loaded bit by bit; what was added together can be unloaded by itself."""

    def __init__(self) -> None:
        self._inner, self._outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self.count = 0

    def fileno(self) -> int:
        """The end that travels."""
        return self._outer.fileno()

    def add(self, fds: Sequence[int], label: bytes = b"c") -> bool:
        """Put references to ``fds`` in, at most ``MAX_IN_PACKET`` at a time; False where the carrier is full."""
        try:
            send_rights(self._inner, [label], fds)
        except BlockingIOError:
            return False
        self.count += len(fds)
        return True

    def detach(self) -> int:
        """Give away the end that travels; nothing can be added any more."""
        self._inner.close()
        return self._outer.detach()

    def close(self) -> None:
        self._inner.close()
        self._outer.close()

    @staticmethod
    def unload_all(fd: int) -> list[int]:
        """Everything in the carrier ``fd``, which is closed; its sender has added the last one already."""
        fds: list[int] = []
        with socket.socket(fileno=fd) as carrier:
            while True:
                try:
                    data, ancillary, flags, _ = carrier.recvmsg(
                        16, _SPACE, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                    )
                except BlockingIOError:
                    return fds
                if not data:
                    return fds
                if flags & socket.MSG_CTRUNC:
                    raise too_many()
                fds += descriptors_in(ancillary)


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a packet."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


class NoRoom(OSError):
    """This process may open too few descriptors for those that a message brings, which is still there."""

    def __init__(self) -> None:
        super().__init__(errno.EMFILE, f"{_too_few('it brings')}. The message is still there: {_advice()}")

    def __reduce__(self) -> Any:
        return OSError, self.args


def too_many() -> OSError:
    """What to raise when the kernel dropped descriptors that this process had no room for."""
    return OSError(errno.EMFILE, f"a message was lost: {_too_few('it brought')}; {_advice()}")


def _too_few(those: str) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process may have {soft} descriptors open, too few for those that {those}"


def _advice() -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"close some, or raise the limit (ulimit -n, at most {hard})"
