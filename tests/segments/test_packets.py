"""What is large, and still fits a packet: arrays of some tens of KiB."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mp_ipcchan import Full, Receiver, Sender, _codec, _outlet, channel
from mp_ipcchan._message import INLINE_SIZE, LARGE_BUFFER, PACKET_SIZE, PLAIN_SIZE
from mp_ipcchan._outlet import Outlet
from mp_ipcchan._transport import _spill, unix

from ..conformance._support import LIMIT, InThread
from ..processes._support import context_of, started
from ._support import KIB, array, check

SIZE = 64 * KIB
#: What an unprivileged process may ask for as a send buffer, unless somebody has raised net.core.wmem_max.
USUAL_LIMIT = 212992


@pytest.fixture
def pair() -> Iterator[tuple[Sender[Any], Receiver[Any]]]:
    tx, rx = channel()
    with tx, rx:
        yield tx, rx


def _fill(tx: Sender[Any]) -> int:
    """Send arrays until the kernel takes no more; how many."""
    for number in range(10_000):
        try:
            tx.try_send(array(number, SIZE))
        except Full:
            return number
    raise AssertionError("the kernel takes everything")


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: (7, one), lambda one: {"a": one}, lambda one: [[one]]])
@pytest.mark.parametrize("size", [40 * KIB, SIZE, 66 * KIB, 67 * KIB, 70 * KIB])
def test_one_array(pair: tuple[Sender[Any], Receiver[Any]], wrap: Any, size: int) -> None:
    """An array in a packet is the receiver's own, and the sender's is as it was."""
    tx, rx = pair
    sent = array(1, size)
    for number in range(3):
        tx.send(wrap(sent))
        sent[0] = 5
        received = rx.recv(LIMIT)
        while isinstance(received, (tuple, list, dict)):
            received = next(iter(received.values())) if isinstance(received, dict) else received[-1]
        assert received.flags.writeable
        received[1:] = 0
        assert received[0] == 1, number
        sent[0] = 1
        check(sent, 1, size)


def test_which_arrays_are_part_of_their_packet() -> None:
    """One that is all, or next to it, is copied into the packet; several that don't fit stay out, for a segment."""
    large = array(0, SIZE)
    for one in (large, (1, large), [large], {"a": large}, (large, array(0, KIB))):
        frame = _codec.encode(one)
        assert isinstance(frame, bytes)
        assert len(frame) <= INLINE_SIZE + PLAIN_SIZE
    for several in ((large, array(1, SIZE)), {"a": large, "b": array(0, 40 * KIB)}):
        message = _codec.encode(several)
        assert not isinstance(message, bytes)
        assert len(message.buffers) == 2


def _be_patient(tx: Sender[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it be no matter of time whether a wait is in vain."""
    for name in ("_SHORT_PATIENCE", "_LONG_PATIENCE"):
        monkeypatch.setattr(_outlet, name, LIMIT)
    tx._open_link().outlet._patience = LIMIT


def test_large_message_waits_for_a_reader_at_work(
    pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full socket it waits in the kernel, not in the backlog."""
    tx, rx = pair
    _be_patient(tx, monkeypatch)
    filled = _fill(tx)
    reading = InThread(lambda: [rx.recv(LIMIT) for _ in range(filled + 200)])
    for number in range(filled, filled + 200):
        tx.send(array(number, SIZE))
        assert not tx._open_link().outlet.backlog
    for number, received in enumerate(reading.result()):
        check(received, number, SIZE)


def test_nobody_is_waited_for_in_vain_again_and_again(
    pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody reads, ever fewer messages wait for room; once somebody makes some, they do again."""
    waits: list[int] = []
    made_room: list[object] = []

    def wait(outlet: Outlet, deadline: float | None) -> bool:
        waits.append(sent)
        return False

    def make_room(outlet: Outlet, deadline: float | None) -> bool:
        made_room.append(rx.recv(LIMIT))
        return True

    monkeypatch.setattr(Outlet, "_await_room", wait)
    # Nobody sends what waits but the sender itself.
    monkeypatch.setattr(Outlet, "_serve", lambda outlet: True)
    tx, rx = pair
    _be_patient(tx, monkeypatch)
    sent = 0
    for sent in range(500):
        tx.send(array(sent, SIZE))
    first = waits[0]
    gaps = [later - earlier for earlier, later in pairwise(waits)]
    assert gaps == [min(1 + 2**number, 65) for number in range(len(gaps))]
    assert len(gaps) > 8, (first, waits)
    outlet = tx._open_link().outlet
    for number in range(500):
        check(rx.recv(LIMIT), number, SIZE)
        outlet.drain()
    monkeypatch.setattr(Outlet, "_await_room", make_room)
    filled = _fill(tx)
    for sent in range(filled, filled + 66):
        tx.send(array(sent, SIZE))
    assert made_room
    for _ in range(filled + 66 - len(made_room)):
        rx.recv(LIMIT)
        outlet.drain()
    # It is as at the beginning.
    monkeypatch.setattr(Outlet, "_await_room", wait)
    waits.clear()
    filled = _fill(tx)
    for sent in range(3):
        tx.send(array(sent, SIZE))
    assert waits == [0, 2]
    for _ in range(filled + 3):
        rx.recv(LIMIT)
        outlet.drain()


def _send_and_end(tx: Sender[Any], count: int) -> None:
    for number in range(count):
        tx.send(array(number, SIZE))


def test_end_of_a_process_that_filled_the_large_buffer() -> None:
    """Nobody reads, and its end doesn't wait for that; the same of another process that ends behind it."""
    tx, rx = channel()
    with rx:
        for _ in range(2):
            with started(context_of("fork"), _send_and_end, tx, 20):
                pass
        tx.close()
        for number in [*range(20), *range(20)]:
            check(rx.recv(LIMIT), number, SIZE)


def _held(sock: socket.socket) -> int:
    """How much of its buffer is in use (bytes)."""
    (held,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    return int(held)


def test_room_to_raise_the_large_buffer() -> None:
    """However full it is, the first step of raising it makes room, and leaves some for the second."""
    one, other = unix.make_pair(LARGE_BUFFER)
    with closing(one), closing(other):
        for size in (PACKET_SIZE, SIZE, 40 * KIB, 100):
            while True:
                try:
                    one.send(bytes(size), unix.SEND_FLAGS)
                except BlockingIOError:
                    break
            assert _held(one) < 2 * _spill._RAISED[0]
            while _held(one):
                other.recv(PACKET_SIZE)
    assert LARGE_BUFFER < _spill._RAISED[0] < USUAL_LIMIT


def test_kernel_tells_of_room_before_the_last_packet_is_read() -> None:
    """That is what the size of the large buffer is for: the reader never runs dry."""
    one, other = unix.make_pair(LARGE_BUFFER)
    with closing(one), closing(other):
        waiting = 0
        while True:
            try:
                one.send(bytes(PACKET_SIZE), unix.SEND_FLAGS)
                waiting += 1
            except BlockingIOError:
                break
        while not _writable(one):
            other.recv(PACKET_SIZE)
            waiting -= 1
        assert waiting >= 1


def _writable(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock.fileno(), select.POLLOUT)
    return bool(poller.poll(0))


def test_array_of_another_package_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numpy there is nothing that would be looked for."""
    large = np.zeros(SIZE // 8)
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert _codec._arrays_in((large,)) == 0
