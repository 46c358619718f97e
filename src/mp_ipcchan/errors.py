"""What can go wrong, one class a cause; each is also the stdlib class that a program already catches.

The names say who did it: ``Endpoint...`` you did, ``ReceiverGone`` and ``Disconnected`` the other
side did, ``Empty`` and ``Full`` mean "not now", ``ProtocolError`` means that the bytes come from a stranger.
"""

from __future__ import annotations

import importlib
import queue
from typing import TYPE_CHECKING, Any

__all__ = [
    "Disconnected",
    "Empty",
    "EndpointClosed",
    "EndpointMoved",
    "Full",
    "IpcError",
    "ProtocolError",
    "ReceiverGone",
    "SerializationError",
    "ShutDown",
    "TaskTimeoutError",
    "WorkerLostError",
]

if TYPE_CHECKING:
    from ._pools._task import WorkerLostError

    _StdlibShutDown = Exception
else:
    # queue.ShutDown came with Python 3.13.
    _StdlibShutDown = getattr(queue, "ShutDown", Exception)


class IpcError(Exception):
    """The root of everything that this library raises for reasons of its own."""


class Disconnected(IpcError, EOFError):
    """Every sender is gone, in every process, and every message has been received: the normal end."""


class ReceiverGone(IpcError, BrokenPipeError):
    """The receiver is closed, or its process has died: nobody can ever read what was to be sent."""


class Empty(IpcError, queue.Empty):
    """No message now, or none in the time given. The channel is alive."""


class Full(IpcError, queue.Full):
    """The kernel can't take the message now, or could not in the time given. Nothing was sent.

    Of a queue: it has no room. Of ``put_many``: ``put`` of the objects are in the queue, and ``refused`` is the next.
    """

    put: int = 0
    refused: object = None

    def __reduce__(self) -> tuple[Any, ...]:
        # It may be anything; in another process it is of no use.
        return type(self), self.args, {"put": self.put}


class SerializationError(IpcError, ValueError):
    """The object could not be encoded, or the message could not be decoded; ``__cause__`` tells why.

    The channel goes on. Raised by ``send``, nothing has left, and the endpoints in the object
    still work; raised by ``recv``, that one message is gone.
    """


class EndpointMoved(IpcError, ValueError):
    """This receiver was sent to another process, which owns it now."""


class EndpointClosed(IpcError, ValueError):
    """This endpoint was closed by ``close()``, by its ``with`` block, or in a forked child that it wasn't passed to."""


class ProtocolError(IpcError, OSError):
    """A packet arrived that no peer of this library sends. It is dropped, its descriptors are closed."""


class ShutDown(IpcError, _StdlibShutDown):
    """The queue was shut down: nothing more can be put, and what could be got has been."""


class TaskTimeoutError(IpcError, TimeoutError):
    """A task took longer than its ``timeout`` and was stopped."""


def __getattr__(name: str) -> object:
    # Its base, BrokenProcessPool, brings concurrent.futures and logging: for programs with pools alone.
    if name == "WorkerLostError":
        return getattr(importlib.import_module("._pools._task", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
