"""How endpoints travel where the stdlib does the pickling: process arguments, its Queue, Pipe and Manager.

``multiprocessing`` pickles with ``ForkingPickler``, whose registry takes reducers per type. Ours use
the same packing as a message does. The descriptors go with the process that is being started or,
where there is none, through the stdlib's resource sharer: a thread of this process hands them
out when the other side unpickles, so this process must live until then.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from multiprocessing import connection as stdlib
from multiprocessing import context, resource_sharer
from multiprocessing.reduction import ForkingPickler
from typing import Any

from . import _codec
from ._connection import Connection
from ._fd import Fd, FdHandle
from ._message import HandleKind
from ._opaque import OpaqueReceiver, OpaqueSender
from ._process import Launch
from ._queues import _queue_travel  # noqa: F401  (registers how queues travel)
from ._queues._queue import JoinableQueue, Queue, SimpleQueue
from ._receiver import BytesReceiver, Receiver
from ._segments._shared_memory import SharedMemory
from ._sender import BytesSender, Sender


def _reduce(pack: _codec.Pack, obj: object) -> tuple[Callable[..., object], tuple[Any, ...]]:
    rebuild, args, handles = pack(obj)
    kinds = bytes(handle.kind for handle in handles)
    popen = context.get_spawning_popen()
    if isinstance(popen, Launch):
        tokens = [popen.lend(handle) for handle in handles]
    else:
        # A stock process could inherit the descriptors, but nothing would tell when to close ours.
        tokens = [resource_sharer.DupFd(handle.fileno()) for handle in handles]
        for handle in handles:
            handle.sent()
    return _rebuild, (rebuild, args, kinds, tokens)


def _rebuild(rebuild: Callable[..., object], args: tuple[Any, ...], kinds: bytes, tokens: list[Any]) -> object:
    return rebuild(*args, kinds, [token.detach() for token in tokens])


def register(cls: type) -> None:
    """Let objects of exactly ``cls``, which travel in our messages, travel with the stdlib's pickles, too."""
    ForkingPickler.register(cls, partial(_reduce, _codec.packer(cls)))


_CHANNELS = (Sender, BytesSender, OpaqueSender, Receiver, BytesReceiver, OpaqueReceiver)

for _cls in (*_CHANNELS, Connection, SimpleQueue, Queue, JoinableQueue, Fd, SharedMemory):
    register(_cls)


# -- the stdlib's own, in our messages --------------------------------------------------------


def _pack_stock_connection(connection: stdlib.Connection) -> _codec.Packed:
    handle = FdHandle(HandleKind.FILE, connection.fileno())
    return _rebuild_stock_connection, (connection.readable, connection.writable), [handle]


@_codec.rebuilds
def _rebuild_stock_connection(readable: bool, writable: bool, kinds: bytes, fds: list[int]) -> stdlib.Connection:
    (fd,) = _codec.expect((HandleKind.FILE,), kinds, fds)
    return stdlib.Connection(fd, readable, writable)


def _pack_socket(sock: socket.socket) -> _codec.Packed:
    handle = FdHandle(HandleKind.FILE, sock.fileno())
    return _rebuild_socket, (int(sock.family), int(sock.type), sock.proto), [handle]


@_codec.rebuilds
def _rebuild_socket(family: int, kind: int, proto: int, kinds: bytes, fds: list[int]) -> socket.socket:
    (fd,) = _codec.expect((HandleKind.FILE,), kinds, fds)
    try:
        return socket.socket(family, kind, proto, fileno=fd)
    except BaseException:
        os.close(fd)
        raise


_codec.register(stdlib.Connection, _pack_stock_connection)
_codec.register(socket.socket, _pack_socket)
