"""Records in shared memory: whole, in order, or not at all."""

from __future__ import annotations

import os
import random
import threading
from collections import deque
from typing import Any

import pytest

from mp_ipcchan._pools import _future, _ring

from ..conformance._support import LIMIT, InThread


def _pair() -> tuple[_ring.Writer, _ring.Reader]:
    ring = memoryview(bytearray(_ring.SIZE))
    cell = memoryview(bytearray(16)).cast("Q")
    return _ring.Writer(ring, cell, 0, 1), _ring.Reader(ring, cell, 0, 1)


def test_what_was_put_is_taken_in_order() -> None:
    writer, reader = _pair()
    assert not reader
    assert all(writer.put(number, bytes([number]) * number) for number in range(50))
    assert reader
    found: deque[bytes] = deque()
    reader.take(0, found)
    assert list(found) == [bytes([number]) * number for number in range(50)]
    assert not reader


def test_it_stops_where_a_number_is_missing() -> None:
    writer, reader = _pair()
    for number in (0, 1, 3):
        writer.put(number, b"%d" % number)
    found: deque[bytes] = deque()
    reader.take(0, found)
    assert list(found) == [b"0", b"1"]
    assert reader
    reader.take(3, found)
    assert list(found) == [b"0", b"1", b"3"]


def test_peek_leaves_it_there() -> None:
    writer, reader = _pair()
    assert reader.peek(0) is None
    for number in range(3):
        writer.put(number, b"%d" % number)
    assert (reader.peek(0), reader.peek(0), reader.peek(1)) == (b"0", b"0", None)
    reader.skip(1)
    assert (reader.peek(0), reader.peek(1)) == (None, b"1")
    # What was seen to and not skipped is dropped on the way.
    found: deque[bytes] = deque()
    reader.take(2, found)
    assert list(found) == [b"2"]
    assert not reader


def test_peek_and_skip_round_and_round() -> None:
    writer, reader = _pair()
    dice = random.Random(2)
    for number in range(3000):
        frame = dice.randbytes(dice.choice([0, 1, 7, 8, 9, 500, _ring.LARGEST]))
        assert writer.put(number, frame)
        assert reader.peek(number) == frame
        reader.skip(number + 1)
        assert not reader


def test_nothing_to_read_once_it_is_closed() -> None:
    writer, reader = _pair()
    writer.put(0, b"0")
    reader.close()
    assert not reader
    assert reader.peek(0) is None


def test_closed_between_two_steps_of_a_peek(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread: there is what was there before, or nothing."""
    writer, reader = _pair()
    found: deque[bytes] = deque()
    for number in range(20):
        assert writer.put(number, bytes(1000))
        reader.take(number, found)
    writer.put(20, b"twenty")
    monkeypatch.setattr(_ring, "fence", reader.close)
    assert reader.peek(20) is None


def test_full_and_too_large() -> None:
    writer, reader = _pair()
    assert not writer.put(0, bytes(_ring.LARGEST + 1))
    count = 0
    while writer.put(count, bytes(1000)):
        count += 1
    assert count == _ring.SIZE // 1008
    found: deque[bytes] = deque()
    reader.take(0, found)
    assert len(found) == count
    assert writer.put(count, bytes(1000))


def test_round_and_round() -> None:
    writer, reader = _pair()
    dice = random.Random(1)
    waiting: deque[bytes] = deque()
    found: deque[bytes] = deque()
    put = taken = 0
    for _ in range(5000):
        frame = dice.randbytes(dice.choice([0, 1, 7, 8, 9, 500, _ring.LARGEST]))
        if writer.put(put, frame):
            waiting.append(frame)
            put += 1
        else:
            assert waiting
        if dice.random() < 0.2:
            reader.take(taken, found)
            while found:
                assert found.popleft() == waiting.popleft()
                taken += 1
            assert not waiting
    assert taken > 1000


@pytest.mark.parametrize("lock", [_ring._fence, _future._lock], ids=["fence", "futures"])
def test_lock_that_another_thread_holds_at_a_fork(lock: Any) -> None:
    """It is free in the child, whatever that thread was doing."""
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            go.wait(LIMIT)

    thread = InThread(hold)
    assert held.wait(LIMIT)
    child = os.fork()
    if not child:
        os._exit(0 if lock.acquire(timeout=LIMIT) else 1)
    _, status = os.waitpid(child, 0)
    go.set()
    thread.result()
    assert status == 0
