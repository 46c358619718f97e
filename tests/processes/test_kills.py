"""A killed process takes at most what it had in its hands: the others go on, and streams end when they should."""

from __future__ import annotations

from queue import Empty
from typing import Any

import pytest

from mp_ipcchan import Disconnected, Full, JoinableQueue, Queue, Receiver, ReceiverGone, Sender, channel

from ..conformance._support import LIMIT, attempts, pattern
from ._support import context_of, kill, running, started

BIG = pattern(200_000)
#: A small message goes in a packet, a big one in a segment.
messages = pytest.mark.parametrize("message", [b"small", BIG], ids=["small", "big"])


def send_forever(tx: Sender[Any], number: int, message: bytes) -> None:
    """Send numbered messages, without getting far ahead of the reader."""
    count = 0
    while True:
        tx.send((number, count, message), timeout=LIMIT)
        count += 1


def receive_forever(rx: Receiver[Any], tx: Sender[Any]) -> None:
    tx.send("started")
    while True:
        rx.recv(LIMIT)


def hold(rx: Receiver[Any], *_: object) -> None:
    """Do nothing with the other arguments until the sender is gone."""
    with pytest.raises(Disconnected):
        rx.recv(4 * LIMIT)


def process(start_method: str, target: Any, *args: Any) -> Any:
    return running(context_of(start_method).Process(target=target, args=args))  # type: ignore[attr-defined]


@messages
def test_killed_while_it_sends(message: bytes, start_method: str) -> None:
    """Of two senders one is killed: its messages have no gap, the other goes on, and the stream ends with that one."""
    tx, rx = channel()
    with rx, process(start_method, send_forever, tx, 0, message) as first:
        with process(start_method, send_forever, tx, 1, message) as second:
            tx.close()
            counts = [0, 0]

            def receive(until: Any) -> None:
                for _ in attempts():
                    number, count, came = rx.recv(LIMIT)
                    assert (count, came) == (counts[number], message)
                    counts[number] += 1
                    if until():
                        return

            receive(lambda: min(counts) > 20)
            kill(first)
            more = counts[1] + 200
            receive(lambda: counts[1] > more)
            kill(second)
        for _ in attempts():
            try:
                number, count, came = rx.recv(LIMIT)
            except Disconnected:
                break
            assert (count, came) == (counts[number], message)
            counts[number] += 1


@messages
def test_killed_while_it_receives(message: bytes, start_method: str) -> None:
    """Senders to a killed receiver are told, in every kind of send, and don't wait for it."""
    tx, moved = channel()
    up_tx, up = channel()
    with tx, up, process(start_method, receive_forever, moved, up_tx) as reader:
        up_tx.close()
        assert up.recv(LIMIT) == "started"
        for _ in range(50):
            tx.send(message, timeout=LIMIT)
        kill(reader)
        for send in (tx.send, tx.try_send, lambda obj: tx.send(obj, LIMIT), lambda obj: tx.send_many([obj])):
            with pytest.raises(ReceiverGone):
                send(message)
        with pytest.raises(Disconnected):
            up.recv(LIMIT)


def test_killed_with_a_backlog_behind(start_method: str) -> None:
    """What waits for a killed receiver is dropped, and a blocked send ends."""
    tx, moved = channel()
    held, wait = channel()
    inner_tx, inner_rx = channel()
    with tx, held, inner_rx, process(start_method, hold, wait, moved) as reader:
        for number in range(5000):
            tx.send(number)
        tx.send(inner_tx)
        inner_tx.close()
        with pytest.raises(Full):
            tx.try_send("no room")
        kill(reader)
        for _ in attempts():
            try:
                tx.send("more")
            except ReceiverGone:
                break
        # The sender that waited with the rest has gone with it.
        with pytest.raises(Disconnected):
            inner_rx.recv(LIMIT)


def test_killed_with_endpoints(start_method: str) -> None:
    """Endpoints that a killed process holds are closed: the streams end on both sides."""
    tx, rx = channel()
    to_child, moved = channel()
    held, wait = channel()
    with rx, to_child, held, process(start_method, hold, wait, tx, [moved]) as holder:
        tx.close()
        to_child.send("accepted")
        kill(holder)
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)
        with pytest.raises(ReceiverGone):
            to_child.send("refused")


def test_killed_with_unread_endpoints(start_method: str) -> None:
    """So are those in messages that it hasn't read, in endpoints that are themselves unread, too."""
    outer_tx, outer_rx = channel()
    middle_tx, middle_rx = channel()
    tx, rx = channel()
    to_inner, inner = channel()
    held, wait = channel()
    with rx, to_inner, held, process(start_method, hold, wait, outer_rx) as holder:
        middle_tx.send([tx, inner, BIG])
        tx.close()
        outer_tx.send(middle_rx)
        middle_tx.close()
        to_inner.send("accepted")
        kill(holder)
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)
        with pytest.raises(ReceiverGone):
            to_inner.send("refused")
        with pytest.raises(ReceiverGone):
            outer_tx.send("refused")
    outer_tx.close()


def test_killed_sender_of_endpoints(start_method: str) -> None:
    """What a process had sent before it was killed is whole: endpoints in it work."""
    tx, rx = channel()
    held, wait = channel()
    with rx, held, process(start_method, send_pair, wait, tx) as sender:
        tx.close()
        inner_tx, inner_rx = rx.recv(LIMIT)
        kill(sender)
        with inner_tx, inner_rx:
            inner_tx.send("after its death")
            assert inner_rx.recv(LIMIT) == "after its death"
            inner_tx.close()
            with pytest.raises(Disconnected):
                inner_rx.recv(LIMIT)
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def send_pair(wait: Receiver[Any], tx: Sender[Any]) -> None:
    tx.send(channel())
    hold(wait)


def get_forever(queue: Queue[Any], up: Sender[Any]) -> None:
    while True:
        up.send(queue.get(timeout=LIMIT))


def test_readers_of_a_queue(start_method: str) -> None:
    """Of three readers two are killed, wherever they are: the third takes all the rest but what they had in hand."""
    queue: Queue[Any] = Queue()
    ups, contexts = [], []
    for _ in range(3):
        up_tx, up = channel()
        contexts.append(process(start_method, get_forever, queue, up_tx))
        ups.append((up_tx, up))
    with contexts[0] as first, contexts[1] as second, contexts[2]:
        for up_tx, _ in ups:
            up_tx.close()
        # Few enough that the kernel takes all that one reader sends up: nothing waits in a killed process.
        count = 210
        for number in range(count):
            queue.put(number)
            if number == 70:
                kill(first)
            elif number == 140:
                kill(second)
        queue.put("end")
        came = [*ups[0][1], *ups[1][1]]
        while (last := ups[2][1].recv(LIMIT)) != "end":
            came.append(last)
        assert len(came) == len(set(came))
        assert count - 2 <= len(came) <= count
    for _, up in ups:
        up.close()
    queue.close()


def put_forever(queue: Queue[Any], number: int) -> None:
    count = 0
    while True:
        queue.put((number, count))
        count += 1


def test_writers_of_a_bounded_queue(start_method: str) -> None:
    """A killed writer's places are given back: the queue's bound holds for the others, who go on."""
    queue: JoinableQueue[Any] = JoinableQueue(5)
    with process(start_method, put_forever, queue, 0) as first:
        with process(start_method, put_forever, queue, 1) as second:
            counts = [0, 0]

            def get_until(condition: Any) -> None:
                for _ in attempts():
                    number, count = queue.get(timeout=LIMIT)
                    assert count == counts[number]
                    counts[number] += 1
                    if condition():
                        return

            get_until(lambda: min(counts) > 20)
            kill(first)
            more = counts[1] + 100
            get_until(lambda: counts[1] > more)
            kill(second)
        with pytest.raises(Empty):
            for _ in range(5 + 1):
                queue.get_nowait()
        for number in range(5):
            queue.put(number, timeout=LIMIT)
        assert queue.get_many(5, timeout=LIMIT) == list(range(5))
    queue.close()


def echo(rx: Receiver[Any], tx: Sender[Any]) -> None:
    for message in rx:
        tx.send(message)


def test_many_kills(start_method: str) -> None:
    """Ten workers killed in a row, each with a receiver of its own: the results of the last one arrive."""
    up_tx, up = channel()
    with up, up_tx:
        for _ in range(10):
            tx, moved = channel()
            with tx, process(start_method, echo, moved, up_tx) as worker:
                tx.send(BIG)
                assert up.recv(LIMIT) == BIG
                kill(worker)
                with pytest.raises(ReceiverGone):
                    tx.send(BIG)
        tx, moved = channel()
        with started(context_of(start_method), echo, moved, up_tx):
            up_tx.close()
            with tx:
                tx.send_many(range(10))
            assert list(up) == list(range(10))
