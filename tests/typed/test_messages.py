"""Typed channels: what fits, what doesn't, and endpoints in messages."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import multiprocessing
import os
import sys
import typing
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from typing import Any

import msgspec
import pytest

from mp_ipcchan import (
    BytesReceiver,
    BytesSender,
    Disconnected,
    Empty,
    EndpointClosed,
    EndpointMoved,
    Fd,
    Full,
    MessageReceived,
    OneShotServer,
    Queue,
    Receiver,
    ReceiverGone,
    ReceiverSet,
    Sender,
    SerializationError,
    SharedMemory,
    bytes_channel,
    channel,
    connect,
)
from mp_ipcchan._typed_codec import codec_of

from ..conformance._support import LIMIT, InThread, open_descriptors
from ..processes._support import METHODS, context_of, started


class Person(msgspec.Struct):
    name: str
    age: typing.Annotated[int, msgspec.Meta(ge=0)] = 0


class Request(msgspec.Struct):
    """All that may stand in a message, and messages of its own kind."""

    text: str = ""
    reply: Sender[Person] | None = None
    requests: Receiver[Request] | None = None
    pickles: Sender | None = None  # type: ignore[type-arg]
    unpickles: Receiver | None = None  # type: ignore[type-arg]
    buffers: list[BytesSender] = []
    buffers_in: BytesReceiver | None = None
    memory: dict[str, SharedMemory] = {}
    file: tuple[Fd, ...] = ()
    anything: Any = None


@pytest.fixture
def pair() -> Iterator[tuple[Sender[Request], Receiver[Request]]]:
    tx, rx = channel(Request)
    with tx, rx:
        yield tx, rx


# -- what fits --------------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Color(enum.Enum):
    RED = "red"


class Named(typing.NamedTuple):
    a: int
    b: bytes


class Keyed(typing.TypedDict):
    a: int


@pytest.mark.parametrize(
    ("of", "values"),
    [
        (int, [0, -1, 2**63]),
        (Person, [Person("a", 1), Person("")]),
        (list[Person], [[], [Person("a")] * 3]),
        (dict[str, list[int]], [{}, {"a": [1]}]),
        (int | str | None, [1, "a", None]),
        (Point, [Point(1, 2)]),
        (Color, [Color.RED]),
        (Named, [Named(1, b"x")]),
        (Keyed, [{"a": 1}]),
        (bytes, [b"", bytes(200_000)]),
        (Any, [1, "a", [1, {"b": None}]]),
        (frozenset[int], [frozenset({1, 2})]),
    ],
    ids=repr,
)
def test_values_arrive_equal(of: Any, values: list[Any]) -> None:
    tx, rx = channel(of)
    with tx, rx:
        for value in values:
            tx.send(value)
            received = rx.recv(LIMIT)
            assert received == value
            assert type(received) is type(value)


def test_a_message_that_does_not_fit() -> None:
    """It is refused where it is sent, with its place in the message; the channel goes on, nothing has left."""
    tx, rx = channel(list[Person])
    with tx, rx:
        for wrong, place in (
            ([Person(5)], r"\$\[0\].name"),  # type: ignore[arg-type]
            ([Person("a"), Person("b", -1)], r"\$\[1\].age"),
            ("text", "Expected `array`"),
            ([lambda: None], "function"),
            ([object()], "object"),
        ):
            for send in (tx.send, tx.try_send, lambda obj: tx.send_many([obj]), lambda obj: tx.send(obj, 1)):
                with pytest.raises(SerializationError, match=place) as caught:
                    send(wrong)  # type: ignore[arg-type]
                assert caught.value.__cause__ is not None
        with pytest.raises(Empty):
            rx.try_recv()
        tx.send([Person("c")])
        assert rx.recv(LIMIT) == [Person("c")]


def test_F13_wrong_type_on_both_ends() -> None:
    """Ends that disagree about the type: each message is refused where it is received, and the channel goes on."""
    tx, any_rx = channel(Any)
    # As in a peer with another version of the type.
    rx = Receiver[Person](any_rx._claim(), codec_of(Person))
    with tx, rx:
        for wrong in (1, "x", {"name": 5}, {"age": 5}, ["a", 1], None):
            tx.send(wrong)
            with pytest.raises(SerializationError, match="can't decode"):
                rx.recv(LIMIT)
        tx.send_many([{"name": "right"}, {"name": 5}, {"name": "next"}])
        assert rx.recv_many(10, LIMIT) == [Person("right")]
        with pytest.raises(SerializationError):
            rx.recv_many(10, LIMIT)
        assert rx.recv(LIMIT) == Person("next")


@pytest.mark.parametrize("with_file", [False, True], ids=["plain", "file"])
@pytest.mark.parametrize("size", [1, 200_000], ids=["small", "large"])
@pytest.mark.parametrize("typed", ["receiver", "sender"])
def test_only_one_end_has_a_type(typed: str, size: int, with_file: bool) -> None:
    """The error says so, however the message is received."""
    why = "it is a pickle: only this end" if typed == "receiver" else "it is no pickle: has only its sender's end"
    sending, receiving = channel(Any)
    tx = Sender[Any](sending._give_up(), None if typed == "receiver" else codec_of(Request))
    rx = Receiver[Any](receiving._claim(), codec_of(Request) if typed == "receiver" else None)
    with tx, Fd(0) as file:
        for _ in range(3):
            tx.send(Request("x" * size, file=(file,) if with_file else ()))
        with pytest.raises(SerializationError, match=why) as caught:
            rx.recv(LIMIT)
        assert caught.value.__cause__ is not None
        with pytest.raises(SerializationError, match=why):
            rx.recv_many(1, LIMIT)
        with ReceiverSet() as receivers:
            receivers.add(rx)
            [event] = receivers.select(LIMIT)
            assert isinstance(event, MessageReceived)
            with pytest.raises(SerializationError, match=why):
                event.message.to()


def test_too_large_is_no_pickle() -> None:
    """What is wrong otherwise is not called another kind of message."""
    tx, any_rx = channel(Any)
    with tx, Receiver[Any](any_rx._claim(), codec_of(Any, 100_000)) as rx:
        for wrong in ("x" * 200_000, ["x" * 70_000, "y" * 70_000]):
            tx.send(wrong)
            with pytest.raises(SerializationError, match="can't decode a message: .* larger than"):
                rx.recv(LIMIT)


def test_servers_of_another_type() -> None:
    """A server and a client of which one has a type: the server hears what is wrong, and the log of one for many."""
    with OneShotServer(type=Person) as server, connect(server.name) as tx:
        tx.send(Person("a pickle"))
        with pytest.raises(SerializationError, match="it is a pickle: only this end of the channel has a type"):
            server.accept(LIMIT)
    with OneShotServer() as server, connect(server.name, type=Person) as typed:
        typed.send(Person("no pickle"))
        with pytest.raises(
            SerializationError, match="it is no pickle: has only its sender's end of the channel a type"
        ):
            server.accept(LIMIT)


def test_the_rest_of_the_surface() -> None:
    """Many at a time, iteration, time limits, clones: as on any channel."""
    tx, rx = channel(Person)
    people = [Person(str(number), number) for number in range(3000)]
    tx.send_many(people)
    received = rx.recv_many(10, LIMIT)
    assert 1 <= len(received) <= 10
    with pytest.raises(SerializationError):
        tx.send_many([Person("kept"), typing.cast("Person", 5), Person("not sent")])
    clone, copied = tx.clone(), copy.copy(tx)
    for one in (clone, copied):
        with pytest.raises(SerializationError):
            one.send(typing.cast("Person", "x"))
    clone.send(Person("clone"))
    for one in (tx, clone, copied):
        one.close()
    assert [*received, *rx] == [*people, Person("kept"), Person("clone")]
    with pytest.raises(Disconnected):
        rx.recv(LIMIT)
    rx.close()


def test_full_and_empty() -> None:
    tx, rx = channel(bytes)
    with tx, rx:
        with pytest.raises(Empty):
            rx.recv(0.01)
        with pytest.raises(Full):
            for _ in range(10_000):
                tx.try_send(bytes(1000))
        with pytest.raises(Full):
            tx.send(bytes(1000), 0.01)
        rx.close()
        with pytest.raises(ReceiverGone):
            tx.send(b"")


@pytest.mark.parametrize("size", [65_000, 65_536, 1_000_000, 5_000_000])
def test_large_messages(size: int) -> None:
    """Those that don't fit a packet go by a segment, from several threads too."""
    tx, rx = channel(Request)
    with tx, rx:
        sending = InThread(lambda: [tx.send(Request("x" * size, anything=number)) for number in range(3)])
        for number in range(3):
            received = rx.recv(LIMIT)
            assert (len(received.text), received.anything) == (size, number)
        sending.result()
        assert not tx._open_link().outlet.segments.recycles


def test_max_size() -> None:
    """A message above the limit is refused in send, and in recv where the sender has another limit."""
    tx, rx = channel(bytes, max_size=100_000)
    with tx, rx:
        tx.send(bytes(99_000))
        assert len(rx.recv(LIMIT)) == 99_000
        with pytest.raises(SerializationError, match="max_size, 100000"):
            tx.send(bytes(100_000))
        careless = Sender[bytes](tx._open_link().retain(), codec_of(bytes))
        careless.send(bytes(100_000))
        careless.send(b"next")
        with pytest.raises(SerializationError, match="max_size, 100000"):
            rx.recv(LIMIT)
        assert rx.recv(LIMIT) == b"next"
        careless.close()
    with pytest.raises(ValueError, match="at least 1"):
        channel(bytes, max_size=0)
    with pytest.raises(TypeError, match="channels with a type"):
        channel(max_size=5)  # type: ignore[call-overload]


# -- what types there are ---------------------------------------------------------------------


class Node(msgspec.Struct):
    children: list[Node] = []
    replies: list[Sender[Node]] = []


def test_types_that_refer_to_themselves() -> None:
    tx, rx = channel(Node)
    with tx, rx:
        reply_tx, reply_rx = channel(Node)
        with reply_tx, reply_rx:
            tx.send(Node([Node([], [reply_tx])], [reply_tx]))
            node = rx.recv(LIMIT)
            assert node.children[0].replies[0] is node.replies[0]
            node.replies[0].send(Node([Node()]))
            assert reply_rx.recv(LIMIT) == Node([Node()])


T = typing.TypeVar("T")


class Envelope(msgspec.Struct, typing.Generic[T]):
    body: T
    reply: Sender[T]


@dataclasses.dataclass
class Reply:
    to: Sender[Person]


class KeyedReply(typing.TypedDict):
    to: Sender[Person]


class NamedReply(typing.NamedTuple):
    to: Sender[Person]


class One(msgspec.Struct, tag=True):
    to: Sender[Person]


class Other(msgspec.Struct, tag=True):
    memory: SharedMemory


@pytest.mark.parametrize(
    ("of", "make", "get"),
    [
        (Sender[Person], lambda tx: tx, lambda message: message),
        (Sender[Person] | None, lambda tx: tx, lambda message: message),
        (list[Sender[Person]], lambda tx: (tx, tx), lambda message: message[1]),
        (Envelope[Person], lambda tx: Envelope(Person("a"), tx), lambda message: message.reply),
        (Reply, Reply, lambda message: message.to),
        (KeyedReply, lambda tx: {"to": tx}, lambda message: message["to"]),
        (NamedReply, NamedReply, lambda message: message.to),
        (One | Other, One, lambda message: message.to),
    ],
    # Not by their repr: the addresses in it differ from one process that runs tests to another.
    ids=["itself", "optional", "in-a-list", "generic", "struct", "typed-dict", "named-tuple", "union"],
)
def test_where_endpoints_may_stand(of: Any, make: Callable[[Any], Any], get: Callable[[Any], Any]) -> None:
    """As the whole message, in containers, and in fields of all classes that there are; typed wherever it stands."""
    tx, rx = channel(of)
    reply_tx, reply_rx = channel(Person)
    with tx, rx, reply_tx, reply_rx:
        tx.send(make(reply_tx))
        received = get(rx.recv(LIMIT))
        with received:
            received.send(Person("there"))
            assert reply_rx.recv(LIMIT) == Person("there")
            with pytest.raises(SerializationError):
                received.send("no person")
        with pytest.raises(SerializationError):
            tx.send(make(tx))


@pytest.mark.parametrize(
    "of",
    [
        object,
        complex,
        list[complex],
        collections.Counter,
        "Person",
        3,
        int | Sender[int],
        Sender[object],
        dict[str, Sender[list[Receiver[object]]]],
        Receiver["Nobody"],  # type: ignore[name-defined]
        Queue,
    ],
    ids=repr,
)
def test_types_that_can_not_be_expressed(of: Any) -> None:
    """The channel can't be made: TypeError says which part it is, and no descriptor is left."""
    before = open_descriptors()
    for _ in range(2):
        with pytest.raises(TypeError, match="messages can't be of type"):
            channel(of)
    assert open_descriptors() == before


def test_without_msgspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install; channels without a type are as ever."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(ImportError, match=r"pip install 'mp_ipcchan\[msgspec\]'"):
        channel(list[typing.Annotated[int, "not seen before"]])
    tx, rx = channel()
    with tx, rx:
        tx.send(1)
        assert rx.recv(LIMIT) == 1


def test_no_type_means_pickles() -> None:
    tx, rx = channel(type=None)
    with tx, rx:
        tx.send({1j})
        assert rx.recv(LIMIT) == {1j}


# -- endpoints in messages --------------------------------------------------------------------


def test_a_reply_channel(pair: tuple[Sender[Request], Receiver[Request]]) -> None:
    """A sender in a request is copied, checks what it sends against its own type, and arrives as a Sender."""
    tx, rx = pair
    reply_tx, reply_rx = channel(Person)
    with reply_rx:
        with reply_tx:
            tx.send(Request("who?", reply_tx))
            reply_tx.send(Person("first"))
        received = rx.recv(LIMIT).reply
        assert type(received) is Sender
        received.send(Person("second"))
        with pytest.raises(SerializationError):
            received.send(typing.cast("Person", Request()))
        received.close()
        assert list(reply_rx) == [Person("first"), Person("second")]


def test_a_receiver_moves(pair: tuple[Sender[Request], Receiver[Request]]) -> None:
    """With all that waits in it, messages with descriptors and packed ones too."""
    tx, rx = pair
    inner_tx, inner_rx = channel(Request)
    memory = SharedMemory.from_bytes(b"inside")
    with inner_tx:
        for number in range(500):
            inner_tx.send(Request(str(number)))
        inner_tx.send(Request("memory", memory={"m": memory}))
        inner_tx.send(Request("x" * 100_000))
        # Some are in user space now: they came packed.
        assert inner_rx.recv(LIMIT).text == "0"
        assert inner_rx.recv_many(300, LIMIT)[0].text == "1"
        inner_tx.send(Request("late"))
    tx.send(Request(requests=inner_rx))
    with pytest.raises(EndpointMoved):
        inner_rx.recv()
    moved = rx.recv(LIMIT).requests
    assert moved is not None
    with moved:
        *numbered, with_memory, large, late = list(moved)
    left = len(numbered)
    assert [one.text for one in numbered] == [str(number) for number in range(500 - left, 500)]
    assert bytes(with_memory.memory["m"]) == b"inside"
    assert len(large.text) == 100_000
    assert late.text == "late"


def test_a_receiver_through_its_own_channel(pair: tuple[Sender[Request], Receiver[Request]]) -> None:
    tx, rx = pair
    with pytest.raises(SerializationError, match="its own channel"):
        tx.send(Request(requests=rx))
    tx.send(Request("still there"))
    assert rx.recv(LIMIT).text == "still there"


def test_a_waiting_message_with_descriptors_moves(pair: tuple[Sender[Request], Receiver[Request]]) -> None:
    """One that had been taken from the kernel and put back."""
    tx, rx = pair
    inner_tx, inner_rx = channel(Request)
    with inner_tx:
        inner_tx.send(Request(memory={"m": SharedMemory.from_bytes(b"inside"), "n": SharedMemory.from_bytes(b"2")}))
        inlet = inner_rx._open_link().inlet
        inlet.put_back(inlet.take(False))  # type: ignore[arg-type]
        tx.send(Request(requests=inner_rx))
    with typing.cast("Receiver[Request]", rx.recv(LIMIT).requests) as moved:
        received = moved.recv(LIMIT).memory
        assert {name: bytes(one) for name, one in received.items()} == {"m": b"inside", "n": b"2"}


def test_a_failed_send_moves_nothing(pair: tuple[Sender[Request], Receiver[Request]]) -> None:
    """Whatever the failure, endpoints in the message work as before, and nothing is left open."""
    tx, rx = pair
    inner_tx, inner_rx = channel(Request)
    other_tx, other_rx = channel(Person)
    other_tx.close()
    with inner_tx, inner_rx, other_rx:
        before = open_descriptors()
        for wrong, error in (
            (Request(requests=inner_rx, text=typing.cast("str", 5)), SerializationError),
            (Request(requests=inner_rx, anything=inner_tx), SerializationError),
            (Request(requests=inner_rx, reply=typing.cast("Any", inner_tx)), SerializationError),
            (Request(requests=inner_rx, reply=other_tx), EndpointClosed),
            (Request(requests=inner_rx, anything=lambda: None), SerializationError),
        ):
            with pytest.raises(error):
                tx.send(wrong)
            inner_tx.send(Request("still"))
            assert inner_rx.recv(LIMIT).text == "still"
        rx.close()
        with pytest.raises(ReceiverGone):
            tx.send(Request(requests=inner_rx))
        assert not inner_rx.closed
        assert open_descriptors() < before


def test_moved_and_closed_at_any_depth() -> None:
    tx, rx = channel(Node)
    inner_tx, inner_rx = channel(Node)
    receivers_tx, receivers_rx = channel(dict[str, list[Receiver[Node]]])
    with tx, rx, receivers_tx, receivers_rx:
        receivers_tx.send({"a": [inner_rx]})
        with pytest.raises(EndpointMoved):
            receivers_tx.send({"b": [inner_rx]})
        inner_tx.close()
        with pytest.raises(EndpointClosed):
            tx.send(Node([Node([Node([], [inner_tx])])]))
        tx.close()
        with pytest.raises(EndpointClosed):
            tx.send(Node())


def test_all_kinds_in_one_message(pair: tuple[Sender[Request], Receiver[Request]]) -> None:
    tx, rx = pair
    pickles, unpickles = channel()
    buffers, buffers_in = bytes_channel()
    read, write = os.pipe()
    memory = SharedMemory.from_bytes(b"memory")
    before = open_descriptors()
    with Fd(read) as file:
        os.close(read)
        tx.send(
            Request(
                pickles=pickles,
                unpickles=unpickles,
                buffers=[buffers, buffers.clone()],
                buffers_in=buffers_in,
                memory={"a": memory, "b": memory, "empty": SharedMemory.zeros(0)},
                file=(file,),
            )
        )
    received = rx.recv(LIMIT)
    received.pickles.send({1j})  # type: ignore[union-attr]
    assert received.unpickles.recv(LIMIT) == {1j}  # type: ignore[union-attr]
    for one in received.buffers:
        one.send(b"x")
        assert received.buffers_in.recv(LIMIT) == b"x"  # type: ignore[union-attr]
    assert received.memory["a"] is received.memory["b"]
    assert [bytes(one) for one in received.memory.values()] == [b"memory", b"memory", b""]
    os.write(write, b"through")
    os.close(write)
    with received.file[0].open() as opened:
        assert opened.read() == b"through"
    for endpoint in (received.pickles, received.unpickles, received.buffers_in, *received.buffers, pickles, buffers):
        endpoint.close()  # type: ignore[union-attr]
    assert len(open_descriptors()) < len(before)


def test_an_endpoint_of_another_channel(pair: tuple[Sender[Request], Receiver[Request]]) -> None:
    """Typed where pickles are expected, pickles where a type is, another type, another kind: refused in send."""
    tx, rx = pair
    person, _keep = channel(Person)
    pickles, _keep_too = channel()
    buffers, _ = bytes_channel()
    for wrong in (
        Request(pickles=person),
        Request(reply=pickles),
        Request(reply=typing.cast("Any", buffers)),
        Request(reply=typing.cast("Any", rx)),
        Request(reply=typing.cast("Any", 5)),
        Request(reply=typing.cast("Any", [0, 0, 1, None])),
        Request(memory={"a": typing.cast("Any", buffers)}),
    ):
        with pytest.raises(SerializationError, match="expected"):
            tx.send(wrong)
    with pytest.raises(Empty):
        rx.try_recv()


def test_many_endpoints(pair: tuple[Sender[Request], Receiver[Request]]) -> None:
    """More than the kernel takes in a packet, of one channel each: in a carrier."""
    tx, rx = pair
    memories = {str(number): SharedMemory.from_bytes(str(number).encode()) for number in range(300)}
    tx.send(Request(memory=memories))
    assert rx.recv(LIMIT).memory == memories


class Sends(msgspec.Struct):
    """Sends something itself while it is decoded: where it is checked, and where it is received."""

    number: int
    replies: list[Sender[Any]] = []

    def __post_init__(self) -> None:
        for tx in self.replies:
            tx.send(self.number)


def test_reentrant() -> None:
    tx, rx = channel(Sends)
    side_tx, side_rx = channel(Any)
    with tx, rx, side_tx, side_rx:
        tx.send(Sends(1, [side_tx]))
        assert rx.recv(LIMIT).number == 1
        assert side_rx.recv_many(10, LIMIT)[0] == 1


# -- across processes -------------------------------------------------------------------------


def serve(requests: Receiver[Request]) -> None:
    for request in requests:
        assert request.reply is not None
        request.reply.send(Person(request.text.upper(), len(request.text)))
        request.reply.close()


def serve_from(queue: Any) -> None:
    serve(queue.get())


def serve_one_from(queue: Any) -> None:
    request = queue.get().recv(LIMIT)
    request.reply.send(Person(request.text.upper(), len(request.text)))


@pytest.mark.parametrize("method", METHODS)
def test_process_arguments(method: str) -> None:
    """A typed receiver passed to a process stays typed there."""
    tx, rx = channel(Request)
    with started(context_of(method), serve, rx):
        for text in ("a", "bc"):
            reply_tx, reply_rx = channel(Person)
            tx.send(Request(text, reply_tx))
            reply_tx.close()
            assert list(reply_rx) == [Person(text.upper(), len(text))]
            reply_rx.close()
        tx.close()


def test_through_channels_of_pickles_and_queues() -> None:
    """Typed endpoints stay typed, and keep their limit."""
    tx, rx = channel(Request, max_size=1000)
    over_tx, over_rx = channel()
    with over_tx, over_rx:
        tx.send(Request("waiting"))
        over_tx.send({"tx": tx, "rx": rx})
        received = over_rx.recv(LIMIT)
        with received["tx"] as far_tx, received["rx"] as far_rx, tx:
            assert far_rx.recv(LIMIT).text == "waiting"
            for wrong in (5, Request("x" * 1000)):
                with pytest.raises(SerializationError):
                    far_tx.send(wrong)
    queue: Queue[Any] = Queue()
    tx, rx = channel(Request)
    with started(context_of("fork"), serve_from, queue):
        queue.put(rx)
        reply_tx, reply_rx = channel(Person)
        tx.send(Request("q", reply_tx))
        tx.close()
        assert reply_rx.recv(LIMIT) == Person("Q", 1)
        reply_tx.close()
        reply_rx.close()
    queue.close()


def test_through_the_stdlib() -> None:
    """The stdlib's own Queue takes typed endpoints along, too."""
    stock = multiprocessing.get_context("fork")
    queue = stock.Queue()
    tx, rx = channel(Request)
    reply_tx, reply_rx = channel(Person)
    with reply_rx:
        with started(stock, serve_one_from, queue), tx, reply_tx:
            queue.put(rx)
            tx.send(Request("s", reply_tx))
            assert reply_rx.recv(LIMIT) == Person("S", 1)
    queue.close()
    queue.join_thread()
    resource_sharer.stop(LIMIT)


def test_a_type_that_can_not_be_unpickled_there() -> None:
    """The message is gone, nothing is left open, and the channel of pickles goes on."""
    over_tx, over_rx = channel()
    with over_tx, over_rx:
        tx, rx = channel(Request)
        before = open_descriptors()
        over_tx.send([tx, rx])
        over_tx.send("next")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mp_ipcchan._channel.codec_of", _refuse)
            with pytest.raises(SerializationError, match="unknown here"):
                over_rx.recv(LIMIT)
        assert over_rx.recv(LIMIT) == "next"
        assert len(open_descriptors()) < len(before)
        with tx, pytest.raises(ReceiverGone):
            tx.send(Request())


def _refuse(*_: object) -> None:
    raise TypeError("unknown here")


def test_killed_clients() -> None:
    """What a killed process had sent arrives; what it held ends."""
    tx, rx = channel(Request)

    def client(requests: Sender[Request], go: Receiver[Any]) -> None:
        reply_tx, _reply_rx = channel(Person)
        requests.send(Request("from the child", reply_tx))
        go.recv()

    go_tx, go_rx = channel()
    process = context_of("fork").Process(target=client, args=(tx, go_rx))  # type: ignore[attr-defined]
    process.start()
    tx.close()
    with rx, go_tx:
        request = rx.recv(LIMIT)
        process.kill()
        process.join()
        process.close()
        assert request.reply is not None
        with request.reply, pytest.raises(ReceiverGone):
            request.reply.send(Person("too late"))
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def test_what_an_ended_process_left_behind() -> None:
    """A process that ends with a backlog: all of it arrives, with what it carries."""
    tx, rx = channel(Request)

    def leave(requests: Sender[Request]) -> None:
        memory = SharedMemory.from_bytes(b"left")
        for number in range(3000):
            requests.send(Request(str(number), memory={"m": memory} if number % 100 == 0 else {}))
        requests.send(Request("x" * 300_000))

    with started(context_of("fork"), leave, tx):
        pass
    tx.close()
    with rx:
        *numbered, large = list(rx)
    assert [one.text for one in numbered] == [str(number) for number in range(3000)]
    assert all(bytes(one.memory["m"]) == b"left" for one in numbered[::100])
    assert len(large.text) == 300_000
