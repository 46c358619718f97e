"""The systems under test, one small adapter each.

An adapter gives the calls that a user of that library would write, with nothing in between: at a
million messages a second one more Python call per message is a tenth of the result. Hence senders and
receivers are handed a count and loop themselves, over bound methods.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any, Protocol

from .floors import CopyFloor, Floor, PacketFloor
from .shapes import MiB, Payload, Shape

#: Messages in one call, where a system has calls for many.
BATCH = 100

#: ``send(objs)`` sends each of them.
Send = Callable[[Iterable[Any]], None]
#: ``receive(payload, count)`` receives that many messages, checks them as the payload says, and returns the last.
Receive = Callable[[Payload, int], Any]


@dataclass(frozen=True)
class Ends:
    """What a process needs to ask and be answered."""

    put: Callable[[Any], object]
    get: Callable[[], Any]


class System(Protocol):
    """A way to get messages from process to process.

    ``make`` runs in the parent; the children, forked after it, then call exactly one of ``sender``,
    ``receiver``, ``client`` and ``server``. ``close`` runs in the parent when they have ended.
    """

    name: str
    #: The column of ratios that the system stands behind; of several with one name, the fastest.
    baseline: str | None
    #: The optional module that it needs.
    module: str | None

    def fits(self, shape: Shape, /) -> bool:
        """Whether the system promises to work in this shape (not whether it is good at it)."""
        ...

    def make(self, shape: Shape) -> None: ...

    def sender(self) -> Send: ...

    def receiver(self, index: int, /) -> Receive: ...

    def client(self) -> Ends: ...

    def server(self) -> Ends: ...

    def close(self) -> None: ...


def one_by_one(put: Callable[[Any], object]) -> Send:
    def send(objs: Iterable[Any]) -> None:
        for obj in objs:
            put(obj)

    return send


def each(get: Callable[[], Any]) -> Receive:
    def receive(payload: Payload, count: int) -> Any:
        check = payload.check if payload.check_each else None
        item = None
        if payload.numbered:
            for expected in range(count):
                item = get()
                if item != expected:
                    raise ValueError(f"received {item!r} where {expected} was next")
        elif check is None:
            for _ in repeat(None, count):
                item = get()
        else:
            for _ in repeat(None, count):
                item = get()
                check(item)
        return item

    return receive


def in_batches(put_many: Callable[[list[Any]], object]) -> Send:
    def send(objs: Iterable[Any]) -> None:
        rest = iter(objs)
        while batch := list(islice(rest, BATCH)):
            put_many(batch)

    return send


def as_they_come(get_many: Callable[[int], list[Any]]) -> Receive:
    def receive(payload: Payload, count: int) -> Any:
        items: list[Any] = []
        received = 0
        while received < count:
            # Never more than its share: what one consumer takes too many of, another waits for.
            items = get_many(min(BATCH, count - received))
            if payload.numbered and items != [*range(received, received + len(items))]:
                raise ValueError(f"{received} was next, received {items!r}")
            received += len(items)
        return items[-1]

    return receive


@dataclass
class QueueSystem(System):
    """Anything with ``put`` and ``get`` that several processes share."""

    name: str
    factory: Callable[[Shape], Any]
    baseline: str | None = None
    module: str | None = None
    _queues: list[Any] = field(default_factory=list)

    def fits(self, _shape: Shape, /) -> bool:
        return True

    def make(self, shape: Shape) -> None:
        self._queues = [self.factory(shape) for _ in range(2 if shape.round_trip else 1)]

    def sender(self) -> Send:
        return one_by_one(self._queues[0].put)

    def receiver(self, _index: int, /) -> Receive:
        return each(self._queues[0].get)

    def client(self) -> Ends:
        return Ends(self._queues[0].put, self._queues[1].get)

    def server(self) -> Ends:
        return Ends(self._queues[1].put, self._queues[0].get)

    def close(self) -> None:
        while self._queues:
            self._queues.pop().close()


@dataclass
class QueueManySystem(QueueSystem):
    """The same through ``put_many`` and ``get_many``."""

    #: The name of the parameter of ``get_many`` that bounds how many it gives.
    limit: str = "max_items"

    def fits(self, shape: Shape, /) -> bool:
        return not shape.round_trip and shape.small

    def sender(self) -> Send:
        return in_batches(self._queues[0].put_many)

    def receiver(self, _index: int, /) -> Receive:
        get_many = self._queues[0].get_many
        return as_they_come(lambda most: get_many(**{self.limit: most}))


@dataclass
class ChannelSystem(System):
    """Our channels: many senders, one receiver."""

    name: str = "channel"
    baseline: str | None = None
    module: str | None = "mp_ipcchan"
    _senders: list[Any] = field(default_factory=list)
    _receivers: list[Any] = field(default_factory=list)

    def fits(self, shape: Shape, /) -> bool:
        return shape.consumers == 1

    def make(self, shape: Shape) -> None:
        channel = importlib.import_module("mp_ipcchan").channel
        for _ in range(2 if shape.round_trip else 1):
            sender, receiver = channel()
            self._senders.append(sender)
            self._receivers.append(receiver)

    def sender(self) -> Send:
        return one_by_one(self._senders[0].send)

    def receiver(self, _index: int, /) -> Receive:
        return each(self._receivers[0].recv)

    def client(self) -> Ends:
        return Ends(self._senders[0].send, self._receivers[1].recv)

    def server(self) -> Ends:
        return Ends(self._senders[1].send, self._receivers[0].recv)

    def close(self) -> None:
        for ends in (self._senders, self._receivers):
            while ends:
                ends.pop().close()


@dataclass
class ChannelManySystem(ChannelSystem):
    name: str = "channel (many)"

    def fits(self, shape: Shape, /) -> bool:
        return super().fits(shape) and not shape.round_trip and shape.small

    def sender(self) -> Send:
        return in_batches(self._senders[0].send_many)

    def receiver(self, _index: int, /) -> Receive:
        return as_they_come(self._receivers[0].recv_many)


@dataclass
class PipeSystem(System):
    """``Pipe()`` of a context: one-way where that is enough, duplex for round trips."""

    name: str
    factory: Callable[[bool], tuple[Any, Any]]
    baseline: str | None = None
    module: str | None = None
    _connections: list[Any] = field(default_factory=list)

    def fits(self, shape: Shape, /) -> bool:
        # The stdlib's documentation forbids more than one process at either end.
        return shape.one_to_one

    def make(self, shape: Shape) -> None:
        self._connections = list(self.factory(shape.round_trip))

    def sender(self) -> Send:
        return one_by_one(self._connections[1].send)

    def receiver(self, _index: int, /) -> Receive:
        return each(self._connections[0].recv)

    def client(self) -> Ends:
        return Ends(self._connections[1].send, self._connections[1].recv)

    def server(self) -> Ends:
        return Ends(self._connections[0].send, self._connections[0].recv)

    def close(self) -> None:
        while self._connections:
            self._connections.pop().close()


@dataclass
class ZmqSystem(System):
    """pyzmq over ``ipc://`` with pickle protocol 5: the consumers bind, the producers connect to all of them.

    Small objects are one frame. Arrays go as pyzmq's manual advises: their buffers as frames of
    their own, with ``copy=False``.
    """

    name: str
    sending: str
    receiving: str
    fits_shape: Callable[[Shape], bool]
    baseline: str | None = "pyzmq"
    module: str | None = "zmq"
    _shape: Shape | None = None
    _addresses: list[str] = field(default_factory=list)
    _serial: itertools.count[int] = field(default_factory=itertools.count)

    def fits(self, shape: Shape, /) -> bool:
        return self.fits_shape(shape)

    def make(self, shape: Shape) -> None:
        # The abstract namespace (@): no files to clean up.
        stem = f"ipc://@mp_ipcchan-benchmarks-{os.getpid()}-{self.sending}-{next(self._serial)}"
        self._shape = shape
        self._addresses = [f"{stem}-{index}" for index in range(shape.consumers)]

    def _ends(self, kind: str, *, bind: str | None = None) -> Ends:
        """A socket of the calling process; a context doesn't survive a fork, so each child makes its own."""
        assert self._shape is not None
        zmq = importlib.import_module("zmq")
        socket = zmq.Context.instance().socket(getattr(zmq, kind))
        # No limit makes PUSH strictly round-robin, so that each consumer gets its share. Arrays
        # are bounded, or all of a round would wait in memory at once.
        socket.set_hwm(4 if self._shape.in_bytes else 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 1)
        if bind is not None:
            socket.bind(bind)
        else:
            for address in self._addresses:
                socket.connect(address)
        return _array_frames(socket) if self._shape.in_bytes else _plain_frames(socket)

    def sender(self) -> Send:
        return one_by_one(self._ends(self.sending).put)

    def receiver(self, index: int, /) -> Receive:
        return each(self._ends(self.receiving, bind=self._addresses[index]).get)

    def client(self) -> Ends:
        return self._ends(self.sending)

    def server(self) -> Ends:
        return self._ends(self.receiving, bind=self._addresses[0])

    def close(self) -> None:
        self._addresses = []


def _plain_frames(socket: Any) -> Ends:
    send, recv, dumps, loads = socket.send, socket.recv, pickle.dumps, pickle.loads
    return Ends(lambda obj: send(dumps(obj, 5)), lambda: loads(recv()))


def _array_frames(socket: Any) -> Ends:
    def put(obj: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(obj, 5, buffer_callback=buffers.append)
        socket.send_multipart([head, *buffers], copy=False)

    def get() -> Any:
        head, *frames = socket.recv_multipart(copy=False)
        return pickle.loads(head.buffer, buffers=[frame.buffer for frame in frames])

    return Ends(put, get)


@dataclass
class TorchSystem(QueueSystem):
    """Torch's queue, which shares the memory of tensors: arrays travel as such."""

    def fits(self, shape: Shape, /) -> bool:
        return shape.one_to_one and shape.payload.module == "numpy"

    def sender(self) -> Send:
        put, share = super().sender(), importlib.import_module("torch").from_numpy

        def send(objs: Iterable[Any]) -> None:
            put(map(share, objs))

        return send

    def receiver(self, _index: int, /) -> Receive:
        get = self._queues[0].get
        return each(lambda: get().numpy())


def _faster_fifo(shape: Shape) -> Any:
    # It must hold at least one message; its default is 1 MB, and four is what lets both sides work at once.
    size = max(MiB, 4 * shape.payload.nbytes)
    return importlib.import_module("faster_fifo").Queue(max_size_bytes=size)


def _context(module: str) -> Any:
    return importlib.import_module(module).get_context("fork")


def _stock() -> Any:
    return multiprocessing.get_context("fork")


def _ours() -> Any:
    importlib.import_module("mp_ipcchan")
    return multiprocessing.get_context("ipcchan")


#: Those that run in the shapes that only survey: ours, the stdlib's, the fastest peers, the floors.
SURVEYED = frozenset(
    ("channel", "ctx.Queue", "ctx.Pipe", "mp.Queue", "mp.Pipe", "faster-fifo", "pyzmq PUSH/PULL", "C loop", "memcpy")
)


def all_systems() -> list[System | Floor]:
    """Every system, ours first, in the order in which a round runs them."""
    ours = "mp_ipcchan"
    fifo = "faster_fifo"
    return [
        ChannelSystem(),
        ChannelManySystem(),
        QueueSystem("ctx.Queue", lambda _: _ours().Queue(), module=ours),
        QueueManySystem("ctx.Queue (many)", lambda _: _ours().Queue(), module=ours),
        QueueSystem("ctx.SimpleQueue", lambda _: _ours().SimpleQueue(), module=ours),
        PipeSystem("ctx.Pipe", lambda duplex: _ours().Pipe(duplex), module=ours),
        QueueSystem("mp.Queue", lambda _: _stock().Queue(), baseline="mp.Queue"),
        QueueSystem("mp.SimpleQueue", lambda _: _stock().SimpleQueue(), baseline="mp.SimpleQueue"),
        PipeSystem("mp.Pipe", lambda duplex: _stock().Pipe(duplex), baseline="mp.Pipe"),
        QueueSystem("faster-fifo", _faster_fifo, module=fifo),
        QueueManySystem("faster-fifo (many)", _faster_fifo, module=fifo, limit="max_messages_to_get"),
        ZmqSystem("pyzmq PUSH/PULL", "PUSH", "PULL", lambda shape: not shape.round_trip),
        ZmqSystem("pyzmq PAIR", "PAIR", "PAIR", lambda shape: shape.one_to_one),
        ZmqSystem("pyzmq REQ/REP", "REQ", "REP", lambda shape: shape.round_trip),
        QueueSystem("billiard.Queue", lambda _: _context("billiard").Queue(), module="billiard"),
        TorchSystem("torch.Queue", lambda _: _context("torch.multiprocessing").Queue(), module="torch"),
        PacketFloor(),
        CopyFloor(),
    ]
