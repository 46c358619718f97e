"""Ten thousand channels between two processes that may have 256 descriptors."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from mp_ipcchan import Disconnected, Empty, Fd, MessageReceived, Mux, Receiver, ReceiverSet

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


def _send_to_each(mux: Mux, count: int) -> None:
    _limit()
    with mux:
        senders = []
        for _ in range(count):
            tx, rx = mux.channel()
            senders.append(tx)
            mux.tx.send(rx)
        for number, tx in enumerate(senders):
            if number % 1000 == 0:
                assert mux.rx.recv(LIMIT) == "go on"
            tx.send(number)
            tx.close()


def _select_of(count: int) -> None:
    """All in one set, at the same time."""
    _limit()
    left, right = Mux.pair()
    with left, ReceiverSet() as receivers, started(context_of("fork"), _send_to_each, right, count):
        for _ in range(count):
            receivers.add(left.rx.recv(LIMIT))
        assert len(os.listdir("/proc/self/fd")) < FEW
        got: set[int] = set()
        closed: set[int] = set()
        while len(receivers):
            if len(closed) == len(got) and len(got) % 1000 == 0:
                with pytest.raises(Empty):
                    receivers.try_select()
                left.tx.send("go on")
            for event in receivers.select(LIMIT):
                if isinstance(event, MessageReceived):
                    assert event.message.to() == event.id
                    got.add(event.id)
                else:
                    assert event.id in got
                    closed.add(event.id)
        assert got == closed == set(range(count))


def _await_all_of(count: int) -> None:
    """A coroutine for each."""
    _limit()
    left, right = Mux.pair()

    async def receive(rx: Receiver[int], number: int) -> None:
        async with asyncio.timeout(LIMIT) if sys.version_info >= (3, 11) else nullcontext():
            assert [one async for one in rx] == [number]
        rx.close()

    async def receive_all() -> None:
        tasks = [asyncio.ensure_future(receive(left.rx.recv(LIMIT), number)) for number in range(count)]
        for _ in range(0, count, 1000):
            await asyncio.sleep(0)
            left.tx.send("go on")
        assert len(os.listdir("/proc/self/fd")) < FEW
        await asyncio.gather(*tasks)

    with left, started(context_of("fork"), _send_to_each, right, count):
        asyncio.run(receive_all())


@pytest.mark.parametrize("wait", [_select_of, _await_all_of], ids=["set", "coroutines"])
@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_waited_for_together(wait: Callable[[int], None], count: int) -> None:
    """In a set, or each in a coroutine, they take no descriptor either."""
    with started(context_of("fork"), wait, count):
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
