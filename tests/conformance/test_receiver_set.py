"""Conformance 2.1, 2.3 and 3: waiting for many receivers at once. Each test is named after its row.

The rows at the level of bytes (P) run on channels of bytes and of objects. Where a row leaves something to the
implementation (how many events come at a time), the test does, too.
"""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import pickle
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count, islice
from typing import Any

import pytest

from mp_ipcchan import (
    BytesReceiver,
    ChannelClosed,
    Disconnected,
    Empty,
    EndpointClosed,
    EndpointMoved,
    Fd,
    MessageReceived,
    Mux,
    OpaqueReceiver,
    ProtocolError,
    Ready,
    Receiver,
    ReceiverGone,
    ReceiverSet,
    Sender,
    SerializationError,
    UndecodedMessage,
    bytes_channel,
    channel,
)

from ..queues.test_signals import interrupted_at, needs_returns_unwatched
from ._support import (
    LIMIT,
    MEDIUM,
    MIB,
    PERSON,
    SEVEN,
    AnySender,
    Child,
    F,
    Interrupted,
    Interrupter,
    InThread,
    MakePair,
    attempts,
    bare_fork,
    both_kinds,
    calling_often,
    fork,
    interrupted,
    open_descriptors,
    pattern,
    room_for,
)

Event = MessageReceived | ChannelClosed | Ready


def read(events: list[Event]) -> list[Any]:
    """Events as plain values: ``(id, object)``, and ``(id, None)`` for an end."""
    found: list[Any] = []
    for event in events:
        match event:
            case MessageReceived(id, message):
                found.append((id, message.to()))
            case ChannelClosed(id):
                found.append((id, None))
            case other:
                found.append(other)
    return found


def read_until(receivers: ReceiverSet, count: int) -> list[Any]:
    """The values of the next ``count`` events."""
    found: list[Any] = []
    for _ in attempts():
        if len(found) >= count:
            break
        found += read(receivers.select(LIMIT))
    return found


@contextmanager
def members(make_pair: MakePair, count: int) -> Iterator[tuple[list[Any], ReceiverSet]]:
    """Senders, and a set of their receivers."""
    with ReceiverSet() as receivers, ExitStack() as stack:
        senders: list[AnySender] = []
        for number in range(count):
            tx, rx = make_pair()
            senders.append(stack.enter_context(tx))
            assert receivers.add(rx) == number
        yield senders, receivers


# -- the rows --------------------------------------------------------------------------------


def check_select(make_pair: MakePair, payload: object) -> None:
    with members(make_pair, 2) as (senders, receivers):
        for number in (0, 1):
            senders[number].send(payload)
            assert read(receivers.select(LIMIT)) == [(number, payload)]
        for tx in senders:
            tx.send(payload)
        assert sorted(read_until(receivers, 2)) == [(0, payload), (1, payload)]
        with pytest.raises(Empty):
            receivers.try_select()


def test_H05_select() -> None:
    """Messages of two members come with the right id, alone and both at once."""
    check_select(channel, PERSON)


@both_kinds
def test_P16_receiver_set(make_pair: MakePair) -> None:
    check_select(make_pair, SEVEN)


def check_states(select_now: Callable[[ReceiverSet], list[Event]], wait: Callable[[ReceiverSet], None]) -> None:
    """What select gives with nothing there, a message, nothing, the end, and no member any more."""
    with members(channel, 1) as ([tx], receivers):
        wait(receivers)
        tx.send(PERSON)
        assert read(select_now(receivers)) == [(0, PERSON)]
        wait(receivers)
        tx.close()
        assert select_now(receivers) == [ChannelClosed(0)]
        wait(receivers)
        assert len(receivers) == 0
        assert 0 not in receivers


def test_H06_try_select() -> None:
    def wait(receivers: ReceiverSet) -> None:
        with pytest.raises(Empty):
            receivers.try_select()

    check_states(ReceiverSet.try_select, wait)


def test_H07_try_select_timeout() -> None:
    """A wait in vain lasts its time, also for a set without members; what is there comes without waiting."""

    def wait(receivers: ReceiverSet) -> None:
        start = time.monotonic()
        with pytest.raises(Empty):
            receivers.select(0.01)
        assert time.monotonic() - start >= 0.01

    check_states(lambda receivers: receivers.select(0.01), wait)


def select_and_answer(rx: Receiver[Any], tx: Sender[Any]) -> None:
    with ReceiverSet() as receivers:
        assert receivers.add(rx) == 0
        tx.send("waiting")
        assert read(receivers.select()) == [(0, "Test")]
        tx.send("Success!")


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def await_state(pid: int, state: str) -> None:
    for _ in attempts():
        if state_of(pid) == state:
            return
        time.sleep(0.001)


def test_P17_receiver_set_eintr() -> None:
    """A process that is stopped and continued while it waits goes on waiting."""
    tx, rx = channel()
    answer_tx, answer_rx = channel()
    with tx, answer_rx, fork(select_and_answer, rx, answer_tx) as child:
        answer_tx.close()
        assert answer_rx.recv(LIMIT) == "waiting"
        await_state(child.pid, "S")
        os.kill(child.pid, signal.SIGSTOP)
        await_state(child.pid, "T")
        time.sleep(0.042)
        os.kill(child.pid, signal.SIGCONT)
        tx.send("Test")
        assert answer_rx.recv(LIMIT) == "Success!"
        assert child.join() == 0


def test_P17_signals_while_waiting() -> None:
    """Handlers that return don't end a wait, nor lengthen it."""
    with members(channel, 1) as (_, receivers), calling_often(lambda: None):
        start = time.monotonic()
        with pytest.raises(Empty):
            receivers.select(0.1)
        assert 0.1 <= time.monotonic() - start < LIMIT


@both_kinds
def test_P18_receiver_set_empty(make_pair: MakePair) -> None:
    """An empty message is a message, not the end."""
    with members(make_pair, 1) as ([tx], receivers):
        tx.send(b"")
        assert read(receivers.select(LIMIT)) == [(0, b"")]
        assert 0 in receivers


@both_kinds
@pytest.mark.parametrize("before", [True, False], ids=["P19", "P20"])
def test_P19_P20_close_before_or_after_adding(make_pair: MakePair, before: bool) -> None:
    tx, rx = make_pair()
    with ReceiverSet() as receivers:
        if before:
            tx.close()
        assert receivers.add(rx) == 0
        tx.close()
        assert receivers.select(LIMIT) == [ChannelClosed(0)]


@both_kinds
def test_P21_receiver_set_medium_data(make_pair: MakePair) -> None:
    payloads = [pattern(MEDIUM), pattern(MEDIUM)[::-1]]
    with members(make_pair, 2) as (senders, receivers):
        for tx, payload in zip(senders, payloads, strict=True):
            tx.send(payload)
        assert sorted(read_until(receivers, 2)) == list(enumerate(payloads))


@both_kinds
def test_P22_receiver_set_big_data(make_pair: MakePair) -> None:
    payloads = [pattern(MIB), pattern(MIB)[::-1]]
    with members(make_pair, 2) as (senders, receivers):
        sending = [InThread(tx.send, payload) for tx, payload in zip(senders, payloads, strict=True)]
        assert sorted(read_until(receivers, 2)) == list(enumerate(payloads))
        for thread in sending:
            thread.result()
        with pytest.raises(Empty):
            receivers.try_select()


@both_kinds
def test_P23_receiver_set_concurrent(make_pair: MakePair) -> None:
    """Five threads send a hundred messages each: each channel's in order, whole, then its end, once."""

    def size(number: int, message: int) -> int:
        return ((message * 99991 + number * 90001) % 16381) & ~3

    def send_all(number: int, tx: Any) -> None:
        with tx:
            for message in range(100):
                tx.send(pattern(size(number, message)))

    with members(make_pair, 5) as (senders, receivers):
        sending = [InThread(send_all, number, tx) for number, tx in enumerate(senders)]
        found: dict[int, list[Any]] = {number: [] for number in range(5)}
        for _ in attempts():
            if not len(receivers):
                break
            for number, value in read(receivers.select(LIMIT)):
                found[number].append(value)
        for thread in sending:
            thread.result()
    for number, values in found.items():
        assert values == [*(pattern(size(number, message)) for message in range(100)), None]


# -- S16, S17: what comes when ---------------------------------------------------------------


def test_S16_end_behind_the_last_message() -> None:
    """A call may give several messages of a member, in order, and its end behind them, once; ids aren't reused."""
    with ReceiverSet() as receivers:
        for number in range(3):
            tx, rx = channel()
            assert receivers.add(rx) == number
            with tx:
                tx.send_many(range(100))
            assert read_until(receivers, 101) == [*((number, value) for value in range(100)), (number, None)]
            assert number not in receivers
            with pytest.raises(Empty):
                receivers.try_select()


@both_kinds
def test_S17_data_before_adding(make_pair: MakePair) -> None:
    """What waits in the kernel when a receiver is added comes at once."""
    tx, rx = make_pair()
    with tx, ReceiverSet() as receivers:
        tx.send(SEVEN)
        receivers.add(rx)
        assert read(receivers.try_select()) == [(0, SEVEN)]


@pytest.mark.parametrize("moved", [False, True], ids=["here", "moved"])
def test_S17_messages_in_user_space_before_adding(moved: bool) -> None:
    """So does what waits in this process, because it came packed with others, or in a receiver that moved."""
    tx, rx = channel()
    carrier_tx, carrier_rx = channel()
    with tx, carrier_tx, carrier_rx, ReceiverSet() as receivers:
        tx.send_many(range(50))
        assert rx.recv(LIMIT) == 0
        if moved:
            carrier_tx.send(rx)
            rx = carrier_rx.recv(LIMIT)
        assert receivers.fileno() >= 0
        receivers.add(rx)
        # The kernel shows it, too, for those who wait for the set itself.
        assert select.select([receivers], [], [], LIMIT)[0] == [receivers]
        assert [value for _, value in read_until(receivers, 49)] == list(range(1, 50))
        assert select.select([receivers], [], [], 0)[0] == []


def test_S17_adding_wakes_who_waits() -> None:
    """A receiver that another thread adds while one waits is waited for, with what waits in it already."""
    tx, rx = channel()
    later_tx, later_rx = channel()
    with members(channel, 1) as (_, receivers), tx, later_tx:
        tx.send_many(range(10))
        rx.recv(LIMIT)
        waiting = InThread(receivers.select, LIMIT)
        await_waiting(receivers)
        assert receivers.add(rx) == 1
        found = read(waiting.result())
        found += read_until(receivers, 9 - len(found))
        assert found == [(1, value) for value in range(1, 10)]
        waiting = InThread(receivers.select, LIMIT)
        await_waiting(receivers)
        assert receivers.add(later_rx) == 2
        later_tx.send("later")
        assert read(waiting.result()) == [(2, "later")]


def await_waiting(receivers: ReceiverSet, threads: int = 1) -> None:
    for _ in attempts():
        if receivers._waiting >= threads:
            return
        time.sleep(0.001)


# -- S18, S19: who owns what -----------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "with", "drop"])
def test_S18_dropping_a_set_drops_its_members(end: str) -> None:
    """The senders of a set that is closed or let go of find their receivers gone."""
    before = open_descriptors()
    receivers = ReceiverSet()
    with ExitStack() as stack:
        senders = []
        for _ in range(3):
            tx, rx = channel()
            senders.append(stack.enter_context(tx))
            receivers.add(rx)
        senders[0].send_many(range(20))
        receivers.select(LIMIT)
        if end == "close":
            receivers.close()
            receivers.close()
            assert receivers.closed
            for use in (receivers.select, receivers.try_select, receivers.fileno, lambda: receivers.add(rx)):
                with pytest.raises((EndpointClosed, EndpointMoved)):
                    use()
        elif end == "with":
            with receivers:
                pass
        else:
            del receivers
        for tx in senders:
            with pytest.raises(ReceiverGone):
                tx.send(1)
    assert open_descriptors() == before


@pytest.mark.parametrize("size", [0, F + 1], ids=["small", "large"])
@pytest.mark.parametrize("how", ["close", "drop", "fail"])
def test_S19_undecoded_endpoints_are_closed(how: str, size: int) -> None:
    """F5: what a message carries is open until it is decoded; dropped, or not decodable, it is closed."""
    sub_tx, sub_rx = channel()
    moved_tx, moved_rx = channel()
    with members(channel, 1) as ([tx], receivers), sub_rx, moved_tx, open(os.devnull, "rb") as file, Fd(file) as handle:
        poison = Undecodable() if how == "fail" else None
        tx.send((sub_tx, moved_rx, handle, bytes(size), poison))
        sub_tx.close()
        before = open_descriptors()
        [event] = receivers.select(LIMIT)
        assert isinstance(event, MessageReceived)
        message = event.message
        assert len(open_descriptors() - before) >= 3
        with pytest.raises(Empty):
            sub_rx.try_recv()
        if how == "close":
            message.close()
            message.close()
        elif how == "fail":
            with pytest.raises(SerializationError) as caught:
                message.to()
            assert isinstance(caught.value.__cause__, RuntimeError)
            del caught
        del event, message
        assert open_descriptors() == before
        with pytest.raises(Disconnected):
            sub_rx.recv(LIMIT)
        with pytest.raises(ReceiverGone):
            moved_tx.send(1)


class Undecodable:
    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise RuntimeError("not today")


@both_kinds
@pytest.mark.parametrize("size", [3, F + 1], ids=["small", "large"])
def test_S19_message_is_decoded_once(make_pair: MakePair, size: int) -> None:
    """``to`` gives the object once; ``data`` are the bytes as they came; ``repr`` shows a few of them."""
    payload = pattern(size)
    with members(make_pair, 1) as ([tx], receivers):
        tx.send(payload)
        [(number, message)] = [event.unwrap() for event in receivers.select(LIMIT)]
        assert number == 0
        assert isinstance(message, UndecodedMessage)
        data = message.data
        assert (data == payload) if make_pair is bytes_channel else (payload in data)
        assert len(repr(message)) < 256
        assert f"{len(data)} bytes" in repr(message)
        assert message.to() == payload
        for use in (message.to, lambda: message.data):
            with pytest.raises(EndpointClosed, match="decoded already"):
                use()
        message.close()
        assert "used up" in repr(message)


def test_S19_events_can_be_unwrapped_and_compared() -> None:
    with pytest.raises(Disconnected):
        ChannelClosed(3).unwrap()
    with pytest.raises(ValueError, match="no message"):
        Ready(3).unwrap()
    assert {ChannelClosed(3), ChannelClosed(3), Ready(3)} == {ChannelClosed(3), Ready(3)}
    with pytest.raises(AttributeError):
        ChannelClosed(3).id = 4  # type: ignore[misc]


# -- adding and removing ---------------------------------------------------------------------


def test_S01_adding_moves() -> None:
    """A receiver that was added is the set's; one that isn't there can't be added."""
    tx, rx = channel()
    with tx, ReceiverSet() as receivers:
        receivers.add(rx)
        assert rx.closed
        for use in (rx.recv, rx.try_recv, rx.fileno, rx.to_opaque, lambda: receivers.add(rx), lambda: tx.send(rx)):
            with pytest.raises(EndpointMoved):
                use()
        rx.close()
        tx.send(1)
        assert read(receivers.select(LIMIT)) == [(0, 1)]
        _, closed = channel()
        closed.close()
        with pytest.raises(EndpointClosed):
            receivers.add(closed)
        with pytest.raises(TypeError, match="takes receivers"):
            receivers.add("rx")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="always ready"), open(__file__) as file:
            receivers.add(file)
        assert len(receivers) == 1


@both_kinds
def test_S01_removing_gives_the_receiver_back(make_pair: MakePair) -> None:
    """With all that waits for it; then the set hears nothing of it any more."""
    with members(make_pair, 2) as (senders, receivers):
        senders[1].send_many([b"%d" % number for number in range(100)])
        assert read(receivers.select(LIMIT)) == [(1, b"0")]
        rx = receivers.remove(1)
        assert len(receivers) == 1
        assert 1 not in receivers
        with rx:
            assert [rx.recv(LIMIT) for _ in range(99)] == [b"%d" % number for number in range(1, 100)]
            senders[1].send(b"more")
            with pytest.raises(Empty):
                receivers.try_select()
            assert rx.recv(LIMIT) == b"more"
            with pytest.raises(KeyError, match="id 1"):
                receivers.remove(1)
            # Again, by another id.
            assert receivers.add(rx) == 2
            senders[1].send(b"again")
            assert read(receivers.select(LIMIT)) == [(2, b"again")]


def test_S01_removed_receiver_lives_elsewhere() -> None:
    """A member whose socket stays open in another process doesn't go on firing here when it has left."""
    with members(channel, 2) as (senders, receivers):
        carrier_tx, carrier_rx = channel()
        with carrier_tx, carrier_rx:
            carrier_tx.send(receivers.remove(0))
            senders[0].send("for the new owner")
            assert select.select([receivers], [], [], 0)[0] == []
            with pytest.raises(Empty):
                receivers.select(0.01)
            with carrier_rx.recv(LIMIT) as rx:
                assert rx.recv(LIMIT) == "for the new owner"


def test_S01_sets_stay_where_they_are() -> None:
    with ReceiverSet() as receivers:
        for use in (pickle.dumps, copy.copy):
            with pytest.raises(TypeError, match="can't be sent"):
                use(receivers)  # type: ignore[operator]
        assert repr(receivers) == "<mp_ipcchan.ReceiverSet of 0>"


@both_kinds
def test_H11_opaque_members(make_pair: MakePair) -> None:
    """An opaque receiver's messages decode as those of what it was; removed, it is opaque still."""
    tx, rx = make_pair()
    with tx, ReceiverSet() as receivers:
        receivers.add(rx.to_opaque())
        tx.send(SEVEN)
        assert read(receivers.select(LIMIT)) == [(0, SEVEN)]
        opaque = receivers.remove(0)
        assert isinstance(opaque, OpaqueReceiver)
        with opaque.to() as again:
            assert type(again) is type(rx)


# -- what would wait for ever ----------------------------------------------------------------


def test_empty_set_does_not_wait_for_ever() -> None:
    with ReceiverSet() as receivers:
        with pytest.raises(ValueError, match="no members"):
            receivers.select()
        with pytest.raises(Empty):
            receivers.select(0)


@pytest.mark.parametrize("how", ["remove", "close"])
def test_who_waits_hears_of_the_end(how: str) -> None:
    """Threads that wait are told when another one takes the last member away, or closes the set."""
    before = open_descriptors()
    with members(channel, 1) as (_, receivers):
        waiting = [InThread(receivers.select) for _ in range(3)]
        await_waiting(receivers, 3)
        if how == "remove":
            receivers.remove(0).close()
        else:
            receivers.close()
        for thread in waiting:
            with pytest.raises(ValueError if how == "remove" else EndpointClosed):
                thread.result()
    assert open_descriptors() == before


def test_threads_share_a_set() -> None:
    """Of several threads that select, each message reaches one."""
    with members(channel, 4) as (senders, receivers):

        def take() -> list[Any]:
            found: list[Any] = []
            while True:
                try:
                    found += read(receivers.select())
                except ValueError:
                    return found

        threads = [InThread(take) for _ in range(3)]
        for tx in senders:
            for number in range(200):
                tx.send(number)
            tx.close()
        found = [one for thread in threads for one in thread.result()]
        expected = [(number, value) for number in range(4) for value in [*range(200), None]]
        assert sorted(found, key=repr) == sorted(expected, key=repr)


# -- F9: nobody starves, and nothing is lost ---------------------------------------------------


def flood(tx: Sender[Any]) -> None:
    with tx:
        while True:
            try:
                tx.send_many(range(500))
            except ReceiverGone:
                return


def test_F09_fast_sender_does_not_starve_others() -> None:
    """While two members are flooded, select returns, a few messages each, and the others' come within a few calls."""
    with members(channel, 4) as (senders, receivers):
        floods = [InThread(flood, tx.clone()) for tx in senders[:2]]
        waits = []
        for number in range(20):
            for tx in senders[2:]:
                tx.send(number)
            missing = {2, 3}
            for count in islice(iter(attempts()), 1000):
                assert count is None
                events = receivers.select(LIMIT)
                assert len(events) <= 4 * 16
                missing -= {event.id for event in events}
                waits.append(missing)
                if not missing:
                    break
            assert not missing
        assert len(waits) <= 20 * 4
        receivers.close()
        for thread in floods:
            thread.result()


@pytest.mark.parametrize("kind", ["channel", "queue", "connection"])
def test_F09_all_ready_members_have_their_turn(kind: str) -> None:
    """However many are ready, and however much each has, each is reported before any is for the third time."""
    count = 300
    with ExitStack() as stack, ReceiverSet() as receivers:
        for number in range(count):
            if kind == "channel":
                tx, rx = channel()
                send, close = tx.send, tx.close
            elif kind == "queue":
                rx = context.SimpleQueue()
                send, close = rx.put, rx.close
            else:
                rx, tx = context.Pipe()
                stack.callback(rx.close)
                send, close = tx.send, tx.close
            stack.callback(close)
            for message in range(40):
                send(message)
            assert receivers.add(rx) == number
        calls: dict[int, int] = {}
        for _ in attempts():
            if len(calls) == count:
                break
            for number in {event.id for event in receivers.select(LIMIT)}:
                calls[number] = calls.get(number, 0) + 1
        assert max(calls.values()) <= 2


context: Any = multiprocessing.get_context("ipcchan")


def test_F09_error_discards_nothing() -> None:
    """A packet that isn't ours comes as a message that can't be decoded, in its place among the others."""
    with members(channel, 2) as (senders, receivers):
        for number in range(2):
            senders[number].send("before")
            inject(senders[number], b"garbage")
            senders[number].send("after")
        found: dict[int, list[Any]] = {0: [], 1: []}
        for _ in attempts():
            if sum(map(len, found.values())) == 6:
                break
            for event in receivers.select(LIMIT):
                assert isinstance(event, MessageReceived)
                try:
                    found[event.id].append(event.message.to())
                except ProtocolError:
                    found[event.id].append(ProtocolError)
        assert found == {number: ["before", ProtocolError, "after"] for number in range(2)}
        assert len(receivers) == 2


def inject(tx: AnySender, packet: bytes) -> None:
    """Send a packet as it is by the socket of ``tx``."""
    import socket

    with socket.socket(fileno=os.dup(tx.fileno())) as sock:
        sock.send(packet)


def test_F09_no_room_for_descriptors() -> None:
    """Where a process has room for one message's descriptors, the other messages stay where they are."""
    sub_tx, sub_rx = channel()
    with members(channel, 3) as (senders, receivers), sub_tx, sub_rx, ExitStack() as stack:
        for tx in senders:
            for number in range(3):
                tx.send((number, [stack.enter_context(Fd(sub_tx)) for _ in range(4)]))
        found: dict[int, list[int]] = {0: [], 1: [], 2: []}
        with room_for(6):
            for _ in attempts():
                if sum(map(len, found.values())) == 9:
                    break
                for event in receivers.select(LIMIT):
                    assert isinstance(event, MessageReceived)
                    number, files = event.message.to()
                    found[event.id].append(number)
                    for file in files:
                        file.close()
        assert found == {number: [0, 1, 2] for number in range(3)}


def test_F09_room_for_no_descriptor_at_all() -> None:
    """A message whose descriptors have no room says so when it is decoded, and comes once they have."""
    with members(channel, 1) as ([tx], receivers), open(os.devnull, "rb") as file, Fd(file) as handle:
        tx.send([handle])
        tx.send("next")
        with room_for(0):
            events = receivers.select(LIMIT)
            assert isinstance(events[0], MessageReceived)
            with pytest.raises(OSError, match="still there") as caught:
                events[0].message.to()
            assert caught.value.errno == errno.EMFILE
        first, *events = receivers.select(LIMIT)
        assert isinstance(first, MessageReceived)
        [received] = first.message.to()
        assert os.fstat(received.fileno()).st_rdev == os.fstat(file.fileno()).st_rdev
        received.close()
        assert read(events or receivers.select(LIMIT)) == [(0, "next")]


def test_F09_thousands_of_members() -> None:
    """A set of thousands finds those few that have something, wherever they are, and all their ends."""
    count = 4000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with members(channel, count) as (senders, receivers):
            for number in (0, count // 3, count - 1):
                senders[number].send(number)
            assert sorted(read_until(receivers, 3)) == [(n, n) for n in (0, count // 3, count - 1)]
            for tx in senders:
                tx.close()
            assert {number for number, _ in read_until(receivers, count)} == set(range(count))
            assert len(receivers) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- signals ----------------------------------------------------------------------------------


def select_all(receivers: ReceiverSet, interrupt: Interrupter) -> list[Event]:
    """The events until every member has ended; each call may be interrupted once."""
    events: list[Event] = []
    for _ in attempts():
        try:
            # No loop in here: the jump back to its start is not covered by ``except``.
            interrupt.armed = True
            events.extend(chain.from_iterable(map(receivers.select, (LIMIT,))))
            interrupt.armed = False
        except Interrupted:
            pass
        if len(receivers) == 0:
            interrupt.armed = False
            break
    try:
        return events + receivers.try_select()
    except Empty:
        return events


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="3.10 runs handlers between any two bytecodes: see docs/architecture.md"
)
@interrupted
def test_S14_interrupted_select_loses_nothing() -> None:
    """A handler that raises in the middle of select costs no event, doubles none, and keeps each member's order."""
    count = 30_000

    def send_all(tx: Sender[Any]) -> None:
        with tx:
            for number in range(count):
                tx.send(number)

    interrupt = Interrupter()
    with members(channel, 3) as (senders, receivers):
        sending = [InThread(send_all, tx) for tx in senders]
        with calling_often(interrupt):
            events = select_all(receivers, interrupt)
        for thread in sending:
            thread.result()
    found: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for number, value in read(events):
        found[number].append(value)
    for values in found.values():
        assert sorted(set(range(count)) - set(values)) == [], "messages were lost"
        assert values == [*range(count), None]


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="3.10 runs handlers between any two bytecodes: see docs/architecture.md"
)
@interrupted
def test_S14_interrupted_select_reports_each_end_once() -> None:
    """The same for the ends of many channels."""
    interrupt = Interrupter()
    with calling_often(interrupt):
        for _ in range(40):
            check_ends(interrupt, 50)


def check_ends(interrupt: Interrupter, count: int) -> None:
    with members(channel, count) as (senders, receivers):
        for tx in senders:
            tx.send("last")
            tx.close()
        events = select_all(receivers, interrupt)
    found = read(events)
    assert sorted(found, key=repr) == sorted(
        [(number, value) for number in range(count) for value in ("last", None)], key=repr
    )


def test_S14_handler_that_selects() -> None:
    """A handler may look into the set that it interrupts, and finds nothing, or what it can have."""
    with members(channel, 1) as ([tx], receivers):
        found: list[Any] = []

        def handle() -> None:
            try:
                found.extend(read(receivers.try_select()))
            except Empty:
                pass

        with calling_often(handle):
            for number in range(2000):
                tx.send(number)
                try:
                    found += read(receivers.select(0))
                except Empty:
                    pass
        while len(found) < 2000:
            found += read(receivers.select(LIMIT))
    assert sorted(value for _, value in found) == list(range(2000))


def test_S14_handler_that_closes() -> None:
    """A handler may close the set, wherever that is: select says so, and nothing is left open."""
    before = open_descriptors()
    for number in range(30):
        with members(channel, 3) as (senders, receivers):
            for tx in senders:
                tx.send_many(range(100))
            with calling_often(receivers.close, 0.0001 * (1 + number % 5)):
                with pytest.raises(EndpointClosed):
                    for tx in (*senders, *senders) * 1000:
                        try:
                            tx.send(1)
                        except ReceiverGone:
                            pass
                        receivers.select(LIMIT)
            for tx in senders:
                with pytest.raises(ReceiverGone):
                    tx.send(1)
    assert open_descriptors() == before


def test_S14_kept_events_leave_with_their_member() -> None:
    """What an interrupted call has taken of a member goes with it when it is removed, in order."""
    with members(channel, 2) as (senders, receivers):
        for tx in senders:
            tx.send_many(range(40))
        receivers._kept = [*receivers.select(LIMIT), *receivers.select(LIMIT)]
        taken = len([event for event in receivers._kept if event.id == 0])
        assert taken > 1
        with receivers.remove(0) as rx:
            assert [rx.recv(LIMIT) for _ in range(40)] == list(range(40))
        assert read_until(receivers, 40) == [(1, value) for value in range(40)]


@interrupted
@needs_returns_unwatched
@pytest.mark.parametrize("mux", [False, True], ids=["channel", "mux"])
def test_interrupted_remove_loses_no_receiver(mux: bool) -> None:
    """Wherever a signal's handler raises in ``remove``, it has returned the receiver, or that is a member still."""
    with ExitStack() as stack:
        left, right = Mux.pair()
        stack.enter_context(left)
        stack.enter_context(right)
        for place in count(1):
            if mux:
                tx, rx = left.channel()
                left.tx.send(rx)
                rx = right.rx.recv(LIMIT)
            else:
                tx, rx = channel()
            with tx, ReceiverSet() as receivers:
                number = receivers.add(rx)
                del rx
                tx.send_many(range(40))
                receivers._kept = receivers.select(LIMIT)
                removed: list[Receiver[int]] = []
                # Kept in the C call that removes.
                was_interrupted = interrupted_at(
                    place,
                    lambda: removed.extend(map(receivers.remove, (number,))),  # noqa: B023
                )
                if not removed:
                    assert number in receivers
                    tx.send(40)
                    found = read_until(receivers, 1)
                    removed.append(receivers.remove(number))
                    assert [value for _, value in found] == [*range(len(found))]
                with removed.pop() as again:
                    first = again.recv(LIMIT)
                    assert [again.recv(LIMIT) for _ in range(39 - first)] == [*range(first + 1, 40)]
                assert number not in receivers
                with pytest.raises(Empty):
                    receivers.try_select()
            if not was_interrupted:
                assert place > 10
                break


# -- fork -------------------------------------------------------------------------------------


def test_S23_bare_fork_gives_both_a_set() -> None:
    """The child waits for itself, and what it does to its set changes nothing in the parent's."""
    tx, rx = channel()
    told_tx, told_rx = channel()
    go_tx, go_rx = channel()
    with tx, told_tx, told_rx, go_tx, go_rx, ReceiverSet() as receivers:
        assert receivers.add(rx) == 0

        def in_child() -> None:
            assert read(receivers.select(LIMIT)) == [(0, "to the child")]
            receivers.remove(0).close()
            assert len(receivers) == 0
            told_tx.send("done")
            go_rx.recv(LIMIT)

        tx.send("to the child")
        with bare_fork(in_child) as child:
            assert told_rx.recv(LIMIT) == "done"
            tx.send("to the parent")
            assert read(receivers.select(LIMIT)) == [(0, "to the parent")]
            go_tx.send(None)
            assert child.join() == 0


def test_S23_bare_fork_leaves_what_was_received_to_the_parent() -> None:
    with members(channel, 1) as ([tx], receivers):
        tx.send_many(range(20))
        assert read(receivers.select(LIMIT)) == [(0, 0)]

        def in_child() -> None:
            with pytest.raises(Empty):
                receivers.try_select()

        with bare_fork(in_child) as child:
            assert child.join() == 0
        assert [value for _, value in read_until(receivers, 19)] == list(range(1, 20))


def check_closed(receivers: ReceiverSet, tx: Sender[Any], go_rx: Receiver[Any]) -> None:
    go_rx.recv()
    assert receivers.closed
    with pytest.raises(EndpointClosed):
        receivers.select(0)
    tx.send("child is right")


def test_S23_context_fork_closes_sets() -> None:
    """In a child of our contexts a set is closed, so the parent's streams end when the parent has closed them."""
    go_tx, go_rx = channel()
    told_tx, told_rx = channel()
    receivers = ReceiverSet()
    tx, rx = channel()
    with tx, go_tx, told_rx:
        receivers.add(rx)
        with fork(check_closed, receivers, told_tx, go_rx) as child:
            told_tx.close()
            receivers.close()
            with pytest.raises(ReceiverGone):
                for _ in attempts():
                    tx.send(1)
            go_tx.send(None)
            assert told_rx.recv(LIMIT) == "child is right"
            assert child.join() == 0


# -- other members ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue", "bounded"])
def test_queues_as_members(kind: str) -> None:
    """A queue's messages come one by one, as ``get`` would take them; others may take, too."""
    queue = context.Queue(2) if kind == "bounded" else getattr(context, kind)()
    with ReceiverSet() as receivers:
        assert receivers.add(queue) == 0
        with pytest.raises(ValueError, match="member of this set already"):
            receivers.add(queue)
        for number in range(2):
            queue.put((number, Fd(0)))
        for number in range(2):
            [event] = receivers.select(LIMIT)
            assert isinstance(event, MessageReceived)
            value, handle = event.message.to()
            handle.close()
            assert value == number
        if kind == "bounded":
            assert queue.qsize() == 0
            queue.put(1, timeout=LIMIT)
            queue.put(2, timeout=LIMIT)
            assert queue.full()
            assert read(receivers.select(LIMIT)) == [(0, 1)]
            queue.put(3, timeout=LIMIT)
            assert [queue.get(timeout=LIMIT), queue.get(timeout=LIMIT)] == [2, 3]
        with pytest.raises(Empty):
            receivers.select(0.01)
        assert receivers.remove(0) is queue
        queue.put("still open")
        assert queue.get() == "still open"
    queue.close()


def test_queue_that_is_shut_down() -> None:
    """The end of a queue comes when it was shut down and everything was taken; it stays its owner's."""
    queue = context.Queue()
    with ReceiverSet() as receivers:
        receivers.add(queue)
        queue.put(1)
        queue.shutdown()
        assert read_until(receivers, 2) == [(0, 1), (0, None)]
        assert 0 not in receivers
        waiting_queue = context.Queue()
        receivers.add(waiting_queue)
        waiting = InThread(receivers.select, LIMIT)
        await_waiting(receivers)
        waiting_queue.shutdown()
        assert waiting.result() == [ChannelClosed(1)]
    queue.close()
    waiting_queue.close()


def put_and_end(queue: Any) -> None:
    for number in range(3000):
        queue.put(number)


def test_queue_with_what_an_ended_process_left() -> None:
    """The rest of a process's backlog, which lies in the queue's front lane, is found."""
    queue = context.Queue()
    process = context.Process(target=put_and_end, args=(queue,))
    process.start()
    process.join()
    process.close()
    with ReceiverSet() as receivers:
        receivers.add(queue)
        assert [value for _, value in read_until(receivers, 3000)] == list(range(3000))
    queue.close()


def test_connections_as_members() -> None:
    """A connection gives its messages, and its end; it stays its owner's."""
    left, right = context.Pipe()
    with left, right, ReceiverSet() as receivers:
        receivers.add(left)
        right.send((1, 2))
        assert read(receivers.select(LIMIT)) == [(0, (1, 2))]
        right.send("other")
        assert left.recv() == "other"
        with pytest.raises(Empty):
            receivers.try_select()
        right.send("last")
        right.close()
        assert read_until(receivers, 2) == [(0, "last"), (0, None)]
        assert not left.closed
        sending_only = context.Pipe(duplex=False)
        with sending_only[0], sending_only[1], pytest.raises(OSError, match="write-only"):
            receivers.add(sending_only[1])


def test_descriptors_and_sentinels_as_members() -> None:
    """They are ready as long as they are, and told apart from messages."""
    reading, writing = os.pipe()
    try:
        with ReceiverSet() as receivers:
            assert receivers.add(reading) == 0
            with pytest.raises(Empty):
                receivers.try_select()
            os.write(writing, b"x")
            for _ in range(2):
                assert receivers.select(LIMIT) == [Ready(0)]
            os.read(reading, 1)
            with pytest.raises(Empty):
                receivers.try_select()
            process = context.Process(target=threading.Event().wait, args=(LIMIT,))
            process.start()
            assert receivers.add(process.sentinel) == 1
            process.kill()
            assert receivers.select(LIMIT) == [Ready(1)]
            assert receivers.remove(1) == process.sentinel
            process.join()
            process.close()
            with ReceiverSet() as inner, pytest.raises(Empty):
                receivers.add(inner)
                receivers.try_select()
    finally:
        os.close(reading)
        os.close(writing)


def test_descriptor_that_was_closed_and_used_again() -> None:
    """A descriptor that its owner closed without removing it makes room for whoever gets its number."""
    with ReceiverSet() as receivers:
        reading, writing = os.pipe()
        receivers.add(reading)
        os.close(reading)
        os.close(writing)
        again, writing = os.pipe()
        try:
            assert again == reading
            assert receivers.add(again) == 1
            assert 0 not in receivers
            os.write(writing, b"x")
            assert receivers.select(LIMIT) == [Ready(1)]
        finally:
            os.close(again)
            os.close(writing)


def test_S06_members_of_a_killed_process() -> None:
    """What a killed process had sent comes before the end of its channel."""
    tx, rx = channel()
    ready_tx, ready_rx = channel()
    with ReceiverSet() as receivers, ready_rx:

        def send_and_wait() -> None:
            for number in range(50):
                tx.send(number)
            ready_tx.send("sent")
            threading.Event().wait(LIMIT)

        child: Child
        with bare_fork(send_and_wait) as child:
            tx.close()
            receivers.add(rx)
            assert ready_rx.recv(LIMIT) == "sent"
            child.kill()
            assert [value for _, value in read_until(receivers, 51)] == [*range(50), None]
            child.join()
        ready_tx.close()


def test_bytes_member_refuses_descriptors() -> None:
    """F5: a bytes receiver that is sent endpoints refuses that message, and keeps nothing of it."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with tx, ReceiverSet() as receivers, sub_rx:
        receivers.add(BytesReceiver(rx._claim()))
        tx.send([sub_tx])
        sub_tx.close()
        [event] = receivers.select(LIMIT)
        assert isinstance(event, MessageReceived)
        with pytest.raises(ProtocolError):
            event.message.to()
        with pytest.raises(Disconnected):
            sub_rx.recv(LIMIT)


def test_a_process_is_a_member(start_method: str) -> None:
    """It is ready once it has ended, and is what ``remove`` returns."""
    process = multiprocessing.get_context(f"ipcchan_{start_method}").Process(target=int)
    process.start()
    with ReceiverSet() as receivers:
        number = receivers.add(process)
        assert receivers.select(LIMIT) == [Ready(number)]
        assert receivers.remove(number) is process
    process.join()
    process.close()
