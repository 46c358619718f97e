"""Conformance 2.3: what the transport carries. Each test is named after its row.

Where a row has no endpoints, it runs on a channel of bytes and on one of objects. Where it has, the
message is a pair ``(data, endpoints)`` on a channel of objects. ``send`` never waits, so rows that
fill a buffer until the sender blocks do so with ``send(timeout=...)``, and loop with ``send``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from mp_ipcchan import Disconnected, Empty, ReceiverGone, Sender, channel

from ._support import (
    LIMIT,
    MEDIUM,
    MIB,
    SEVEN,
    AnyReceiver,
    AnySender,
    F,
    InThread,
    MakePair,
    all_kinds,
    attempts,
    pattern,
    repeat,
    tagged,
)


def check_transfer(data: bytes, senders: int, in_thread: bool) -> None:
    """Send ``data`` with so many senders; each arrives in its place, and carries F bytes of its own."""
    with ExitStack() as stack:
        tx, rx = channel()
        pairs = [channel() for _ in range(senders)]
        for end in (tx, rx, *(end for pair in pairs for end in pair)):
            stack.enter_context(end)
        message = (data, [sub_tx for sub_tx, _ in pairs])
        if in_thread:
            sending = InThread(tx.send, message)
            received, endpoints = rx.recv(LIMIT)
            sending.result()
        else:
            tx.send(message)
            received, endpoints = rx.recv(LIMIT)
        assert received == data
        assert len(endpoints) == senders
        full = pattern(F)
        for received_tx, (_, sub_rx) in zip(endpoints, pairs, strict=True):
            assert isinstance(received_tx, Sender)
            received_tx.send(full)
            assert sub_rx.recv(LIMIT) == full
            received_tx.close()
        with pytest.raises(Empty):
            rx.try_recv()


@all_kinds
def test_P01_simple(make_pair: MakePair) -> None:
    """Seven bytes arrive equal."""
    tx, rx = make_pair()
    with tx, rx:
        tx.send(SEVEN)
        assert rx.recv(LIMIT) == SEVEN


def test_P02_sender_transfer() -> None:
    """A sender arrives with the data, exactly one, and what is sent on it flows."""
    super_tx, super_rx = channel()
    sub_tx, sub_rx = channel()
    with super_tx, super_rx, sub_tx, sub_rx:
        super_tx.send((b"foo", [sub_tx]))
        data, [received_tx] = super_rx.recv(LIMIT)
        with received_tx:
            assert data == b"foo"
            received_tx.send(b"foo")
            assert sub_rx.recv(LIMIT) == b"foo"


def test_P03_receiver_transfer() -> None:
    """A receiver arrives with the data, exactly one, and yields what is sent to it."""
    super_tx, super_rx = channel()
    sub_tx, sub_rx = channel()
    with super_tx, super_rx, sub_tx:
        super_tx.send((b"foo", [sub_rx]))
        data, [received_rx] = super_rx.recv(LIMIT)
        with received_rx:
            assert data == b"foo"
            sub_tx.send(b"foo")
            assert received_rx.recv(LIMIT) == b"foo"


def test_P04_multisender_transfer() -> None:
    """Two senders arrive in their order: each leads to its own receiver."""
    super_tx, super_rx = channel()
    tx0, rx0 = channel()
    tx1, rx1 = channel()
    with super_tx, super_rx, tx0, rx0, tx1, rx1:
        super_tx.send((b"foo", [tx0, tx1]))
        data, [received0, received1] = super_rx.recv(LIMIT)
        with received0, received1:
            assert data == b"foo"
            received0.send(b"zero")
            received1.send(b"one")
            assert rx0.recv(LIMIT) == b"zero"
            assert rx1.recv(LIMIT) == b"one"


@all_kinds
def test_P05_medium_data(make_pair: MakePair) -> None:
    """What fills a packet is sent and received by one thread."""
    tx, rx = make_pair()
    with tx, rx:
        tx.send(pattern(MEDIUM))
        assert rx.recv(LIMIT) == pattern(MEDIUM)


def test_P06_medium_data_with_sender_transfer() -> None:
    """As P05, and a sender with it, which works."""
    check_transfer(pattern(MEDIUM), senders=1, in_thread=False)


@all_kinds
def test_P07_big_data(make_pair: MakePair) -> None:
    """1 MiB, sent by another thread, arrives equal."""
    tx, rx = make_pair()
    with tx, rx:
        sending = InThread(tx.send, pattern(MIB))
        assert rx.recv(LIMIT) == pattern(MIB)
        sending.result()


@all_kinds
def test_P08_huge_data(make_pair: MakePair) -> None:
    """50, 46, 49, 47 and 48 MiB, each on a channel of its own, arrive equal."""
    for size in (50 * MIB, 46 * MIB, 49 * MIB, 47 * MIB, 48 * MIB):
        data = pattern(size)
        tx, rx = make_pair()
        with tx, rx:
            sending = InThread(tx.send, data)
            assert rx.recv(LIMIT) == data
            sending.result()


def test_P09_big_data_with_sender_transfer() -> None:
    """1 MiB with a sender; both arrive, and the sender then carries F bytes."""
    check_transfer(pattern(MIB), senders=1, in_thread=True)


@pytest.mark.parametrize("senders", [0, 1, 2, 3, 4, 5, 6, 64])
def test_P10_full_packet(senders: int) -> None:
    """Exactly F bytes with so many senders, sent and received by one thread."""
    check_transfer(pattern(F), senders, in_thread=False)


@all_kinds
def test_P10_full_packet_alone(make_pair: MakePair) -> None:
    """Exactly F bytes, and every size by which an envelope about them could fill the packet."""
    tx, rx = make_pair()
    with tx, rx:
        for size in range(F - 256, F + 1):
            data = pattern(size)
            tx.send(data)
            assert rx.recv(LIMIT) == data


def test_P10_full_packet_around_the_edge() -> None:
    """The sizes at which data and senders together just fill a packet, and one byte more, are no exception."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with tx, rx, sub_tx, sub_rx, sub_tx.clone() as again:
        for size in range(F - 512, F + 2):
            data = pattern(size)
            tx.send((data, [sub_tx, again]))
            received, endpoints = rx.recv(LIMIT)
            assert received == data
            for number, received_tx in enumerate(endpoints):
                with received_tx:
                    received_tx.send((size, number))
            assert [sub_rx.recv(LIMIT) for _ in range(2)] == [(size, 0), (size, 1)]


@pytest.mark.parametrize("senders", [0, 63])
def test_P11_overfull_packet(senders: int) -> None:
    """One byte more than F, with so many senders: no packet takes it, and one thread is enough."""
    check_transfer(pattern(F + 1), senders, in_thread=False)


@all_kinds
def test_P11_overfull_packet_alone(make_pair: MakePair) -> None:
    """One byte more than F, sent and received by one thread."""
    tx, rx = make_pair()
    with tx, rx:
        tx.send(pattern(F + 1))
        assert rx.recv(LIMIT) == pattern(F + 1)


@all_kinds
def test_P12_empty(make_pair: MakePair) -> None:
    """No bytes are a message, not the end."""
    tx, rx = make_pair()
    with tx, rx:
        tx.send(b"")
        assert rx.recv(LIMIT) == b""
        with pytest.raises(Empty):
            rx.try_recv()


def test_P13_fd_only() -> None:
    """No bytes and one sender arrive as just that."""
    check_transfer(b"", senders=1, in_thread=False)


@pytest.mark.parametrize("senders", range(7))
def test_P14_big_data_with_fds(senders: int) -> None:
    """1 MiB with 0 to 6 senders, sent by another thread."""
    check_transfer(pattern(MIB), senders, in_thread=True)


def check_concurrent_senders(make_pair: MakePair, threads: int, size: int, delay: Callable[[], object]) -> None:
    """So many threads send at once, each by a clone; their messages arrive whole, each once, and no more."""
    tx, rx = make_pair()

    def send(by: AnySender, number: int) -> None:
        with by:
            delay()
            by.send(tagged(size, number))

    with tx, rx:
        sending = [InThread(send, tx.clone(), number) for number in range(threads)]
        messages = [spin_try_recv(rx) for _ in range(threads)]
        for thread in sending:
            thread.result()
        assert sorted(messages) == [tagged(size, number) for number in range(threads)]
        with pytest.raises(Empty):
            rx.try_recv()
        tx.close()
        with pytest.raises(Disconnected):
            rx.try_recv()


def spin_try_recv(rx: AnyReceiver) -> Any:
    """The next message, by ``try_recv`` alone, which says Empty until it is there."""
    for _ in attempts():
        try:
            return rx.try_recv()
        except Empty:
            pass
    return None


@all_kinds
def test_P15_concurrent_senders(make_pair: MakePair) -> None:
    """Three threads send 1 MiB each at once; the messages arrive whole, each once, then nothing."""
    together = threading.Barrier(3)
    check_concurrent_senders(make_pair, threads=3, size=MIB, delay=lambda: together.wait(LIMIT))


@all_kinds
def test_P26_no_senders_notification(make_pair: MakePair) -> None:
    """Once the sender is closed, receiving raises Disconnected."""
    tx, rx = make_pair()
    tx.close()
    with rx, pytest.raises(Disconnected):
        rx.recv(LIMIT)


def send_until_it_fails(send: Callable[[bytes], object]) -> None:
    """Send seven bytes again and again, until that raises what tells that the receiver is gone, and only that."""
    with pytest.raises(ReceiverGone) as caught:
        repeat(send, SEVEN)
    assert not isinstance(caught.value, Disconnected)


@all_kinds
def test_P27_no_receiver_notification(make_pair: MakePair) -> None:
    """Once the receiver is closed, sending fails, with another error than the one for no senders."""
    tx, rx = make_pair()
    rx.close()
    with tx:
        send_until_it_fails(tx.send)


@all_kinds
def test_P28_no_receiver_notification_pending(make_pair: MakePair) -> None:
    """As P27 where a message was left unread; and the error stays the same, whatever the kernel calls it."""
    tx, rx = make_pair()
    with tx:
        tx.send(SEVEN)
        rx.close()
        for _ in range(3):
            send_until_it_fails(tx.send)


def close_after_42_ms(rx: AnyReceiver) -> None:
    time.sleep(0.042)
    rx.close()


@all_kinds
def test_P29_no_receiver_notification_delayed(make_pair: MakePair) -> None:
    """The receiver is closed while another thread sends without end: sending fails then."""
    tx, rx = make_pair()
    with tx:
        closing = InThread(close_after_42_ms, rx)
        send_until_it_fails(tx.send)
        closing.result()


@all_kinds
def test_P29_no_receiver_notification_delayed_blocked(make_pair: MakePair) -> None:
    """The receiver is closed while another thread waits for room to send: it wakes with the error."""
    tx, rx = make_pair()
    with tx:
        closing = InThread(close_after_42_ms, rx)
        send_until_it_fails(lambda data: tx.send(data, timeout=LIMIT))
        closing.result()


def poll_until_disconnected(rx: AnyReceiver) -> None:
    with pytest.raises(Disconnected):
        spin_try_recv(rx)


@all_kinds
def test_P30_no_senders_notification_try_recv(make_pair: MakePair) -> None:
    """Polling says Empty while there is a sender, and Disconnected once it is closed."""
    tx, rx = make_pair()
    with rx:
        with pytest.raises(Empty):
            rx.try_recv()
        tx.close()
        poll_until_disconnected(rx)


@all_kinds
def test_P31_no_senders_notification_try_recv_delayed(make_pair: MakePair) -> None:
    """As P30, where another thread closes the sender 42 ms later."""
    tx, rx = make_pair()

    def close_later() -> None:
        time.sleep(0.042)
        tx.close()

    with rx:
        with pytest.raises(Empty):
            rx.try_recv()
        closing = InThread(close_later)
        poll_until_disconnected(rx)
        closing.result()


@all_kinds
def test_P32_try_recv(make_pair: MakePair) -> None:
    """Nothing, then the data, then nothing again."""
    tx, rx = make_pair()
    with tx, rx:
        with pytest.raises(Empty):
            rx.try_recv()
        tx.send(SEVEN)
        assert rx.try_recv() == SEVEN
        with pytest.raises(Empty):
            rx.try_recv()


@all_kinds
def test_P33_try_recv_large(make_pair: MakePair) -> None:
    """Polling while another thread sends 1 MiB says Empty until all of it is there, and after it."""
    tx, rx = make_pair()

    def send_and_close() -> None:
        with tx:
            tx.send(pattern(MIB))

    with rx:
        sending = InThread(send_and_close)
        assert spin_try_recv(rx) == pattern(MIB)
        poll_until_disconnected(rx)
        sending.result()


def work_for_50_ms() -> None:
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        pass


@all_kinds
def test_P34_try_recv_large_delayed(make_pair: MakePair) -> None:
    """Ten threads send 512 KiB each after 50 ms of work; polling gives each whole and once, then nothing."""
    check_concurrent_senders(make_pair, threads=10, size=MIB // 2, delay=work_for_50_ms)
