"""Limits on descriptors: those in flight of one user, those of a process. Messages wait, or the error is clear."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any
from unittest.mock import patch

import pytest

import mp_ipcchan
from mp_ipcchan import (
    Fd,
    JoinableQueue,
    Pipe,
    Queue,
    Receiver,
    Sender,
    SerializationError,
    SimpleQueue,
    channel,
)
from mp_ipcchan._transport import unix
from tests.conformance._support import InThread, bare_fork, room_for
from tests.queues._support import is_asleep, until

#: Seconds that nothing here takes.
LIMIT = 20.0
NOBODY = 65534

fork: Any = multiprocessing.get_context("ipcchan_fork")


def _as_nobody(run: Callable[..., None], descriptors: int, *args: Any) -> None:
    """Run in a process that isn't root, as root has no limit of descriptors in flight."""
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    run(*args)


def _in_child(run: Callable[..., None], descriptors: int, *args: Any) -> None:
    process = fork.Process(target=_as_nobody, args=(run, descriptors, *args))
    process.start()
    process.join(LIMIT)
    ended = process.exitcode
    process.kill()
    process.join()
    process.close()
    assert ended == 0


def _send_more_than_may_fly(tx: Sender[Any], rx: Receiver[Any]) -> None:
    with open(os.devnull, "rb") as file:
        for number in range(300):
            with Fd(file) as fd:
                tx.send((number, fd))
            if number == 200:
                # By now the user's limit is reached, and messages wait with a duplicate each; make room.
                for expected in range(100):
                    got, received = rx.recv(LIMIT)
                    received.close()
                    assert got == expected
    for expected in range(100, 300):
        got, received = rx.recv(LIMIT)
        assert os.fstat(received.fileno()).st_rdev == os.stat(os.devnull).st_rdev
        received.close()
        assert got == expected


def test_too_many_in_flight_wait_their_turn() -> None:
    """A user's limit of descriptors in flight has no readiness event; what it holds up arrives all the same."""
    _in_child(_send_more_than_may_fly, 200, *channel())


def test_ten_thousand_resends_cost_no_descriptor() -> None:
    """However often a sender arrives, the process has one descriptor for it."""
    tx, rx = channel()
    sub_tx, sub_rx = channel()
    with tx, rx, sub_tx, sub_rx:
        tx.send(sub_tx)
        kept = [rx.recv(LIMIT)]
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10_000):
            tx.send(sub_tx)
            kept.append(rx.recv(LIMIT))
        assert len(os.listdir("/proc/self/fd")) == before
        kept[-1].send("through the last")
        assert sub_rx.recv(LIMIT) == "through the last"
        for one in kept:
            one.close()


def test_no_descriptors_left_for_a_channel() -> None:
    """Where no descriptor is left, making a channel raises OSError and leaks none."""

    def run() -> None:
        with pytest.raises(OSError, match="Too many open files"):
            kept = []
            while True:
                kept.append(mp_ipcchan.channel())

    _in_child(run, 64)


def _put_and_use_up(queue: Queue[int], count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for number in range(count):
        queue.put(number)
    # Never closed: the process ends with all of them in use.
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            os.dup(0)


def test_process_without_a_descriptor_left_hands_on_what_waits() -> None:
    """The end of a process needs none but those that it has kept for that."""
    with closing(Queue[int]()) as queue:
        process = fork.Process(target=_put_and_use_up, args=(queue, 5000))
        process.start()
        process.join(LIMIT)
        ended = process.exitcode
        process.kill()
        process.join()
        process.close()
        assert ended == 0
        assert [queue.get(timeout=LIMIT) for _ in range(5000)] == list(range(5000))


def _receive_files(count: int, get_many: Callable[[int], list[tuple[int, Fd]]]) -> None:
    got: list[int] = []
    while len(got) < count:
        batch = get_many(count)
        for number, fd in batch:
            got.append(number)
            fd.close()
    assert got == list(range(count))


def _recv_many(rx: Receiver[Any], count: int) -> None:
    _receive_files(count, lambda most: rx.recv_many(most, LIMIT))


def _get_many(queue: Queue[Any], count: int) -> None:
    _receive_files(count, lambda most: queue.get_many(most, LIMIT))


@pytest.mark.parametrize("kind", [channel, Queue])
def test_many_messages_with_files_for_few_descriptors(kind: Any) -> None:
    """``recv_many`` and ``get_many`` take what there is room for, and lose none."""
    made = kind()
    put, target, source = (
        (made.put, _get_many, made) if isinstance(made, Queue) else (made[0].send, _recv_many, made[1])
    )
    with open(os.devnull, "rb") as file:
        for number in range(100):
            put((number, Fd(file)))
    _in_child(target, 64, source, 100)
    for end in (made,) if isinstance(made, Queue) else made:
        end.close()


def _pipe() -> tuple[Any, Any]:
    receiving, sending = Pipe(False)
    return sending, receiving


def _check_that_files_wait(ends: tuple[Any, Any], receive: Callable[[Any], Any], plain_first: int) -> None:
    sending, receiving = ends
    put = sending.put if hasattr(sending, "put") else sending.send
    with closing(sending), closing(receiving), open(os.devnull, "rb") as file:
        for number in range(plain_first):
            put(number)
        with Fd(file) as one, Fd(file) as other:
            put([one, other])
        put("next")
        assert [receive(receiving) for _ in range(plain_first)] == list(range(plain_first))
        for room in (0, 1):
            with room_for(room):
                for _ in range(3):
                    with pytest.raises(OSError, match="still there") as caught:
                        receive(receiving)
                    assert caught.value.errno == errno.EMFILE
        for received in receive(receiving):
            with received:
                assert os.fstat(received.fileno()).st_rdev == os.fstat(file.fileno()).st_rdev
        assert receive(receiving) == "next"


@pytest.mark.parametrize("plain_first", [0, 5])
@pytest.mark.parametrize(
    "receive",
    [
        lambda rx: rx.recv(),
        lambda rx: rx.recv(LIMIT),
        lambda rx: rx.try_recv(),
        lambda rx: rx.recv_many(1)[0],
        lambda rx: next(iter(rx)),
    ],
    ids=["recv", "timed", "try_recv", "recv_many", "for"],
)
def test_message_with_files_waits_for_room(receive: Callable[[Any], Any], plain_first: int) -> None:
    """Where a process has no descriptors for what a message brings, it is told so; the message is still there."""
    _check_that_files_wait(channel(), receive, plain_first)


@pytest.mark.parametrize("plain_first", [0, 5])
@pytest.mark.parametrize("kind", [Queue, JoinableQueue, SimpleQueue, lambda: Queue(9), _pipe])
def test_message_with_files_waits_for_room_in_queues_and_pipes(kind: Any, plain_first: int) -> None:
    made = kind()
    if isinstance(made, tuple):
        _check_that_files_wait(made, lambda connection: connection.recv(), plain_first)
    else:
        _check_that_files_wait((made, made), lambda queue: queue.get(), plain_first)


def test_message_with_files_waits_for_room_in_a_coroutine() -> None:
    async def receive_all() -> None:
        tx, rx = channel()
        with tx, rx, open(os.devnull, "rb") as file, Fd(file) as fd:
            tx.send(fd)
            with room_for(0), pytest.raises(OSError, match="still there"):
                await rx.recv_async()
            (await rx.recv_async()).close()

    asyncio.run(receive_all())


def _receive_twice(rx: Receiver[Any], told: Sender[Any]) -> None:
    with closing(rx), closing(told):
        with room_for(0):
            try:
                rx.recv()
            except OSError as error:
                told.send(error.errno)
        rx.recv().close()
        told.send("received")


def test_message_with_files_that_comes_to_a_sleeper() -> None:
    """Where there were too few descriptors as it fell asleep, a message is looked at before it is received."""
    tx, rx = channel()
    told_tx, told_rx = channel()
    with tx, told_rx:
        process = fork.Process(target=_receive_twice, args=(rx, told_tx))
        process.start()
        told_tx.close()
        until(lambda: is_asleep(process))
        with open(os.devnull, "rb") as file, Fd(file) as fd:
            tx.send(fd)
            assert told_rx.recv(LIMIT) == errno.EMFILE
            assert told_rx.recv(LIMIT) == "received"
        process.join(LIMIT)
        assert process.exitcode == 0
        process.close()


def _send_files(tx: Sender[Any], count: int) -> None:
    with open(os.devnull, "rb") as file:
        for number in range(count):
            tx.send((number, Fd(file)))


def _move_with_too_few(rx: Receiver[Any], count: int) -> None:
    for expected in range(count):
        number, fd = rx.recv(LIMIT)
        assert number == expected
        fd.close()
        if number == count // 2:
            # By now the rest, which came as one packet, waits in this process.
            carrier_tx, carrier_rx = channel()
            with carrier_tx, carrier_rx, pytest.raises(SerializationError, match="still there"):
                carrier_tx.send(rx)


def test_receiver_that_could_not_move_has_its_messages() -> None:
    """Moving takes what waits in the process along; where there are too few descriptors for that, it stays."""
    tx, rx = channel()
    sender = fork.Process(target=_send_files, args=(tx, 600))
    sender.start()
    tx.close()
    sender.join(LIMIT)
    sender.close()
    _in_child(_move_with_too_few, 64, rx, 600)
    rx.close()


def test_no_fork_while_there_are_copies_of_descriptors() -> None:
    """A child would keep those that a thread makes to see whether there is room: a fork waits until they are gone."""
    tx, rx = channel()
    dup = os.dup
    copied, forking = threading.Event(), threading.Event()
    forked: list[bool] = []

    def copy(fd: int) -> int:
        copied.set()
        assert forking.wait(LIMIT)
        # Time enough for a fork that doesn't wait.
        time.sleep(0.05)
        forked.append(child is not None)
        return dup(fd)

    child = None
    with tx, rx:
        tx.send("message")
        with patch.object(unix.os, "dup", copy):
            receiving = InThread(rx.recv)
            assert copied.wait(LIMIT)
            forking.set()
            with bare_fork(lambda: None) as child:
                assert child.join() == 0
            assert receiving.result() == "message"
    assert forked == [False]
