"""A signal's handler that sends, or raises, at any instant: nothing is lost, doubled or counted wrongly."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue as stdlib
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import count, repeat, starmap
from types import FrameType
from typing import Any

import pytest

from mp_ipcchan import (
    Disconnected,
    Empty,
    Full,
    JoinableQueue,
    Pipe,
    Queue,
    Sender,
    SerializationError,
    ShutDown,
    _drainer,
    bytes_channel,
    channel,
)

from ..conformance._support import finalising, open_descriptors
from ..conformance._support import interrupted as interrupted_finalisers

#: Seconds that a test goes on for; what it looks for shows within a tenth of that where it is broken.
LONG = 1.5
LIMIT = 30.0


class Stop(KeyboardInterrupt):
    """What the handler raises, as Ctrl-C does."""


@contextmanager
def handling(handler: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_handler_that_sends() -> None:
    """A handler may send on the very channel whose ``send`` it interrupts."""
    tx, rx = channel()
    received: list[tuple[str, int]] = []
    reader = threading.Thread(target=lambda: received.extend(rx))
    reader.start()
    by_handler = by_main = 0

    def handle(*_: object) -> None:
        nonlocal by_handler
        tx.send(("handler", by_handler))
        by_handler += 1
        # Armed again only now: a handler that interrupts itself would count wrongly.
        signal.setitimer(signal.ITIMER_REAL, 0.003)

    with handling(handle):
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            tx.send(("main", by_main))
            by_main += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    tx.close()
    reader.join(LIMIT)
    rx.close()
    for who, many in (("main", by_main), ("handler", by_handler)):
        assert [number for name, number in received if name == who] == list(range(many))


def _wait_in(name: str) -> None:
    """Wait for a message that nobody sends."""
    tx, rx = channel()
    queue: Queue[int] = Queue()
    ways: dict[str, Callable[[], object]] = {
        "recv": rx.recv,
        "recv in time": lambda: rx.recv(LIMIT),
        "recv_many": lambda: rx.recv_many(3),
        "for": lambda: list(rx),
        "get": queue.get,
        "get in time": lambda: queue.get(timeout=LIMIT),
        "get_many": lambda: queue.get_many(3),
    }
    with tx, rx, closing(queue):
        ways[name]()


@pytest.mark.parametrize("name", ["recv", "recv in time", "recv_many", "for", "get", "get in time", "get_many"])
def test_traceback_of_who_is_interrupted_while_waiting(name: str) -> None:
    """It tells of the interruption alone, not of the look before in vain; and of what the caller was handling."""

    def handle(*_: object) -> None:
        raise Stop

    with handling(handle):
        with pytest.raises(Stop) as caught:
            # Long after the last look, which takes microseconds.
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            _wait_in(name)
        assert caught.value.__context__ is None
        with pytest.raises(Stop) as caught:
            try:
                raise LookupError
            except LookupError:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                _wait_in(name)
        assert type(caught.value.__context__) is LookupError


@pytest.mark.parametrize("make", [lambda: Queue(50), Queue, JoinableQueue], ids=["bounded", "plain", "joinable"])
def test_handler_that_raises_in_put(make: Callable[[], Queue[int]]) -> None:
    """Interrupted at any instant, ``put`` has put the message or has not; the counts say which."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    queue = make()

    armed = False

    def handle(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Stop

    with handling(handle):
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            try:
                # A signal that comes late finds the handler disarmed.
                armed = True
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 6e-5))
                for number in range(50):
                    queue.put(number)
                time.sleep(0.001)
                armed = False
            except Stop:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            with pytest.raises(stdlib.Empty):
                while True:
                    queue.get(timeout=0.002)
    assert queue.qsize() == 0
    if queue._maxsize:
        for number in range(50):
            queue.put_nowait(number)
        with pytest.raises(stdlib.Full):
            queue.put_nowait(50)
        for _ in range(50):
            queue.get(timeout=LIMIT)
    queue.shutdown()
    with pytest.raises(ShutDown):
        queue.get(timeout=LIMIT)
    queue.close()


def test_handler_that_raises_while_messages_wait() -> None:
    """What was accepted arrives once, in order, however often adding to the backlog was interrupted."""
    dice = random.Random(7)

    armed = False

    def handle(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Stop

    with handling(handle):
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            tx, rx = channel()
            sent = -1
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-4, 6e-4))
                for number in range(400):
                    tx.send(number)
                    sent = number
                armed = False
            except Stop:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            tx.close()
            received = list(rx)
            rx.close()
            # The one that was interrupted may have gone, or not.
            assert received in (list(range(sent + 1)), list(range(sent + 2)))
            assert not [number for number, times in Counter(received).items() if times > 1]


def test_sender_closed_with_a_backlog_before_a_fork() -> None:
    """A channel whose last sender was closed ends, though a process was forked while its backlog waited."""
    tx, rx = channel()
    release_tx, release_rx = channel()
    for number in range(5000):
        tx.send(number)
    tx.close()
    context: Any = multiprocessing.get_context("ipcchan_fork")
    process = context.Process(target=release_rx.recv, args=())
    process.start()
    try:
        assert rx.recv_many(5000, timeout=LIMIT)[0] == 0
        rest = []
        with pytest.raises(EOFError):
            while True:
                rest.append(rx.recv(timeout=LIMIT))
    finally:
        release_tx.close()
        process.kill()
        process.join()
        process.close()
        release_rx.close()
        rx.close()


def test_recv_many_gives_what_comes_before_a_message_that_cannot_be_decoded() -> None:
    """The good ones first, then the failure once, then the rest."""
    tx, rx = channel()
    with tx, rx:
        tx.send_many([1, 2])
        tx.send(Undecodable())
        tx.send(3)
        assert rx.recv_many(10) == [1, 2]
        with pytest.raises(SerializationError):
            rx.recv_many(10)
        assert rx.recv_many(10) == [3]


class AlarmedByPickle:
    """The alarm goes off while it is pickled, and while it is unpickled."""

    def __reduce__(self) -> Any:
        signal.raise_signal(signal.SIGALRM)
        return int, ("7",)


def _unpickle_alarmed() -> int:
    signal.raise_signal(signal.SIGALRM)
    return 7


class AlarmedByUnpickling:
    def __reduce__(self) -> Any:
        return _unpickle_alarmed, ()


def _time_out(*_: object) -> None:
    raise TimeoutError("the alarm")


@pytest.mark.parametrize("handler", [_time_out, partial(_time_out, None)], ids=["function", "partial"])
def test_error_of_a_handler_is_no_error_of_the_message(handler: Callable[..., None]) -> None:
    """What a handler raises comes out as it is, and a message that was being decoded is still there."""
    tx, rx = channel()
    with tx, rx:
        with handling(handler):
            with pytest.raises(TimeoutError, match="the alarm"):
                tx.send(AlarmedByPickle())
            tx.send(AlarmedByUnpickling())
            for receive in (rx.recv, partial(rx.recv_many, 5)):
                with pytest.raises(TimeoutError, match="the alarm"):
                    receive()
        with handling(lambda *_: None):
            assert rx.recv(LIMIT) == 7


class Interrupter:
    """Interrupts calls at random instants, but for finalisers."""

    def __init__(self) -> None:
        seed = random.randrange(1 << 32)
        print("seed", seed)
        self._dice = random.Random(seed)
        self._armed = False

    def handle(self, _: int, frame: FrameType | None) -> None:
        if self._armed and not finalising(frame):
            self._armed = False
            raise Stop

    def interrupt(self, call: Callable[[], object], within: float) -> None:
        """Call, and interrupt that at an instant ``within`` so many seconds, if it takes that long."""
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self._dice.uniform(1e-5, within))
            call()
        except Stop:
            pass
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)


def interrupted_at(place: int, call: Callable[[], object]) -> bool:
    """Call, and let a signal's handler raise at the ``place``-th instant at which one may run; whether there was one.

    That is where a function of Python begins, and where one of C ends.
    """

    def watch(frame: FrameType, event: str, _arg: object) -> None:
        nonlocal place
        instant = event in ("call", "c_return")
        place -= instant
        if instant and place <= 0 and not finalising(frame):
            sys.setprofile(None)
            signal.raise_signal(signal.SIGALRM)

    interrupter = Interrupter()
    interrupter._armed = True
    with handling(interrupter.handle):
        sys.setprofile(watch)
        try:
            call()
        except Stop:
            return True
        finally:
            sys.setprofile(None)
    return False


@interrupted_finalisers
@pytest.mark.parametrize("polled", [False, True])
@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_interrupted_close_leaves_no_descriptor(which: str, polled: bool) -> None:
    """Wherever the handler raises, the end is closed, or can still be; and not when garbage is collected, by chance."""
    gc.collect()
    gc.disable()
    try:
        before = open_descriptors()
        # More than the instants that there are, of which some are in finalizers, where what is raised comes to nothing.
        for place in range(1, 60):
            tx, rx = channel()
            if polled:
                rx.fileno()
            end = tx if which == "sender" else rx
            interrupted_at(place, end.close)
            for one in (end, tx, rx):
                one.close()
            assert open_descriptors() == before, place
    finally:
        gc.enable()


@pytest.fixture
def interrupter() -> Iterator[Interrupter]:
    interrupter = Interrupter()
    with handling(interrupter.handle):
        yield interrupter


def test_interrupted_send_many_doubles_nothing(interrupter: Interrupter) -> None:
    """Of several messages sent at once, the first ones have been sent, each once."""
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        tx, rx = channel()
        with rx:
            interrupter.interrupt(partial(tx.send_many, range(3000)), 3e-3)
            tx.close()
            got = list(rx)
        assert got == list(range(len(got)))


@pytest.mark.parametrize(
    "receive",
    [
        lambda rx: rx.recv(0),
        lambda rx: rx.try_recv(),
        lambda rx: rx.recv_many(5, 0),
        lambda rx: rx.recv_into(bytearray(9), 0),
    ],
    ids=["recv", "try_recv", "recv_many", "recv_into"],
)
def test_interrupted_receiver_is_free_for_other_threads(
    interrupter: Interrupter, receive: Callable[[Any], object]
) -> None:
    """Wherever the handler raises, whoever receives next, in whatever thread, needn't wait for what was interrupted."""
    tx, rx = bytes_channel()

    def receive_on() -> None:
        # What the handler raises comes out, or this goes on for ever.
        while True:
            with suppress(Empty):
                receive(rx)

    with tx, rx, ThreadPoolExecutor(1) as other:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            interrupter.interrupt(receive_on, 5e-5)
            tx.send(b"")
            assert other.submit(rx.recv, LIMIT / 10).result() == b""


def _unpickle_forking() -> int:
    return os.fork()


class ForkingWhenUnpickled:
    def __reduce__(self) -> Any:
        return _unpickle_forking, ()


@pytest.mark.parametrize("receive", [lambda rx: rx.recv(), lambda rx: rx.recv_many(1)[0]], ids=["recv", "recv_many"])
def test_fork_in_the_middle_of_receiving(receive: Callable[[Any], int]) -> None:
    """Both processes come back from the call."""
    tx, rx = channel()
    with tx, rx:
        tx.send(ForkingWhenUnpickled())
        parent = os.getpid()
        try:
            pid = receive(rx)
        except BaseException:
            if os.getpid() != parent:
                os._exit(1)
            raise
        if not pid:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        tx.send("next")
        assert rx.recv(LIMIT) == "next"


needs_returns_unwatched = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="3.10 looks for signals where a function returns, too"
)


@needs_returns_unwatched
def test_interrupted_recv_bytes_loses_nothing(interrupter: Interrupter) -> None:
    """A message is returned, or still there."""
    left, right = Pipe()
    messages = [b"%d" % number for number in range(100)]
    with left, right:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            for message in messages:
                right.send_bytes(message)
            got: list[bytes] = []
            # Received and kept by one C call each.
            interrupter.interrupt(partial(got.extend, starmap(left.recv_bytes, repeat((), len(messages)))), 5e-4)
            while left.poll():
                got.append(left.recv_bytes())
            assert got == messages


@needs_returns_unwatched
def test_interrupted_recv_into_loses_nothing(interrupter: Interrupter) -> None:
    """A message is in the buffer, or still there, or both: what it raised then can't tell."""
    tx, rx = bytes_channel()
    messages = [b"%06d" % number for number in range(100)]
    buffer = bytearray(6)
    with tx, rx:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            buffer[:] = messages[0]
            for message in messages:
                tx.send(message)
            got: list[bytes] = []

            def receive_all(got: list[bytes] = got) -> None:
                while True:
                    rx.recv_into(buffer, 0)
                    got.append(bytes(buffer))

            with suppress(Empty):
                interrupter.interrupt(receive_all, 5e-4)
            got.append(bytes(buffer))
            with suppress(Empty):
                receive_all()
            assert list(dict.fromkeys(got)) == messages


@needs_returns_unwatched
@pytest.mark.parametrize("bound", [50, 0])
def test_interrupted_get_loses_nothing_and_keeps_the_bound(interrupter: Interrupter, bound: int) -> None:
    """However often ``get`` is interrupted, each message comes once, and gives its slot back once."""
    with closing(Queue[int](bound)) as queue:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            for number in range(50):
                queue.put_nowait(number)
            assert queue.qsize() == 50
            assert queue.full() == bool(bound)
            got: list[int] = []
            for get in (_get_some, _get_many):
                interrupter.interrupt(partial(get, queue, got), 2e-4)
            while not queue.empty():
                got.append(queue.get(timeout=LIMIT))
            assert got == list(range(50))


def _leave(queue: Queue[Any], count: int) -> None:
    for number in range(count):
        queue.put((number, bytes(100_000 if number % 50 == 7 else 10)))


@needs_returns_unwatched
@interrupted_finalisers
@pytest.mark.parametrize("at_once", [1, 20])
def test_interrupted_get_of_what_a_child_has_left(interrupter: Interrupter, at_once: int) -> None:
    """Each message comes once, however often it is interrupted: at its claim, at a record among plain ones."""
    context: Any = multiprocessing.get_context("ipcchan_fork")
    count = 500
    with closing(Queue[Any]()) as queue:
        # What is imported for large messages is imported before.
        queue.put(bytes(100_000))
        queue.get(timeout=LIMIT)
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        with closing(Queue[Any]()) as queue:
            child = context.Process(target=_leave, args=(queue, count))
            child.start()
            child.join()
            child.close()
            got: list[tuple[int, bytes]] = []

            def take(queue: Queue[Any] = queue, got: list[Any] = got) -> None:
                while True:
                    some = queue.get_many(at_once, 0) if at_once > 1 else [queue.get_nowait()]
                    # No call comes between: what was returned is in the list.
                    got += some

            while len(got) < count:
                with suppress(Empty):
                    interrupter.interrupt(take, 1e-3)
            assert [number for number, _ in got] == list(range(count))


def _get_some(queue: Queue[int], got: list[int]) -> None:
    for _ in range(10):
        # No call comes between: what was returned is in the list.
        number = queue.get_nowait()
        got += (number,)


def _get_many(queue: Queue[int], got: list[int]) -> None:
    for _ in range(3):
        numbers = queue.get_many(7)
        got += numbers


def test_handler_that_sends_as_the_drainer_is_started() -> None:
    """Where the handler's message needs the thread, too, one is started, and it ends with the last backlog."""
    tx, rx = channel()
    other_tx, other_rx = channel()

    def enter(frame: FrameType, _event: str, _arg: object) -> None:
        # Just where a handler may be called.
        if frame.f_code is _drainer._start.__code__:
            sys.settrace(None)
            other_tx.send("last")

    with tx, rx, other_tx, other_rx:
        for sender in (tx, other_tx):
            with suppress(Full):
                while True:
                    sender.try_send("fills the socket")
        sys.settrace(enter)
        try:
            tx.send("last")
        finally:
            sys.settrace(None)
        for receiver in (rx, other_rx):
            while receiver.recv(LIMIT) != "last":
                pass


class Undecodable:
    def __reduce__(self) -> Any:
        return int, ("x",)


@contextmanager
def handled_at(place: int, handler: Callable[[], None]) -> Iterator[list[bool]]:
    """Have a signal's handler do something at the ``place``-th instant at which one may run; whether there was one."""
    came: list[bool] = []

    def watch(_frame: object, event: str, _arg: object) -> None:
        nonlocal place
        place -= event in ("call", "c_return")
        if place == 0:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGALRM)

    def handle(*_: object) -> None:
        came.append(True)
        handler()

    with handling(handle):
        sys.setprofile(watch)
        try:
            yield came
        finally:
            sys.setprofile(None)


@pytest.mark.parametrize("what", ["drain", "large", "with a descriptor"])
def test_handler_that_sends_at_any_instant(what: str) -> None:
    """What it leaves waiting is sent by somebody, though the interrupted call was about to let the thread go."""
    for place in count(1):
        tx, rx = channel()
        other, kept = channel()
        outlet = tx._open_link().outlet
        received: list[object] = []
        sent = iter(count())
        expected = 0

        def fill(tx: Any = tx, outlet: Any = outlet, sent: Any = sent) -> None:
            while not outlet.backlog:
                tx.send(next(sent))

        def read(rx: Any = rx, received: Any = received) -> None:
            with suppress(Empty):
                while True:
                    received.append(rx.try_recv())

        def handler() -> None:
            read()
            fill()

        with kept, other, rx:
            fill()
            # The thread that sends waits for the lock: this one does it.
            with outlet.lock:
                if what == "drain":
                    read()
                with handled_at(place, handler) as came:
                    if what == "drain":
                        outlet.drain()
                    else:
                        tx.send(bytes(20_000) if what == "large" else other)
            expected = next(sent)
            tx.close()
            received.extend(rx.recv(LIMIT) for _ in range(expected + (what != "drain") - len(received)))
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
            for one in received:
                if isinstance(one, Sender):
                    one.close()
            assert sorted(one for one in received if isinstance(one, int)) == [*range(expected)]
        if not came:
            return
