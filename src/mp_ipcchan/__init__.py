"""Channels between processes on the operating system's own primitives, and a multiprocessing context on them.

The data path, which docs/architecture.md explains::

    object -encode-> Message -send-> transport ==kernel== transport -recv-> Parcel -decode-> object
           _codec    _message        _transport/                                     _codec

Modules import only from those above them in this list:

    errors                                          what can go wrong
    _deadline, _message                             timeouts; messages and their descriptors
    _memory, _segment, _segment_pool,
    _segment_cache                                  shared memory: what senders keep of it, and what readers do
    _transport/                                     packets and descriptors over the kernel's sockets
    _codec, _typed_codec                            objects to messages and back: pickle, or checked against a type
    _drainer, _outlet, _inlet, _link                one socket's two halves, shared by all handles on it
    _memory, _shared_memory                         SharedMemory
    _async                                          receiving and sending in coroutines
    _fd, _endpoint, _opaque, _sender, _receiver,
    _channel, _typed_fields                         Fd, Sender and Receiver: codec and transport meet
    _connection, _counter, _ledger, _books,
    _ends, _queue, _queue_travel                    pipes and queues
    _undecoded, _events, _members, _receiver_set,
    _router                                         many receivers at once: undecoded messages, sets, callbacks
    _peer, _address, _listener, _watch,
    _rendezvous, _host, _server                     names for processes that don't know each other
    _reach, _process, _reduction, _context          processes, the stdlib's pickling, and its contexts
    _switchboard, _lane*, _trunk, _mux              many channels over one socket, which stand where links do
    _call, _chunk, _variables, _schedule,
    _future, _task                                  the pool: calls on their way, and who gets which
    _lifeline, _resident, _logs, _worker            what runs in a worker, and what it owes its parent
    _member, _commons, _crew,
    _outcome, _stats, _engine                       workers as their parent sees them, and who hears of it
    _map, _executor                                 what users call
    _ticket, _foreign, _workforce                   where a Pool's tasks run: its own workers, or any executor
    _feed, _async_result, _imap, _progress,
    _engine_url, _pool                              the Pool: its input, its results, itself
"""

import importlib
from typing import TYPE_CHECKING

from . import _reduction, _typed_fields  # noqa: F401  (they register our types: with the stdlib's pickling, and ours)
from ._channel import bytes_channel, channel
from ._connection import Connection, Pipe
from ._context import install, uninstall
from ._fd import Fd
from ._opaque import OpaqueReceiver, OpaqueSender
from ._peer import Peer
from ._queue import JoinableQueue, Queue, SimpleQueue
from ._receiver import BytesReceiver, Receiver
from ._rendezvous import connect, peer_of
from ._sender import BytesSender, Sender
from ._shared_memory import SharedMemory
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
)

if TYPE_CHECKING:
    from ._events import ChannelClosed, MessageReceived, Ready
    from ._executor import ProcessPoolExecutor, get_reusable_executor
    from ._future import Future
    from ._mux import Mux
    from ._pool import Pool
    from ._receiver_set import ReceiverSet
    from ._router import Route, Router, router
    from ._server import OneShotServer, Server
    from ._stats import WorkerStats
    from ._task import TaskTimeoutError, WorkerLostError
    from ._undecoded import UndecodedMessage

__version__ = "0.1.0"

#: Names that are imported when they are first used: they need concurrent.futures, dataclasses, logging or subprocess.
_LATE = {
    "ChannelClosed": "_events",
    "Future": "_future",
    "MessageReceived": "_events",
    "Mux": "_mux",
    "OneShotServer": "_server",
    "Pool": "_pool",
    "ProcessPoolExecutor": "_executor",
    "Ready": "_events",
    "ReceiverSet": "_receiver_set",
    "Route": "_router",
    "Router": "_router",
    "Server": "_server",
    "TaskTimeoutError": "_task",
    "UndecodedMessage": "_undecoded",
    "WorkerLostError": "_task",
    "WorkerStats": "_stats",
    "get_reusable_executor": "_executor",
    "router": "_router",
}

__all__ = [
    "BytesReceiver",
    "BytesSender",
    "ChannelClosed",
    "Connection",
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
