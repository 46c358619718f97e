"""connect: how a process that was told a name meets the server that has it."""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
from typing import Any, TypeVar, overload

from .._deadline import deadline_in, remaining
from .._endpoint import Endpoint
from .._link import Link
from .._message import CHANNEL_BUFFER
from .._sender import Sender
from .._transport import unix
from .._typed_codec import codec_for
from ._address import address_of, is_abstract, is_one_shot
from ._peer import Admission, Allow, Peer, peer_at

T = TypeVar("T")

_TIMEVAL = struct.Struct("ll")

#: What is wrong, where the kernel's word for it doesn't tell.
_REASONS = {
    errno.ENOENT: "nobody serves this name (any more)",
    errno.ECONNREFUSED: "nobody serves this name (any more)",
    errno.EACCES: "this user may not connect to it",
    errno.EPROTOTYPE: "another kind of socket has this name",
}


@overload
def connect(
    name: str | os.PathLike[str], timeout: float | None = None, *, allow: Allow = None, type: None = None
) -> Sender[Any]: ...
@overload
def connect(
    name: str | os.PathLike[str], timeout: float | None = None, *, allow: Allow = None, type: type[T]
) -> Sender[T]: ...
@overload
def connect(
    name: str | os.PathLike[str], timeout: float | None = None, *, allow: Allow = None, type: Any
) -> Sender[Any]: ...
def connect(
    name: str | os.PathLike[str],
    timeout: float | None = None,
    *,
    allow: Allow = None,
    type: Any = None,  # noqa: A002  (as of ``channel``)
) -> Sender[Any]:
    """A sender to the server of that name. It waits while the server's queue is full. ``type``: the server's, if any.

    Raises ``FileNotFoundError`` or ``ConnectionRefusedError`` where nobody serves it (any more), or its one client
    has come already, ``PermissionError`` where this user may not connect, ``TimeoutError`` where the server has
    not made room within ``timeout`` seconds. Where the server refuses this client, sending raises ``ReceiverGone``.

    An abstract name ("@...") can be taken by anybody while it is free, so the server must be of this user or
    root's, unless ``allow`` (uids, or a function of pid, uid and gid) admits others; for a path, whoever may write to
    its directory decides, unless ``allow`` is given. ``PermissionError`` tells who it is.
    """
    typed = codec_for(type)
    name = os.fspath(name)
    address = address_of(name)
    sock = unix.make_socket()
    try:
        unix.prepare(sock, CHANNEL_BUFFER)
        one_shot = is_one_shot(name)
        try:
            connected = _connect_at_once(sock, address) if one_shot else _connect(sock, address, timeout)
        except OSError as error:
            reason = _REASONS.get(error.errno or 0, "this is no server's name")
            raise error.__class__(error.errno, f"{error.strerror}: {reason}", name) from error
        if not connected and one_shot:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the one client of this server has come already", name)
        if not connected:
            raise TimeoutError(errno.ETIMEDOUT, f"no room for a client within {timeout} seconds", name)
        if allow is not None or is_abstract(name):
            _check_server(sock, name, allow)
    except BaseException:
        sock.close()
        raise
    # A socket so new has no link yet.
    link = Link(sock, os.fstat(sock.fileno()).st_ino)
    link.outlet.packs = True
    return Sender(link, typed)


def _connect_at_once(sock: socket.socket, address: bytes) -> bool:
    """Connect if there is room now."""
    sock.setblocking(False)
    try:
        sock.connect(address)
    except BlockingIOError:
        return False
    finally:
        sock.setblocking(True)
    return True


def _connect(sock: socket.socket, address: bytes, timeout: float | None) -> bool:
    """Connect, and wait for room; False where there was none in time."""
    deadline = deadline_in(timeout)
    try:
        while True:
            left = remaining(deadline)
            if left == 0:
                # The kernel's limit is in its ticks: signals that come more often would never let one pass.
                return _connect_at_once(sock, address)
            if left is not None:
                # A connect that doesn't block fails at once, and nothing tells when to try again.
                _limit_waits(sock, left)
            try:
                sock.connect(address)
            except BlockingIOError:
                return False
            # A signal ends the kernel's waiting, and Python takes that for a connection.
            if _is_connected(sock):
                return True
    finally:
        if timeout is not None:
            _limit_waits(sock, 0)


def _limit_waits(sock: socket.socket, seconds: float) -> None:
    """Let the kernel wait no longer in sending calls, ``connect`` among them; 0 for no limit."""
    whole, fraction = divmod(min(seconds, 2**31), 1)
    microseconds = min(math.ceil(fraction * 1e6), 999_999)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(whole), microseconds))


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return False
        raise
    return True


def _check_server(sock: socket.socket, name: str, allow: Allow) -> None:
    peer = peer_at(sock)
    if not Admission(allow).admits(peer) and not (allow is None and peer.uid == 0):
        reason = f"uid {peer.uid} (pid {peer.pid}) serves this name; if that is right, say so with allow="
        raise PermissionError(errno.EPERM, reason, name)


def peer_of(endpoint: Endpoint) -> Peer:
    """Who connected: of a receiver that ``accept`` returned, the client; of what ``connect`` returned, the server.

    Of an end of a channel that was not made so, the process that made it.
    """
    if not isinstance(endpoint, Endpoint):
        raise TypeError(f"peer_of takes a Sender or a Receiver, not {endpoint!r}")
    return peer_at(endpoint._open_link().sock)
