"""Limits on descriptors: those in flight of one user, those of a process. Messages wait, or the error is clear."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from typing import Any

import pytest

import mp_ipcchan
from mp_ipcchan import Fd, Receiver, Sender, channel

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
