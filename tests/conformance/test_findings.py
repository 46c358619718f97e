"""Conformance 4.2: where the reference system fails, and ours must not. Each test is named after its finding."""

from __future__ import annotations

import array
import errno
import os
import queue
import random
import resource
import socket
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import (
    Disconnected,
    Empty,
    Fd,
    MessageReceived,
    OneShotServer,
    ProtocolError,
    Receiver,
    ReceiverGone,
    ReceiverSet,
    Router,
    Sender,
    SerializationError,
    Server,
    bytes_channel,
    channel,
    connect,
)
from mp_ipcchan._message import PACKET_SIZE

from ._support import (
    LIMIT,
    MIB,
    PERSON,
    SEVEN,
    AnyReceiver,
    AnySender,
    Child,
    F,
    InThread,
    MakePair,
    all_kinds,
    attempts,
    bare_fork,
    calling_often,
    open_descriptors,
    pattern,
    repeat,
    room_for,
)

# -- F1, F2: a peer that dies in the middle of a large message ------------------------------


@all_kinds
def test_F01_large_send_without_receiver(make_pair: MakePair) -> None:
    """A large send to a receiver that is gone fails, it does not hang."""
    tx, rx = make_pair()
    rx.close()
    with tx, pytest.raises(ReceiverGone):
        tx.send(pattern(8 * MIB))


def kill_after(child: Child, told_rx: Receiver[Any], messages: int) -> None:
    for _ in range(messages):
        told_rx.recv(LIMIT)
    child.kill()


@all_kinds
def test_F01_receiver_killed_during_large_sends(make_pair: MakePair) -> None:
    """Large sends to a process that is killed meanwhile, however far it was with receiving them, fail then."""
    for received_first in range(5):
        tx, rx = make_pair()
        told_tx, told_rx = channel()

        def receive_without_end(rx: Any = rx, told_tx: Sender[Any] = told_tx) -> None:
            while True:
                rx.recv(LIMIT)
                told_tx.send(None)

        with tx, told_rx, bare_fork(receive_without_end) as child:
            rx.close()
            told_tx.close()
            data = pattern(4 * MIB)
            killing = InThread(kill_after, child, told_rx, received_first)
            with pytest.raises(ReceiverGone):
                repeat(tx.send, data, LIMIT)
            killing.result()
            child.join()


def check_next(rx: AnyReceiver, expected: bytes) -> None:
    assert rx.try_recv() == expected


@all_kinds
def test_F02_sender_killed_during_large_sends(make_pair: MakePair) -> None:
    """A process that is killed while it sends ends neither the channel nor a message: what comes is whole."""
    tx, rx = make_pair()
    data = pattern(2 * MIB)

    def send_without_end() -> None:
        rx.close()
        while True:
            tx.send(data, timeout=LIMIT)

    with tx, rx:
        for count in range(10):
            with bare_fork(send_without_end) as child:
                for _ in range(count + 1):
                    assert rx.recv(LIMIT) == data
                child.kill()
                child.join()
            with pytest.raises(Empty):
                repeat(check_next, rx, data)
        tx.send(b"alive")
        assert rx.recv(LIMIT) == b"alive"


@all_kinds
@pytest.mark.parametrize("by", ["set", "router"])
def test_F02_sender_killed_and_those_who_wait_for_many(make_pair: MakePair, by: str) -> None:
    """Nor does a set, or a router, take the death of one of several senders for the end of the channel."""
    tx, rx = make_pair()
    data = pattern(2 * MIB)

    def send_without_end() -> None:
        rx.close()
        while True:
            tx.send(data, timeout=LIMIT)

    got: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with tx, Router() as router, ReceiverSet() as receivers:
        with bare_fork(send_without_end) as child:
            if by == "router":
                router.add_route(rx, got.put, on_close=lambda: got.put("closed"))
            else:
                receivers.add(rx)

            def next_of_them() -> Any:
                if by == "set" and got.empty():
                    for event in receivers.select(LIMIT):
                        got.put(event.message.to() if isinstance(event, MessageReceived) else "closed")
                return got.get(timeout=LIMIT)

            for _ in range(3):
                assert next_of_them() == data
            child.kill()
            child.join()
        tx.send(b"alive")
        for _ in attempts():
            last = next_of_them()
            if last != data:
                break
        assert last == b"alive"


# -- F3, F4: what a message takes along -----------------------------------------------------


class Unpicklable:
    def __reduce__(self) -> str:
        raise RuntimeError("not today")


def test_F03_failed_send_leaves_nothing_behind() -> None:
    """Endpoints of a message that couldn't be serialized are in no later message, and nothing keeps them open."""
    tx, rx = channel()
    stale_tx, stale_rx = channel()
    moving_tx, moving_rx = channel()
    sub_tx, sub_rx = channel()
    with tx, rx, stale_rx, moving_tx, moving_rx, sub_tx, sub_rx:
        before = open_descriptors()
        for _ in range(10):
            with pytest.raises(SerializationError):
                tx.send((stale_tx, moving_rx, Unpicklable()))
        assert open_descriptors() == before
        tx.send("plain")
        tx.send(("one", sub_tx))
        assert rx.recv(LIMIT) == "plain"
        one, received_tx = rx.recv(LIMIT)
        with received_tx:
            received_tx.send(one)
            assert sub_rx.recv(LIMIT) == "one"
        stale_tx.close()
        with pytest.raises(Disconnected):
            stale_rx.recv(LIMIT)
        moving_tx.send("stayed")
        assert moving_rx.recv(LIMIT) == "stayed"


class SendsOn:
    """Sends ``value`` on ``tx`` while it is serialized."""

    def __init__(self, tx: Sender[Any], value: object) -> None:
        self._tx = tx
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        self._tx.send(self._value)
        return str, ("nested",)


def test_F04_nested_send_takes_only_its_own() -> None:
    """A message that is sent while another is serialized takes its own endpoints, and leaves the other's."""
    tx, rx = channel()
    pairs = [channel() for _ in range(3)]
    with tx, rx, ExitStack() as stack:
        for end in (end for pair in pairs for end in pair):
            stack.enter_context(end)
        (a_tx, a_rx), (b_tx, b_rx), (c_tx, c_rx) = pairs
        tx.send((a_tx, SendsOn(tx, [b_tx]), c_tx))
        [received_b] = rx.recv(LIMIT)
        received_a, nested, received_c = rx.recv(LIMIT)
        assert nested == "nested"
        for received_tx, sub_rx, name in ((received_a, a_rx, "a"), (received_b, b_rx, "b"), (received_c, c_rx, "c")):
            with received_tx:
                received_tx.send(name)
                assert sub_rx.recv(LIMIT) == name


def test_F04_nested_send_that_fails() -> None:
    """A nested send that fails, and is caught, costs the outer message nothing."""

    class FailsInside:
        def __reduce__(self) -> tuple[Any, ...]:
            with pytest.raises(SerializationError):
                tx.send((b_tx, Unpicklable()))
            return str, ("caught",)

    tx, rx = channel()
    a_tx, a_rx = channel()
    b_tx, b_rx = channel()
    with tx, rx, a_tx, a_rx, b_rx:
        tx.send((a_tx, FailsInside(), a_tx))
        b_tx.close()
        received_tx, caught, again = rx.recv(LIMIT)
        with received_tx:
            assert caught == "caught"
            assert again is received_tx
            received_tx.send(1)
            assert a_rx.recv(LIMIT) == 1
        with pytest.raises(Disconnected):
            b_rx.recv(LIMIT)


# -- F5, F6: messages that can't be delivered -----------------------------------------------


def _refuse(*_: object) -> None:
    raise RuntimeError("can't be received")


class Undecodable:
    """Can be sent, and not received."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


@pytest.mark.parametrize("size", [0, F + 1], ids=["small", "large"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_F05_undecodable_message_with_endpoints(first: bool, size: int) -> None:
    """A message that can't be decoded raises SerializationError; its endpoints are closed, and the next one comes."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    moved_tx, moved_rx = channel()
    with tx, rx, sub_rx, moved_tx, open(os.devnull, "rb") as file, Fd(file) as handle:
        endpoints = (sub_tx, moved_rx, handle, bytes(size))
        tx.send((Undecodable(), endpoints) if first else (endpoints, Undecodable()))
        tx.send("next")
        before = open_descriptors()
        with pytest.raises(SerializationError) as caught:
            rx.recv(LIMIT)
        assert isinstance(caught.value.__cause__, RuntimeError)
        del caught
        assert open_descriptors() == before
        assert rx.recv(LIMIT) == "next"
        sub_tx.close()
        with pytest.raises(Disconnected):
            sub_rx.recv(LIMIT)
        with pytest.raises(ReceiverGone):
            moved_tx.send(1)


def test_F05_bytes_receiver_is_sent_endpoints() -> None:
    """A receiver of bytes that gets a packet with descriptors refuses it, keeps none, and goes on."""
    with packets_of_a_sender() as (raw_tx, read_packet):
        sub_tx, sub_rx = channel()
        tx, rx = bytes_channel()
        with sub_tx, sub_rx, tx, rx:
            raw_tx.send((b"data", [sub_tx]))
            packet, fds = read_packet()
            inject(tx, packet, fds)
            tx.send(b"next")
            before = open_descriptors()
            with pytest.raises(ProtocolError):
                rx.recv(LIMIT)
            assert open_descriptors() == before
            assert rx.recv(LIMIT) == b"next"
            close_all(fds)


@pytest.mark.parametrize("size", [0, F + 1], ids=["small", "large"])
@pytest.mark.parametrize(("senders", "room"), [(64, 0), (64, 1), (64, 63), (252, 63), (253, 252), (300, 0), (300, 299)])
def test_F06_descriptors_cut_off(senders: int, room: int, size: int) -> None:
    """A message of whose descriptors the kernel would drop some stays where it is, with the reason."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with tx, rx, sub_tx, sub_rx, ExitStack() as stack:
        tx.send((bytes(size), [stack.enter_context(sub_tx.clone()) for _ in range(senders)]))
        tx.send("next")
        before = open_descriptors()
        with room_for(room):
            for _ in range(3):
                with pytest.raises(OSError, match="still there") as caught:
                    rx.recv(LIMIT)
                assert caught.value.errno == errno.EMFILE
        data, received = rx.recv(LIMIT)
        assert data == bytes(size)
        assert len(received) == senders
        for received_tx in received:
            received_tx.close()
        del data
        assert open_descriptors() == before
        assert rx.recv(LIMIT) == "next"


# -- F7, F8: signals, and other readers -----------------------------------------------------


@all_kinds
@pytest.mark.parametrize(("size", "count"), [(8, 50_000), (F + 1, 1000)], ids=["small", "large"])
def test_F07_signals_while_receiving(make_pair: MakePair, size: int, count: int) -> None:
    """Handlers that return, a thousand times a second, are not noticed by whoever receives."""
    signals = 0

    def note() -> None:
        nonlocal signals
        signals += 1

    def send_all() -> None:
        with tx:
            for number in range(count):
                tx.send(number.to_bytes(8, "little") + bytes(size - 8))

    tx, rx = make_pair()
    with rx:
        sending = InThread(send_all)
        with calling_often(note):
            for number in range(count):
                assert rx.recv(LIMIT) == number.to_bytes(8, "little") + bytes(size - 8)
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
        sending.result()
    assert signals


@all_kinds
@pytest.mark.parametrize("size", [8, F + 1], ids=["small", "large"])
def test_F07_signals_while_sending(make_pair: MakePair, size: int) -> None:
    """Nor by whoever sends, waiting for room."""
    tx, rx = make_pair()
    count = 50_000 if size == 8 else 1000

    def receive_all() -> list[int]:
        return [int.from_bytes(data[:8], "little") for data in rx]

    with rx:
        receiving = InThread(receive_all)
        with tx, calling_often(lambda: None):
            for number in range(count):
                tx.send(number.to_bytes(8, "little") + bytes(size - 8), timeout=LIMIT)
        assert receiving.result() == list(range(count))


def test_F07_signals_while_waiting() -> None:
    """Nor do they prolong or shorten a wait: receiving within 0.2 s takes 0.2 s, as does accepting."""
    tx, rx = channel()
    with tx, rx, OneShotServer() as server, calling_often(lambda: None):
        for wait in (rx.recv, server.accept):
            start = time.monotonic()
            with pytest.raises(Empty):
                wait(timeout=0.2)
            assert 0.2 <= time.monotonic() - start < LIMIT / 2


def test_F07_signals_while_connecting() -> None:
    """Nor are they noticed by servers and clients."""
    with calling_often(lambda: None):
        for _ in range(50):
            with OneShotServer() as server:
                client = InThread(send_person, server.name)
                rx, first = server.accept(LIMIT)
                with rx:
                    assert first == PERSON
                client.result()


def send_person(name: str) -> None:
    with connect(name, LIMIT) as tx:
        tx.send(PERSON)


def send_numbers(tx: AnySender, count: int) -> None:
    for number in range(count):
        tx.send(number.to_bytes(2, "little"))


@all_kinds
def test_F08_another_process_takes_the_message(make_pair: MakePair) -> None:
    """Two processes that hold one receiver after a bare fork share what comes; a timed receive of neither hangs."""
    tx, rx = make_pair()
    result_tx, result_rx = channel()

    def receive_share() -> list[int]:
        share = []
        while True:
            try:
                share.append(int.from_bytes(rx.recv(timeout=0.5), "little"))
            except Empty:
                return share

    def report_share() -> None:
        result_tx.send(receive_share())

    with tx, rx, result_rx, bare_fork(report_share) as child:
        result_tx.close()
        sending = InThread(send_numbers, tx, 2000)
        shares = receive_share()
        sending.result()
        shares += result_rx.recv(LIMIT)
        assert sorted(shares) == list(range(2000))
        assert child.join() == 0


# -- F11: names of servers ------------------------------------------------------------------


def test_F11_long_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the directory for temporary files has a name too long for a socket's, a server works all the same."""
    long = tmp_path / ("d" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with OneShotServer() as server:
        send_person(server.name)
        rx, first = server.accept(LIMIT)
        with rx:
            assert first == PERSON
    assert list(long.iterdir()) == []


def test_F11_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no server can be made, that is an OSError, and no descriptor is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        OneShotServer()
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["missing", "n" * 120], ids=["missing", "too long"])
def test_F11_no_server(tmp_path: Path, name: str) -> None:
    """Connecting to what isn't there, or has a name longer than a socket's, is an OSError, and leaves no descriptor."""
    before = open_descriptors()
    with pytest.raises(OSError):
        connect(str(tmp_path / name), LIMIT)
    assert open_descriptors() == before


def test_F11_server_leaves_no_name() -> None:
    """The name is gone with the server, and with its one client."""
    with OneShotServer() as closed:
        pass
    with OneShotServer() as used:
        send_person(used.name)
        used.accept(LIMIT)[0].close()
        for name in (closed.name, used.name):
            with pytest.raises(OSError):
                connect(name, LIMIT)


@pytest.mark.parametrize("name", ["n" * 120, "@" + "n" * 120, "missing/socket", "a\0b", "@", ""])
def test_F11_chosen_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A chosen name that can't be is an OSError, for both sides; it is not cut, and leaves no descriptor."""
    monkeypatch.chdir(tmp_path)
    before = open_descriptors()
    for meet in (Server, connect):
        with pytest.raises(OSError):
            meet(name)
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == []


# -- F12: what a message takes --------------------------------------------------------------


@all_kinds
def test_F12_small_messages_take_little_memory(make_pair: MakePair) -> None:
    """A received message keeps the memory that it needs, not what the largest would have; it is received into one
    buffer's worth, and no fresh pages of it.
    """
    count = 1000
    tx, rx = make_pair()
    with tx, ReceiverSet() as receivers:
        with rx:
            faults = 0
            for warm in (False, True):
                before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
                for _ in range(count):
                    tx.send(SEVEN)
                    assert rx.recv(LIMIT) == SEVEN
                if warm:
                    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
            # A buffer made anew is at least a page, each time.
            assert faults < count / 10
            receivers.add(rx)
        tracemalloc.start()
        try:
            undecoded: list[Any] = []
            for _ in range(count):
                tx.send(SEVEN)
                undecoded += receivers.select(LIMIT)
            kept, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept < count * 1024
        assert most - kept < 2 * PACKET_SIZE
        assert [event.message.to() for event in undecoded] == [SEVEN] * count


# -- F13: packets that lie ------------------------------------------------------------------


@contextmanager
def packets_of_a_sender() -> Iterator[tuple[Sender[Any], Callable[[], tuple[bytes, list[int]]]]]:
    """A sender, and a function that reads what it sent, as it lies in the kernel: bytes and descriptors."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(f"{directory}/raw")
        listener.listen()
        tx = stack.enter_context(connect(f"{directory}/raw", LIMIT))
        peer, _ = listener.accept()
        stack.enter_context(peer)
        peer.settimeout(LIMIT)

        def read_packet() -> tuple[bytes, list[int]]:
            packet, fds, _, _ = socket.recv_fds(peer, 1 << 20, 253)
            return packet, fds

        yield tx, read_packet


def inject(tx: Any, packet: bytes, fds: list[int]) -> None:
    """Send a packet as it is by the socket of ``tx``."""
    with socket.socket(fileno=os.dup(tx.fileno())) as sock:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sock.sendmsg([packet], rights)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def check_refused_or_read(tx: Sender[Any], rx: Receiver[Any]) -> None:
    """Receive a forged packet: whatever it holds, it costs one message, no descriptor, and little memory."""
    tx.send("next")
    before = open_descriptors()
    for _ in attempts():
        try:
            received = rx.recv(LIMIT)
        except (SerializationError, ProtocolError):
            continue
        if isinstance(received, str) and received == "next":
            break
        close_endpoints(received)
        del received
    assert open_descriptors() == before


def close_endpoints(received: object) -> None:
    if isinstance(received, (list, tuple)):
        for part in received:
            close_endpoints(part)
    elif isinstance(received, (Sender, Receiver)):
        received.close()


@pytest.mark.parametrize("size", [1, 4, 8, 24, 64, 1000, F])
def test_F13_garbage(size: int) -> None:
    """Packets of random bytes are refused, one by one."""
    noise = random.Random(size)
    tx, rx = channel()
    with tx, rx:
        for _ in range(100):
            inject(tx, noise.randbytes(size), [])
            with pytest.raises((SerializationError, ProtocolError)):
                rx.recv(LIMIT)
        tx.send("next")
        assert rx.recv(LIMIT) == "next"


def test_F13_garbage_with_descriptors() -> None:
    """Packets of random bytes with descriptors are refused, and the descriptors closed."""
    noise = random.Random(13)
    tx, rx = channel()
    with tx, rx, open(os.devnull, "rb") as file:
        for size in range(1, 100):
            inject(tx, noise.randbytes(size), [file.fileno()] * (size % 7))
            check_refused_or_read(tx, rx)


#: The bytes at the start of a packet that are not yet a pickle.
HEAD = 26


@pytest.mark.parametrize("size", [0, F + 1], ids=["small", "large"])
def test_F13_lying_header(size: int) -> None:
    """Each byte of a packet's head may lie, by any of its bits: nothing is allocated, leaked or misread for it."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with packets_of_a_sender() as (raw_tx, read_packet), tx, rx, sub_tx, sub_rx:
        raw_tx.send((pattern(size), [sub_tx, sub_tx.clone()]))
        packet, fds = read_packet()
        tracemalloc.start()
        try:
            for position in range(HEAD):
                for bit in range(8):
                    forged = bytearray(packet)
                    forged[position] ^= 1 << bit
                    inject(tx, bytes(forged), fds)
                    check_refused_or_read(tx, rx)
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()
            close_all(fds)


def test_F13_cut_or_extended_packets() -> None:
    """A packet that is shorter or longer than its header says, or brings other descriptors, is refused."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with packets_of_a_sender() as (raw_tx, read_packet), tx, rx, sub_tx, sub_rx:
        raw_tx.send(("data", [sub_tx, sub_tx.clone()]))
        packet, fds = read_packet()
        for length in range(1, len(packet)):
            inject(tx, packet[:length], fds)
        inject(tx, packet + b"\0", fds)
        for wrong in ([], fds[:1], fds + fds[:1]):
            inject(tx, packet, wrong)
        before = open_descriptors()
        for _ in range(len(packet) + 3):
            with pytest.raises((ProtocolError, SerializationError)):
                rx.recv(LIMIT)
        assert open_descriptors() == before
        check_refused_or_read(tx, rx)
        close_all(fds)


def test_F13_forged_index() -> None:
    """A message that refers to a descriptor which it doesn't bring, or twice to one, is refused, not a crash."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with packets_of_a_sender() as (raw_tx, read_packet), tx, rx, sub_tx, sub_rx:
        raw_tx.send([sub_tx, sub_tx.clone()])
        packet, fds = read_packet()
        # In the pickle, the second sender's place: descriptors from 1 on, one of them.
        place = b"K\x01K\x01"
        assert packet.count(place) == 1
        for forged in (
            b"K\x02K\x01",
            b"K\xffK\x01",
            b"K\x01K\x02",
            b"K\x00K\x01",
            b"K\x00K\x02",
            b"K\x01K\x00",
            b"NK\x01K",
        ):
            inject(tx, packet.replace(place, forged), fds)
            tx.send("next")
            before = open_descriptors()
            with pytest.raises((SerializationError, ProtocolError)):
                rx.recv(LIMIT)
            assert open_descriptors() == before
            assert rx.recv(LIMIT) == "next"
        close_all(fds)


def test_F13_endpoint_that_is_no_socket() -> None:
    """A descriptor that is passed off as a sender, and is a file or another kind of socket, is refused."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with packets_of_a_sender() as (raw_tx, read_packet), tx, rx, sub_tx, sub_rx:
        raw_tx.send(sub_tx)
        packet, fds = read_packet()
        with open(os.devnull, "rb") as file, socket.socket(socket.AF_INET) as foreign:
            for wrong in (file, foreign):
                inject(tx, packet, [wrong.fileno()])
                tx.send("next")
                before = open_descriptors()
                with pytest.raises((SerializationError, ProtocolError)):
                    rx.recv(LIMIT)
                assert open_descriptors() == before
                assert rx.recv(LIMIT) == "next"
        close_all(fds)
