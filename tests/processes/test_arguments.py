"""What a process is given: endpoints, connections, queues and files as arguments, by every way to start it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from multiprocessing import popen_fork
from pathlib import Path
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
    Queue,
    Receiver,
    ReceiverGone,
    Sender,
    SimpleQueue,
    bytes_channel,
    channel,
)

from ..conformance._support import LIMIT, bare_fork, open_descriptors, pattern
from ._support import context_of, join, nothing, running, started


class Box:
    """An object with attributes."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside: object) -> None:
        self.inside = inside


class Node(list[Any]):
    """A list with attributes, which may contain itself."""

    rx: Receiver[Any]


# -- a receiver moves, a sender is copied -----------------------------------------------------


def relay(rx: Receiver[Any], tx: Sender[Any]) -> None:
    """Send on what comes, until the last sender is gone."""
    with rx, tx:
        for message in rx:
            tx.send(message)


def relay_found(find: str, *args: Any, **kwargs: Any) -> None:
    """As ``relay``, where the endpoints are somewhere in the arguments."""
    rx, tx = eval(find, {"args": args, "kwargs": kwargs})
    relay(rx, tx)


def check_relayed(tx: Sender[Any], rx: Receiver[Any], moved: Receiver[Any], copied: Sender[Any]) -> None:
    """The child of ``relay`` has been started: it has the receiver, and a copy of the sender; streams end."""
    for call in (moved.recv, moved.try_recv, moved.fileno):
        with pytest.raises(EndpointMoved):
            call()
    assert moved.closed
    assert not copied.closed
    with copied:
        tx.send("through the child")
        assert rx.recv(LIMIT) == "through the child"
        copied.send("from here")
        assert rx.recv(LIMIT) == "from here"
    tx.close()
    with pytest.raises(Disconnected):
        rx.recv(LIMIT)


PLACES: dict[str, Callable[[Any, Any], tuple[str, tuple[Any, ...], dict[str, Any]]]] = {
    "args": lambda rx, tx: ("args", (rx, tx), {}),
    "kwargs": lambda rx, tx: ("(kwargs['rx'], kwargs['tx'])", (), {"rx": rx, "tx": tx}),
    "containers": lambda rx, tx: ("(args[0][1]['deep'][0], kwargs['x'][0])", ([0, {"deep": (rx,)}],), {"x": [tx]}),
    "attributes": lambda rx, tx: ("(args[0].box.rx, args[0].tx)", (Box(box=Box(rx=rx), tx=tx),), {}),
    "slots": lambda rx, tx: ("args[0].inside", (Slotted((rx, tx)),), {}),
    "keys and sets": lambda rx, tx: ("(next(iter(args[0])), next(iter(args[1])))", ({rx: 1}, {tx}), {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_endpoints_are_found(place: str, start_method: str) -> None:
    """In args, kwargs, containers, attributes, slots, keys: the receiver moves and the sender is copied."""
    tx, moved = channel()
    copied, rx = channel()
    find, args, kwargs = PLACES[place](moved, copied)
    with tx, rx, started(context_of(start_method), relay_found, find, *args, **kwargs):
        check_relayed(tx, rx, moved, copied)


def relay_node(node: Any) -> None:
    assert node[0] is node
    relay(node.rx, node[1])


def test_cycles(start_method: str) -> None:
    """In a list that contains itself."""
    tx, moved = channel()
    copied, rx = channel()
    node = Node()
    node += [node, copied]
    node.rx = moved
    with tx, rx, started(context_of(start_method), relay_node, node):
        check_relayed(tx, rx, moved, copied)


def test_closure() -> None:
    """In the variables, and defaults, of a function that only fork can be given."""
    tx, moved = channel()
    copied, rx = channel()

    def target(default: Sender[Any] = copied) -> None:
        relay(moved, default)

    with tx, rx, started(context_of("fork"), target):
        check_relayed(tx, rx, moved, copied)


class Relay:
    def __init__(self, rx: Receiver[Any], tx: Sender[Any]) -> None:
        self.rx, self.tx = rx, tx

    def run(self) -> None:
        relay(self.rx, self.tx)


def test_bound_method(start_method: str) -> None:
    """In the object whose method is the target."""
    tx, moved = channel()
    copied, rx = channel()
    with tx, rx, started(context_of(start_method), Relay(moved, copied).run):
        check_relayed(tx, rx, moved, copied)


class ForkRelay(context_of("fork").Process):  # type: ignore[misc]
    rx: Receiver[Any]
    tx: Sender[Any]

    def run(self) -> None:
        relay(self.rx, self.tx)


class SpawnRelay(context_of("spawn").Process):  # type: ignore[misc]
    run = ForkRelay.run


class ForkserverRelay(context_of("forkserver").Process):  # type: ignore[misc]
    run = ForkRelay.run


@pytest.mark.parametrize("cls", [ForkRelay, SpawnRelay, ForkserverRelay])
def test_process_subclass(cls: Any) -> None:
    """In the attributes of a process object."""
    tx, moved = channel()
    copied, rx = channel()
    process = cls()
    process.rx, process.tx = moved, copied
    with tx, rx, running(process):
        check_relayed(tx, rx, moved, copied)
        join(process)


def relay_bytes(rx: BytesReceiver, tx: BytesSender) -> None:
    with rx, tx:
        for message in rx:
            tx.send(message)


def test_bytes_channels(start_method: str) -> None:
    """Channels of buffers are given as those of objects are."""
    tx, moved = bytes_channel()
    copied, rx = bytes_channel()
    big = pattern(1 << 20)
    with tx, rx:
        tx.send(b"before")
        with started(context_of(start_method), relay_bytes, moved, copied):
            copied.close()
            tx.send(big)
            tx.close()
            assert [rx.recv(LIMIT), rx.recv(LIMIT)] == [b"before", big]
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
            with pytest.raises(EndpointMoved):
                moved.recv(LIMIT)


def test_receiver_moves_with_what_waits(start_method: str) -> None:
    """Unread messages go along: in the kernel, unpacked already, large, and with endpoints in them."""
    tx, moved = channel()
    copied, rx = channel()
    inner_tx, inner_rx = channel()
    big = pattern(300_000)
    with tx, rx, copied, inner_rx:
        tx.send_many(range(100))
        tx.send_many([*range(100, 150), inner_tx, big, *range(150, 200)])
        inner_tx.close()
        # Packed messages that the receiver has taken from the kernel wait in the process.
        assert [moved.recv(LIMIT) for _ in range(110)] == list(range(110))
        with started(context_of(start_method), relay, moved, copied):
            copied.close()
            assert [rx.recv(LIMIT) for _ in range(40)] == list(range(110, 150))
            with rx.recv(LIMIT) as came:
                came.send("inside")
            assert inner_rx.recv(LIMIT) == "inside"
            assert rx.recv(LIMIT) == big
            assert [rx.recv(LIMIT) for _ in range(50)] == list(range(150, 200))
            tx.close()
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
        with pytest.raises(Disconnected):
            inner_rx.recv(LIMIT)


def test_receiver_with_a_backlog_behind(start_method: str) -> None:
    """What the kernel didn't take before the start comes after what it did, and none twice."""
    tx, moved = channel()
    copied, rx = channel()
    count = 20_000
    with tx, rx:
        for number in range(count):
            tx.send(number)
        with started(context_of(start_method), relay, moved, copied):
            copied.close()
            tx.send(count)
            tx.close()
            assert [rx.recv(LIMIT) for _ in range(count + 1)] == list(range(count + 1))
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)


def send_from_two(first: Sender[int], second: Sender[int]) -> None:
    first.send(1)
    first.close()
    second.send(2)


def test_same_sender_twice(start_method: str) -> None:
    """Two handles on one channel: each is closed by itself in the child, too."""
    tx, rx = channel()
    clone = tx.clone()
    with rx, started(context_of(start_method), send_from_two, tx, clone):
        tx.close()
        clone.close()
        assert [rx.recv(LIMIT), rx.recv(LIMIT)] == [1, 2]
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def same(tx: Sender[bool], one: Receiver[Any], other: Receiver[Any]) -> None:
    tx.send(one is other)
    tx.send(one.recv(LIMIT))


def test_same_object_twice(start_method: str) -> None:
    """One receiver object in two places is one object there, too."""
    tx, rx = channel()
    to_child, moved = channel()
    with tx, rx, to_child, started(context_of(start_method), same, tx, moved, moved):
        to_child.send("once")
        assert rx.recv(LIMIT) is True
        assert rx.recv(LIMIT) == "once"


# -- what a child isn't given -----------------------------------------------------------------


def say_and_wait(tx: Sender[Any], rx: Receiver[Any]) -> None:
    tx.send("here")
    with pytest.raises(Disconnected):
        rx.recv(LIMIT)


def test_others_are_closed_in_the_child(start_method: str) -> None:
    """Streams end while a child lives that wasn't given their ends."""
    tx, rx = channel()
    hold, held = channel()
    other_tx, other_rx = channel()
    third_tx, third_rx = channel()
    with rx, started(context_of(start_method), say_and_wait, tx, held):
        tx.close()
        assert rx.recv(LIMIT) == "here"
        other_tx.close()
        with pytest.raises(Disconnected):
            other_rx.recv(LIMIT)
        third_rx.close()
        with pytest.raises(ReceiverGone):
            third_tx.send("nobody")
        hold.close()
    other_rx.close()
    third_tx.close()


KEPT: list[Any] = []


def use_what_was_not_given(queue: Queue[Any]) -> None:
    errors = []
    for call in (partial(KEPT[0].send, 1), partial(KEPT[1].recv, LIMIT)):
        try:
            call()
        except EndpointClosed:
            errors.append("closed")
    queue.put(errors)


def test_use_of_what_was_not_given() -> None:
    """A forked child finds endpoints that it wasn't given closed."""
    queue: Queue[Any] = Queue()
    with contextlib.ExitStack() as stack:
        KEPT[:] = [stack.enter_context(end) for end in channel()]
        with started(context_of("fork"), use_what_was_not_given, queue):
            assert queue.get(timeout=LIMIT) == ["closed", "closed"]
        KEPT[0].send("still open here")
        assert KEPT[1].recv(LIMIT) == "still open here"
    KEPT.clear()
    queue.close()


def use_what_was_inherited() -> None:
    queue, connection = KEPT
    queue.put("from the child")
    connection.send("from the child")


def test_inherited_queues_and_connections() -> None:
    """Those stay open and usable in a forked child, as the stdlib's do."""
    queue: Queue[Any] = Queue()
    near, far = context_of("fork").Pipe()
    KEPT[:] = [queue, far]
    with near, far:
        with started(context_of("fork"), use_what_was_inherited):
            assert queue.get(timeout=LIMIT) == "from the child"
            assert near.poll(LIMIT)
            assert near.recv() == "from the child"
    KEPT.clear()
    queue.close()


def test_bare_fork_keeps_both_ends() -> None:
    """After ``os.fork`` both processes hold everything, and a stream ends when both have closed it."""
    tx, rx = channel()
    back_tx, back_rx = channel()

    def in_child() -> None:
        assert rx.recv(LIMIT) == "to the child"
        back_tx.send("to the parent")
        rx.close()

    with tx, rx, back_rx:
        with bare_fork(in_child) as child:
            tx.send("to the child")
            assert back_rx.recv(LIMIT) == "to the parent"
            assert child.join() == 0
        tx.send("to myself")
        assert rx.recv(LIMIT) == "to myself"
        back_tx.close()
        with pytest.raises(Disconnected):
            back_rx.recv(LIMIT)


# -- failures and numbers ---------------------------------------------------------------------


class Refused(Exception):
    pass


class Unpicklable:
    def __reduce__(self) -> Any:
        raise Refused


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_failed_start(method: str) -> None:
    """An argument that can't be pickled leaves the receivers here, with their messages in order, and no descriptors."""
    tx, rx = channel()
    inner_tx, inner_rx = channel()
    with tx, rx, inner_tx, inner_rx:
        tx.send_many([*range(10), inner_tx, *range(10, 20)])
        assert rx.recv(LIMIT) == 0
        before = open_descriptors()
        process = context_of(method).Process(  # type: ignore[attr-defined]
            target=nothing, args=(rx, [inner_rx], tx, Unpicklable(), rx)
        )
        for _ in range(3):
            with pytest.raises(Refused):
                process.start()
            assert open_descriptors() == before
        assert [rx.recv(LIMIT) for _ in range(9)] == list(range(1, 10))
        with rx.recv(LIMIT) as came:
            came.send("inside")
        assert inner_rx.recv(LIMIT) == "inside"
        assert [rx.recv(LIMIT) for _ in range(10)] == list(range(10, 20))


def test_failed_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process can be made, the receiver stays here, with its messages in order."""

    def refuse(*_: object) -> None:
        raise BlockingIOError

    tx, rx = channel()
    with tx, rx:
        tx.send_many(range(10))
        assert rx.recv(LIMIT) == 0
        process = context_of("fork").Process(target=nothing, args=(rx,))  # type: ignore[attr-defined]
        with monkeypatch.context() as patched, pytest.raises(BlockingIOError):
            patched.setattr(popen_fork.Popen, "_launch", refuse)
            process.start()
        assert [rx.recv(LIMIT) for _ in range(9)] == list(range(1, 10))


def test_moved_and_closed_endpoints_are_refused(start_method: str) -> None:
    """An endpoint that is no more can't be given to a process, and whoever starts it hears of that."""
    tx, rx = channel()
    tx.close()
    rx.close()
    for end in (tx, rx):
        process = context_of(start_method).Process(target=nothing, args=(end,))  # type: ignore[attr-defined]
        with pytest.raises(EndpointClosed):
            process.start()


def answer_all(rxs: list[Receiver[int]], txs: list[Sender[int]]) -> None:
    for rx, tx in zip(rxs, txs, strict=True):
        tx.send(rx.recv(LIMIT) + 1)


def test_thousand_endpoints(start_method: str) -> None:
    """500 receivers and 500 senders in one start."""
    questions = [channel() for _ in range(500)]
    answers = [channel() for _ in range(500)]
    for number, (tx, _) in enumerate(questions):
        tx.send(number)
    before = len(open_descriptors())
    with started(context_of(start_method), answer_all, [rx for _, rx in questions], [tx for tx, _ in answers]):
        assert all(rx.closed for _, rx in questions)
        assert len(open_descriptors()) <= before - 500 + 2
        for tx, _ in answers:
            tx.close()
        for number, (_, rx) in enumerate(answers):
            assert rx.recv(LIMIT) == number + 1
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
    for tx, rx in questions + answers:
        tx.close()
        rx.close()


# -- everything else that travels -------------------------------------------------------------


def send_to_connection(connection: Connection) -> None:
    connection.send(("from the child", connection.recv()))


def test_connection(start_method: str) -> None:
    """A connection is given as the stdlib's is: both have it, and it ends with the last."""
    near, far = context_of(start_method).Pipe()
    with near, far:
        with started(context_of(start_method), send_to_connection, far):
            near.send("from the parent")
            assert near.poll(LIMIT)
            assert near.recv() == ("from the child", "from the parent")
        far.close()
        with pytest.raises(EOFError):
            near.recv()


def swap(queue: Any, back: Any) -> None:
    for _ in range(100):
        back.put(queue.get())


@pytest.mark.parametrize("kind", [Queue, JoinableQueue, SimpleQueue])
def test_queue(kind: Callable[[], Any], start_method: str) -> None:
    """Queues of every kind are given by every way."""
    queue, back = kind(), kind()
    with started(context_of(start_method), swap, queue, back):
        for number in range(100):
            queue.put(number)
        assert [back.get() for _ in range(100)] == list(range(100))
    queue.close()
    back.close()


def work_off(queue: JoinableQueue[Any], done: Sender[Any]) -> None:
    while (task := queue.get(timeout=LIMIT)) is not None:
        done.send(task)
        queue.task_done()
    queue.task_done()


def test_joinable_queue_with_bound(start_method: str) -> None:
    """The bound and the count of tasks hold across the processes."""
    queue: JoinableQueue[Any] = JoinableQueue(2)
    tx, rx = channel()
    with rx, started(context_of(start_method), work_off, queue, tx):
        tx.close()
        for number in range(100):
            queue.put(number, timeout=LIMIT)
        queue.put(None, timeout=LIMIT)
        queue.join()
        assert list(rx) == list(range(100))
        assert queue.empty()
    queue.close()


def append_line(fd: Fd) -> None:
    with fd.open("wb") as file:
        file.write(b"from the child\n")


def test_fd(start_method: str, tmp_path: Path) -> None:
    """An open file is given by copy."""
    path = tmp_path / "file"
    with path.open("wb") as file, Fd(file) as fd:
        file.write(b"from the parent\n")
        file.flush()
        with started(context_of(start_method), append_line, fd):
            pass
        assert not fd.closed
    assert path.read_bytes() == b"from the parent\nfrom the child\n"


def _use_what_is_there(tx: Sender[str]) -> None:
    try:
        kept[0].recv()
    except EndpointClosed as error:
        tx.send(str(error))


#: What a forked child finds in its globals.
kept: list[Receiver[int]] = []


def test_what_was_not_passed_says_so() -> None:
    """A global that a forked child has inherited is closed there, and says why."""
    answers_tx, answers = channel()
    tx, rx = channel()
    kept.append(rx)
    with tx, rx, answers:
        with started(context_of("fork"), _use_what_is_there, answers_tx):
            answers_tx.close()
            assert "was not passed to this process" in answers.recv(LIMIT)
    kept.clear()
