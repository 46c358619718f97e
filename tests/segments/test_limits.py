"""Where a process has used up something, a large message goes another way, or an error says what, and all goes on."""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mp_ipcchan import Fd, Receiver, Sender, SimpleQueue, channel
from mp_ipcchan._message import TooLargeError
from mp_ipcchan._segments import _segment

from ..conformance._support import LIMIT, pattern
from ..processes._support import context_of, running, started
from ._support import KIB, MIB, array, check, in_child, kept, leave_address_space

SIZE = 100 * KIB


def _hold_a_thousand() -> None:
    tx, rx = channel()
    held = {}
    for number in range(1000):
        tx.send(array(number, SIZE))
        held[number] = rx.recv(LIMIT)
    numbers = list(held)
    random.Random(1).shuffle(numbers)
    for number in numbers:
        check(held.pop(number), number, SIZE)
    tx.close()
    rx.close()


@pytest.mark.parametrize("user", [False, True], ids=["root", "user"])
def test_a_thousand_arrays_for_few_descriptors(user: bool) -> None:
    """A received array costs no descriptor, whoever has sent it."""
    in_child(_hold_a_thousand, {resource.RLIMIT_NOFILE: 256}, user=user)


def _use_up_descriptors(keep_one: bool) -> None:
    tx, rx = channel()
    if keep_one:
        tx.send(array(0, SIZE))
        check(rx.recv(LIMIT), 0, SIZE)
    used = []
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            used.append(os.dup(0))
    if keep_one:
        # The kept one is given away.
        tx.send(array(1, SIZE))
        assert not kept(tx)
        check(rx.recv(LIMIT), 1, SIZE)
        used.append(os.dup(0))
    for _ in range(3):
        with pytest.raises(OSError, match="ulimit -n"):
            tx.send(array(2, SIZE))
        tx.send("small")
        assert rx.recv(LIMIT) == "small"
    for fd in used[-3:]:
        os.close(fd)
    for number in range(3):
        tx.send(array(number, SIZE))
        check(rx.recv(LIMIT), number, SIZE)


@pytest.mark.parametrize("keep_one", [False, True], ids=["nothing-kept", "one-kept"])
def test_no_descriptor_left(keep_one: bool) -> None:
    """A kept segment makes way; where there is none, ``send`` says which limit it is, and loses nothing else."""
    in_child(_use_up_descriptors, {resource.RLIMIT_NOFILE: 64}, keep_one)


def _send_more_than_may_fly() -> None:
    tx, rx = channel()
    for number in range(300):
        tx.send(array(number, SIZE))
    for number in range(300):
        check(rx.recv(LIMIT), number, SIZE)
    tx.close()
    rx.close()


def test_too_many_in_flight() -> None:
    """What a user may not have in flight waits, although no event tells when it may go."""
    in_child(_send_more_than_may_fly, {resource.RLIMIT_NOFILE: 100}, user=True)


def _write_too_large_files(tx: Sender[Any], rx: Receiver[Any]) -> None:
    for number in range(3):
        with pytest.raises(OSError, match="ulimit -f"):
            tx.send(array(number, 2 * MIB))
        tx.send(array(number, 500 * KIB))
        check(rx.recv(LIMIT), number, 500 * KIB)
    # The same where messages wait for the kernel.
    for number in range(5000):
        tx.send(number)
    with pytest.raises(OSError, match="ulimit -f"):
        tx.send(array(0, 2 * MIB))
    tx.send(array(1, 500 * KIB))
    assert [rx.recv(LIMIT) for _ in range(5000)] == list(range(5000))
    check(rx.recv(LIMIT), 1, 500 * KIB)


def test_file_size_limit() -> None:
    """A message that may not be written raises in ``send``, and those that wait don't stumble over it."""
    with_ends = channel()
    in_child(_write_too_large_files, {resource.RLIMIT_FSIZE: MIB}, *with_ends)
    for end in with_ends:
        end.close()


def _end_with_more_than_a_file(tx: Sender[Any], count: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    for number in range(2000):
        tx.send(number)
    for number in range(count):
        tx.send(array(number, 300 * KIB))


def test_end_of_a_process_that_may_not_write_large_files() -> None:
    """What waits is more than a file may hold: it goes in several, nobody reads, the process ends all the same."""
    tx, rx = channel()
    with rx:
        with started(context_of("fork"), _end_with_more_than_a_file, tx, 20):
            tx.close()
        assert [rx.recv(LIMIT) for _ in range(2000)] == list(range(2000))
        for number in range(20):
            check(rx.recv(LIMIT), number, 300 * KIB)


def test_no_memory_for_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``send`` says so, and the channel goes on."""
    tx, rx = channel()

    def refuses(*_: Any) -> int:
        raise OSError(errno.ENOMEM, "as if there were none")

    with tx, rx:
        with monkeypatch.context() as context:
            context.setattr(os, "memfd_create", refuses)
            with pytest.raises(OSError, match=r"102\d{3} bytes: there is no memory"):
                tx.send(pattern(SIZE))
            tx.send("small")
            assert rx.recv(LIMIT) == "small"
        with monkeypatch.context() as context:
            # No memory for what makes a segment fit others, too.
            context.setattr(os, "posix_fallocate", refuses)
            tx.send(array(0, SIZE))
            assert not kept(tx)
            check(rx.recv(LIMIT), 0, SIZE)
        tx.send(array(1, SIZE))
        check(rx.recv(LIMIT), 1, SIZE)


def test_position_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an ended process leaves behind needs a file that was opened; without /proc that is one on disk."""

    def refuses(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "as if this process had changed its user")

    owned: list[int] = []
    with monkeypatch.context() as context:
        context.setattr(_segment, "os", _Without("open", refuses))
        fd = _segment.create_with_position([b"abc", b"def"], owned)
    assert owned == [fd]
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    assert os.pread(fd, 10, 0) == b"abcdef"
    os.close(fd)


def _take_what_fits(rx: Any, take: Callable[[Any], object], room: int, attempts: int) -> None:
    # In a new process: a forked one may give back what it has inherited, and then have more.
    leave_address_space(room)
    for number in range(attempts):
        with pytest.raises(MemoryError, match=r"was dropped.*ulimit -v"):
            take(rx)
        assert take(rx) in (number, bytes([number]))


def _recv(rx: Receiver[Any]) -> object:
    return rx.recv(LIMIT)


def _recv_many(rx: Receiver[Any]) -> object:
    return rx.recv_many(1, LIMIT)[0]


def _get(queue: Any) -> object:
    taken: object = queue.get(timeout=LIMIT)
    return taken


def _recv_bytes(rx: Any) -> object:
    return rx.recv_bytes()


BIG = 128 * MIB


@pytest.mark.parametrize("room", [BIG // 2, BIG + BIG // 2], ids=["not-mapped", "not-decoded"])
@pytest.mark.parametrize("take", [_recv, _recv_many])
def test_more_than_a_receiver_has_memory_for(take: Any, room: int) -> None:
    """The message is dropped, an error says so, and the channel goes on; its sender hears nothing of it."""
    tx, rx = channel()
    with tx, started(context_of("spawn"), _take_what_fits, rx, take, room, 2):
        for number in range(2):
            tx.send(bytes(BIG))
            tx.send(number)


@pytest.mark.parametrize("room", [BIG // 2, BIG + BIG // 2], ids=["not-mapped", "not-decoded"])
def test_more_than_a_taker_has_memory_for(room: int) -> None:
    """The same of a queue, whose counts are right then, and of the bytes in a pipe."""
    context: Any = context_of("spawn")
    queue = context.Queue()
    for number in range(2):
        queue.put(bytes(BIG))
        queue.put(number)
    with started(context, _take_what_fits, queue, _get, room, 2):
        pass
    assert queue.qsize() == 0
    queue.close()
    receiving, sending = context.Pipe(duplex=False)
    with receiving, sending, started(context, _take_what_fits, receiving, _recv_bytes, room, 2):
        for number in range(2):
            sending.send_bytes(bytes(BIG))
            sending.send_bytes(bytes([number]))


def test_the_error_of_a_dropped_message_can_be_pickled() -> None:
    """A task in another process may raise it."""
    for size in (None, 5):
        error = TooLargeError(size)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def _end_with_something_large(tx: Sender[Any], with_descriptor: bool) -> None:
    for number in range(2000):
        tx.send(number)
    for number in range(2):
        tx.send((Fd(0), bytes(BIG)) if with_descriptor else bytes(BIG))
        tx.send((Fd(0), number) if with_descriptor else number)


def _take_what_is_left(rx: Receiver[Any], with_descriptor: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    leave_address_space(BIG // 2)
    assert [rx.recv(LIMIT) for _ in range(2000)] == list(range(2000))
    for number in range(2):
        with pytest.raises(MemoryError, match=r"was dropped.*ulimit -v"):
            rx.recv(LIMIT)
        received = rx.recv(LIMIT)
        if with_descriptor:
            received[0].close()
            received = received[1]
        assert received == number
    with pytest.raises(EOFError):
        rx.recv(LIMIT)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("with_descriptor", [False, True], ids=["plain", "descriptors"])
def test_more_than_there_is_memory_for_of_what_a_process_left(with_descriptor: bool) -> None:
    """One message of a process that has ended is too large; all others arrive."""
    tx, rx = channel()
    with started(context_of("spawn"), _end_with_something_large, tx, with_descriptor):
        tx.close()
    with started(context_of("spawn"), _take_what_is_left, rx, with_descriptor):
        pass


class _Without:
    """The module ``os`` with one function replaced, for one module alone."""

    def __init__(self, name: str, function: Any) -> None:
        self._replaced = {name: function}

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(os, name)


def _load(tx: SimpleQueue[Any], count: int, nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    for number in range(count):
        tx.put((number, [np.full(nbytes, (number + part) % 251, np.uint8) for part in range(8)]))


def _train(rx: SimpleQueue[Any], count: int, nbytes: int, window: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    held: list[Any] = []
    for number in range(count):
        got, arrays = rx.get()
        assert got == number
        held.append(arrays)
        if len(held) > window:
            verify(held.pop(0), number - window, nbytes)
    for at, arrays in enumerate(held):
        verify(arrays, count - len(held) + at, nbytes)


def verify(arrays: list[Any], number: int, nbytes: int) -> None:
    assert len(arrays) == 8
    for part, one in enumerate(arrays):
        assert len(one) == nbytes
        assert (one == (number + part) % 251).all()


def check_window(count: int, nbytes: int, window: int) -> None:
    context: Any = context_of("spawn")
    queue = context.SimpleQueue()
    with running(context.Process(target=_train, args=(queue, count, nbytes, window))) as consumer:
        with running(context.Process(target=_load, args=(queue, count, nbytes))) as producer:
            for process in (producer, consumer):
                process.join(10 * LIMIT)
                assert process.exitcode == 0
    queue.close()


def test_window_of_messages_for_few_descriptors() -> None:
    """As a data loader has it: hundreds of messages of eight arrays held at a time, under ``ulimit -n 256``."""
    check_window(1000, 33 * KIB, 300)


@pytest.mark.slow
def test_window_of_a_thousand_messages() -> None:
    """20,000 messages of eight arrays of 64 KiB, a thousand held at a time, under ``ulimit -n 256``."""
    check_window(20_000, 64 * KIB, 1000)
