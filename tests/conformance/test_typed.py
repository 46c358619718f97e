"""Conformance 2.1: channels of objects and of bytes. Each test is named after its row."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest

from mp_ipcchan import (
    BytesSender,
    Disconnected,
    Empty,
    Receiver,
    ReceiverGone,
    Sender,
    SerializationError,
    bytes_channel,
    channel,
)

from ._support import LIMIT, PERSON, SEVEN, InThread


def test_H01_simple() -> None:
    """A value arrives equal; once the sender is closed, the next receive raises Disconnected."""
    tx, rx = channel()
    with tx, rx:
        tx.send(PERSON)
        assert rx.recv(LIMIT) == PERSON
        tx.close()
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def test_H02_disconnect_non_empty_channel() -> None:
    """What was sent before the sender closed is received before Disconnected."""
    tx, rx = channel()
    with rx:
        tx.send(PERSON)
        tx.close()
        assert rx.recv(LIMIT) == PERSON
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def test_H03_embedded_senders() -> None:
    """A sender inside a message works where it is received."""
    sub_tx, sub_rx = channel()
    super_tx, super_rx = channel()
    with sub_tx, sub_rx, super_tx, super_rx:
        super_tx.send((PERSON, sub_tx))
        person, received_tx = super_rx.recv(LIMIT)
        with received_tx:
            assert person == PERSON
            received_tx.send(PERSON)
            assert sub_rx.recv(LIMIT) == PERSON


def test_H04_embedded_receivers() -> None:
    """A receiver inside a message yields, where it is received, what is sent after it moved."""
    sub_tx, sub_rx = channel()
    super_tx, super_rx = channel()
    with sub_tx, super_tx, super_rx:
        super_tx.send((PERSON, sub_rx))
        person, received_rx = super_rx.recv(LIMIT)
        with received_rx:
            assert person == PERSON
            sub_tx.send(PERSON)
            assert received_rx.recv(LIMIT) == PERSON


def test_H08_try_recv() -> None:
    """Receiving without waiting: Empty, the value, Empty, and Disconnected once the sender is closed."""
    tx, rx = channel()
    with tx, rx:
        with pytest.raises(Empty):
            rx.try_recv()
        tx.send(PERSON)
        assert rx.try_recv() == PERSON
        with pytest.raises(Empty):
            rx.try_recv()
        tx.close()
        with pytest.raises(Disconnected):
            rx.try_recv()


def test_H09_try_recv_timeout() -> None:
    """Receiving within 1 s: Empty is raised after at least half of it, what is there comes sooner."""
    tx, rx = channel()
    with tx, rx:
        start = time.monotonic()
        with pytest.raises(Empty):
            rx.recv(timeout=1.0)
        assert time.monotonic() - start >= 0.5

        tx.send(PERSON)
        start = time.monotonic()
        assert rx.recv(timeout=1.0) == PERSON
        assert time.monotonic() - start < 1.0

        start = time.monotonic()
        with pytest.raises(Empty):
            rx.recv(timeout=1.0)
        assert time.monotonic() - start >= 0.5

        tx.close()
        with pytest.raises(Disconnected):
            rx.recv(timeout=1.0)


def test_H10_multiple_paths_to_a_sender() -> None:
    """One object three times in a message is one object there too; its sender works by each path."""
    sub_tx, sub_rx = channel()
    super_tx, super_rx = channel()
    with sub_tx, sub_rx, super_tx, super_rx:
        item = (PERSON, sub_tx)
        super_tx.send([item, item, item])
        received = super_rx.recv(LIMIT)
        assert [person for person, _ in received] == [PERSON] * 3
        assert received[0] is received[1] is received[2]
        for index in (0, 1):
            received[index][1].send(index)
            assert sub_rx.recv(LIMIT) == index
        received[0][1].close()


def test_H13_bytes() -> None:
    """Seven bytes, an odd number for alignment, arrive as they were sent."""
    tx, rx = bytes_channel()
    with tx, rx:
        tx.send(SEVEN)
        assert rx.recv(LIMIT) == SEVEN


def test_H14_embedded_bytes_receivers() -> None:
    """A sender of bytes travels in a typed channel, and what is sent on it arrives here."""
    bytes_tx, bytes_rx = bytes_channel()
    super_tx, super_rx = channel()
    with bytes_tx, bytes_rx, super_tx, super_rx:
        super_tx.send(bytes_tx)
        with super_rx.recv(LIMIT) as received_tx:
            assert isinstance(received_tx, BytesSender)
            received_tx.send(SEVEN)
            assert bytes_rx.recv(LIMIT) == SEVEN


def test_H15_so_linger() -> None:
    """What is sent right before the sender closes arrives; the close does not reset the channel."""
    tx, rx = channel()
    with rx:
        tx.send(42)
        tx.close()
        assert rx.recv(LIMIT) == 42


class SendsWhileSerialized:
    """Becomes "hello" when it is sent, and sends None on the same channel meanwhile."""

    def __init__(self, tx: Sender[Any]) -> None:
        self._tx = tx

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        self._tx.send(None)
        return str, ("hello",)


def test_H16_reentrant() -> None:
    """What a value sends while it is serialized comes first, then the value; the channel goes on."""
    tx, rx = channel()
    with tx, rx:
        tx.send(SendsWhileSerialized(tx))
        assert rx.recv(LIMIT) is None
        assert rx.recv(LIMIT) == "hello"
        tx.send("third")
        assert rx.recv(LIMIT) == "third"


def test_H17_clone_sender_after_receiver_dropped() -> None:
    """A sender can be cloned though the receiver is gone."""
    tx, rx = channel()
    rx.close()
    with tx, tx.clone() as by_name, copy.copy(tx) as by_copy:
        for sender in (tx, by_name, by_copy):
            with pytest.raises(ReceiverGone):
                sender.send(1)


def test_H18_transfer_closed_sender() -> None:
    """A sender whose receiver is gone can be sent, and arrives as a sender."""
    dead_tx, dead_rx = channel()
    super_tx, super_rx = channel()
    dead_rx.close()
    with dead_tx, super_tx, super_rx:
        super_tx.send(dead_tx)
        with super_rx.recv(LIMIT) as received_tx:
            assert isinstance(received_tx, Sender)
            with pytest.raises(ReceiverGone):
                received_tx.send(1)


def test_H19_ipc_sender_is_sync() -> None:
    """One sender serves many threads; nothing is lost or doubled, and each thread's order is kept."""
    tx, rx = channel()
    with tx, rx:

        def send_all(thread: int) -> None:
            for number in range(1000):
                tx.send((thread, number))

        threads = [InThread(send_all, thread) for thread in range(8)]
        received = [rx.recv(LIMIT) for _ in range(8 * 1000)]
        for running in threads:
            running.result()
        for thread in range(8):
            assert [number for by, number in received if by == thread] == list(range(1000))


def test_H19_ipc_receiver_not_sync() -> None:
    """Threads that receive from one receiver take turns: each message goes to one of them, in its order."""
    tx, rx = channel()
    with rx:
        threads: list[InThread[list[int]]] = [InThread(list, rx) for _ in range(4)]
        for number in range(1000):
            tx.send(number)
        tx.close()
        shares = [running.result() for running in threads]
        assert all(share == sorted(share) for share in shares)
        assert sorted(number for share in shares for number in share) == list(range(1000))


_decoding = threading.Event()
_go_on = threading.Event()


def _decode_slowly() -> str:
    _decoding.set()
    assert _go_on.wait(LIMIT)
    return "decoded"


class SlowToDecode:
    """Takes as long to be received as the test wants."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _decode_slowly, ()


def test_H19_ipc_receiver_in_use() -> None:
    """While a thread receives, another finds it busy and can't send the receiver away; neither does harm."""
    _decoding.clear()
    _go_on.clear()
    tx, rx = channel()
    super_tx, super_rx = channel()
    with tx, rx, super_tx, super_rx:
        tx.send(SlowToDecode())
        tx.send("next")
        receiving = InThread(rx.recv, LIMIT)
        try:
            assert _decoding.wait(LIMIT)
            with pytest.raises(Empty):
                rx.try_recv()
            with pytest.raises(SerializationError):
                super_tx.send(rx)
        finally:
            _go_on.set()
        assert receiving.result() == "decoded"
        super_tx.send(rx)
        with super_rx.recv(LIMIT) as moved:
            assert isinstance(moved, Receiver)
            assert moved.recv(LIMIT) == "next"
