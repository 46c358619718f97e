"""Our objects through the stdlib's own pickling, the stdlib's through ours, and reducers that users register."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import pickle
import socket
from collections.abc import Iterator
from multiprocessing import connection as stdlib
from multiprocessing import reduction
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from mp_ipcchan import (
    BytesReceiver,
    BytesSender,
    Connection,
    Disconnected,
    EndpointClosed,
    EndpointMoved,
    Fd,
    JoinableQueue,
    Pipe,
    Queue,
    Receiver,
    Sender,
    SerializationError,
    SimpleQueue,
    bytes_channel,
    channel,
)

from ..conformance._support import LIMIT
from ._support import METHODS, context_of, started

# -- through the stdlib's queue, pipe, manager and process arguments --------------------------


@pytest.fixture(params=METHODS)
def stock(request: pytest.FixtureRequest) -> BaseContext:
    """The stdlib's own contexts."""
    return multiprocessing.get_context(str(request.param))


@pytest.fixture
def _no_sharer() -> Iterator[None]:
    """The stdlib's thread that hands out descriptors ends with the test."""
    yield
    from multiprocessing import resource_sharer

    resource_sharer.stop(LIMIT)


def answer(item: Any) -> None:
    """What a child does with a pair, or one thing, that it was given or has received: answer by it."""
    if isinstance(item, tuple):
        rx, tx = item
        tx.send(rx.recv(LIMIT) + 1)
        rx.close()
        tx.close()
    elif isinstance(item, stdlib.Connection):
        item.send(item.recv() + 1)
        item.close()
    elif isinstance(item, JoinableQueue):
        item.task_done()
    else:
        item.put("from the child")


def answer_from_queue(queue: Any) -> None:
    answer(queue.get())


def answer_from_pipe(pipe: Any) -> None:
    answer(pipe.recv())


def answer_from_list(items: Any) -> None:
    answer(items.pop())


def check_answers(give: Any) -> None:
    """``give`` hands an object to a child that runs ``answer``."""
    tx, moved = channel()
    copied, rx = channel()
    with tx, rx, copied:
        tx.send_many([1, 2])
        give((moved, copied))
        assert rx.recv(LIMIT) == 2
        with pytest.raises(EndpointMoved):
            moved.recv(LIMIT)
    near, far = Pipe()
    with near:
        near.send(1)
        give(far)
        assert near.poll(LIMIT)
        assert near.recv() == 2
        far.close()
    for queue in (Queue[Any](), SimpleQueue[Any]()):
        give(queue)
        assert queue.get() == "from the child"
        queue.close()
    tasks: JoinableQueue[Any] = JoinableQueue(3)
    tasks.put(1)
    give(tasks)
    tasks.join()
    tasks.close()


@pytest.mark.usefixtures("_no_sharer")
def test_through_a_stock_queue(stock: BaseContext) -> None:
    """Endpoints, connections and queues go through the stdlib's Queue to the stdlib's processes."""
    queue = stock.Queue()

    def give(item: object) -> None:
        with started(stock, answer_from_queue, queue):
            queue.put(item)

    check_answers(give)
    queue.close()
    queue.join_thread()


@pytest.mark.usefixtures("_no_sharer")
def test_through_a_stock_pipe(stock: BaseContext) -> None:
    """The same through the stdlib's Pipe."""

    def give(item: object) -> None:
        near, far = stock.Pipe()
        with near, far, started(stock, answer_from_pipe, far):
            near.send(item)

    check_answers(give)


@pytest.mark.usefixtures("_no_sharer")
def test_through_a_stock_manager(stock: BaseContext) -> None:
    """The same through a list and a queue in the stdlib's manager, which takes them apart and sends them on."""
    with stock.Manager() as manager:
        items = manager.list()
        queue = manager.Queue()

        def give_by_list(item: object) -> None:
            items.append(item)
            with started(stock, answer_from_list, items):
                pass

        def give_by_queue(item: object) -> None:
            queue.put(item)
            with started(stock, answer_from_queue, queue):
                pass

        tx, rx = channel()
        for give in (give_by_list, give_by_queue):
            to_child, moved = channel()
            with to_child:
                to_child.send(1)
                give((moved, tx))
                assert rx.recv(LIMIT) == 2
        tx.close()
        rx.close()


@pytest.mark.usefixtures("_no_sharer")
@pytest.mark.parametrize("method", METHODS)
def test_as_arguments_of_stock_processes(method: str) -> None:
    """Process arguments of the stdlib's contexts; a stock fork leaves both ends in both processes."""
    context = multiprocessing.get_context(method)
    tx, given = channel()
    copied, rx = channel()
    with tx, rx, given:
        tx.send(1)
        with started(context, answer, (given, copied)):
            assert rx.recv(LIMIT) == 2
            copied.close()
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)
        assert given.closed == (method != "fork")
    near, far = Pipe()
    queue: Queue[Any] = Queue()
    with near, far:
        with started(context, answer, far), started(context, answer, queue):
            near.send(1)
            assert near.poll(LIMIT)
            assert near.recv() == 2
            assert queue.get(timeout=LIMIT) == "from the child"
    queue.close()


# -- the stdlib's objects through ours --------------------------------------------------------


def use_stock_objects(rx: Receiver[Any]) -> None:
    connection, sock = rx.recv(LIMIT)
    assert type(connection) is stdlib.Connection
    assert (connection.readable, connection.writable) == (False, True)
    assert (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
    with connection, sock:
        connection.send("by the connection")
        sock.sendall(b"by the socket")


def test_stock_connection_and_socket(start_method: str) -> None:
    """The stdlib's Connection and ``socket.socket`` are copied by a message."""
    tx, rx = channel()
    readable, writable = multiprocessing.get_context("spawn").Pipe(duplex=False)
    near, far = socket.socketpair()
    with readable, near, tx, started(context_of(start_method), use_stock_objects, rx):
        with writable, far:
            tx.send((writable, far))
            assert not writable.closed
        assert readable.poll(LIMIT)
        assert readable.recv() == "by the connection"
        with pytest.raises(EOFError):
            readable.recv()
        near.settimeout(LIMIT)
        assert near.recv(100) == b"by the socket"
        assert near.recv(100) == b""


def test_internet_socket() -> None:
    """A listening socket of another family arrives as such."""
    tx, rx = channel()
    with tx, rx, socket.create_server(("127.0.0.1", 0)) as server:
        tx.send(server)
        with rx.recv(LIMIT) as came:
            assert came.getsockname() == server.getsockname()
            assert came.family == socket.AF_INET
            assert came.fileno() != server.fileno()


# -- reducers of users ------------------------------------------------------------------------


class Celsius:
    """Pickles by itself as nothing useful, so that a reducer makes a difference."""

    degrees = 0.0

    def __reduce__(self) -> Any:
        return Celsius, ()


def _celsius(degrees: float) -> Celsius:
    it = Celsius()
    it.degrees = degrees
    return it


def _reduce_celsius(it: Celsius) -> tuple[Any, ...]:
    return _celsius, (it.degrees,)


def _reduce_doubled(it: Celsius) -> tuple[Any, ...]:
    return _celsius, (2 * it.degrees,)


@pytest.fixture
def _unregister() -> Iterator[None]:
    """The stdlib has no way to unregister."""
    registry = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    before = dict(registry)
    yield
    registry.clear()
    registry.update(before)


def _through_channel(obj: object) -> Any:
    tx, rx = channel()
    with tx, rx:
        tx.send(obj)
        return rx.recv(LIMIT)


def _through_queue(obj: object) -> Any:
    queue: Queue[Any] = Queue()
    try:
        queue.put(obj)
        return queue.get(timeout=LIMIT)
    finally:
        queue.close()


def _through_pipe(obj: object) -> Any:
    near, far = Pipe()
    with near, far:
        near.send(obj)
        return far.recv()


@pytest.mark.usefixtures("_unregister")
@pytest.mark.parametrize("through", [_through_channel, _through_queue, _through_pipe])
def test_registered_reducers(through: Any) -> None:
    """A reducer counts from when it is registered, also after the first message; so does one that replaces it."""
    warm = _celsius(20.0)
    assert through(warm).degrees == 0.0
    reduction.register(Celsius, _reduce_celsius)
    assert through([warm])[0].degrees == 20.0
    reduction.register(Celsius, _reduce_doubled)
    assert through(warm).degrees == 40.0


@pytest.mark.usefixtures("_unregister")
def test_reducer_that_sends_endpoints() -> None:
    """What a user's reducer returns may have endpoints in it."""
    tx, rx = channel()
    with tx, rx:
        reduction.register(Celsius, lambda _: (list, ([tx],)))
        (came,) = _through_channel(Celsius())
        with came:
            came.send(1)
            assert rx.recv(LIMIT) == 1


# -- pickle, copy, deepcopy -------------------------------------------------------------------


TRAVELLERS: dict[type, Any] = {
    Sender: channel,
    Receiver: channel,
    BytesSender: bytes_channel,
    BytesReceiver: bytes_channel,
    Connection: Pipe,
    Queue: lambda: (Queue(),),
    JoinableQueue: lambda: (JoinableQueue(),),
    SimpleQueue: lambda: (SimpleQueue(),),
    Fd: lambda: (Fd(0),),
}


@pytest.mark.parametrize("cls", TRAVELLERS, ids=lambda cls: str(cls.__name__))
def test_bare_pickle(cls: type) -> None:
    """``pickle.dumps`` says what to do instead, whatever carries descriptors."""
    with contextlib.ExitStack() as stack:
        made = TRAVELLERS[cls]()
        for one in made:
            stack.callback(one.close)
        traveller = next(one for one in made if type(one) is cls)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match=f"{cls.__name__} .*send them"):
                pickle.dumps([traveller], protocol)


def test_pickle_of_what_is_closed() -> None:
    """A closed endpoint says that it is closed."""
    tx, rx = channel()
    tx.close()
    rx.close()
    for end in (tx, rx):
        with pytest.raises(EndpointClosed):
            pickle.dumps(end)


def test_pickle_inside_of_a_message() -> None:
    """An object that pickles an endpoint by itself fails alone: the message isn't sent, the channel goes on."""

    class Nested:
        def __reduce__(self) -> Any:
            return pickle.loads, (pickle.dumps(tx),)

    tx, rx = channel()
    with tx, rx:
        with pytest.raises(SerializationError, match="can't be pickled by themselves"):
            tx.send(Nested())
        tx.send(1)
        assert rx.recv(LIMIT) == 1


@pytest.mark.parametrize("make", [channel, bytes_channel])
def test_copies_of_senders(make: Any) -> None:
    """``copy.copy`` of a sender is a handle of its own."""
    tx, rx = make()
    with rx:
        second = copy.copy(tx)
        tx.close()
        second.send(b"by the copy")
        assert rx.recv(LIMIT) == b"by the copy"
        second.close()
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)
        for one in (copy.copy, copy.deepcopy):
            with pytest.raises(EndpointClosed):
                one(tx)


@pytest.mark.parametrize("make", [channel, bytes_channel])
def test_no_deep_copies_of_senders(make: Any) -> None:
    """``copy.deepcopy`` would share what it promises not to: it says so, and the sender works as before."""
    tx, rx = make()
    with tx, rx:
        with pytest.raises(TypeError):
            copy.deepcopy([tx])
        tx.send(b"message")
        assert rx.recv(LIMIT) == b"message"


@pytest.mark.parametrize("make", [channel, bytes_channel])
@pytest.mark.parametrize("one", [copy.copy, copy.deepcopy])
def test_no_copies_of_receivers(make: Any, one: Any) -> None:
    """A receiver can't be copied, and works as before."""
    tx, rx = make()
    with tx, rx:
        with pytest.raises(TypeError, match="one receiver"):
            one(rx)
        with pytest.raises(TypeError):
            one([[rx]]) if one is copy.deepcopy else one(rx)
        tx.send(b"message")
        assert rx.recv(LIMIT) == b"message"
