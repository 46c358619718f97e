"""Fork in the middle of something: what waits is the parent's, and locks of other threads don't matter."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mp_ipcchan import Disconnected, Queue, Sender, channel

from ..conformance._support import LIMIT, InThread, bare_fork
from ._support import context_of, started


def send_more(tx: Sender[Any]) -> None:
    """The child's own messages, some of which wait at its end."""
    for number in range(1000):
        tx.send(("child", number))


@pytest.mark.parametrize("bare", [True, False])
def test_fork_with_a_backlog(bare: bool) -> None:
    """A child that is forked while messages wait doesn't send them again; its own come, in order."""
    tx, rx = channel()
    count = 5000
    with rx:
        for number in range(count):
            tx.send(("parent", number))
        with contextlib.ExitStack() as stack:
            if bare:
                child = stack.enter_context(bare_fork(lambda: _send_and_end(tx)))
            else:
                stack.enter_context(started(context_of("fork"), send_more, tx))
            tx.close()
            received: dict[str, list[int]] = {"parent": [], "child": []}
            with pytest.raises(Disconnected):
                while True:
                    who, number = rx.recv(LIMIT)
                    received[who].append(number)
            assert received["parent"] == list(range(count))
            assert received["child"] == list(range(1000))
            if bare:
                assert child.join() == 0


def _send_and_end(tx: Sender[Any]) -> None:
    # After a bare fork this process holds the receiver, too, and ends without the interpreter's hooks:
    # each message is with the kernel before the next.
    for number in range(1000):
        tx.send(("child", number), timeout=LIMIT)


def test_fork_with_a_backlog_of_endpoints() -> None:
    """Endpoints that wait in the parent are closed in the child: the stream ends with the parent's."""
    tx, rx = channel()
    inner_tx, inner_rx = channel()
    held, wait = channel()
    with tx, rx, inner_rx:
        for number in range(1000):
            tx.send(number)
        tx.send(inner_tx)
        inner_tx.close()
        with started(context_of("fork"), wait_for_end, wait), held:
            for number in range(1000):
                assert rx.recv(LIMIT) == number
            rx.recv(LIMIT).close()
            with pytest.raises(Disconnected):
                inner_rx.recv(LIMIT)
            held.close()


def wait_for_end(rx: Any) -> None:
    with pytest.raises(Disconnected):
        rx.recv(LIMIT)


@contextlib.contextmanager
def busy_thread(call: Callable[[int], object]) -> Iterator[list[int]]:
    """Another thread that goes on calling; the list has the number of its calls once it has ended."""
    stop = threading.Event()
    calls: list[int] = []

    def run() -> None:
        number = 0
        while not stop.is_set():
            call(number)
            number += 1
        calls.append(number)

    thread = InThread(run)
    try:
        yield calls
    finally:
        stop.set()
        thread.result()


def send_100(tx: Sender[Any], who: int) -> None:
    for number in range(100):
        tx.send((who, number))


def test_fork_while_another_thread_sends() -> None:
    """The children can use the channel at once, whatever that thread was in the middle of; no message comes twice."""
    tx, rx = channel()
    with rx:
        reader = InThread(lambda: list(rx))
        with busy_thread(lambda number: tx.send((-1, number))) as calls:
            for who in range(20):
                with started(context_of("fork"), send_100, tx, who):
                    pass
        tx.close()
        received = reader.result()
    assert [number for who, number in received if who == -1] == list(range(calls[0]))
    for who in range(20):
        assert [number for one, number in received if one == who] == list(range(100))
    assert max(Counter(received).values()) == 1


def put_100(queue: Queue[Any], who: int) -> None:
    for number in range(100):
        queue.put((who, number))


def test_fork_while_another_thread_puts(start_method: str) -> None:
    """The same with a queue, by every way to start a process."""
    queue: Queue[Any] = Queue()
    received: list[tuple[int, int]] = []

    def put(number: int) -> None:
        # More than the kernel takes; no more than is taken in a moment, however long a process takes to start.
        if queue.qsize() < 5000:
            queue.put((-1, number))

    with busy_thread(put) as calls:
        for who in range(5):
            with started(context_of(start_method), put_100, queue, who):
                while len(received) < 100 * (who + 1):
                    message = queue.get(timeout=LIMIT)
                    if message[0] != -1:
                        received.append(message)
    assert received == [(who, number) for who in range(5) for number in range(100)]
    assert calls[0] > 0
    queue.cancel_join_thread()
    while not queue.empty():
        queue.get(timeout=LIMIT)
    queue.close()


def receive_100(rx: Any, up: Sender[Any]) -> None:
    up.send([rx.recv(LIMIT) for _ in range(100)])


def test_fork_while_another_thread_receives() -> None:
    """A thread that waits in ``recv`` on another channel doesn't keep the child from receiving on its own."""
    busy_tx, busy_rx = channel()
    with busy_rx:
        reader = InThread(lambda: list(busy_rx))
        for _ in range(20):
            tx, moved = channel()
            up_tx, up = channel()
            with tx, up, started(context_of("fork"), receive_100, moved, up_tx):
                busy_tx.send(1)
                tx.send_many(range(100))
                assert up.recv(LIMIT) == list(range(100))
                up_tx.close()
        busy_tx.close()
        assert reader.result() == [1] * 20
