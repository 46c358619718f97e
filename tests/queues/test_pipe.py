"""``Pipe`` has the stdlib's surface, and what is behind it keeps whole what comes through."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import BufferTooShort, connection
from typing import Any

import pytest

from mp_ipcchan import Connection, Pipe, Queue, Receiver, channel
from mp_ipcchan._message import INLINE_SIZE
from tests.conformance._support import InThread

from ._support import LIMIT, Crew, end_of, is_asleep, kill, until

SIZES = [0, 1, INLINE_SIZE - 1, INLINE_SIZE, INLINE_SIZE + 1, 65535, 65536, 65537, 50 << 20]


@contextmanager
def pipe(duplex: bool = True) -> Iterator[tuple[Connection, Connection]]:
    first, second = Pipe(duplex)
    with first, second:
        yield first, second


def test_is_a_stdlib_connection(start_method: str) -> None:
    first, second = multiprocessing.get_context(f"ipcchan_{start_method}").Pipe()
    with first, second:
        assert isinstance(first, connection.Connection)
        assert isinstance(first, Connection)


# -- beside the stdlib's ---------------------------------------------------------------------


def _outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def _surface(first: Any, second: Any) -> Iterator[object]:
    """What each call of the surface gives; first only receives, second only sends, unless they are duplex."""
    data = bytearray(b"0123456789")
    for end in first, second:
        yield end.readable, end.writable, end.closed
    yield _outcome(lambda: first.poll())
    yield _outcome(lambda: first.poll(0.01))
    second.send({"a": [1, None]})
    yield first.poll(), first.poll(1), first.poll(None), first.recv()
    for offset, size in (0, None), (3, None), (3, 4), (10, None), (0, 0), (5, 5):
        second.send_bytes(data, offset, size)
        yield first.recv_bytes()
    for offset, size in (-1, None), (11, None), (0, -1), (0, 11), (5, 6):
        yield _outcome(lambda offset=offset, size=size: second.send_bytes(data, offset, size))  # type: ignore[misc]
    yield _outcome(lambda: second.send_bytes("text"))
    second.send_bytes(memoryview(data).cast("H"))
    yield first.recv_bytes()
    second.send_bytes(data)
    yield first.recv_bytes(10)
    yield _outcome(lambda: first.recv_bytes(-1))
    into = bytearray(b"-" * 20)
    for offset in 0, 5, 10:
        second.send_bytes(data)
        yield first.recv_bytes_into(into, offset), bytes(into)
    for offset in -1, 21:
        yield _outcome(lambda offset=offset: first.recv_bytes_into(into, offset))  # type: ignore[misc]
    second.send_bytes(data)
    yield _outcome(lambda: first.recv_bytes_into(into, 11))
    second.send_bytes(data)
    yield _outcome(lambda: first.recv_bytes_into(bytearray(9)))
    yield _outcome(lambda: second.send(lambda: None))[0] in (AttributeError, pickle.PicklingError)  # type: ignore[index]
    second.send("after")
    yield first.recv()
    second.send_bytes(pickle.dumps([1, 2]))
    yield first.recv()
    second.send([3, 4])
    yield pickle.loads(first.recv_bytes())
    if not second.readable:
        yield _outcome(second.recv), _outcome(second.recv_bytes), _outcome(second.poll)
        yield _outcome(lambda: first.send(1)), _outcome(lambda: first.send_bytes(b""))
    with second as same:
        yield same is second
    yield second.closed, _outcome(lambda: second.send(1)), _outcome(lambda: second.send_bytes(b""))
    yield _outcome(second.recv), _outcome(second.poll), _outcome(second.fileno)
    second.close()
    yield first.poll(), _outcome(first.recv), _outcome(first.recv_bytes), _outcome(lambda: first.recv_bytes_into(into))
    if first.writable:
        with pytest.raises(BrokenPipeError):
            for _ in range(3):
                first.send(b"x" * 100_000)
    first.close()
    yield first.closed, _outcome(first.recv), _outcome(first.poll), _outcome(first.fileno)
    yield _outcome(lambda: first.recv_bytes(5)), _outcome(lambda: first.recv_bytes_into(into))


@pytest.mark.parametrize("duplex", [True, False])
def test_surface_is_the_stdlibs(duplex: bool) -> None:
    """Call by call: values, errors, and the errors' texts."""
    stock = list(_surface(*multiprocessing.get_context("fork").Pipe(duplex)))
    for number, (ours, theirs) in enumerate(zip(_surface(*Pipe(duplex)), stock, strict=True)):
        assert ours == theirs, number


def test_too_long_for_maxlength() -> None:
    with pipe() as (first, second):
        second.send_bytes(b"12345")
        with pytest.raises(OSError, match="bad message length"):
            first.recv_bytes(4)


def test_too_long_for_the_buffer() -> None:
    """``BufferTooShort`` carries the whole message; the next one comes as usual."""
    with pipe() as (first, second):
        for data in b"12345", bytes(100_000):
            second.send_bytes(data)
            second.send_bytes(b"next")
            with pytest.raises(BufferTooShort) as caught:
                first.recv_bytes_into(bytearray(4))
            assert caught.value.args == (data,)
            assert first.recv_bytes_into(bytearray(4)) == 4


def test_unpicklable() -> None:
    """Nothing leaves, and the connection goes on."""
    with pipe() as (first, second):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            second.send(lambda: None)
        with pytest.raises(TypeError):
            second.send(threading.Lock())
        second.send("next")
        assert first.recv() == "next"


# -- waiting ---------------------------------------------------------------------------------


def test_wait_and_selectors() -> None:
    with pipe() as (first, second), pipe() as (third, fourth), selectors.DefaultSelector() as selector:
        selector.register(first, selectors.EVENT_READ)
        selector.register(third, selectors.EVENT_READ)
        assert not connection.wait([first, third], 0)
        assert not selector.select(0)
        for sender, receiver in (second, first), (fourth, third):
            for message in 1, bytes(100_000), fourth:
                sender.send(message)
                assert connection.wait([first, third], LIMIT) == [receiver]
                assert [key.fileobj for key, _ in selector.select(LIMIT)] == [receiver]
                receiver.recv()
                assert not selector.select(0)
        second.close()
        assert connection.wait([first, third], LIMIT) == [first]
        assert [key.fileobj for key, _ in selector.select(LIMIT)] == [first]
        with pytest.raises(EOFError):
            first.recv()


def test_poll_wakes() -> None:
    with pipe() as (first, second):
        waiting = InThread(lambda: first.poll(LIMIT))
        second.send(1)
        assert waiting.result()
        assert first.recv() == 1


# -- large and many --------------------------------------------------------------------------


def _echo(end: Connection) -> None:
    with pytest.raises(EOFError):
        while True:
            end.send_bytes(end.recv_bytes())


@pytest.mark.parametrize("size", SIZES)
def test_sizes(crew: Crew, size: int) -> None:
    """There and back, whole, around each size at which messages begin to travel otherwise."""
    data = random.Random(size).randbytes(size)
    with pipe() as (first, second):
        child = crew.start(_echo, second)
        second.close()
        first.send_bytes(data)
        assert first.poll(LIMIT)
        assert first.recv_bytes() == data
        first.send_bytes(data)
        into = bytearray(size)
        assert first.poll(LIMIT)
        assert first.recv_bytes_into(into) == size
        assert into == data
        first.send(data)
        assert first.poll(LIMIT)
        assert first.recv() == data
        kill(child)


def _send_numbers(end: Connection, count: int) -> None:
    with end:
        for number in range(count):
            end.send(number)


@pytest.mark.parametrize("size", [10, 10_000, 100_000])
def test_send_waits_for_the_reader(crew: Crew, size: int) -> None:
    """``send`` blocks while the peer doesn't read, and goes on when it does."""
    count = 20_000 if size < 100_000 else 3000
    with pipe() as (first, second):
        child = crew.start(_send_sized, second, count, size)
        second.close()
        until(lambda: first.poll() and is_asleep(child))
        for number in range(count):
            got, data = first.recv()
            assert got == number
            assert len(data) == size
        with pytest.raises(EOFError):
            first.recv()
        assert end_of(child) == 0


def _send_sized(end: Connection, count: int, size: int) -> None:
    for number in range(count):
        end.send((number, bytes(size)))


def _receive(end: Connection) -> None:
    while True:
        end.recv()


@pytest.mark.parametrize("size", [10, 300_000])
def test_reader_killed(crew: Crew, size: int) -> None:
    """A sender whose reader is killed gets ``BrokenPipeError``, whether it waits at that moment or not."""
    seed = random.randrange(1 << 32)
    print("seed:", seed)
    dice = random.Random(seed)
    for _ in range(10):
        first, second = Pipe()
        with second:
            child = crew.start(_receive, first)
            first.close()
            sending = InThread(lambda end=second: _send_until_broken(end, size))
            time.sleep(dice.uniform(0, 0.02))
            kill(child)
            sending.result()


def _send_until_broken(end: Connection, size: int) -> None:
    with pytest.raises(BrokenPipeError):
        while True:
            end.send(bytes(size))


def _hold(end: Connection, wait: Receiver[None]) -> None:
    with pytest.raises(EOFError):
        wait.recv(LIMIT)


def test_reader_killed_that_never_reads(crew: Crew) -> None:
    """A sender that waits for room learns of the end."""
    tx, rx = channel()
    with tx, pipe() as (first, second):
        child = crew.start(_hold, first, rx)
        first.close()
        sending = InThread(lambda: _send_until_broken(second, 1000))
        kill(child)
        sending.result()


def _send_in_turns(end: Connection, lock: Any, turns: Queue[int], count: int) -> None:
    for _ in range(count):
        with lock:
            number = turns.get(timeout=LIMIT)
            end.send((number, bytes(number % 3 * 50_000)))
            turns.put(number + 1)


def test_order_across_processes(any_crew: Crew, start_method: str, queue: Queue[int]) -> None:
    """Messages of two processes that send in turns arrive in that order."""
    context = multiprocessing.get_context(f"ipcchan_{start_method}")
    count = 1000
    with pipe(duplex=False) as (reading, writing):
        lock = context.Lock()
        queue.put(1)
        for _ in range(2):
            any_crew.start(_send_in_turns, writing, lock, queue, count)
        for expected in range(1, 2 * count + 1):
            assert reading.poll(LIMIT)
            number, data = reading.recv()
            assert number == expected
            assert len(data) == number % 3 * 50_000
        any_crew.finish()


# -- connections travel ----------------------------------------------------------------------


def _answer_through_received(end: Connection) -> None:
    assert end.poll(LIMIT)
    with end.recv() as received:
        received.send("through")


def test_connection_through_a_connection(any_crew: Crew) -> None:
    with pipe() as (first, second), pipe() as (third, fourth):
        any_crew.start(_answer_through_received, second)
        first.send(fourth)
        fourth.close()
        assert third.poll(LIMIT)
        assert third.recv() == "through"
        with pytest.raises(EOFError):
            third.recv()
        any_crew.finish()


def test_directions_travel() -> None:
    """A connection that only receives, or only sends, does so where it arrives."""
    with pipe() as (first, second), pipe(duplex=False) as (reading, writing):
        first.send([reading, writing])
        received_reading, received_writing = second.recv()
        with received_reading, received_writing:
            assert (received_reading.readable, received_reading.writable) == (True, False)
            assert (received_writing.readable, received_writing.writable) == (False, True)
            received_writing.send(1)
            assert reading.recv() == 1


def test_writing_end_of_an_ended_process(any_crew: Crew) -> None:
    """What a process sent before its end is read, then comes the end."""
    with pipe(duplex=False) as (reading, writing):
        child = any_crew.start(_send_numbers, writing, 100)
        writing.close()
        assert end_of(child) == 0
        assert [reading.recv() for _ in range(100)] == list(range(100))
        with pytest.raises(EOFError):
            reading.recv()
