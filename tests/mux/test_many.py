"""Ten thousand channels between two processes that may have 256 descriptors."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest

from mp_ipcchan import Disconnected, Fd, Mux

from ..conformance._support import LIMIT
from ..processes._support import context_of, started

#: ``ulimit -n`` of both processes.
DESCRIPTORS = 256
#: None of them should need more than this.
FEW = 40


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


def _answer(mux: Mux, count: int) -> None:
    """Hold all channels at the same time; then answer on each, and see its end."""
    _limit()
    with mux:
        held = [mux.rx.recv(LIMIT) for _ in range(count)]
        assert len(os.listdir("/proc/self/fd")) < FEW
        for number, (requests, answers) in reversed(list(enumerate(held))):
            assert [requests.recv(LIMIT) for _ in range(3)] == [(number, 0), (number, 1), (number, 2)]
            answers.send(number)
            answers.close()
            with pytest.raises(Disconnected):
                requests.recv(LIMIT)
            requests.close()


def _ask(count: int) -> None:
    """Two channels each: one that goes there, one that comes back."""
    _limit()
    left, right = Mux.pair()
    with left, started(context_of("fork"), _answer, right, count):
        held: list[Any] = []
        for number in range(count):
            tx, rx = left.channel()
            answer_tx, answer_rx = left.channel()
            tx.send((number, 0))
            left.tx.send((rx, answer_tx))
            answer_tx.close()
            held.append((tx, answer_rx))
        for part in (1, 2):
            for number, (tx, _) in enumerate(held):
                tx.send((number, part))
        for tx, _ in held:
            tx.close()
        assert len(os.listdir("/proc/self/fd")) < FEW
        for number, (_, rx) in enumerate(held):
            assert rx.recv(LIMIT) == number
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
            rx.close()


@pytest.mark.parametrize("count", [5_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_ten_thousand_channels_and_few_descriptors(count: int) -> None:
    with started(context_of("fork"), _ask, count):
        pass


def _read_last_first(mux: Mux, count: int) -> None:
    """Messages with files wait on all channels but the last: there is no room for all of them."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with mux:
        held = [mux.rx.recv(LIMIT) for _ in range(count)]
        mux.tx.send("here")
        with pytest.raises(OSError, match="wait unread"):
            held[-1].recv(LIMIT)
        for number, rx in enumerate(held):
            got, fd = rx.recv(LIMIT)
            assert got == number
            assert os.fstat(fd.fileno()).st_rdev == os.stat(os.devnull).st_rdev
            fd.close()
        for rx in held:
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
            rx.close()


def test_no_descriptors_left_for_what_waits_unread() -> None:
    """Who receives is told so; nothing is lost, and it goes on once the others are read."""
    left, right = Mux.pair()
    with left, started(context_of("fork"), _read_last_first, right, 100):
        lanes = [left.channel() for _ in range(100)]
        for _, rx in lanes:
            left.tx.send(rx)
        # Of what waits for its receiver to leave, another channel's could come first.
        assert left.rx.recv(LIMIT) == "here"
        with open(os.devnull, "rb") as file, Fd(file) as fd:
            for number, (tx, _) in enumerate(lanes):
                tx.send((number, fd))
                tx.close()
