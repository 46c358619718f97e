"""Futures: beside the stdlib's, and interrupted at any instant."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from concurrent.futures import Future as StdlibFuture
from types import FrameType
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor, channel
from mp_ipcchan._pools._future import Future

from ..conformance._support import LIMIT, InThread
from . import _tasks as tasks
from ._support import FORK


@pytest.fixture
def _hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hasty")
def test_ours_and_the_stdlib_s_in_two_waits() -> None:
    """``wait`` holds them in the order of their ids: two of ours can't be one and the same to it."""
    futures: list[Any] = []
    while True:
        futures += [Future(), StdlibFuture()]
        futures.sort(key=id)
        kinds = [isinstance(future, Future) for future in futures]
        middle = next((at for at, ours in enumerate(kinds) if not ours and any(kinds[:at]) and any(kinds[at:])), None)
        if middle is not None:
            break
    first, last = futures[kinds.index(True)], futures[len(kinds) - 1 - kinds[::-1].index(True)]

    def wait_often(*both: Any) -> None:
        for _ in range(2000):
            assert not wait(both, timeout=0).done

    threads = [InThread(wait_often, first, futures[middle]), InThread(wait_often, futures[middle], last)]
    for thread in threads:
        thread.result()


def _cancel(future: Future[Any]) -> None:
    """Its frame is the one to interrupt."""
    future.cancel()


def test_cancel_that_is_interrupted() -> None:
    """Whoever waits hears of it all the same, and the task is stopped: the pool's thread does the rest."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    struck = 0

    def strike(_: int, frame: FrameType | None) -> None:
        nonlocal struck
        while frame is not None:
            if frame.f_code is _cancel.__code__:
                struck += 1
                raise KeyboardInterrupt
            frame = frame.f_back

    before = signal.signal(signal.SIGALRM, strike)
    go_tx, go_rx = channel()
    try:
        with ProcessPoolExecutor(1, FORK) as executor, go_tx:
            first = executor.submit(tasks.receive_from, go_rx)
            until = time.monotonic() + LIMIT
            while struck < 30 and time.monotonic() < until:
                future = executor.submit(tasks.square, 2)
                sleepers = [InThread(future.exception) for _ in range(5)]
                waiters = [InThread(wait, [future]) for _ in range(3)]
                signal.setitimer(signal.ITIMER_REAL, dice.random() * 0.0001 + 1e-6)
                interrupted = False
                try:
                    _cancel(future)
                except KeyboardInterrupt:
                    interrupted = True
                signal.setitimer(signal.ITIMER_REAL, 0)
                if not future.cancelled():
                    assert interrupted
                    assert future.cancel()
                for waiter in waiters:
                    assert waiter.result().done == {future}
                for sleeper in sleepers:
                    with pytest.raises(CancelledError):
                        sleeper.result()
            go_tx.send("done")
            assert first.result(LIMIT) == "done"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert struck >= 10


def test_cancelled_once() -> None:
    """However often, and by however many threads, it is called."""
    for _ in range(200):
        future: Future[int] = Future()
        called: list[object] = []
        future.add_done_callback(called.append)
        start = threading.Barrier(3)

        def cancel(one: Future[int] = future, start: threading.Barrier = start) -> bool:
            start.wait(LIMIT)
            return one.cancel()

        threads = [InThread(cancel) for _ in range(3)]
        assert all(thread.result() for thread in threads)
        assert called == [future]
