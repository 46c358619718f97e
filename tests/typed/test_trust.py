"""A typed channel whose peer lies: nothing is unpickled, run, leaked, or allocated for it, and the channel goes on."""

from __future__ import annotations

import fcntl
import os
import pickle
import random
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from mp_ipcchan import (
    BytesReceiver,
    Fd,
    ProtocolError,
    Receiver,
    Sender,
    SerializationError,
    SharedMemory,
    bytes_channel,
    channel,
)
from mp_ipcchan._message import INLINE_SIZE, PACKET_SIZE, PLAIN, HandleKind
from mp_ipcchan._segments._segment import create_blank
from mp_ipcchan._transport._frame import CARRIER_FLAG, SEGMENT_FLAG, FrameKind, head, pack, record
from mp_ipcchan._typed_codec import codec_of

from ..conformance._support import LIMIT, MIB, open_descriptors
from ..conformance.test_findings import close_all, inject, packets_of_a_sender

REFUSED = (SerializationError, ProtocolError)


class Parts(msgspec.Struct):
    text: str = ""
    senders: list[Sender[int]] = []
    receiver: Receiver[Parts] | None = None
    bytes_receiver: BytesReceiver | None = None
    memory: SharedMemory | None = None
    file: Fd | None = None
    anything: Any = None


class Flat(msgspec.Struct):
    text: str = ""
    data: bytes = b""
    numbers: list[int] = []
    table: dict[str, int] = {}


_unpickled: list[str] = []


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return _unpickled.append, ("!",)


@pytest.fixture(params=[Flat, Parts])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Sender[Any], Receiver[Any]]]:
    tx, rx = channel(request.param)
    with tx, rx:
        yield tx, rx


@pytest.fixture
def parts() -> Iterator[tuple[Sender[Parts], Receiver[Parts]]]:
    tx, rx = channel(Parts)
    with tx, rx:
        yield tx, rx


def check_refused(tx: Sender[Any], rx: Receiver[Any], messages: int = 1) -> None:
    """What was injected raises, leaves nothing open, and the channel goes on."""
    of = rx._typed.type  # type: ignore[union-attr]
    tx.send(of("next"))
    before = open_descriptors()
    for _ in range(messages):
        with pytest.raises(REFUSED):
            rx.recv(LIMIT)
    assert rx.recv(LIMIT) == of("next")
    assert open_descriptors() == before
    assert not _unpickled


def check_refused_or_read(tx: Sender[Any], rx: Receiver[Any]) -> None:
    """The same, where what was injected may happen to be a message."""
    of = rx._typed.type  # type: ignore[union-attr]
    tx.send(of("next"))
    before = open_descriptors()
    for _ in range(5000):
        try:
            if rx.recv(LIMIT).text == "next":
                break
        except REFUSED:
            continue
    assert open_descriptors() == before
    assert not _unpickled


@contextmanager
def packet_of(message: Parts) -> Iterator[tuple[bytes, list[int]]]:
    """The packet that a sender of ours makes of the message."""
    with packets_of_a_sender() as (raw_tx, read_packet):
        with Sender[Parts](raw_tx._open_link().retain(), codec_of(Parts)) as tx:
            tx.send(message)
        packet, fds = read_packet()
        try:
            yield packet, fds
        finally:
            close_all(fds)


def segment_of(content: bytes, seals: int | None = None) -> int:
    """A memfd with the content, sealed as ours are, or otherwise."""
    fd = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    # Not moving the position, by which messages of an ended process are claimed.
    os.pwrite(fd, content, 0)
    ours = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ours if seals is None else seals)
    return fd


def inject_and_close(tx: Sender[Any], packet: bytes, fds: list[int]) -> None:
    try:
        inject(tx, packet, fds)
    finally:
        close_all(fds)


# -- pickles ----------------------------------------------------------------------------------


def test_F13_pickles_are_never_read(ends: tuple[Sender[Any], Receiver[Any]]) -> None:
    """In a packet of any kind that there is: plain, packed, with descriptors, in a segment, of an ended process."""
    tx, rx = ends
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        bomb = pickle.dumps(Bomb(), protocol)
        inject(tx, PLAIN + bomb, [])
        check_refused(tx, rx)
        inject(tx, pack([PLAIN + bomb] * 3), [])
        check_refused(tx, rx, 3)
        inject(tx, head(FrameKind.ENVELOPE, 0, b"", (), len(bomb)) + bomb, [])
        check_refused(tx, rx)
        with open(os.devnull) as file:
            inject(tx, head(FrameKind.ENVELOPE, 0, bytes([HandleKind.FILE]), (), len(bomb)) + bomb, [file.fileno()])
        check_refused(tx, rx)
        inject_and_close(tx, head(FrameKind.ENVELOPE, SEGMENT_FLAG, b"", (), len(bomb)), [segment_of(bomb)])
        check_refused(tx, rx)
        inject(tx, head(FrameKind.ENVELOPE, 0, b"", (len(bomb),), 0) + bomb, [])
        check_refused(tx, rx)
        last = record(len(bomb), (), b"") + bomb
        table = struct.pack("<2Q", 1, 4 * len(last))
        spill = head(FrameKind.SPILL, SEGMENT_FLAG, b"", (len(last), 1), len(last) + len(table))
        inject_and_close(tx, spill, [segment_of(last + table)])
        check_refused(tx, rx)
        last = PLAIN + bomb
        table = struct.pack("<2Q", 0, 4 * len(last))
        spill = head(FrameKind.SPILL, SEGMENT_FLAG, b"", (len(last), 1), len(last) + len(table))
        inject_and_close(tx, spill, [segment_of(last + table)])
        check_refused(tx, rx)
        # Said to be a plain frame, and none.
        inject_and_close(tx, spill, [segment_of(b"?" + last[1:] + table)])
        check_refused(tx, rx)


def test_F13_a_sender_of_pickles_on_a_typed_channel(ends: tuple[Sender[Any], Receiver[Any]]) -> None:
    """One made of the same socket, as any program can: all it sends is refused."""
    tx, rx = ends
    with Sender[Any](tx._open_link().retain()) as untyped:
        untyped.send(Bomb())
        check_refused(tx, rx)
        untyped.send([Bomb(), bytes(100_000)])
        check_refused(tx, rx)
        untyped.send([Bomb(), SharedMemory.zeros(1)])
        check_refused(tx, rx)
        untyped.send_many([Bomb()] * 5)
        check_refused(tx, rx, 5)


def test_pickles_refuse_nothing_silently() -> None:
    """The other way round: a typed message on a channel of pickles raises, or is what its bytes say as a pickle."""
    tx, rx = channel()
    with tx, rx, Sender[Any](tx._open_link().retain(), codec_of(Any)) as typed:
        typed.send({"a": [1, 2, 3]})
        with pytest.raises(SerializationError):
            rx.recv(LIMIT)
        tx.send("next")
        assert rx.recv(LIMIT) == "next"


# -- noise and lies ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 64, 1000, INLINE_SIZE])
def test_F13_noise(ends: tuple[Sender[Any], Receiver[Any]], size: int) -> None:
    """Random bytes as a packet, as a message, and as a message with descriptors."""
    tx, rx = ends
    noise = random.Random(size)
    with open(os.devnull) as file:
        for turn in range(20):
            data = noise.randbytes(size)
            inject(tx, data, [])
            check_refused(tx, rx)
            inject(tx, PLAIN + data, [])
            check_refused(tx, rx)
            if size < 60_000:
                kinds = bytes([1 + turn % 7] * 3)
                inject(tx, head(FrameKind.ENVELOPE, 0, kinds, (), size) + data, [file.fileno()] * 3)
                check_refused(tx, rx)


def test_F13_each_byte_of_a_message(parts: tuple[Sender[Parts], Receiver[Parts]]) -> None:
    """A message with every kind of endpoint, of which each byte lies in turn: no leak, no crash, little memory."""
    tx, rx = parts
    sender, _sender_rx = channel(int)
    inner_tx, inner_rx = channel(Parts)
    _bytes_tx, bytes_rx = bytes_channel()
    inner_tx.send_many([Parts("a"), Parts("b")])
    inner_tx.send(Parts(memory=SharedMemory.zeros(1)))
    # So that they travel in the message.
    inlet = inner_rx._open_link().inlet
    waiting = [inlet.take(False) for _ in range(3)]
    inlet.put_back(*waiting)  # type: ignore[arg-type]
    message = Parts("x", [sender, sender.clone()], inner_rx, bytes_rx, SharedMemory.zeros(4096), Fd(0))
    with packet_of(message) as (packet, fds):
        del message
        with little_memory():
            for position in range(len(packet)):
                for change in (1 << position % 8, 0xFF):
                    forged = bytearray(packet)
                    forged[position] ^= change
                    inject(tx, bytes(forged), fds)
                check_refused_or_read(tx, rx)


def place(number: int, first: int, count: int, payload: object = None) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(105, msgspec.msgpack.encode((number, first, count, payload)))


SENDER, RECEIVER, FILE, MEMORY = HandleKind.SENDER, HandleKind.RECEIVER, HandleKind.FILE, HandleKind.MEMORY

#: What is said of the endpoints, and the descriptors' kinds.
LIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "no descriptor": ({"senders": [place(0, 0, 1)]}, []),
    "index too large": ({"senders": [place(0, 1, 1)]}, [SENDER]),
    "index far too large": ({"senders": [place(0, 2**63 - 1, 1)]}, [SENDER]),
    "negative index": ({"senders": [place(0, -1, 1)]}, [SENDER]),
    "too many": ({"senders": [place(0, 0, 2)]}, [SENDER]),
    "negative count": ({"senders": [place(0, 0, -1)]}, [SENDER]),
    "none": ({"senders": [place(0, 0, 0)]}, [SENDER]),
    "twice": ({"senders": [place(0, 0, 1), place(1, 0, 1)]}, [SENDER]),
    "overlapping": ({"senders": [place(0, 0, 1)], "receiver": place(1, 0, 2, [])}, [SENDER, RECEIVER]),
    "one unmentioned": ({"senders": [place(0, 0, 1)]}, [SENDER, SENDER]),
    "all unmentioned": ({}, [FILE, MEMORY]),
    "in a field of another type": ({"anything": place(0, 0, 1)}, [SENDER]),
    "one object as two types": ({"senders": [place(0, 0, 1)], "file": place(0, 0, 1)}, [SENDER]),
    "another kind": ({"senders": [place(0, 0, 1)]}, [RECEIVER]),
    "a file as a sender": ({"senders": [place(0, 0, 1)]}, [FILE]),
    "a sender as memory": ({"memory": place(0, 0, 1)}, [SENDER]),
    "a sender with a payload": ({"senders": [place(0, 0, 1, "x")]}, [SENDER]),
    "a file with a payload": ({"file": place(0, 0, 1, [1])}, [FILE]),
    "a number": ({"senders": [0]}, []),
    "another extension": ({"senders": [msgspec.msgpack.Ext(7, b"")]}, []),
    "an extension of nonsense": ({"senders": [msgspec.msgpack.Ext(105, b"\xc1")]}, []),
    "places of texts": ({"senders": [msgspec.msgpack.Ext(105, msgspec.msgpack.encode(["0", "0", "1", 0]))]}, []),
    "a receiver without a word": ({"receiver": place(0, 0, 1)}, [RECEIVER]),
    "a receiver of nonsense": ({"receiver": place(0, 0, 1, [1, 2])}, [RECEIVER]),
    "a receiver of no frames": ({"receiver": place(0, 0, 1, [b"nonsense"])}, [RECEIVER]),
    "a receiver of large frames": ({"receiver": place(0, 0, 1, [PLAIN + bytes(PACKET_SIZE)])}, [RECEIVER]),
    "a receiver of buffers": ({"receiver": place(0, 0, 1, [(b"", [b""] * 1025, b"")])}, [RECEIVER]),
    "a receiver of kinds": ({"receiver": place(0, 0, 2, [(b"", [], b"\xff")])}, [RECEIVER, FILE]),
    "a file as a receiver of messages": ({"receiver": place(0, 0, 2, [(b"", [], b"\x04")])}, [FILE, FILE]),
    "a receiver of too few": ({"receiver": place(0, 0, 2, [(b"", [], b"\x04\x04")])}, [RECEIVER, FILE]),
    "a receiver of too many": ({"receiver": place(0, 0, 2, [])}, [RECEIVER, FILE]),
}


@pytest.mark.parametrize("lie", LIES)
def test_F13_forged_places(parts: tuple[Sender[Parts], Receiver[Parts]], lie: str) -> None:
    """Whatever a message says of its descriptors, a wrong word costs the message, and nothing is left open."""
    tx, rx = parts
    said, kinds = LIES[lie]
    body = msgspec.msgpack.encode(said)
    before = open_descriptors()
    ends = [end.detach() for _ in kinds for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    try:
        flags, payload = (0, body) if len(body) < 60_000 else (SEGMENT_FLAG, b"")
        segments = [] if payload else [segment_of(body)]
        packet = head(FrameKind.ENVELOPE, flags, bytes(kinds), (), len(body)) + payload
        inject(tx, packet, [*segments, *ends[: len(kinds)]])
        close_all(segments)
    finally:
        for fd in ends:
            os.close(fd)
    check_refused(tx, rx)
    assert open_descriptors() == before


def endless(kind: int) -> Iterator[int]:
    """A socket with plenty to receive, and no descriptors in it."""
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    with one, other:
        other.setblocking(False)
        for _ in range(100):
            other.send(bytes(100))
        yield one.fileno()


def opened(path: str) -> Iterator[int]:
    with open(path) as file:
        yield file.fileno()


def unconnected() -> Iterator[int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alone:
        yield alone.fileno()


def crowded() -> Iterator[int]:
    """A carrier that holds more than it should."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        socket.send_fds(other, [b"c"], [0] * 3)
        yield one.fileno()


CARRIERS: dict[str, Callable[[], Iterator[int]]] = {
    "a file": lambda: opened(os.devnull),
    "packets without descriptors": lambda: endless(socket.SOCK_SEQPACKET),
    "a stream without descriptors": lambda: endless(socket.SOCK_STREAM),
    "a socket without a peer": unconnected,
    "too many": crowded,
}


@pytest.mark.parametrize("what", CARRIERS)
def test_F13_forged_carriers(ends: tuple[Sender[Any], Receiver[Any]], what: str) -> None:
    """What is passed off as a carrier, of a message's descriptors and of those that an ended process left."""
    tx, rx = ends
    packet = head(FrameKind.ENVELOPE, CARRIER_FLAG, bytes([SENDER, SENDER]), (), 1) + b"\x80"
    last = record(1, (), bytes([SENDER, SENDER])) + b"\x80"
    table = struct.pack("<2Q", 3, 4 * len(last))
    spill = head(FrameKind.SPILL, SEGMENT_FLAG, bytes([FILE]), (len(last), 1), len(last) + len(table))
    for carrier in CARRIERS[what]():
        before = open_descriptors()
        inject(tx, packet, [carrier])
        check_refused(tx, rx)
        segment = segment_of(last + table)
        inject(tx, spill, [segment, carrier])
        os.close(segment)
        check_refused(tx, rx)
        assert open_descriptors() == before


def test_what_the_lies_are_measured_by(parts: tuple[Sender[Parts], Receiver[Parts]]) -> None:
    """The same by hand without a lie is taken."""
    tx, rx = parts
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        waiting = [PLAIN + msgspec.msgpack.encode({"text": "waits"}), (msgspec.msgpack.encode({}), [], b"")]
        said = {"senders": [place(0, 0, 1), place(0, 0, 1)], "receiver": place(1, 1, 1, waiting)}
        body = msgspec.msgpack.encode(said)
        packet = head(FrameKind.ENVELOPE, 0, bytes([SENDER, RECEIVER]), (), len(body)) + body
        inject(tx, packet, [one.fileno(), other.fileno()])
        received = rx.recv(LIMIT)
        assert received.senders[0] is received.senders[1]
        with received.senders[0], received.receiver as receiver:  # type: ignore[union-attr]
            assert receiver.recv(LIMIT).text == "waits"
            assert receiver.recv(LIMIT) == Parts()


def test_F13_memory_that_could_kill(parts: tuple[Sender[Parts], Receiver[Parts]]) -> None:
    """Memory or a segment that its sender could truncate under its reader."""
    tx, rx = parts
    body = msgspec.msgpack.encode({"memory": place(0, 0, 1)})
    packet = head(FrameKind.ENVELOPE, 0, bytes([MEMORY]), (), len(body)) + body
    for seals in (0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK):
        inject_and_close(tx, packet, [segment_of(bytes(100), seals)])
        check_refused(tx, rx)
    text = msgspec.msgpack.encode({"text": "x"})
    packet = head(FrameKind.ENVELOPE, SEGMENT_FLAG, b"", (), len(text))
    for fd in (segment_of(text, 0), segment_of(text[:-1]), os.open(os.devnull, os.O_RDWR), os.eventfd(0)):
        inject_and_close(tx, packet, [fd])
        check_refused(tx, rx)


# -- how much ---------------------------------------------------------------------------------


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [0xFFFFFFFF, 0x7FFFFFFF, 0x00FFFFFF])
def test_F13_lengths_that_lie(ends: tuple[Sender[Any], Receiver[Any]], count: int) -> None:
    """Arrays, maps, strings, bytes and extensions that announce more than there is: nothing is allocated for it."""
    tx, rx = ends
    size = struct.pack(">I", count)
    with little_memory():
        for kind in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"):
            for prefix in (b"", b"\x81\xa4text", b"\x81\xa7numbers", b"\x81\xa5table", b"\x81\xa8anything", b"\x91"):
                inject(tx, PLAIN + prefix + kind + size + b"\x01", [])
                check_refused(tx, rx)


def test_F13_nested_without_end(ends: tuple[Sender[Any], Receiver[Any]]) -> None:
    tx, rx = ends
    with little_memory():
        for opening in (b"\x91", b"\x81\xa1a", b"\xc9\x00\x00\xff\x00\x69"):
            for prefix in (b"", b"\x81\xa8anything", b"\x81\xa7unknown"):
                inject(tx, PLAIN + prefix + opening * (60_000 // len(opening)), [])
                check_refused(tx, rx)


def test_F13_huge_and_empty_segments() -> None:
    """A segment of a terabyte of nothing, which costs its sender nothing: refused by its size, unread."""
    tx, rx = channel(Flat, max_size=MIB)
    size = 1 << 40
    with tx, rx, little_memory():
        inject_and_close(tx, head(FrameKind.ENVELOPE, SEGMENT_FLAG, b"", (), size), [create_blank(size)])
        check_refused(tx, rx)
        inject_and_close(tx, head(FrameKind.ENVELOPE, SEGMENT_FLAG, b"", (size - MIB,), 10), [create_blank(size)])
        check_refused(tx, rx)
        # As what an ended process left behind: a message of a terabyte; and many that are large together.
        spill = head(FrameKind.SPILL, SEGMENT_FLAG, b"", (size, 1), size + 16)
        fd = create_blank(size + 16)
        os.pwrite(fd, struct.pack("<2Q", 1, 4 * size), size)
        inject_and_close(tx, spill, [fd])
        check_refused(tx, rx)
        count = 200
        fd = create_blank(size + 8 * (count + 1))
        each = MIB
        table = struct.pack(f"<{count + 1}Q", *(4 * each * number + 1 for number in range(count + 1)))
        os.pwrite(fd, table, size)
        inject_and_close(tx, head(FrameKind.SPILL, SEGMENT_FLAG, b"", (size, count), size + len(table)), [fd])
        check_refused_or_read(tx, rx)


def test_F13_a_segment_that_changes() -> None:
    """What was received is the receiver's own: its sender, who may still write to the segment, changes nothing."""
    tx, rx = channel(msgspec.Raw)
    content = msgspec.msgpack.encode({"text": "x" * 100_000})
    with tx, rx:
        fd = segment_of(content)
        try:
            inject(tx, head(FrameKind.ENVELOPE, SEGMENT_FLAG, b"", (), len(content)), [fd])
            received = rx.recv(LIMIT)
            os.pwrite(fd, bytes(len(content)), 0)
        finally:
            os.close(fd)
        assert bytes(received) == content


def test_F13_a_segment_that_changes_meanwhile() -> None:
    """Written to while it is decoded: the message is read or refused, and is of its type."""
    tx, rx = channel(Flat)
    content = msgspec.msgpack.encode(Flat("é" * 50_000, b"x" * 100, list(range(1000)), {"a": 1}))
    noise = random.Random(5)
    fd = segment_of(content)
    go_on = threading.Event()

    def scribble() -> None:
        while not go_on.is_set():
            os.pwrite(fd, noise.randbytes(16), noise.randrange(len(content) - 16))
            os.pwrite(fd, content, 0)

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        with tx, rx:
            for _ in range(100):
                inject(tx, head(FrameKind.ENVELOPE, SEGMENT_FLAG, b"", (), len(content)), [fd])
                try:
                    received = rx.recv(LIMIT)
                except REFUSED:
                    continue
                assert received.text.encode().decode() == received.text
                assert all(type(number) is int for number in received.numbers)
    finally:
        go_on.set()
        writer.join()
        os.close(fd)
