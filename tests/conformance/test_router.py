"""Conformance 2.2 and 3: a thread that receives for many and calls back. Each test is named after its row."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import queue
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import mp_ipcchan
from mp_ipcchan import (
    Disconnected,
    EndpointMoved,
    Fd,
    Receiver,
    ReceiverGone,
    Route,
    Router,
    Sender,
    SerializationError,
    bytes_channel,
    channel,
)
from mp_ipcchan._sets import _router as module

from ._support import (
    LIMIT,
    PERSON,
    SEVEN,
    InThread,
    attempts,
    bare_fork,
    fork,
    open_descriptors,
    room_for,
)


@pytest.fixture
def router() -> Iterator[Router]:
    with Router() as router:
        yield router
        assert router.shutdown(LIMIT)


@pytest.fixture
def process_wide() -> Iterator[Router]:
    """The process's router, which this test may shut down for good."""
    try:
        yield mp_ipcchan.router()
    finally:
        mp_ipcchan.router().shutdown(LIMIT)
        module._process_wide = None


class Witness:
    """A callback that sends what it gets, and whose end can be seen: it has the only sender."""

    def __init__(self, tx: Sender[Any]) -> None:
        self.tx = tx

    def __call__(self, obj: object) -> None:
        self.tx.send(obj)

    def __del__(self) -> None:
        self.tx.close()


def witness() -> tuple[Witness, Receiver[Any]]:
    tx, rx = channel()
    return Witness(tx), rx


# -- the rows ---------------------------------------------------------------------------------


def test_R01_router_simple_global(process_wide: Router) -> None:
    """Both routes get theirs; after the shutdown a route is refused, and its callback never runs, nor is kept."""
    assert mp_ipcchan.router() is process_wide
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with ExitStack() as stack:
        tx, rx = channel()
        stack.enter_context(tx)
        tx.send(PERSON)
        process_wide.add_route(rx, got.put)
        assert got.get(timeout=LIMIT) == PERSON
        tx, rx = channel()
        stack.enter_context(tx)
        process_wide.add_route(rx, got.put)
        tx.send(42)
        assert got.get(timeout=LIMIT) == 42
        assert process_wide.shutdown(LIMIT)
        tx, rx = channel()
        stack.enter_context(tx)
        stack.enter_context(rx)
        callback, ended = witness()
        with ended:
            with pytest.raises(RuntimeError, match="shut down"):
                process_wide.add_route(rx, callback)
            del callback
            tx.send("never")
            with pytest.raises(Disconnected):
                ended.recv(LIMIT)
        assert rx.recv(LIMIT) == "never"
        assert process_wide.shutdown(LIMIT)
        assert mp_ipcchan.router() is process_wide
        assert process_wide.closed


@pytest.mark.parametrize(
    "iterations", [300, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=["little", "a million"]
)
def test_R02_router_flood(router: Router, iterations: int) -> None:
    """Channel after channel, each with a message and a route of its own: all arrive, and nothing grows."""
    forward_tx, forward_rx = channel()
    with forward_tx, forward_rx:

        def once(number: int) -> None:
            tx, rx = channel()
            tx.send(number)
            router.add_route(rx, forward_tx.send)
            assert forward_rx.recv(LIMIT) == number
            tx.close()

        def settled() -> int:
            for _ in attempts():
                if len(router._routes) == 0:
                    return len(open_descriptors())
            return -1

        for number in range(100):
            once(number)
        before = settled()
        memory = 0
        for number in range(iterations):
            once(number)
            if number == iterations // 10:
                memory = resident()
        assert settled() == before
        assert resident() - memory <= 8 << 20


def resident() -> int:
    """The memory of this process now (bytes); its peak may be another test's."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_R03_router_shutdown() -> None:
    before = set(threading.enumerate())
    router = Router()
    assert set(threading.enumerate()) - before == {router._thread}
    assert router.shutdown() is True
    assert set(threading.enumerate()) == before
    assert repr(router) == "<mp_ipcchan.Router shut down>"


def test_route_to_what_is_no_function(router: Router) -> None:
    """Said at once; the receiver is still the caller's."""
    tx, rx = channel()
    with tx, rx:
        with pytest.raises(TypeError, match="a function to call"):
            router.add_route(rx, 5)  # type: ignore[arg-type]
        tx.send(1)
        assert rx.recv(LIMIT) == 1


def test_R04_routing_to_a_queue(router: Router) -> None:
    """What was sent before goes into the queue, then a message that is no good as its error, then the end."""
    tx, rx = channel()
    tx.send(PERSON)
    got = router.route_to_queue(rx)
    assert isinstance(got, queue.SimpleQueue)
    assert got.get(timeout=LIMIT) == PERSON
    tx.send(Undecodable())
    tx.send("next")
    tx.close()
    assert isinstance(got.get(timeout=LIMIT), SerializationError)
    assert got.get(timeout=LIMIT) == "next"
    assert isinstance(got.get(timeout=LIMIT), Disconnected)

    tx, rx = bytes_channel()
    with tx:
        own: queue.Queue[Any] = queue.Queue()
        assert router.route_to_queue(rx, own) is own
        tx.send(SEVEN)
        assert own.get(timeout=LIMIT) == SEVEN


class Undecodable:
    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise RuntimeError("not today")


def test_R05_router_once_handler(router: Router) -> None:
    """S31: the first message runs it, and it is let go of; later ones are dropped, and their senders don't notice."""
    tx, rx = channel()
    callback, acks = witness()
    sub_tx, sub_rx = channel()
    with tx, acks, sub_rx:
        route = router.add_one_shot_route(rx, callback)
        del callback
        tx.send(1)
        assert acks.recv(LIMIT) == 1
        tx.send([2, sub_tx])
        sub_tx.close()
        with pytest.raises(Disconnected):
            acks.recv(LIMIT)
        # F5: what the swallowed message carries is closed.
        with pytest.raises(Disconnected):
            sub_rx.recv(LIMIT)
        tx.send(3)
        assert not route.closed
        route.close()
        with pytest.raises(ReceiverGone):
            tx.send(4)


@pytest.mark.parametrize("threads", [False, True], ids=["R06", "R07"])
def test_R06_R07_router_multiplexing(router: Router, threads: bool) -> None:
    """Two channels and two routes; with each send in a thread of its own that closes its sender, too."""
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(tx: Sender[Any], number: int) -> None:
        with tx:
            tx.send(number)

    sending = []
    for number in range(2):
        tx, rx = channel()
        if threads:
            sending.append(InThread(send, tx, number))
        else:
            send(tx, number)
        router.add_route(rx, got.put)
    assert {got.get(timeout=LIMIT) for _ in range(2)} == {0, 1}
    for thread in sending:
        thread.result()


@pytest.mark.parametrize("clones", [0, 3], ids=["R08", "R09"])
def test_R08_R09_drops_callbacks_when_the_senders_end(router: Router, clones: int) -> None:
    """The callback is freed once the last sender, or clone, is closed, and not before."""
    tx, rx = channel()
    copies = [tx.clone() for _ in range(clones)]
    ends: list[int] = []
    freed = threading.Event()

    class Callback:
        def __call__(self, obj: object) -> None: ...

        def __del__(self) -> None:
            ends.append(42)
            freed.set()

    gc.disable()
    try:
        router.add_route(rx, Callback())
        for copy in copies:
            copy.close()
        assert ends == []
        tx.send("still there")
        tx.close()
        assert freed.wait(LIMIT)
    finally:
        gc.enable()
    assert ends == [42]


def test_R10_router_big_data(router: Router) -> None:
    people = [("Patrick Walton", number) for number in range(65_536)]
    tx, rx = channel()
    got = router.route_to_queue(rx)
    with tx:
        sending = InThread(tx.send, people)
        assert got.get(timeout=LIMIT) == people
        sending.result()


# -- S29, S30: order, activity, shutdown --------------------------------------------------------


def test_S29_one_thread_in_order(router: Router) -> None:
    """Callbacks run in the router's thread, those of a receiver in its order; a route works once it was added."""
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()
    senders = []
    for number in range(5):
        tx, rx = channel()
        senders.append(tx)
        router.add_route(
            rx,
            lambda obj, number=number: got.put((number, obj, threading.current_thread())),  # type: ignore[misc]
            on_close=lambda number=number: got.put((number, None, threading.current_thread())),  # type: ignore[misc]
        )
    for message in range(200):
        for tx in senders:
            tx.send(message)
    for tx in senders:
        tx.close()
    found: dict[int, list[Any]] = {number: [] for number in range(5)}
    for _ in range(5 * 201):
        number, obj, thread = got.get(timeout=LIMIT)
        assert thread is router._thread
        found[number].append(obj)
    assert all(values == [*range(200), None] for values in found.values())


def test_S29_closing_a_route(router: Router) -> None:
    """``Route.close`` drops receiver and callback, not the others, and ``on_close`` isn't called for it."""
    tx, rx = channel()
    other_tx, other_rx = channel()
    callback, acks = witness()
    closed: list[None] = []
    with tx, other_tx, acks:
        got = router.route_to_queue(other_rx)
        route = router.add_route(rx, callback, on_close=lambda: closed.append(None))
        del callback
        assert isinstance(route, Route)
        assert rx.closed
        with pytest.raises(EndpointMoved):
            rx.recv()
        tx.send(1)
        assert acks.recv(LIMIT) == 1
        assert not route.closed
        route.close()
        route.close()
        assert route.closed
        with pytest.raises(ReceiverGone):
            tx.send(2)
        with pytest.raises(Disconnected):
            acks.recv(LIMIT)
        other_tx.send("goes on")
        assert got.get(timeout=LIMIT) == "goes on"
        assert closed == []


def test_S29_closing_a_route_from_its_callback(router: Router) -> None:
    """Nothing that had come with that message is called back any more."""
    tx, rx = channel()
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def callback(obj: object) -> None:
        got.put(obj)
        route.close()

    with tx:
        tx.send_many(range(50))
        with router._routes._lock:
            # The thread waits until ``route`` is there.
            route = router.add_route(rx, callback)
        for _ in attempts():
            if route.closed:
                break
        with pytest.raises(ReceiverGone):
            tx.send(1)
    assert router.shutdown(LIMIT)
    assert [got.get_nowait(), got.empty()] == [0, True]


def test_S30_shutdown_drops_routes(router: Router) -> None:
    """At once, though a callback runs that doesn't end; the senders get errors, and shutdown's timeout holds."""
    tx, rx = channel()
    other_tx, other_rx = channel()
    running, go_on = threading.Event(), threading.Event()

    def callback(_: object) -> None:
        running.set()
        go_on.wait(LIMIT)

    ended, ends = witness()
    with tx, other_tx, ends:
        router.add_route(rx, callback)
        router.add_route(other_rx, ended)
        del ended
        tx.send(1)
        assert running.wait(LIMIT)
        other_tx.send("comes too late")
        assert router.shutdown(0.01) is False
        for sender in (tx, other_tx):
            with pytest.raises(ReceiverGone):
                sender.send(2)
        with pytest.raises(Disconnected):
            ends.recv(LIMIT)
        go_on.set()
        assert router.shutdown(LIMIT) is True


# -- F10: what callbacks may do -----------------------------------------------------------------


def test_F10_failing_callbacks(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a callback raises, its route and the others go on; it is reported, or logged."""
    errors: queue.SimpleQueue[Any] = queue.SimpleQueue()
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def fail(obj: Any) -> None:
        if isinstance(obj, type):
            raise obj("from the callback")
        got.put(obj)

    def fail_again(error: Exception) -> None:
        raise error

    with caplog.at_level(logging.ERROR, "mp_ipcchan"):
        tx, rx = channel()
        router.add_route(rx, fail, on_error=errors.put)
        tx.send(ValueError)
        assert isinstance(errors.get(timeout=LIMIT), ValueError)
        tx.send(Undecodable())
        error = errors.get(timeout=LIMIT)
        assert isinstance(error, SerializationError)
        assert isinstance(error.__cause__, RuntimeError)
        del error
        assert not caplog.records
        for raised in (SystemExit, KeyboardInterrupt):
            tx.send(raised)
        tx.send("goes on")
        assert got.get(timeout=LIMIT) == "goes on"
        tx.close()
        tx, rx = channel()
        router.add_route(rx, fail, on_error=fail_again, on_close=lambda: fail(LookupError))
        tx.send(ValueError)
        tx.send("goes on")
        assert got.get(timeout=LIMIT) == "goes on"
        tx.close()
        tx, rx = channel()
        router.add_route(rx, fail)
        tx.send(OSError)
        tx.send("goes on")
        assert got.get(timeout=LIMIT) == "goes on"
        tx.close()
        assert router.shutdown(LIMIT)
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert logged[:3] == [SystemExit, KeyboardInterrupt, ValueError]
    assert sorted(one.__name__ for one in logged[3:] if one) in (["LookupError", "OSError"], ["OSError"])
    caplog.clear()


def test_F10_adding_routes_from_callbacks(router: Router) -> None:
    """A callback adds more routes than the kernel would hold wake-ups for, each of which adds the next."""
    count = 1000
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def add_next(number: int) -> None:
        if number == count:
            got.put(number)
            return
        tx, rx = channel()
        tx.send(number + 1)
        router.add_route(rx, add_next)
        tx.close()

    def add_many(_: object) -> None:
        for number in range(count):
            tx, rx = channel()
            router.add_route(rx, got.put)
            tx.send(-number)
            tx.close()

    for callback in (add_next, add_many):
        tx, rx = channel()
        tx.send(0)
        router.add_route(rx, callback)
        tx.close()
    assert sorted(got.get(timeout=LIMIT) for _ in range(count + 1)) == [*range(1 - count, 1), count]


def test_F10_shutdown_from_a_callback() -> None:
    """A callback that shuts its router down returns, and is the last that runs."""
    router = Router()
    tx, rx = channel()
    got: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def callback(obj: object) -> None:
        got.put((obj, router.shutdown()))

    with tx:
        tx.send_many(range(50))
        router.add_route(rx, callback)
        assert got.get(timeout=LIMIT) == (0, False)
        assert router.shutdown(LIMIT) is True
        with pytest.raises(ReceiverGone):
            tx.send(1)
        with pytest.raises(RuntimeError, match="shut down"):
            router.add_one_shot_route(rx, callback)
    assert got.empty()


def test_F10_what_a_callback_does_not_take_is_closed(router: Router) -> None:
    """F5: endpoints in a message for a callback that drops it."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with tx, sub_rx:
        router.add_route(rx, lambda _: None)
        with sub_tx:
            tx.send((sub_tx, Fd(0)))
        with pytest.raises(Disconnected):
            sub_rx.recv(LIMIT)


# -- the router itself ----------------------------------------------------------------------------


def test_router_that_is_let_go_of() -> None:
    """Nobody holds it: its thread ends, and its routes are dropped."""
    router = Router()
    thread = router._thread
    tx, rx = channel()
    with tx:
        router.add_route(rx, print)
        del router
        gc.collect()
        thread.join(LIMIT)
        assert not thread.is_alive()
        with pytest.raises(ReceiverGone):
            tx.send(1)


def test_routers_take_receivers_only(router: Router) -> None:
    reading, writing = multiprocessing.Pipe(duplex=False)
    with reading, writing, pytest.raises(TypeError, match="takes receivers"):
        router.add_route(reading, print)  # type: ignore[arg-type]


def test_opaque_routes(router: Router) -> None:
    tx, rx = bytes_channel()
    with tx:
        got = router.route_to_queue(rx.to_opaque())
        tx.send(SEVEN)
        assert got.get(timeout=LIMIT) == SEVEN


def test_S23_bare_fork_leaves_the_routes_to_the_parent(process_wide: Router) -> None:
    """In the child the parent's router is shut down, and ``router()`` is another one."""
    tx, rx = channel()
    done_tx, done_rx = channel()
    with tx, done_tx, done_rx:
        got = process_wide.route_to_queue(rx)

        def in_child() -> None:
            assert process_wide.closed
            assert process_wide.shutdown() is True
            with pytest.raises(RuntimeError, match="shut down"):
                process_wide.add_route(done_rx, print)
            own = mp_ipcchan.router()
            assert own is not process_wide
            child_tx, child_rx = channel()
            child_tx.send("routed")
            done_tx.send(own.route_to_queue(child_rx).get(timeout=LIMIT))
            assert own.shutdown(LIMIT)

        with bare_fork(in_child) as child:
            assert done_rx.recv(LIMIT) == "routed"
            assert child.join() == 0
        tx.send("still here")
        assert got.get(timeout=LIMIT) == "still here"


def route_in_child(rx: Receiver[Any], tx: Sender[Any]) -> None:
    tx.send(mp_ipcchan.router().route_to_queue(rx).get(timeout=LIMIT))


def test_S23_context_fork(process_wide: Router) -> None:
    """A child of our context routes by a router of its own, while the parent's goes on."""
    tx, rx = channel()
    to_child, in_child = channel()
    from_child, told = channel()
    with tx, to_child, from_child, told:
        got = process_wide.route_to_queue(rx)
        with fork(route_in_child, in_child, from_child) as child:
            to_child.send("to the child")
            assert told.recv(LIMIT) == "to the child"
            assert child.join() == 0
        tx.send("still here")
        assert got.get(timeout=LIMIT) == "still here"


ENDING = """
import sys, threading, time
import mp_ipcchan

blocked = threading.Event()
def block(_):
    blocked.set()
    time.sleep(1000)

tx, rx = mp_ipcchan.channel()
mp_ipcchan.router().add_route(rx, block if sys.argv[1] == "blocked" else print)
other = mp_ipcchan.Router()
tx2, rx2 = mp_ipcchan.channel()
other.add_route(rx2, lambda obj: None)
if sys.argv[1] == "blocked":
    tx.send(1)
    blocked.wait()
"""


@pytest.mark.parametrize("state", ["idle", "blocked"])
def test_S35_interpreter_ends_with_its_routers(state: str) -> None:
    """Routers, idle or in a callback, don't keep a program from ending, and say nothing."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", ENDING, state], env=environment, capture_output=True, timeout=LIMIT, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_message_with_files_waits_for_room(router: Router) -> None:
    """Where there are no descriptors for what a message brings, ``on_error`` hears of it until it can be received."""
    tx, rx = channel()
    warm_tx, warm_rx = channel()
    found: queue.Queue[Any] = queue.Queue()
    errors: queue.Queue[Exception] = queue.Queue()
    with tx, warm_tx, open(os.devnull, "rb") as file, Fd(file) as fd:
        router.add_route(warm_rx, found.put)
        warm_tx.send("what the router needs is open")
        assert found.get(timeout=LIMIT) == "what the router needs is open"
        tx.send(fd)
        tx.send("next")
        with room_for(0):
            router.add_route(rx, found.put, on_error=errors.put)
            for _ in range(2):
                assert "still there" in str(errors.get(timeout=LIMIT))
        with found.get(timeout=LIMIT) as received:
            assert os.fstat(received.fileno()).st_rdev == os.fstat(file.fileno()).st_rdev
        assert found.get(timeout=LIMIT) == "next"
