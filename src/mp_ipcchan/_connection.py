"""Pipe and its connections: the stdlib's surface over one packet a message.

A connection is a link and says what it may do with it. Unlike a Sender it blocks when the peer
doesn't read: programs rely on that, and on a message being ahead of every later one of any process
once ``send`` has returned, which rules out a backlog.
"""

from __future__ import annotations

import errno
import io
from multiprocessing import connection as stdlib
from typing import TYPE_CHECKING, Any, NoReturn

from . import _codec
from ._deadline import deadline_in
from ._delivery import Delivery
from ._inlet import EndOfStream
from ._link import Link, LinkHandle
from ._message import HandleKind, Incoming, Outgoing
from ._receiver import view_bytes
from ._sender import encode_bytes
from ._transport.unix import MSG_NOSIGNAL, PIPE_BUFFER


class Connection(Delivery, stdlib.Connection):
    """One end of ``Pipe()``. Behaves as ``multiprocessing.connection.Connection``, which documents its methods.

    Sent in a message, or passed to a process, it is copied.
    """

    if TYPE_CHECKING:
        # Of the base class; the stubs leave them out.
        _handle: int | None
        _readable: bool
        _writable: bool

        def _check_closed(self) -> None: ...
        def _check_readable(self) -> None: ...
        def _check_writable(self) -> None: ...
        def _bad_message_length(self) -> NoReturn: ...

    def __init__(self, link: Link, readable: bool = True, writable: bool = True) -> None:
        # The base class keeps the number for its checks; the link owns the descriptor.
        super().__init__(link.fileno(), readable, writable)
        self._link = link

    def _close(self) -> None:
        self._link.release()

    def __reduce__(self) -> Any:
        self._check_closed()
        return _codec.refuse_bare_pickle(self)

    # -- sending ---------------------------------------------------------------------------

    def send(self, obj: object) -> None:
        """Send a picklable object; blocks while the peer doesn't read and the pipe is full."""
        if self._handle is None or not self._writable:
            self._check_closed()
            self._check_writable()
        item = _codec.encode(obj)
        outlet = self._link.outlet
        if item.__class__ is bytes and not outlet.backlog:
            # The usual case, without further calls; it waits in the system call.
            try:
                outlet.send_raw(item, MSG_NOSIGNAL)
                return
            except BlockingIOError:  # somebody has made the socket non-blocking
                pass
            except ConnectionResetError as error:
                self._report_closed(error)
        self._send(item)

    def _send_bytes(self, buf: memoryview) -> None:
        self._send(encode_bytes(buf))

    def _send(self, item: Outgoing) -> None:
        try:
            self._link.outlet.send_now(item)
        except ConnectionResetError as error:
            self._report_closed(error)

    def _report_closed(self, error: ConnectionResetError) -> NoReturn:
        # The peer closed with messages unread; to the caller that is no different.
        raise BrokenPipeError(errno.EPIPE, "the other end is closed") from error

    # -- receiving -------------------------------------------------------------------------

    def recv(self) -> Any:
        """Receive an object; ``EOFError`` when the other end is closed and everything was received."""
        if self._handle is None or not self._readable:
            self._check_closed()
            self._check_readable()
        return self._deliver(self._link.inlet, True, True, None)

    def _take(self, block: bool, deadline: float | None) -> Incoming:  # noqa: ARG002
        inlet = self._link.inlet
        while True:
            try:
                return inlet.take_message(True)
            except BlockingIOError:
                inlet.await_readable(None)
            except EndOfStream:
                raise EOFError from None

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Receive the bytes of a message; ``OSError`` where there are more than ``maxlength``."""
        self._check_closed()
        self._check_readable()
        if maxlength is not None and maxlength < 0:
            raise ValueError("negative maxlength")

        def copy(incoming: Incoming) -> bytes:
            view = view_bytes(incoming)
            if maxlength is not None and len(view) > maxlength:
                self._bad_message_length()
            return bytes(view)

        return self._deliver_by(self._link.inlet, copy, None)

    def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO:  # noqa: ARG002  (the base class never gives it)
        def copy(incoming: Incoming) -> io.BytesIO:
            buffer = io.BytesIO()
            buffer.write(view_bytes(incoming))
            return buffer

        return self._deliver_by(self._link.inlet, copy, None)

    def _poll(self, timeout: float | None) -> bool:
        return self._link.inlet.await_readable(deadline_in(timeout))

    def fileno(self) -> int:
        """The socket, where that shows all there is to receive; an epoll descriptor else."""
        self._check_closed()
        inlet = self._link.inlet
        elsewhere = self._readable and (inlet.holding or inlet.front is not None)
        return inlet.fileno() if elsewhere else self._link.fileno()


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:
    """Two connected ends. Where not ``duplex``, the first one only receives and the second only sends."""
    first, second = Link.pair(PIPE_BUFFER)
    return Connection(first, True, duplex), Connection(second, duplex, True)


def _pack_connection(connection: Connection) -> _codec.Packed:
    connection._check_closed()
    handle = LinkHandle(HandleKind.CONNECTION, connection._link)
    return _rebuild_connection, (connection.readable, connection.writable), [handle]


@_codec.rebuilds
def _rebuild_connection(readable: bool, writable: bool, kinds: bytes, fds: list[int]) -> Connection:
    (fd,) = _codec.expect((HandleKind.CONNECTION,), kinds, fds)
    return Connection(Link.adopt(fd), readable, writable)


_codec.register(Connection, _pack_connection)
