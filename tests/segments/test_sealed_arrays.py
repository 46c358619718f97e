"""Large arrays that are passed on in the memory they came in, and yet are everybody's own."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mp_ipcchan import Mux, Receiver, Sender, channel
from mp_ipcchan._segments import _sealed_array, _segment, _segment_pool
from mp_ipcchan._segments._memory import PAGE
from mp_ipcchan.errors import ProtocolError

from ..conformance._support import LIMIT
from ..mux._support import crossing
from ..processes._support import context_of, kill, running, started
from ._support import KIB, MIB, Array, array, check, descriptors, in_child

#: Enough for a sealed segment, in these tests.
SIZE = MIB


@pytest.fixture(autouse=True)
def _sealed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if large arrays were smaller."""
    monkeypatch.setattr(_sealed_array, "SEALED_FROM", SIZE)


@pytest.fixture
def pair() -> Iterator[tuple[Sender[Any], Receiver[Any]]]:
    tx, rx = channel()
    with tx, rx:
        yield tx, rx


def read_only(number: int, size: int = SIZE) -> Array:
    made = array(number, size)
    made.flags.writeable = False
    return made


def segment_of(received: npt.NDArray[Any]) -> int | None:
    """Which sealed segment an array lies in: its inode. None where it lies elsewhere, or can't be passed on."""
    pages = _sealed_array._pages_of(received)
    return os.fstat(pages.descriptors.fds[0]).st_ino if pages and pages.descriptors.fds else None


def _copied() -> int:
    """How much of the sealed segments that this process has mapped is its own copy (bytes)."""
    copied, ours = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split(maxsplit=1)[0]:
                ours = "memfd:mp_ipcchan" in line and " rw-p " in line
            elif ours and line.startswith("Anonymous:"):
                copied += int(line.split()[1]) * KIB
    return copied


def _pass_on(rx: Receiver[Any], tx: Sender[Any], size: int, write: bool) -> None:
    _sealed_array.SEALED_FROM = size
    received = rx.recv(LIMIT)
    check(received, 1, size)
    tx.send((segment_of(received), _copied(), received))
    if write:
        # Whoever has it by now doesn't see that.
        received[:] = 0


def _through_three(start_method: str, size: int, write: bool) -> None:
    process: Any = context_of(start_method)
    to_first, at_first = channel()
    to_second, at_second = channel()
    to_us, at_us = channel()
    sent = read_only(1, size)
    with at_us, started(process, _second, at_second, to_us, size, write):
        to_us.close()
        with started(process, _pass_on, at_first, to_second, size, write):
            to_second.close()
            to_first.send(sent)
            to_first.close()
            segments, copied, received = at_us.recv(4 * LIMIT)
        check(received, 1, size)
    assert {*segments, segment_of(received)} == {segments[0]}
    assert segments[0] is not None
    assert copied == (0, 0)
    received[0] = 5
    assert sent[0] == 1
    assert _copied() == PAGE


def _second(rx: Receiver[Any], tx: Sender[Any], size: int, write: bool) -> None:
    _sealed_array.SEALED_FROM = size
    segment, copied, received = rx.recv(4 * LIMIT)
    check(received, 1, size)
    tx.send(((segment, segment_of(received)), (copied, _copied()), received))
    if write:
        received[:] = 0


@pytest.mark.parametrize("write", [False, True], ids=["read", "written-behind"])
def test_three_processes_one_copy(start_method: str, write: bool) -> None:
    """There is one segment all the way, and no process has a copy of its own; what one writes is its own affair."""
    _through_three(start_method, SIZE, write)


@pytest.mark.slow
def test_gibibyte_through_three_processes() -> None:
    assert _segment_pool.MOST_BYTES < 1 << 30
    _through_three("fork", 1 << 30, False)


def test_what_was_written_to_is_copied(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """The first and the last byte count; writes go along; nobody's writes reach another, whoever had it first."""
    tx, rx = pair
    tx.send(read_only(2))
    first = rx.recv(LIMIT)
    for place in (0, -1):
        tx.send(first)
        second = rx.recv(LIMIT)
        assert segment_of(second) == segment_of(first)
        second[place] = 77
        tx.send(second)
        third = rx.recv(LIMIT)
        assert segment_of(third) is None
        assert third[place] == 77
        check(first, 2, SIZE)
        # Read-only again, it gets a segment of its own.
        second.flags.writeable = False
        tx.send(second)
        fourth = rx.recv(LIMIT)
        assert segment_of(fourth) not in (None, segment_of(first))
        assert np.array_equal(fourth, second)


def test_parts_and_shapes(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """Part of an array, in another shape, type or order, still goes as the segment; strided it is copied."""
    tx, rx = pair
    tx.send(read_only(3, 2 * SIZE))
    whole = rx.recv(LIMIT)
    views: list[Any] = [
        whole[1000:].reshape(2, -1),
        whole.reshape(4, -1).T,
        whole.view("f4")[:-1],
        whole.view([("a", "u8"), ("b", "i4"), ("c", "i4")]),
        whole.view("M8[ns]"),
        memoryview(whole[5:]).obj,
    ]
    for view in views:
        tx.send(view)
        received = rx.recv(LIMIT)
        assert segment_of(received) == segment_of(whole)
        assert (received.dtype, received.shape, received.strides) == (view.dtype, view.shape, view.strides)
        assert received.tobytes() == view.tobytes()
        assert received.flags.writeable
    tx.send(whole[::2])
    received = rx.recv(LIMIT)
    assert segment_of(received) is None
    assert np.array_equal(received, whole[::2])


@pytest.mark.parametrize("dtype", ["M8[us]", "f8", [("a", "u4"), ("b", "S12")]])
def test_any_type_is_sealed(pair: tuple[Sender[Any], Receiver[Any]], dtype: Any) -> None:
    tx, rx = pair
    sent = np.asfortranarray(np.zeros((2 * SIZE // np.dtype(dtype).itemsize // 2, 2), dtype))
    sent.flags.writeable = False
    tx.send({"a": sent, "b": [1, sent[:, 0]]})
    received = rx.recv(LIMIT)
    assert segment_of(received["a"]) is not None
    assert segment_of(received["b"][1]) is not None
    assert received["a"].dtype == sent.dtype
    assert received["a"].flags.f_contiguous
    assert received["a"].tobytes() == sent.tobytes()


def test_ordinary_arrays_are_not_sealed(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """What its sender may write to, what is small, and what is less than it looks goes in memory that is used again."""
    tx, rx = pair
    objects = np.full(SIZE // 8, None)
    objects.flags.writeable = False
    for sent in (array(0, SIZE), read_only(0, SIZE - 8), np.broadcast_to(np.float64(1), SIZE), objects):
        tx.send(sent)
        received = rx.recv(LIMIT)
        assert segment_of(received) is None
        assert received.flags.writeable
        assert np.array_equal(received, sent)


def test_fork_of_a_holder(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """A child has the array, too, may pass it on, and knows what its parent had written to."""
    tx, rx = pair
    tx.send([read_only(4), read_only(5)])
    held = rx.recv(LIMIT)
    held[1][0] = 9
    back, at_us = channel()
    with at_us, started(context_of("fork"), _send_what_is_held, back, held):
        back.close()
        segments, received = at_us.recv(LIMIT)
        assert segments == [segment_of(one) for one in held]
        check(received[0], 4, SIZE)
        assert [segment_of(one) for one in received] == [segments[0], None]
        assert received[1][0] == 9


def _send_what_is_held(tx: Sender[Any], held: list[Array]) -> None:
    tx.send(([segment_of(one) for one in held], held))


def _hold_and_pass(rx: Receiver[Any], tx: Sender[Any]) -> None:
    received = rx.recv(LIMIT)
    tx.send(received, timeout=LIMIT)
    rx.recv(4 * LIMIT)


def test_killed_holder(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """What it had passed on is whole, read before its death or after it."""
    _, rx = pair
    to_it, at_it = channel()
    process: Any = context_of("fork")
    with to_it, running(process.Process(target=_hold_and_pass, args=(at_it, pair[0]))) as holder:
        to_it.send(read_only(6))
        early = rx.recv(LIMIT)
        kill(holder)
    check(early, 6, SIZE)
    assert segment_of(early) is not None


def test_memory_goes_with_the_last_holder(pair: tuple[Sender[Any], Receiver[Any]]) -> None:
    """No descriptor is left, and no mapping, of arrays that were sent, received, passed on, or never read."""
    tx, rx = pair
    before = descriptors()
    for _ in range(3):
        tx.send(read_only(7))
        received = rx.recv(LIMIT)
        tx.send(received)
        del received
        rx.recv(LIMIT)
    assert descriptors() == before
    unread_tx, unread_rx = channel()
    unread_tx.send(read_only(8))
    unread_tx.close()
    unread_rx.close()
    assert descriptors() == before
    with open("/proc/self/maps") as file:
        assert not [line for line in file if "memfd:mp_ipcchan" in line and " rw-p " in line]


def test_where_the_kernel_does_not_tell(
    pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pagemap nobody knows whether an array was written to: it is copied."""
    tx, rx = pair
    tx.send(read_only(9))
    first = rx.recv(LIMIT)
    real = os.open

    def opens(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("pagemap"):
            raise PermissionError(errno.EACCES, "as if this process had changed its user")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opens)
    tx.send(first)
    second = rx.recv(LIMIT)
    assert segment_of(second) is None
    check(second, 9, SIZE)


def test_no_mappings_left(pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has all the mappings it may have copies what it receives."""
    tx, rx = pair

    def refuses(fd: int, size: int) -> Any:
        raise OSError(errno.ENOMEM, "as if there were too many")

    tx.send(read_only(10))
    monkeypatch.setattr(_sealed_array, "map_private", refuses)
    received = rx.recv(LIMIT)
    check(received, 10, SIZE)
    received[0] = 0


def _hold_many() -> None:
    tx, rx = channel()
    held = []
    for number in range(100):
        tx.send(read_only(number))
        held.append(rx.recv(LIMIT))
    for number, received in enumerate(held):
        check(received, number, SIZE)
        tx.send(received)
        check(rx.recv(LIMIT), number, SIZE)
    assert segment_of(held[0]) is not None
    assert segment_of(held[-1]) is None
    tx.close()
    rx.close()


def test_more_than_there_are_descriptors_for() -> None:
    """They are held all the same; those that came when descriptors were few are copied when they are sent on."""
    in_child(_hold_many, {resource.RLIMIT_NOFILE: 256})


def test_no_room_for_a_segment(pair: tuple[Sender[Any], Receiver[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ordinary way serves."""
    tx, rx = pair
    real = _segment.create

    def refuses(*args: Any, final: bool = False, **kwargs: Any) -> int:
        if final:
            raise OSError(errno.ENOMEM, "as if there were none")
        return real(*args, **kwargs)

    monkeypatch.setattr(_segment, "create", refuses)
    tx.send(read_only(11))
    received = rx.recv(LIMIT)
    assert segment_of(received) is None
    check(received, 11, SIZE)
    assert received.flags.writeable


def _end_with_arrays_unsent(tx: Sender[Any]) -> None:
    for number in range(2000):
        tx.send(number)
    for number in range(3):
        tx.send(read_only(number))


def test_end_of_a_process_that_has_not_sent_them() -> None:
    """They come with what it leaves behind."""
    tx, rx = channel()
    with rx:
        with started(context_of("fork"), _end_with_arrays_unsent, tx):
            tx.close()
        assert [rx.recv(LIMIT) for _ in range(2000)] == list(range(2000))
        for number in range(3):
            received = rx.recv(LIMIT)
            check(received, number, SIZE)
            assert segment_of(received) is not None


def test_over_a_mux() -> None:
    left, right = Mux.pair()
    with left, right:
        tx, rx = crossing(left, right)
        with tx, rx:
            tx.send(read_only(12))
            first = rx.recv(LIMIT)
            tx.send(first)
            second = rx.recv(LIMIT)
            check(second, 12, SIZE)
            assert segment_of(second) == segment_of(first) is not None


def test_what_is_not_sealed_is_refused() -> None:
    """A sender that could still write to it, or an array that would lie outside: nothing is mapped."""
    owned: list[int] = []
    fd = _segment.create([bytes(SIZE)], owned)
    with pytest.raises(ProtocolError, match="still write"):
        _sealed_array.unpack(fd, np.dtype("u1"), (SIZE,), "C", 0)
    fd = _segment.create([bytes(SIZE)], owned, final=True)
    for shape, offset in (((SIZE + 1,), 0), ((SIZE,), 1), ((SIZE,), -1), ((0,), 0), ((-1,), 0)):
        with pytest.raises(ProtocolError, match=r"bytes in a segment|outside"):
            _sealed_array.unpack(fd, np.dtype("u1"), shape, "C", offset)
    with pytest.raises(OSError, match=r"permitted"):
        os.pwrite(fd, b"1", 0)
    for one in owned:
        os.close(one)
