"""Conformance 3: what is easy to miss, as far as it concerns channels. Each test is named after its number.

Where the reference system does otherwise (its sends block, its large messages go in fragments), the
test asserts what ours promises in its place, and its docstring says so.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import chain, starmap
from types import FrameType
from typing import Any

import pytest

from mp_ipcchan import (
    BytesSender,
    Disconnected,
    Empty,
    EndpointClosed,
    EndpointMoved,
    Fd,
    Full,
    OneShotServer,
    Receiver,
    ReceiverGone,
    Sender,
    SerializationError,
    Server,
    bytes_channel,
    channel,
    connect,
)

from ._support import (
    LIMIT,
    SEVEN,
    AnyReceiver,
    AnySender,
    F,
    Interrupted,
    Interrupter,
    InThread,
    MakePair,
    StartChild,
    all_kinds,
    attempts,
    bare_fork,
    calling_often,
    fork,
    interrupted,
    open_descriptors,
    pattern,
    repeat,
    room_for,
    spawn,
)
from .programs import child as program


def fill(tx: Sender[Any] | BytesSender, data: Any = None) -> int:
    """Send 0, 1, 2, ..., or ``data``, until the kernel takes no more; how many it took."""
    count = 0
    for _ in attempts():
        try:
            message: Any = count if data is None else data
            tx.try_send(message)
        except Full:
            break
        count += 1
    return count


def await_receiver_gone(tx: Sender[Any]) -> None:
    """Send until the kernel has closed a receiver that nobody can reach any more."""
    with pytest.raises(ReceiverGone):
        repeat(tx.send, None)


class Unpicklable:
    def __reduce__(self) -> str:
        raise RuntimeError("not today")


# -- 1: senders copy, receivers move --------------------------------------------------------


def test_S01_senders_copy() -> None:
    """A sender that was sent still works here, and so does the copy."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, rx, carrier_tx, carrier_rx:
        carrier_tx.send(tx)
        with carrier_rx.recv(LIMIT) as copied:
            tx.send("original")
            copied.send("copy")
            assert [rx.recv(LIMIT), rx.recv(LIMIT)] == ["original", "copy"]


def test_S01_receivers_move() -> None:
    """A receiver that was sent is gone here, whatever it is asked to do; closing it is no error."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, carrier_tx, carrier_rx:
        carrier_tx.send(rx)
        assert rx.closed
        for use in (rx.recv, rx.try_recv, rx.fileno, lambda: carrier_tx.send(rx)):
            with pytest.raises(EndpointMoved):
                use()
        rx.close()
        with carrier_rx.recv(LIMIT) as moved:
            tx.send("after the move")
            assert moved.recv(LIMIT) == "after the move"


def check_still_works(tx: Sender[Any], rx: Receiver[Any], waiting: list[object]) -> None:
    assert not rx.closed
    tx.send("last")
    assert [rx.recv(LIMIT) for _ in range(len(waiting) + 1)] == [*waiting, "last"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_S01_failed_encoding_keeps_the_receiver(before: bool) -> None:
    """A message that can't be serialized takes no receiver along, nor what waits in it."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, rx, carrier_tx, carrier_rx:
        tx.send_many(range(3))
        assert rx.recv(LIMIT) == 0
        with pytest.raises(SerializationError) as caught:
            carrier_tx.send((rx, Unpicklable()) if before else (Unpicklable(), rx))
        assert isinstance(caught.value.__cause__, RuntimeError)
        check_still_works(tx, rx, [1, 2])
        with pytest.raises(Empty):
            carrier_rx.try_recv()


def test_S01_failed_send_keeps_the_receiver() -> None:
    """A message that nobody can receive any more takes no receiver along."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    carrier_rx.close()
    with tx, rx, carrier_tx:
        tx.send_many(range(3))
        assert rx.recv(LIMIT) == 0
        with pytest.raises(ReceiverGone):
            carrier_tx.send(rx)
        check_still_works(tx, rx, [1, 2])


def test_S01_full_keeps_the_receiver() -> None:
    """A message that the kernel doesn't take in time takes no receiver along; it can be sent later."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, rx, carrier_tx, carrier_rx:
        tx.send_many(range(3))
        assert rx.recv(LIMIT) == 0
        count = fill(carrier_tx)
        with pytest.raises(Full):
            carrier_tx.try_send(rx)
        with pytest.raises(Full):
            carrier_tx.send(rx, timeout=0.01)
        check_still_works(tx, rx, [1, 2])
        carrier_tx.send(rx)
        assert [carrier_rx.recv(LIMIT) for _ in range(count)] == list(range(count))
        with carrier_rx.recv(LIMIT) as moved:
            check_still_works(tx, moved, [])


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_S01_dead_endpoints_are_refused(end: str) -> None:
    """A closed endpoint in a message raises EndpointClosed, a moved one EndpointMoved, at any depth; it isn't sent."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, rx, carrier_tx, carrier_rx:
        dead = tx if end == "sender" else rx
        dead.close()
        live_tx, live_rx = channel()
        with live_tx, live_rx:
            with pytest.raises(EndpointClosed):
                carrier_tx.send({"live": live_rx, "deep": [(dead,)]})
            check_still_works(live_tx, live_rx, [])
            carrier_tx.send(live_rx)
            carrier_rx.recv(LIMIT).close()
            with pytest.raises(EndpointMoved):
                carrier_tx.send({"deep": [(live_rx,)]})
            with pytest.raises(Empty):
                carrier_rx.try_recv()


# -- 2 to 5: endpoints in flight ------------------------------------------------------------


def test_S02_queue_moves_along() -> None:
    """What was sent before, during and after a move arrives in order at the new owner.

    5,000 messages are more than the kernel holds, so some wait with the sender, and because some were
    received packed, some in the receiver itself.
    """
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, carrier_tx, carrier_rx:
        for number in range(2000):
            tx.send(number)
        assert [rx.recv(LIMIT) for _ in range(1000)] == list(range(1000))
        tx.send_many(range(2000, 3000))
        carrier_tx.send(rx)
        for number in range(3000, 4000):
            tx.send(number)
        with carrier_rx.recv(LIMIT) as moved:
            for number in range(4000, 5000):
                tx.send(number)
            assert [moved.recv(LIMIT) for _ in range(4000)] == list(range(1000, 5000))
            with pytest.raises(Empty):
                moved.try_recv()


def test_S02_queue_moves_along_with_its_endpoints() -> None:
    """Endpoints in messages that wait in a receiver move with it, from hand to hand."""
    sub_tx, sub_rx = channel()
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with sub_tx, sub_rx, tx, carrier_tx, carrier_rx:
        for number in range(10):
            tx.send((number, sub_tx, pattern(F)))
        for _ in range(3):
            carrier_tx.send(rx)
            rx = carrier_rx.recv(LIMIT)
        with rx:
            for number in range(10):
                received, received_tx, data = rx.recv(LIMIT)
                with received_tx:
                    received_tx.send(received)
                assert sub_rx.recv(LIMIT) == number
                assert data == pattern(F)


def test_S02_blocked_sender_waits_for_the_new_owner() -> None:
    """A sender that waits for room goes on waiting while the receiver moves, and is served by its new owner."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, carrier_tx, carrier_rx:
        count = fill(tx)
        blocked = InThread(lambda: tx.send("blocked", timeout=LIMIT))
        carrier_tx.send(rx)
        with carrier_rx.recv(LIMIT) as moved:
            assert [moved.recv(LIMIT) for _ in range(count)] == list(range(count))
            assert moved.recv(LIMIT) == "blocked"
        blocked.result()


def test_S03_sender_in_flight_keeps_the_channel() -> None:
    """A channel whose only sender is in an undelivered message is empty, not ended."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with rx, carrier_tx, carrier_rx:
        carrier_tx.send(tx)
        tx.close()
        with pytest.raises(Empty):
            rx.try_recv()
        with pytest.raises(Empty):
            rx.recv(timeout=0.01)
        with carrier_rx.recv(LIMIT) as received_tx:
            received_tx.send(1)
        assert rx.recv(LIMIT) == 1
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def test_S03_endpoints_that_wait_to_be_sent() -> None:
    """Endpoints in a message that the kernel had no room for are as good as sent: closed here, they work there."""
    tx, rx = channel()
    moving_tx, moving_rx = channel()
    carrier_tx, carrier_rx = channel()
    with rx, carrier_tx, carrier_rx:
        count = fill(carrier_tx)
        moving_tx.send_many(range(10))
        carrier_tx.send((tx, moving_rx))
        for end in (tx, moving_rx, moving_tx):
            end.close()
        with pytest.raises(Empty):
            rx.try_recv()
        for _ in range(count):
            carrier_rx.recv(LIMIT)
        received_tx, received_rx = carrier_rx.recv(LIMIT)
        with received_tx, received_rx:
            assert list(received_rx) == list(range(10))
            received_tx.send("late")
        assert list(rx) == ["late"]


def test_S03_receiver_in_flight_accepts() -> None:
    """Sending to a receiver that is in an undelivered message succeeds, and the messages arrive."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with carrier_tx, carrier_rx:
        carrier_tx.send(rx)
        tx.send_many(range(100))
        tx.close()
        with carrier_rx.recv(LIMIT) as moved:
            assert list(moved) == list(range(100))


def test_S04_dropped_carrier_drops_receivers() -> None:
    """Closing a receiver destroys the receivers in its undelivered messages: their senders fail then."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, carrier_tx:
        carrier_tx.send(rx)
        tx.send("unread")
        carrier_rx.close()
        await_receiver_gone(tx)


def test_S04_dropped_carrier_drops_receivers_that_wait_to_be_sent() -> None:
    """As before, where the message with the receiver had not left yet: ``send`` returned, so the receiver is gone."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, rx, carrier_tx:
        fill(carrier_tx)
        carrier_tx.send(rx)
        assert rx.closed
        carrier_rx.close()
        await_receiver_gone(tx)
        assert rx.closed
        with pytest.raises(EndpointMoved):
            rx.recv(LIMIT)


def test_S04_dropped_carrier_drops_senders() -> None:
    """Closing a receiver destroys the senders in its undelivered messages: their receivers see the end."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with rx, carrier_tx:
        tx.send("before")
        carrier_tx.send(tx)
        tx.close()
        carrier_rx.close()
        assert rx.recv(LIMIT) == "before"
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def test_S04_dropped_carrier_of_carriers() -> None:
    """As before, where the carrier that is closed holds another one, and messages wait in user space."""
    tx, rx = channel()
    inner_tx, inner_rx = channel()
    outer_tx, outer_rx = channel()
    with rx, outer_tx:
        inner_tx.send_many([1, 2])
        inner_tx.send(tx)
        assert inner_rx.recv(LIMIT) == 1
        tx.close()
        outer_tx.send(inner_rx)
        outer_rx.close()
        await_receiver_gone(inner_tx)
        inner_tx.close()
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def test_S05_sender_through_its_own_channel() -> None:
    """A sender in its own channel keeps it open, until it was received and closed."""
    tx, rx = channel()
    with rx:
        tx.send(tx)
        tx.close()
        with rx.recv(LIMIT) as received_tx:
            with pytest.raises(Empty):
                rx.try_recv()
            received_tx.send("still open")
        assert rx.recv(LIMIT) == "still open"
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


@pytest.mark.parametrize("size", [1, 100_000], ids=["small", "large"])
@pytest.mark.parametrize("how", ["send", "timeout", "try_send", "send_many", "send_async", "clone", "opaque"])
def test_S05_receiver_through_its_own_channel(how: str, size: int) -> None:
    """It would be lost, with all that was sent: that is an error, and both ends work as before."""
    tx, rx = channel()
    witness_tx, witness_rx = channel()
    with tx, rx, witness_tx, witness_rx, tx.clone() as clone:
        tx.send((bytes(size), witness_rx))
        moved: Any = rx.to_opaque() if how == "opaque" else rx
        message = (bytes(size), moved)
        sends: dict[str, Callable[[], object]] = {
            "timeout": lambda: tx.send(message, LIMIT),
            "try_send": lambda: tx.try_send(message),
            "send_many": lambda: tx.send_many([message]),
            "send_async": lambda: asyncio.run(tx.send_async(message)),
            "clone": lambda: clone.send(message),
        }
        with pytest.raises(SerializationError, match="its own channel"):
            sends.get(how, lambda: tx.send(message))()
        with moved.to() if how == "opaque" else rx as still:
            data, received = still.recv(LIMIT)
            with received:
                assert len(data) == size
                witness_tx.send("still there")
                assert received.recv(LIMIT) == "still there"
            with pytest.raises(Empty):
                still.try_recv()


def test_S05_channels_that_only_hold_each_other() -> None:
    """Channels whose ends are all in their own queues are freed by the kernel, with all that these hold."""
    tx, rx = channel()
    other_tx, other_rx = channel()
    witness_tx, witness_rx = channel()
    with witness_rx:
        tx.send((tx, witness_tx))
        witness_tx.close()
        other_tx.send(rx)
        tx.send(other_rx)
        tx.close()
        other_tx.close()

        def look() -> None:
            # The kernel looks for such channels whenever a socket closes.
            for end in channel():
                end.close()
            with pytest.raises(Empty):
                witness_rx.try_recv()

        with pytest.raises(Disconnected):
            repeat(look)


# -- 6 to 8: the two ends of a channel's life -----------------------------------------------


@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
def test_S06_data_before_the_end(killed: bool) -> None:
    """All that a process sent is received before Disconnected, though it is dead, or was killed."""
    tx, rx = channel()

    def send_and_die() -> None:
        rx.close()
        for number in range(100):
            tx.send(number)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)

    with rx, bare_fork(send_and_die) as child:
        tx.close()
        assert child.join() == (-signal.SIGKILL if killed else 0)
        assert [rx.recv(LIMIT) for _ in range(100)] == list(range(100))
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


@pytest.mark.parametrize("start", [spawn, fork], ids=["spawn", "fork"])
def test_S06_data_that_the_kernel_had_no_room_for(start: StartChild) -> None:
    """A process that sent more than the kernel holds ends before anybody reads, and all of it is received."""
    with OneShotServer() as server, start(program.send_without_a_reader, server.name, "5000") as child:
        assert child.join() == 0
        rx, first = server.accept(LIMIT)
        with rx:
            assert [first, *(rx.recv(LIMIT) for _ in range(4999))] == list(range(5000))
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)


@all_kinds
def test_S07_empty_message_is_not_the_end(make_pair: MakePair) -> None:
    """Messages without a byte are received one by one, and only then the end."""
    tx, rx = make_pair()
    with rx:
        for data in (b"", b"x", b"", b""):
            tx.send(data)
        tx.close()
        assert list(rx) == [b"", b"x", b"", b""]
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def test_S08_ends_are_told_apart() -> None:
    """No sender is an end of file, no receiver a broken pipe, and neither is taken for the other."""
    tx, rx = channel()
    tx.close()
    with rx, pytest.raises(EOFError) as ended:
        rx.recv(LIMIT)
    assert isinstance(ended.value, Disconnected)
    assert not isinstance(ended.value, ReceiverGone)
    tx, rx = channel()
    rx.close()
    with tx, pytest.raises(BrokenPipeError) as broken:
        tx.send(1)
    assert isinstance(broken.value, ReceiverGone)
    assert not isinstance(broken.value, Disconnected)


@all_kinds
@pytest.mark.parametrize("pending", [False, True], ids=["read", "unread"])
def test_S08_receiver_gone_whatever_the_errno(make_pair: MakePair, pending: bool) -> None:
    """The kernel says EPIPE, or first ECONNRESET where a message was unread; both are ReceiverGone, in every call."""
    tx, rx = make_pair()
    with tx:
        if pending:
            tx.send(SEVEN)
        rx.close()
        for _ in range(2):
            for send in (tx.send, tx.try_send, lambda data: tx.send(data, timeout=LIMIT)):
                with pytest.raises(ReceiverGone):
                    send(SEVEN)


def test_S08_no_signal() -> None:
    """Sending to nobody raises ReceiverGone though SIGPIPE would end the process."""
    tx, rx = channel()
    rx.close()

    def send() -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with pytest.raises(ReceiverGone):
            tx.send(1)

    with tx, bare_fork(send) as child:
        assert child.join() == 0


# -- 9: what the kernel holds ---------------------------------------------------------------


@all_kinds
@pytest.mark.parametrize("size", [64, 1024, 4096, 16384, 65536, 212952])
def test_S09_send_never_blocks(make_pair: MakePair, size: int) -> None:
    """One thread sends far more than the kernel holds, then receives it (the reference system would stop)."""
    count = min(10_000, 64_000_000 // size)
    tx, rx = make_pair()
    with tx, rx:
        data = pattern(size)
        for number in range(count):
            tx.send(number.to_bytes(4, "little") + data)
        for number in range(count):
            received = rx.recv(LIMIT)
            assert received[:4] == number.to_bytes(4, "little")
            assert received[4:] == data
        with pytest.raises(Empty):
            rx.try_recv()


def test_S09_what_waits_is_what_was_sent() -> None:
    """A message is as it was when ``send`` returned, though its buffer changes before the kernel has room for it."""
    bytes_tx, bytes_rx = bytes_channel()
    tx, rx = channel()
    with bytes_tx, bytes_rx, tx, rx:
        for size in (100, F + 1):
            for number in range(300):
                buffer = bytearray([number % 251]) * size
                bytes_tx.send(buffer)
                bytes_tx.send(memoryview(buffer))
                tx.send([buffer, pickle.PickleBuffer(buffer)])
                buffer[:] = bytes(size)
            for number in range(300):
                expected = bytes([number % 251]) * size
                assert bytes_rx.recv(LIMIT) == bytes_rx.recv(LIMIT) == expected
                assert rx.recv(LIMIT) == [expected, expected]


@all_kinds
def test_S09_bounded_sends(make_pair: MakePair) -> None:
    """``try_send`` and ``send(timeout=)`` raise Full where the kernel is full; what they refused never arrives."""
    tx, rx = make_pair()
    with tx, rx:
        count = fill(tx, SEVEN)
        with pytest.raises(Full):
            tx.send(b"late", timeout=0.01)
        assert [rx.recv(LIMIT) for _ in range(count)] == [SEVEN] * count
        tx.send(b"next", timeout=LIMIT)
        assert rx.recv(LIMIT) == b"next"


# -- 14: signals ----------------------------------------------------------------------------


def collect(box: list[Any], call: Any, *args: Any) -> None:
    """Append what ``call`` returns to ``box`` before a signal's handler can run: no bytecode lies between."""
    box.extend(starmap(call, (args,)))


def receive_interrupted(
    tx: AnySender, rx: AnyReceiver, message: Callable[[int], Any], count: int, timeout: float | None
) -> list[Any]:
    """What arrives of ``count`` messages, where a signal's handler raises again and again in ``recv``."""

    def send_all() -> None:
        with tx:
            for number in range(count):
                tx.send(message(number), timeout=timeout)

    received: list[Any] = []
    interrupt = Interrupter()
    with rx:
        sending = InThread(send_all)
        with calling_often(interrupt):
            for _ in attempts():
                try:
                    # No loop in here: the jump back to its start is not covered by ``except``.
                    interrupt.armed = True
                    collect(received, rx.recv, LIMIT)
                    interrupt.armed = False
                except Interrupted:
                    pass
                except Disconnected:
                    interrupt.armed = False
                    break
        sending.result()
    return received


def send_interrupted(tx: AnySender, message: Callable[[int], Any], count: int) -> list[int]:
    """The numbers of the messages whose ``send`` returned, where a signal's handler raises in it again and again."""
    sent: list[None] = []
    certain: list[int] = []
    interrupt = Interrupter()
    with tx, calling_often(interrupt):
        for number in range(count):
            sent.clear()
            item = message(number)
            try:
                interrupt.armed = True
                collect(sent, tx.send, item)
                interrupt.armed = False
            except Interrupted:
                pass
            if sent:
                certain.append(number)
    return certain


no_promise_on_310 = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="3.10 runs handlers between any two bytecodes: see docs/architecture.md"
)


@no_promise_on_310
@interrupted
@all_kinds
@pytest.mark.parametrize(("size", "count"), [(8, 100_000), (F + 1, 3000)], ids=["small", "large"])
def test_S14_interrupted_receive_loses_nothing(make_pair: MakePair, size: int, count: int) -> None:
    """A handler that raises in the middle of receiving costs no message, doubles none, and keeps their order."""

    def message(number: int) -> bytes:
        return number.to_bytes(8, "little") + bytes(size - 8)

    # Small messages may wait with the sender, which packs them then.
    received = receive_interrupted(*make_pair(), message, count, None if size == 8 else LIMIT)
    numbers = [int.from_bytes(data[:8], "little") for data in received]
    assert sorted(set(range(count)) - set(numbers)) == [], "messages were lost"
    assert numbers == list(range(count))
    assert all(data == message(number) for number, data in enumerate(received))


@no_promise_on_310
@interrupted
@all_kinds
def test_S14_handlers_one_after_another(make_pair: MakePair) -> None:
    """One that raises, and the next that raises while that is seen to: beside a busy thread, time passes quickly."""
    count = 200_000
    tx, rx = make_pair()
    receiving = type(rx).recv.__code__

    def send_all() -> None:
        with tx:
            for number in range(count):
                tx.send(number.to_bytes(8, "little"))

    def interrupt() -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is receiving:
                raise Interrupted
            frame = frame.f_back

    received: list[bytes] = []
    with rx:
        sending = InThread(send_all)
        with calling_often(interrupt, 0.0003):
            for _ in attempts():
                try:
                    received.extend(map(rx.recv, (LIMIT,)))
                except Interrupted:
                    pass
                except Disconnected:
                    break
        sending.result()
    assert received == [number.to_bytes(8, "little") for number in range(count)]


@no_promise_on_310
@interrupted
@all_kinds
@pytest.mark.parametrize("batch", [1, 50])
def test_S14_interrupted_recv_many_loses_nothing(make_pair: MakePair, batch: int) -> None:
    """The same for messages that are taken together."""
    count = 50_000
    tx, rx = make_pair()

    def send_all() -> None:
        with tx:
            for number in range(count):
                tx.send(number.to_bytes(8, "little"))

    received: list[Any] = []
    interrupt = Interrupter()
    with rx:
        sending = InThread(send_all)
        with calling_often(interrupt):
            for _ in attempts():
                try:
                    interrupt.armed = True
                    received.extend(chain.from_iterable(map(rx.recv_many, (batch,), (LIMIT,))))
                    interrupt.armed = False
                except Interrupted:
                    pass
                except Disconnected:
                    interrupt.armed = False
                    break
        sending.result()
    assert [int.from_bytes(data, "little") for data in received] == list(range(count))


@interrupted
@all_kinds
@pytest.mark.parametrize(("size", "count"), [(8, 100_000), (F + 1, 3000)], ids=["small", "large"])
def test_S14_interrupted_send_doubles_nothing(make_pair: MakePair, size: int, count: int) -> None:
    """A handler that raises in the middle of sending costs at most the message being sent, and doubles none.

    Which of the messages whose ``send`` was interrupted have left can't be known; those whose ``send`` returned have.
    """
    tx, rx = make_pair()
    receiving = InThread(lambda: [int.from_bytes(data[:8], "little") for data in rx])
    certain = send_interrupted(tx, lambda number: number.to_bytes(8, "little") + bytes(size - 8), count)
    received = receiving.result()
    rx.close()
    assert sorted(set(certain) - set(received)) == [], "messages were lost"
    assert received == sorted(set(received)), "messages were doubled, or overtook each other"


def test_S14_handler_that_sends() -> None:
    """A handler may send on the channel that the main thread is just sending on; both keep their order."""
    tx, rx = channel()
    handled = 0

    def send() -> None:
        nonlocal handled
        tx.send(("handler", handled))
        handled += 1

    with rx:
        with tx, calling_often(send):
            for number in range(100_000):
                tx.send(("main", number))
        received = list(rx)
    assert [number for by, number in received if by == "main"] == list(range(100_000))
    assert [number for by, number in received if by == "handler"] == list(range(handled))


@all_kinds
def test_S14_handler_that_receives(make_pair: MakePair) -> None:
    """A handler may receive from what the main thread is just receiving from; each message goes to one of them."""
    count = 50_000
    tx, rx = make_pair()

    def send_all() -> None:
        with tx:
            for number in range(count):
                tx.send(number.to_bytes(8, "little"))

    handled: list[Any] = []

    def receive() -> None:
        with suppress(Empty, Disconnected):
            handled.append(rx.try_recv())

    with rx:
        sending = InThread(send_all)
        with calling_often(receive):
            received = list(rx)
        sending.result()
    numbers = sorted(int.from_bytes(data, "little") for data in received + handled)
    assert sorted(set(range(count)) - set(numbers)) == [], "messages were lost"
    assert numbers == list(range(count)), "messages were doubled"


# -- 20, 21: what is shared between processes -----------------------------------------------


def test_S20_sockets_stay_blocking() -> None:
    """No call changes the sockets, which other processes share: none of them is ever non-blocking."""
    before = open_descriptors()
    tx, rx = channel()
    with tx, rx:
        sockets = open_descriptors() - before
        with pytest.raises(Empty):
            rx.try_recv()
        with pytest.raises(Empty):
            rx.recv(timeout=0.01)
        count = fill(tx)
        with pytest.raises(Full):
            tx.send(None, timeout=0.01)
        assert [os.get_blocking(fd) for fd in sockets] == [True, True]
        for _ in range(count):
            rx.recv(LIMIT)


def test_S20_default_timeout_changes_nothing() -> None:
    """``socket.setdefaulttimeout``, which makes every new socket non-blocking, does not reach ours."""
    before = open_descriptors()
    socket.setdefaulttimeout(5)
    try:
        tx, rx = channel()
        with tx, rx:
            tx.send((tx, SEVEN))
            received_tx, data = rx.recv(LIMIT)
            received_tx.close()
            assert data == SEVEN
            assert all(os.get_blocking(fd) for fd in open_descriptors() - before)
    finally:
        socket.setdefaulttimeout(None)


def test_S20_another_process_made_the_sockets_non_blocking() -> None:
    """Who shares a socket may make it non-blocking; receiving still waits, and so does sending with a timeout."""
    before = open_descriptors()
    tx, rx = channel()
    with tx, rx:
        for fd in open_descriptors() - before:
            os.set_blocking(fd, False)
        receiving = InThread(rx.recv)
        tx.send("waited for")
        assert receiving.result() == "waited for"
        count = fill(tx)
        with pytest.raises(Full):
            tx.send("late", timeout=0.01)
        sending = InThread(tx.send, "last", LIMIT)
        assert [rx.recv(LIMIT) for _ in range(count)] == list(range(count))
        assert InThread(rx.recv).result() == "last"
        sending.result()


def test_S21_descriptors_are_not_inherited() -> None:
    """Every descriptor that is made or received is closed in a program that this process starts."""
    before = open_descriptors()
    tx, rx = channel()
    far_tx, far_rx = channel()
    with tx, rx, far_tx, far_rx, open(os.devnull, "rb") as file, Fd(file) as handle:
        far_tx.send((tx, handle, pattern(F + 1)))
        received_tx, received_file, _ = far_rx.recv(LIMIT)
        far_tx.send(rx)
        received_rx = far_rx.recv(LIMIT)
        received_rx.fileno()
        with received_tx, received_file, received_rx:
            ours = open_descriptors() - before
            assert [fd for fd in ours if os.get_inheritable(fd)] == []


def test_S21_programs_keep_no_channel_open() -> None:
    """A program started meanwhile does not hide the end of a channel, even if it inherits what it can."""
    carrier_tx, carrier_rx = channel()
    tx, rx = channel()
    with carrier_tx, carrier_rx, rx:
        carrier_tx.send(tx)
        tx.close()
        received_tx = carrier_rx.recv(LIMIT)
        command = [sys.executable, "-c", "import sys; sys.stdout.write('.'); sys.stdout.flush(); sys.stdin.read()"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False, bufsize=0
        ) as child:
            try:
                assert child.stdout is not None
                assert child.stdout.read(1) == b"."
                received_tx.close()
                with pytest.raises(Disconnected):
                    rx.recv(LIMIT)
            finally:
                child.kill()


# -- 22: many descriptors -------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, F + 1], ids=["small", "large"])
@pytest.mark.parametrize("senders", [63, 64, 65, 251, 252, 253, 254, 255, 506, 507, 1000])
def test_S22_many_senders(senders: int, size: int) -> None:
    """One message takes any number of endpoints, also beyond the kernel's 253 a packet; they arrive in order."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * senders + 200:
        pytest.skip("too few descriptors (ulimit -n)")
    with ExitStack() as stack:
        tx, rx = channel()
        pairs = [channel() for _ in range(2)]
        for end in (tx, rx, *(end for pair in pairs for end in pair)):
            stack.enter_context(end)
        sent = [stack.enter_context(pairs[number % 2][0].clone()) for number in range(senders)]
        tx.send((pattern(size), sent))
        data, received = rx.recv(LIMIT)
        assert data == pattern(size)
        assert len(received) == senders
        for number, received_tx in enumerate(received):
            with received_tx:
                received_tx.send(number)
            assert pairs[number % 2][1].recv(LIMIT) == number


@pytest.mark.parametrize("senders", [64, 253, 300])
def test_S22_no_room_for_descriptors(senders: int) -> None:
    """A message with more descriptors than the receiver may open raises EMFILE, and comes once it may."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with tx, rx, sub_tx, sub_rx, ExitStack() as stack:
        tx.send([stack.enter_context(sub_tx.clone()) for _ in range(senders)])
        tx.send("next")
        before = open_descriptors()
        with room_for(20), pytest.raises(OSError, match="still there") as caught:
            rx.recv(LIMIT)
        assert caught.value.errno == errno.EMFILE
        for received in rx.recv(LIMIT):
            received.close()
        assert open_descriptors() == before
        assert rx.recv(LIMIT) == "next"


# -- 23 to 26: processes, identity, re-entrance ---------------------------------------------


def test_S23_fork_keeps_both_ends() -> None:
    """After a bare fork the child holds a sender, too: the stream ends only once both have closed it."""
    tx, rx = channel()
    go_tx, go_rx = channel()

    def hold_until_told() -> None:
        rx.close()
        go_tx.close()
        tx.send("forked")
        assert go_rx.recv(LIMIT) == "go"

    with rx, go_tx, bare_fork(hold_until_told) as child:
        tx.close()
        go_rx.close()
        assert rx.recv(LIMIT) == "forked"
        with pytest.raises(Empty):
            rx.try_recv()
        go_tx.send("go")
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)
        assert child.join() == 0


def test_S23_fork_keeps_the_receiver() -> None:
    """After a bare fork the child holds the receiver, too: senders fail only once both have closed it."""
    tx, rx = channel()
    go_tx, go_rx = channel()

    def hold_until_told() -> None:
        go_tx.close()
        assert go_rx.recv(LIMIT) == "go"

    with tx, go_tx, bare_fork(hold_until_told) as child:
        rx.close()
        go_rx.close()
        tx.send("nobody will read this")
        go_tx.send("go")
        await_receiver_gone(tx)
        assert child.join() == 0


def test_S23_fork_leaves_the_backlog_to_the_parent() -> None:
    """What waited to be sent at a fork is sent by the parent alone, once; the child sends what it sends itself."""
    tx, rx = channel()
    with rx:
        with tx:
            for number in range(5000):
                tx.send(number)
            with fork(tx.send, "child") as child:
                assert child.join() == 0
        received = list(rx)
    assert received.count("child") == 1
    received.remove("child")
    assert received == list(range(5000))


def test_S23_fork_leaves_what_was_received_to_the_parent() -> None:
    """What waited in a receiver, having come in one packet with others, is received by the parent alone."""
    tx, rx = channel()
    with tx, rx:
        tx.send_many(range(100))
        assert rx.recv(LIMIT) == 0

        def find_nothing() -> None:
            with pytest.raises(Empty):
                rx.recv(timeout=0.01)

        with bare_fork(find_nothing) as child:
            assert child.join() == 0
        assert [rx.recv(LIMIT) for _ in range(99)] == list(range(1, 100))


def test_S23_context_fork_closes_what_was_not_passed() -> None:
    """A child of our context has the endpoints that it was given, and no others: the stream ends with ours."""
    tx, rx = channel()
    go_tx, go_rx = channel()
    held_tx, held_rx = channel()
    with rx, go_tx, held_rx, fork(hold_until_told, held_tx, go_rx) as child:
        held_tx.close()
        tx.send("here")
        tx.close()
        assert rx.recv(LIMIT) == "here"
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)
        with pytest.raises(Empty):
            held_rx.try_recv()
        with pytest.raises(EndpointMoved):
            go_rx.recv(LIMIT)
        go_tx.send("go")
        assert held_rx.recv(LIMIT) == "gone"
        with pytest.raises(Disconnected):
            held_rx.recv(LIMIT)
        assert child.join() == 0


def hold_until_told(held_tx: Sender[Any], go_rx: Receiver[Any]) -> None:
    assert go_rx.recv(LIMIT) == "go"
    held_tx.send("gone")


def test_S24_one_receiver_twice_in_a_message() -> None:
    """A receiver that a message names twice moves once, and is one object there, too."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, carrier_tx, carrier_rx:
        carrier_tx.send({"a": rx, "b": [rx]})
        with pytest.raises(EndpointMoved):
            rx.try_recv()
        received = carrier_rx.recv(LIMIT)
        with received["a"]:
            assert received["a"] is received["b"][0]
            tx.send(1)
            assert received["b"][0].recv(LIMIT) == 1


def test_S24_one_descriptor_for_a_channel() -> None:
    """However often a sender comes, by one object or by several, it costs the receiving process one descriptor."""
    carrier_tx, carrier_rx = channel()

    def receive_all() -> None:
        carrier_tx.close()
        before = open_descriptors()
        kept = [sender for senders in carrier_rx for sender in senders]
        assert len(kept) == 3 * 1000
        assert len(open_descriptors() - before) == 1
        kept[-1].send(len(kept))
        for sender in kept:
            sender.close()
        assert open_descriptors() == before

    with carrier_rx, bare_fork(receive_all) as child:
        tx, rx = channel()
        with rx:
            with carrier_tx, tx, tx.clone() as other:
                for _ in range(1000):
                    carrier_tx.send([tx, other, tx.clone()])
            assert rx.recv(LIMIT) == 3000
            assert child.join() == 0


def test_S24_one_queue_for_a_channel() -> None:
    """All senders of a channel in a process keep one order, also one that comes once the others are closed."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    result_tx, result_rx = channel()

    def receive_all() -> None:
        for end in (tx, carrier_tx, carrier_rx):
            end.close()
        result_tx.send(list(rx))

    with result_tx, result_rx, carrier_tx, carrier_rx, bare_fork(receive_all) as child:
        rx.close()
        carrier_tx.send(tx)
        for number in range(10_000):
            tx.send(number)
        tx.close()
        with carrier_rx.recv(LIMIT) as again:
            for number in range(10_000, 20_000):
                again.send(number)
        assert result_rx.recv(LIMIT) == list(range(20_000))
        assert child.join() == 0


class Reenters:
    """Sends, while it is serialized, a message with an endpoint and with one less deep of its kind, and receives it."""

    def __init__(self, tx: Sender[Any], rx: Receiver[Any], endpoint: Sender[Any], depth: int) -> None:
        self._parts = tx, rx, endpoint, depth

    def __reduce__(self) -> tuple[Any, ...]:
        tx, rx, endpoint, depth = self._parts
        if depth:
            tx.send((depth, endpoint, Reenters(tx, rx, endpoint, depth - 1)))
            received_depth, received_tx, below = rx.recv(LIMIT)
            with received_tx:
                received_tx.send(received_depth)
            assert below == depth - 1
        return int, (depth,)


def test_S25_serializing_may_send_and_receive() -> None:
    """An object that sends and receives while it is serialized, several deep, disturbs no message around it."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with tx, rx, sub_tx, sub_rx:
        tx.send((sub_tx, Reenters(tx, rx, sub_tx, depth=5), sub_tx))
        first, depth, last = rx.recv(LIMIT)
        with first:
            assert depth == 5
            assert first is last
            first.send("outer")
        assert [sub_rx.recv(LIMIT) for _ in range(6)] == [1, 2, 3, 4, 5, "outer"]


def test_S25_threads_serialize_apart() -> None:
    """Threads that serialize at once, each with endpoints in it, get no other thread's endpoints."""

    def work(thread: int) -> None:
        tx, rx = channel()
        sub_tx, sub_rx = channel()
        with tx, rx, sub_tx, sub_rx:
            for number in range(200):
                tx.send((thread, Reenters(tx, rx, sub_tx, depth=1), sub_tx))
                received, depth, received_tx = rx.recv(LIMIT)
                assert (received, depth) == (thread, 1)
                with received_tx:
                    received_tx.send((thread, number))
                assert [sub_rx.recv(LIMIT) for _ in range(2)] == [1, (thread, number)]

    for running in [InThread(work, thread) for thread in range(4)]:
        running.result()


class SendsOn:
    """Sends ``value`` on ``tx`` while it is serialized."""

    def __init__(self, tx: Sender[Any], value: object) -> None:
        self._tx = tx
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        self._tx.send(self._value)
        return str, ("outer",)


def test_S26_inner_message_first() -> None:
    """Messages sent while another is serialized come before it, the innermost first."""
    tx, rx = channel()
    with tx, rx:
        tx.send([SendsOn(tx, SendsOn(tx, "innermost")), SendsOn(tx, "later")])
        assert [rx.recv(LIMIT) for _ in range(4)] == ["innermost", "outer", "later", ["outer", "outer"]]


# -- 27, 28: one-shot servers ---------------------------------------------------------------


def test_S27_client_without_a_word() -> None:
    """A client that connects and leaves, having sent nothing, makes ``accept`` raise Disconnected."""
    with OneShotServer() as server:
        connect(server.name, LIMIT).close()
        with pytest.raises(Disconnected):
            server.accept(LIMIT)


def test_S27_nobody_comes() -> None:
    """``accept`` ends in time where no client comes, and where one comes but is silent; both may still speak."""
    with OneShotServer() as server:
        with pytest.raises(Empty):
            server.accept(timeout=0.01)
        with connect(server.name, LIMIT) as tx:
            with pytest.raises(Empty):
                server.accept(timeout=0.01)
            tx.send("at last")
            rx, first = server.accept(LIMIT)
            with rx:
                assert first == "at last"


def test_S27_silent_client_of_many() -> None:
    """A server of many isn't held up by clients that say nothing, or leave without a word."""
    with Server() as server, connect(server.name, LIMIT):
        connect(server.name, LIMIT).close()
        with connect(server.name, LIMIT) as tx:
            tx.send("hello")
            rx, first = server.accept(LIMIT)
            rx.close()
            assert first == "hello"


def test_S28_second_client() -> None:
    """Whoever connects after the client that was accepted gets an error, and so does a second ``accept``."""
    with OneShotServer() as server, connect(server.name, LIMIT) as tx:
        tx.send("first")
        rx, _ = server.accept(LIMIT)
        with rx:
            with pytest.raises(OSError):
                connect(server.name, LIMIT)
            with pytest.raises((EndpointClosed, EndpointMoved)):
                server.accept(LIMIT)
            tx.send("still served")
            assert rx.recv(LIMIT) == "still served"


def test_S28_second_client_in_the_queue() -> None:
    """A client that connects while the first waits to be accepted is refused at once; the first is served."""
    with OneShotServer() as server, connect(server.name, LIMIT) as tx:
        for timeout in (LIMIT, None, 0):
            with pytest.raises(ConnectionRefusedError, match="one client"):
                connect(server.name, timeout)
        tx.send("first")
        rx, first = server.accept(LIMIT)
        with rx:
            assert first == "first"


# -- 33: what a descriptor is ---------------------------------------------------------------


def test_S33_files_and_sockets_of_the_user() -> None:
    """A descriptor is what its sender says it is, not what it looks like: a user's socket is no channel there."""
    tx, rx = channel()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with tx, rx, ours, theirs, open(__file__, "rb") as file, Fd(theirs) as socket_fd, Fd(file) as file_fd:
        tx.send((socket_fd, file_fd))
        received_socket, received_file = rx.recv(LIMIT)
        assert type(received_socket) is type(received_file) is Fd
        with socket.socket(fileno=received_socket.detach()) as received:
            received.send(b"through the user's socket")
            assert ours.recv(100) == b"through the user's socket"
        with received_file.open("rb") as opened:
            assert opened.read() == open_and_read(__file__)


def open_and_read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
