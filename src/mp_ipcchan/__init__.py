"""Channels between processes on the operating system's own primitives, and a multiprocessing context on them.

What there is to import; ``help()`` on each tells more, and README.md and docs/ begin from the beginning::

    channel, bytes_channel                      a Sender and a Receiver, which travel in messages themselves
    ReceiverSet, Router, router                 many receivers at once: wait for them, or have functions called
    get_context, install, uninstall             multiprocessing with our Process, Queue, Pipe and Pool
    ProcessPoolExecutor, get_reusable_executor  concurrent.futures' executor, on workers that may die
    OneShotServer, Server, connect, peer_of     names for processes that don't know each other
    SharedMemory, Fd                            memory and open files, sent as handles
    Mux                                         thousands of channels over one socket
    errors                                      what can go wrong

For those who change it: the data path, which docs/architecture.md explains::

    object -encode-> Message -send-> transport ==kernel== transport -recv-> Parcel -decode-> object
           _codec    _message        _transport/                                     _codec

Modules and packages import only from those above them in this list:

    errors, _deadline, _interrupt, _message     what can go wrong; timeouts; messages and their descriptors
    _segments/                                  shared memory: what messages lie in, and SharedMemory
    _transport/                                 packets and descriptors over the kernel's sockets
    _codec, _typed_codec                        objects to messages and back: pickle, or checked against a type
    _drainer, _outlet, _inlet, _link            one socket's two halves, shared by all handles on it
    _async                                      receiving and sending in coroutines
    _fd, _delivery, _endpoint, _opaque,
    _sender, _receiver, _channel, _typed_fields Fd, Sender and Receiver: codec and transport meet
    _connection, _queues/                       pipes and queues
    _sets/                                      many receivers at once: undecoded messages, sets, callbacks
    _servers/                                   names for processes that don't know each other
    _lanes/                                     many channels over one socket, which stand where links do
    _reach, _process, _reduction, _context      processes, the stdlib's pickling, and its contexts
    _pools/                                     the executor and the Pool: who gets which task, who runs it

``tests/unit/test_layers.py`` has the table module by module, and checks it.
"""

import importlib
from typing import TYPE_CHECKING

from . import _reduction, _typed_fields  # noqa: F401  (they register our types: with the stdlib's pickling, and ours)
from ._channel import bytes_channel, channel
from ._connection import Connection, Pipe
from ._context import Context, get_context, install, uninstall
from ._fd import Fd
from ._opaque import OpaqueReceiver, OpaqueSender
from ._queues._queue import JoinableQueue, Queue, SimpleQueue
from ._receiver import BytesReceiver, Receiver
from ._segments._shared_memory import SharedMemory
from ._sender import BytesSender, Sender
from ._servers._peer import Peer
from ._servers._rendezvous import connect, peer_of
from .errors import (
    Disconnected,
    Empty,
    EndpointClosed,
    EndpointMoved,
    Full,
    IpcError,
    ProtocolError,
    ReceiverGone,
    SerializationError,
    ShutDown,
    TaskTimeoutError,
)

if TYPE_CHECKING:
    from ._lanes._mux import Mux
    from ._pools._executor import ProcessPoolExecutor, get_reusable_executor
    from ._pools._future import Future
    from ._pools._pool import Pool
    from ._pools._stats import WorkerStats
    from ._pools._task import WorkerLostError
    from ._servers._server import OneShotServer, Server
    from ._sets._events import ChannelClosed, MessageReceived, Ready
    from ._sets._receiver_set import ReceiverSet
    from ._sets._router import Route, Router, router
    from ._sets._undecoded import UndecodedMessage

__version__ = "0.1.0"

#: Names that are imported when they are first used: they need concurrent.futures, dataclasses, logging or subprocess.
_LATE = {
    "ChannelClosed": "_sets._events",
    "Future": "_pools._future",
    "MessageReceived": "_sets._events",
    "Mux": "_lanes._mux",
    "OneShotServer": "_servers._server",
    "Pool": "_pools._pool",
    "ProcessPoolExecutor": "_pools._executor",
    "Ready": "_sets._events",
    "ReceiverSet": "_sets._receiver_set",
    "Route": "_sets._router",
    "Router": "_sets._router",
    "Server": "_servers._server",
    "UndecodedMessage": "_sets._undecoded",
    "WorkerLostError": "_pools._task",
    "WorkerStats": "_pools._stats",
    "get_reusable_executor": "_pools._executor",
    "router": "_sets._router",
}

__all__ = [
    "BytesReceiver",
    "BytesSender",
    "ChannelClosed",
    "Connection",
    "Context",
    "Disconnected",
    "Empty",
    "EndpointClosed",
    "EndpointMoved",
    "Fd",
    "Full",
    "Future",
    "IpcError",
    "JoinableQueue",
    "MessageReceived",
    "Mux",
    "OneShotServer",
    "OpaqueReceiver",
    "OpaqueSender",
    "Peer",
    "Pipe",
    "Pool",
    "ProcessPoolExecutor",
    "ProtocolError",
    "Queue",
    "Ready",
    "Receiver",
    "ReceiverGone",
    "ReceiverSet",
    "Route",
    "Router",
    "Sender",
    "SerializationError",
    "Server",
    "SharedMemory",
    "ShutDown",
    "SimpleQueue",
    "TaskTimeoutError",
    "UndecodedMessage",
    "WorkerLostError",
    "WorkerStats",
    "bytes_channel",
    "channel",
    "connect",
    "get_context",
    "get_reusable_executor",
    "install",
    "peer_of",
    "router",
    "uninstall",
]

for _name in __all__:
    # Tracebacks, pickles and repr show the public name.
    if _name not in _LATE:
        globals()[_name].__module__ = __name__
del _name


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    value.__module__ = __name__
    globals()[name] = value
    return value
