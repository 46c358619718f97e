"""Ctrl-C at any instant of a call: it is that call's end, and nobody else's."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor
from mp_ipcchan._pools import _engine
from mp_ipcchan._pools._commons import Commons
from mp_ipcchan._pools._crew import Crew

from ..conformance._support import InThread
from . import _tasks as tasks
from ._support import LIMIT

_STARTING = {Crew._start_worker.__code__, threading.Thread.start.__code__}
#: How many interrupts a test waits for, and for how long (seconds) at most.
ENOUGH, LONGEST = 60, 20.0


def _map(pool: Any) -> None:
    assert pool.map(tasks.square, range(100), 1) == [x * x for x in range(100)]


def _map_chunks(pool: Any) -> None:
    assert pool.map(tasks.square, (x for x in range(100))) == [x * x for x in range(100)]


def _imap(pool: Any) -> None:
    assert list(pool.imap(tasks.square, range(100))) == [x * x for x in range(100)]


def _imap_unordered(pool: Any) -> None:
    assert sorted(pool.imap_unordered(tasks.square, (x for x in range(100)), 7)) == [x * x for x in range(100)]


def _apply_async(pool: Any) -> None:
    results = [pool.apply_async(tasks.square, (x,)) for x in range(100)]
    assert [result.get(LIMIT) for result in results] == [x * x for x in range(100)]


def _submit(executor: Any) -> None:
    futures = [executor.submit(tasks.square, x) for x in range(100)]
    assert [future.result(LIMIT) for future in futures] == [x * x for x in range(100)]


def _one_at_a_time(executor: Any) -> None:
    for x in range(50):
        assert executor.submit(tasks.square, x).result(LIMIT) == x * x


def _executor_map(executor: Any) -> None:
    assert list(executor.map(tasks.square, range(100), chunksize=3)) == [x * x for x in range(100)]


POOL_CALLS = [_map, _map_chunks, _imap, _imap_unordered, _apply_async]
EXECUTOR_CALLS = [_submit, _one_at_a_time, _executor_map]


class _Interrupts:
    """A handler that raises in ``calls`` alone. Counts how often it did."""

    def __init__(self, calls: list[Callable[..., None]]) -> None:
        self._codes = {call.__code__ for call in calls}
        self.count = 0

    def __call__(self, _: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code in _STARTING:
                # What the stdlib leaves behind there (logging's lock, by a hook of fork; a child or thread that waits)
                # isn't ours, and a descriptor may stay open.
                return
            if frame.f_code in self._codes:
                self.count += 1
                raise KeyboardInterrupt
            frame = frame.f_back


def _storm(target: Any, calls: list[Callable[..., None]]) -> None:
    """Interrupt many calls, once each, at a random instant."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    interrupts = _Interrupts(calls)
    end = time.monotonic() + LONGEST
    before = signal.signal(signal.SIGALRM, interrupts)
    with pytest.MonkeyPatch.context() as patch:
        # What is raised in a finaliser, the interpreter tells and drops.
        patch.setattr(sys, "unraisablehook", id)
        try:
            while interrupts.count < ENOUGH and time.monotonic() < end:
                signal.setitimer(signal.ITIMER_REAL, dice.choice([0.0003, 0.001, 0.004]) * dice.random() + 1e-6)
                try:
                    dice.choice(calls)(target)
                except KeyboardInterrupt:
                    pass
                except RuntimeError as error:
                    # What the stdlib's conditions make of it.
                    if not isinstance(error.__context__, KeyboardInterrupt):
                        raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert interrupts.count > 20


@contextmanager
def _executor(start_method: str) -> Iterator[ProcessPoolExecutor]:
    executor = ProcessPoolExecutor(2, multiprocessing.get_context(f"ipcchan_{start_method}"))
    # Open, as a pool is.
    assert executor.submit(tasks.square, 2).result(LIMIT) == 4
    yield executor
    InThread(executor.shutdown).result()


@contextmanager
def _pool(start_method: str) -> Iterator[Any]:
    pool = multiprocessing.get_context(f"ipcchan_{start_method}").Pool(2)
    yield pool
    assert InThread(pool.map, tasks.square, range(300), 1).result() == [x * x for x in range(300)]
    pool.close()
    InThread(pool.join).result()


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_pool(start_method: str) -> None:
    with _pool(start_method) as pool:
        _storm(pool, POOL_CALLS)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_executor(start_method: str) -> None:
    with _executor(start_method) as executor:
        _storm(executor, EXECUTOR_CALLS)
        _submit(executor)


@pytest.mark.parametrize("call", POOL_CALLS, ids=lambda call: call.__name__)
def test_each_call_of_a_pool(call: Callable[..., None]) -> None:
    with _pool("fork") as pool:
        _storm(pool, [call])


@pytest.mark.parametrize("call", EXECUTOR_CALLS, ids=lambda call: call.__name__)
def test_each_call_of_an_executor(call: Callable[..., None]) -> None:
    with _executor("fork") as executor:
        _storm(executor, [call])


class _Interrupting:
    """An epoll that is interrupted right behind its first registration."""

    def __init__(self, epoll: Any) -> None:
        self._epoll = epoll
        self._interrupts = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def register(self, *args: Any) -> None:
        self._epoll.register(*args)
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt


def test_interrupted_behind_a_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread registers once more what it doesn't know to be registered."""

    def commons(size: int) -> Commons:
        made = Commons(size)
        monkeypatch.setattr(made, "epoll", _Interrupting(made.epoll))
        return made

    monkeypatch.setattr(_engine, "Commons", commons)
    with ProcessPoolExecutor(2) as executor:
        with pytest.raises(KeyboardInterrupt):
            executor.submit(tasks.square, 2)
        assert executor.submit(tasks.square, 3).result(LIMIT) == 9


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_ctrl_c_is_put_off_while_a_worker_starts(start_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread the kernel tells: the stdlib's hooks at a fork hold locks that a handler would leave held."""
    steps: list[str] = []

    def interrupted(*args: Any) -> Any:
        if not steps:
            steps.append("interrupted")
            # As where another thread has taken it: nothing is blocked.
            before = signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
            signal.raise_signal(signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        begun(*args)
        steps.append("started")

    context: Any = multiprocessing.get_context(f"ipcchan_{start_method}")
    begun = context.Process.start
    monkeypatch.setattr(context.Process, "start", interrupted)
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        with pytest.raises(KeyboardInterrupt):
            executor.submit(tasks.square, 2)
        assert steps[:2] == ["interrupted", "started"]
        assert executor.submit(tasks.square, 3).result(LIMIT) == 9
