"""A name at which processes that don't know each other meet: OneShotServer and connect.

The name is the path of a socket in a directory that only this user may enter. It serves one client:
whoever comes first is accepted, the listening socket closes and the name is gone.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import struct
import tempfile
import weakref
from typing import Any

from typing_extensions import Self

from ._deadline import deadline_in, remaining, wait_for
from ._link import Link
from ._message import CHANNEL_BUFFER
from ._receiver import Receiver
from ._sender import Sender
from ._transport import unix
from .errors import Empty, EndpointClosed

#: The longest path of a socket (bytes): sun_path holds 108, with the zero behind it.
_LONGEST_PATH = 107
_CREDENTIALS = struct.Struct("3i")
_TIMEVAL = struct.Struct("ll")


class OneShotServer:
    """Accepts one client, anybody of this user who calls ``connect(server.name)``.

    Closing it, or leaving its ``with`` block, removes the name.
    """

    def __init__(self) -> None:
        self._directory = _private_directory()
        self.name: str = os.path.join(self._directory, "socket")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._remove = weakref.finalize(self, _remove, self._listener, self._directory, os.getpid())
        try:
            unix.prepare(self._listener, CHANNEL_BUFFER)
            self._listener.bind(self.name)
            self._listener.listen(8)
        except BaseException:
            self.close()
            raise

    def accept(self, timeout: float | None = None) -> tuple[Receiver[Any], Any]:
        """Wait for the client and its first message: ``(receiver, message)``. The server is closed then.

        Raises ``Empty`` when nobody has come and said something within ``timeout`` seconds (a client
        that was accepted stays accepted: call again), ``Disconnected`` where the client leaves
        without a word, ``EndpointClosed`` the second time.
        """
        deadline = deadline_in(timeout)
        receiver = self._client or self._accept(deadline)
        self._client = receiver
        message = receiver.recv(remaining(deadline))
        self._client = None
        return receiver, message

    _client: Receiver[Any] | None = None

    def _accept(self, deadline: float | None) -> Receiver[Any]:
        while True:
            if self.closed:
                raise EndpointClosed("this server is closed, or has accepted its one client")
            if not wait_for(self._listener.fileno(), select.POLLIN, deadline):
                raise Empty(f"nobody has connected to {self.name}")
            client, _ = self._listener.accept()
            if _peer_is_friend(client):
                break
            client.close()
        self.close()
        unix.prepare(client, CHANNEL_BUFFER)
        return Receiver(Link.of(client))

    @property
    def closed(self) -> bool:
        return not self._remove.alive

    def close(self) -> None:
        """Stop listening, remove the name, and drop a client that ``accept`` hasn't returned; may be called twice."""
        self._remove()
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<mp_ipcchan.OneShotServer {'closed' if self.closed else self.name}>"


def _private_directory() -> str:
    directory = tempfile.mkdtemp(prefix=f"ipcchan-{os.getpid()}-")
    if len(os.fsencode(directory)) + len("/socket") > _LONGEST_PATH:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix=f"ipcchan-{os.getpid()}-", dir="/tmp")
    return directory


def _remove(listener: socket.socket, directory: str, owner: int) -> None:
    listener.close()
    if os.getpid() == owner:  # a forked child must not take the parent's name away
        shutil.rmtree(directory, ignore_errors=True)


def _peer_is_friend(client: socket.socket) -> bool:
    _, uid, _ = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(uid == os.geteuid())


def connect(name: str, timeout: float | None = None) -> Sender[Any]:
    """A sender to the server of that name.

    Raises ``FileNotFoundError`` or ``ConnectionRefusedError`` where nobody serves it (any more),
    ``TimeoutError`` where the server has not taken the connection within ``timeout`` seconds.
    """
    if len(os.fsencode(name)) > _LONGEST_PATH:
        raise OSError(f"a server's name has at most {_LONGEST_PATH} bytes, this one has {len(os.fsencode(name))}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        unix.prepare(sock, CHANNEL_BUFFER)
        if timeout is not None:
            # The kernel's own limit: a non-blocking connect would fail at once on a full queue.
            seconds = max(timeout, 0.000001)
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1_000_000))
            )
        try:
            sock.connect(name)
        except BlockingIOError as error:
            raise TimeoutError(f"{name} has not accepted a connection within {timeout} seconds") from error
        except OSError as error:
            reason = f"{error.strerror}: nobody serves this name, or its one client has come already"
            raise type(error)(error.errno, reason, name) from error
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except BaseException:
        sock.close()
        raise
    link = Link.of(sock)
    link.outlet.packs = True
    return Sender(link)
