"""Segments that a sender keeps: used again once nobody needs what is in them, never before, and given back."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mp_ipcchan import Empty, Receiver, Sender, bytes_channel, channel
from mp_ipcchan._segments import _memory, _segment, _segment_cache, _segment_pool

from ..conformance._support import LIMIT, InThread
from ._support import KIB, MIB, array, check, descriptors, kept, mapped


@pytest.fixture
def pair() -> Iterator[tuple[Sender[Any], Receiver[Any]]]:
    tx, rx = channel()
    with tx, rx:
        yield tx, rx


@pytest.fixture
def no_idling(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, nothing is given back as unused."""
    monkeypatch.setattr(_segment_pool, "IDLE_AFTER", 1e6)


@pytest.mark.usefixtures("no_idling")
def test_one_segment_serves_all_that_come_one_by_one(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """An array that was dropped makes its memory free for the next; what its receiver did to it isn't seen."""
    tx, rx = pair
    for number in range(100):
        tx.send(array(number, MIB))
        received = rx.recv(LIMIT)
        check(received, number, MIB)
        received[:] = 0
        del received
        assert len(kept(tx)) == 1
    assert mapped(rx)


@pytest.mark.usefixtures("no_idling")
@pytest.mark.parametrize("size", [72 * KIB, 300 * KIB])
def test_what_is_kept_stays(pair: tuple[Sender[Any], Receiver[Any]], size: int) -> None:
    """Arrays that are held while hundreds follow, and let go of in random order, are each what was sent."""
    tx, rx = pair
    choose = random.Random(4)
    held: dict[int, Any] = {}
    for number in range(400):
        tx.send(array(number, size))
        held[number] = rx.recv(LIMIT)
        while len(held) > choose.randrange(40):
            one = choose.choice(list(held))
            check(held.pop(one), one, size)
    for number, received in held.items():
        check(received, number, size)


@pytest.mark.usefixtures("no_idling")
def test_slices_keep_the_segment(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """The smallest view of an array, or of its memory, holds the message, not the object that was received."""
    tx, rx = pair
    for number in range(5):
        tx.send(array(number, MIB))
        last = memoryview(rx.recv(LIMIT)[-1:])
        gc.collect()
        for other in range(20):
            tx.send(array(100 + other, MIB))
            check(rx.recv(LIMIT), 100 + other, MIB)
        assert last[0] == array(number, MIB)[-1]


def test_received_arrays_are_writable_and_aligned(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """Each buffer of a message begins on a cache line of its own; writing to it doesn't reach the sender."""
    tx, rx = pair
    for _ in range(4):
        sent = [np.full(40_000 + number, number, np.uint8) for number in range(20)]
        tx.send(sent)
        received = rx.recv(LIMIT)
        for number, one in enumerate(received):
            assert one.flags.writeable
            assert one.ctypes.data % 64 == 0
            assert (one == number).all()
            one[:] = 255
        assert all((one == number).all() for number, one in enumerate(sent))


@pytest.mark.parametrize(
    "obj",
    [
        b"x" * MIB,
        bytearray(b"y" * MIB),
        "z" * MIB,
        [b"b" * 50_000, bytearray(b"a" * 50_000)] * 3,
        list(range(200_000)),
        pickle.PickleBuffer(bytearray(b"w" * MIB)),
        pickle.PickleBuffer(b"r" * MIB),
    ],
    ids=["bytes", "bytearray", "str", "several", "pickle", "writable", "read-only"],
)
def test_all_that_is_large_goes_in_segments(pair: tuple[Sender[Any], Receiver[Any]], obj: Any) -> None:
    """The same memory serves bytes, strings, big pickles and buffers, which arrive writable if they were."""
    tx, rx = pair
    for _ in range(4):
        tx.send(obj)
        received = rx.recv(LIMIT)
        if isinstance(obj, pickle.PickleBuffer):
            assert bytes(received) == bytes(obj)
            assert memoryview(received).readonly == memoryview(obj).readonly
        else:
            assert received == obj
            assert type(received) is type(obj)
        del received
    assert len(kept(tx)) == 1


def test_more_buffers_than_a_message_lists(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """What is too many goes inside the pickle, whatever its shape."""
    tx, rx = pair
    sent = [np.asfortranarray(np.full((200, 200), number % 251, np.uint8)) for number in range(1030)]
    sent += [np.asfortranarray(np.full((300, 300), 9, np.uint8))]
    tx.send(sent)
    received = rx.recv(LIMIT)
    assert len(received) == len(sent)
    assert all(np.array_equal(one, other) for one, other in zip(received, sent, strict=True))


@pytest.mark.usefixtures("no_idling")
def test_unread_and_dropped_is_free(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """A message that waits holds its segment, whether in the kernel or in a receiver; dropped unread, it doesn't."""
    tx, rx = pair
    sub_tx, sub_rx = channel()
    with sub_tx:
        for number in range(3):
            sub_tx.send(array(number, MIB))
        segments = sub_tx._open_link().outlet.segments
        assert len(segments.kept) == 3
        tx.send(sub_rx)
        moved = rx.recv(LIMIT)
        check(moved.recv(LIMIT), 0, MIB)
        assert sum(segment.claim_if_free() for segment in list(segments._kept)) == 1
        moved.close()
        assert sum(segment.claim_if_free() for segment in list(segments._kept)) == 2


@pytest.mark.usefixtures("no_idling")
def test_message_that_is_put_back_keeps_its_segment() -> None:
    """A message too large for ``recv_into`` is still there, and whole, after others came and went."""
    tx, rx = bytes_channel()
    with tx, rx:
        tx.send(b"1" * MIB)
        for _ in range(3):
            with pytest.raises(ValueError, match="still there"):
                rx.recv_into(bytearray(10), LIMIT)
            tx.send(b"2" * MIB)
        assert rx.recv(LIMIT) == b"1" * MIB
        for _ in range(3):
            assert rx.recv(LIMIT) == b"2" * MIB


@pytest.mark.usefixtures("no_idling")
def test_pool_is_bounded(pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many messages nobody has read, few segments and few bytes are kept, and no descriptor for the rest."""
    tx, rx = pair
    before = descriptors()
    for number in range(100):
        tx.send(array(number, 100 * KIB))
    assert len(kept(tx)) == _segment_pool._MOST_PER_CHANNEL
    assert descriptors() - before == _segment_pool._MOST_PER_CHANNEL
    others = [channel() for _ in range(8)]
    for number in range(100):
        others[number % 8][0].send(array(number, 100 * KIB))
    assert sum(len(kept(one)) for one in (tx, *(other for other, _ in others))) <= _segment_pool._MOST_SEGMENTS
    for number in range(100):
        check(rx.recv(LIMIT), number, 100 * KIB)
    for end in (tx, *(end for other in others for end in other)):
        end.close()
    assert _segment_pool.is_empty()
    monkeypatch.setattr(_segment_pool, "MOST_BYTES", 64 * MIB)
    big_tx, big_rx = channel()
    for number in range(6):
        big_tx.send(array(number, 20 * MIB))
    assert len(kept(big_tx)) == 2
    for number in range(6):
        check(big_rx.recv(LIMIT), number, 20 * MIB)
    big_tx.close()
    big_rx.close()
    assert _segment_pool.is_empty()


def test_unused_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a sender that sends something large elsewhere, and by a receiver that waits in vain."""
    monkeypatch.setattr(_segment_pool, "IDLE_AFTER", 1e6)
    first_tx, first_rx = channel()
    second_tx, second_rx = channel()
    with first_tx, first_rx, second_tx, second_rx:
        for number in range(3):
            first_tx.send(array(number, MIB))
            check(first_rx.recv(LIMIT), number, MIB)
        monkeypatch.setattr(_segment_pool, "_look_at", 0.0)
        monkeypatch.setattr(_segment_pool, "IDLE_AFTER", 0.01)
        with pytest.raises(Empty):
            second_rx.recv(0.005)
        second_tx.send(array(0, MIB))
        check(second_rx.recv(LIMIT), 0, MIB)
        monkeypatch.setattr(_segment_pool, "_look_at", 0.0)
        with pytest.raises(Empty):
            second_rx.recv(0.05)
        assert not kept(first_tx)
        assert not kept(second_tx)
        assert not mapped(second_rx)
        # And it goes on as before.
        first_tx.send(array(7, MIB))
        check(first_rx.recv(LIMIT), 7, MIB)


def test_close_gives_back() -> None:
    """The last handle of a sender takes its segments along; what was sent is still there."""
    before = descriptors()
    tx, rx = channel()
    with rx:
        with tx, tx.clone() as again:
            tx.send(array(1, MIB))
            tx.close()
            assert len(kept(again)) == 1
        assert _segment_pool.is_empty()
        received = rx.recv(LIMIT)
    check(received, 1, MIB)
    del received
    assert descriptors() == before


@pytest.mark.usefixtures("no_idling")
def test_threads_share_the_segments(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """Four threads that send at once on one channel never write into each other's segment."""
    tx, rx = pair

    def send(first: int) -> None:
        for number in range(first, first + 200):
            tx.send((number, array(number, 100 * KIB)), timeout=LIMIT)

    sending = [InThread(send, 200 * thread) for thread in range(4)]
    seen = []
    for _ in range(800):
        number, received = rx.recv(LIMIT)
        check(received, number, 100 * KIB)
        seen.append(number)
    for thread in sending:
        thread.result()
    assert sorted(seen) == list(range(800))


def test_channel_that_is_not_to_recycle(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """Each message has memory of its own there, which is closed when it is sent."""
    tx, rx = pair
    tx._open_link().outlet.segments.recycles = False
    before = descriptors()
    for number in range(3):
        tx.send(array(number, MIB))
        assert not kept(tx)
        assert descriptors() == before
        check(rx.recv(LIMIT), number, MIB)


def _without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def opens(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "as if /proc were not mounted")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opens)


def test_without_proc_on_either_side(pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc there are no leases: each message has a segment of its own. A reader maps each anew."""
    tx, rx = pair
    with monkeypatch.context() as context:
        _without_proc(context)
        before = descriptors()
        for number in range(5):
            tx.send(array(number, MIB))
            assert not kept(tx)
            assert descriptors() == before
            check(rx.recv(LIMIT), number, MIB)
    # The sender has it, the reader doesn't.
    for number in range(5):
        tx.send(array(number, MIB))
        with monkeypatch.context() as context:
            _without_proc(context)
            check(rx.recv(LIMIT), number, MIB)
        assert not mapped(rx)


def test_no_mappings_left(pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has all the mappings it may have copies what it receives, and writes what it sends."""
    tx, rx = pair

    def refuses(fd: int, size: int, *, entirely: bool = False) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "as if there were too many")

    monkeypatch.setattr(_segment_cache, "map_shared", refuses)
    monkeypatch.setattr(_segment_pool, "map_shared", refuses)
    for number in range(5):
        tx.send(array(number, MIB))
        received = rx.recv(LIMIT)
        check(received, number, MIB)
        received[:] = 0
    assert len(kept(tx)) == 1


class _Clock:
    """Stands for the module ``time`` where one is to see who waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept = 0.0

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.mark.usefixtures("no_idling")
def test_segments_that_stay_lent_are_waited_for_ever_more_rarely(
    pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that keeps all it gets makes the sender wait a few times; where that helps, it does so again."""
    clock = _Clock()
    monkeypatch.setattr(_segment_pool, "time", clock)
    tx, rx = pair
    held: list[Any] = []
    waited: list[int] = []
    for number in range(200):
        before = clock.slept
        tx.send(array(number, 100 * KIB))
        held.append(rx.recv(LIMIT))
        if clock.slept > before:
            assert clock.slept - before < 2 * _segment_pool._PATIENCE
            waited.append(number)
    assert waited == [16, 25, 42, 75, 140]
    monkeypatch.setattr(clock, "sleep", lambda _: held.clear())
    for number in range(200, 400):
        tx.send(array(number, 100 * KIB))
        check(rx.recv(LIMIT), number, 100 * KIB)
    assert not held
    assert tx._open_link().outlet.segments._impatience == _segment_pool._IMPATIENT


@pytest.mark.usefixtures("no_idling")
def test_leases_by_descriptors_while_there_are_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are held, no more take a descriptor than leaves others plenty; the rest takes mappings."""
    tx, rx = channel()
    with tx, rx:
        for _ in range(2):
            # Known to the reader, from the second time on.
            held = [_sent_and_received(tx, rx, number) for number in range(10)]
            del held
        before = descriptors()
        lowest = os.dup(0)
        os.close(lowest)
        monkeypatch.setattr(_segment, "plenty", lambda: lowest + 5)
        rx._open_link().inlet.segments.clear()
        for _ in range(3):
            held = [_sent_and_received(tx, rx, number) for number in range(10)]
            assert descriptors() <= before + 5
            for number, received in enumerate(held):
                check(received, number, MIB)
            del held, received


def _sent_and_received(tx: Sender[Any], rx: Receiver[Any], number: int) -> Any:
    tx.send(array(number, MIB))
    return rx.recv(LIMIT)


def test_mapping_is_no_descriptor() -> None:
    """A mapping shows what the file has, and is shared, without a descriptor; it goes when it is collected."""
    fd = os.memfd_create("test")
    os.write(fd, b"a" * 10_000)
    before = descriptors()
    region = _memory.map_shared(fd, 10_000)
    assert descriptors() == before
    assert region[:] == b"a" * 10_000
    region[5] = ord("b")
    assert os.pread(fd, 1, 5) == b"b"
    os.close(fd)
    assert region[4:7] == b"aba"


def test_mapping_what_can_not_be_mapped() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match=r"map|device|seek|denied|Permission|ENODEV|such"):
        _memory.map_shared(reader, 4096)
    os.close(reader)
    os.close(writer)


def test_fork_in_the_middle_of_a_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is forked while another thread sends holds neither that message's lease nor the pool."""
    tx, rx = channel()
    filling, go_on = threading.Event(), threading.Event()
    fill = _segment_pool._Segment.fill

    def slowly(segment: Any, pieces: Any) -> None:
        filling.set()
        assert go_on.wait(LIMIT)
        fill(segment, pieces)

    with tx, rx:
        tx.send(array(0, MIB))
        check(rx.recv(LIMIT), 0, MIB)
        monkeypatch.setattr(_segment_pool._Segment, "fill", slowly)
        sending = InThread(tx.send, array(1, MIB))
        assert filling.wait(LIMIT)
        told, telling = os.pipe()
        pid = os.fork()
        if not pid:
            open_now = [
                os.readlink(f"/proc/self/fd/{fd}")
                for fd in os.listdir("/proc/self/fd")
                if fd.isdigit() and os.path.exists(f"/proc/self/fd/{fd}")
            ]
            os.write(telling, str(sum("memfd:mp_ipcchan" in name for name in open_now)).encode())
            os._exit(0)
        os.close(telling)
        go_on.set()
        sending.result()
        assert os.read(told, 10) == b"0"
        os.close(told)
        os.waitpid(pid, 0)
        check(rx.recv(LIMIT), 1, MIB)


@pytest.mark.parametrize("count", [10, 1000, 8000, 100_000])
@pytest.mark.parametrize("kind", ["plain", "fortran", "strided", "dates", "records", "of-bytes"])
def test_read_only_arrays_arrive_writable(count: int, kind: str) -> None:
    """As through the stdlib's queues; the sender's own stays what it is."""
    sent: Any = np.arange(count)
    if kind == "fortran":
        sent = np.asfortranarray(sent.reshape(2, -1))
    elif kind == "strided":
        sent = np.arange(2 * count)[::2]
    elif kind == "dates":
        sent = sent.astype("M8[s]")
    elif kind == "records":
        sent = sent.view([("a", "i4"), ("b", "f4")])
    elif kind == "of-bytes":
        sent = np.frombuffer(sent.tobytes())
    sent.flags.writeable = False
    before = sent.tobytes()
    tx, rx = channel()
    with tx, rx:
        tx.send([sent])
        [received] = rx.recv(LIMIT)
        assert received.flags.writeable
        assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
        assert received.flags.c_contiguous == sent.flags.c_contiguous or kind == "strided"
        assert received.tobytes() == before
        received[:] = received[-1]
        assert sent.tobytes() == before
        assert not sent.flags.writeable
