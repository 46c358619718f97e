"""Limits on descriptors: those in flight of one user, those of a process. Messages wait, or the error is clear."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

import mp_ipcchan
from mp_ipcchan import Fd, Queue, Receiver, Sender, SerializationError, channel

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
