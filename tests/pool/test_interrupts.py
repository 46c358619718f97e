"""Ctrl-C at any instant of a call: it is that call's end, and nobody else's."""

from __future__ import annotations

import _imp
import gc
import importlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from types import FrameType
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor
from mp_ipcchan._pools import _call, _engine, _feed
from mp_ipcchan._pools._commons import Commons

from ..conformance._support import InThread
from . import _tasks as tasks
from ._support import FORK, LIMIT, eventually

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


def _new_pool(context: Any) -> None:
    with context.Pool(1) as pool:
        assert pool.apply_async(tasks.square, (3,)).get(LIMIT) == 9


def _new_executor(context: Any) -> None:
    with ProcessPoolExecutor(1, context) as executor:
        assert executor.submit(tasks.square, 3).result(LIMIT) == 9


POOL_CALLS = [_map, _map_chunks, _imap, _imap_unordered, _apply_async]
EXECUTOR_CALLS = [_submit, _one_at_a_time, _executor_map]


class _Interrupts:
    """A handler that raises in ``calls`` alone. Counts how often it did."""

    def __init__(self, calls: list[Callable[..., None]]) -> None:
        self._codes = {call.__code__ for call in calls}
        self.count = 0

    def __call__(self, _: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code in self._codes:
                self.count += 1
                raise KeyboardInterrupt
            frame = frame.f_back


def _storm(target: Any, calls: list[Callable[..., None]], longest: float = 0.004) -> None:
    """Interrupt many calls, once each, at a random instant, ``longest`` seconds after they begin at most."""
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
                signal.setitimer(signal.ITIMER_REAL, dice.choice([0.0003, 0.001, longest]) * dice.random() + 1e-6)
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


@pytest.mark.parametrize("call", ["submit", "apply_async"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_handler_s_error_is_the_caller_s(monkeypatch: pytest.MonkeyPatch, call: str, step: int) -> None:
    """An ordinary exception while the call is pickled, by name or by value, is no reason to pickle it another way."""
    steps = iter(range(1, 4))
    encode = _call._encode

    def strike(*_: object) -> None:
        raise TimeoutError("the alarm")

    def struck(*args: Any) -> Any:
        if next(steps) == step:
            signal.raise_signal(signal.SIGALRM)
        return encode(*args)

    lock = threading.Lock()
    before = signal.signal(signal.SIGALRM, strike)
    try:
        with _executor("fork") as executor, _pool("fork") as pool:
            with monkeypatch.context() as patch, pytest.raises(TimeoutError, match="the alarm"):
                patch.setattr(_call, "_encode", struck)
                # It can't go at all, so all is tried.
                if call == "submit":
                    executor.submit(tasks.square, lock)
                else:
                    pool.apply_async(tasks.square, (lock,))
    finally:
        signal.signal(signal.SIGALRM, before)


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


@pytest.mark.parametrize("call", [_new_pool, _new_executor], ids=["pool", "executor"])
def test_new_ones(start_method: str, call: Callable[..., None]) -> None:
    """Interrupted as they begin and end, they leave nothing open, and no worker."""
    _storm(multiprocessing.get_context(f"ipcchan_{start_method}"), [call], 0.03 if start_method == "fork" else 0.15)


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


class Interrupted(TimeoutError):
    """What the handlers of these tests raise."""


def _interrupt(*_: object) -> None:
    raise Interrupted


@contextmanager
def _handling(*numbers: int) -> Iterator[None]:
    """Handlers that raise."""
    before = [(number, signal.signal(number, _interrupt)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _come(number: int) -> None:
    # As where another thread has taken it: nothing is blocked.
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    signal.raise_signal(number)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_handlers_are_put_off_while_a_worker_starts(
    start_method: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread the kernel tells: the stdlib's hooks at a fork hold locks that a handler would leave held."""
    steps: list[str] = []

    def interrupted(*args: Any) -> Any:
        if not steps:
            steps.append("interrupted")
            _come(number)
        begun(*args)
        steps.append("started")

    context: Any = multiprocessing.get_context(f"ipcchan_{start_method}")
    begun = context.Process.start
    monkeypatch.setattr(context.Process, "start", interrupted)
    with ProcessPoolExecutor(1, mp_context=context) as executor, _handling(number):
        with pytest.raises(Interrupted):
            executor.submit(tasks.square, 2)
        assert steps[:2] == ["interrupted", "started"]
        assert executor.submit(tasks.square, 3).result(LIMIT) == 9


def _then_come(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        result = call(*args)
        _come(signal.SIGALRM)
        return result

    return called


@pytest.mark.parametrize("make", [_executor, _pool], ids=["executor", "pool"])
@pytest.mark.parametrize("place", [(os, "pidfd_open"), (_engine, "Commons"), (threading.Thread, "start")])
def test_what_is_opened_when_a_handler_raises_is_closed(
    start_method: str, make: Callable[[str], Any], place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right behind what opens it, before its owner has it. The pool begins all the same, or is given up whole."""
    with _handling(signal.SIGALRM), monkeypatch.context() as patch:
        patch.setattr(*place, _then_come(getattr(*place)))
        with pytest.raises(Interrupted), make(start_method):
            pass
        patch.undo()
        gc.collect()
        with make(start_method):
            pass


@pytest.mark.parametrize("chunksize", [1, 10, None])
@pytest.mark.parametrize("kind", ["imap", "imap_unordered"])
def test_next_that_is_interrupted_takes_nothing(kind: str, chunksize: int | None) -> None:
    """Whoever catches that and goes on gets every result, once; from a list, too, which is read in ``next``."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    count, size, end = 0, 1000, time.monotonic() + LONGEST

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal count
        assert frame is not None
        if package in frame.f_code.co_filename:
            count += 1
            raise Interrupted

    package = os.path.dirname(_engine.__file__)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with FORK.Pool(2) as pool:
            while count < ENOUGH and time.monotonic() < end:
                results = getattr(pool, kind)(tasks.square, range(size), chunksize)
                found: list[int] = []
                going = True
                while going:
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 * dice.random() + 1e-6)
                    with suppress(Interrupted):
                        taken = len(found)
                        # In one call: the list has it before a handler may raise.
                        found.extend(islice(results, 1))
                        going = len(found) > taken
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert sorted(found) == [x * x for x in range(size)]
                assert kind == "imap_unordered" or found == sorted(found)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count > 20


def test_interrupted_while_input_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ``next``, which has a result by then: it is still there, and the input goes on."""
    advance = _feed.Feed.advance
    steps: list[str] = []

    def interrupted(self: _feed.Feed) -> None:
        if threading.current_thread() is threading.main_thread():
            steps.append("advance")
            if len(steps) == 2:
                # The first one was ``imap``'s.
                _come(signal.SIGALRM)
        advance(self)

    with FORK.Pool(1) as pool, _handling(signal.SIGALRM):
        monkeypatch.setattr(_feed.Feed, "advance", interrupted)
        results = pool.imap(tasks.square, range(1000))
        found: list[int] = []
        with pytest.raises(Interrupted):
            found.extend(results.next(LIMIT) for _ in range(1000))
        found.extend(results)
        assert found == [x * x for x in range(1000)]


def test_interrupted_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.10 kept the import lock, for which every other thread that forks waits."""
    load = importlib.import_module

    def interrupted(*args: Any) -> Any:
        _imp.acquire_lock()
        _come(signal.SIGALRM)
        _imp.release_lock()
        return load(*args)

    with _handling(signal.SIGALRM), monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", interrupted)
        with pytest.raises(Interrupted):
            FORK.Pool(1)
    assert not _imp.lock_held()


def test_interrupted_termination(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever presses Ctrl-C then need not wait for the workers' end, which is certain."""
    kill = _engine.Engine.kill

    def interrupted(*args: Any) -> None:
        _come(signal.SIGALRM)
        kill(*args)

    pool = FORK.Pool(1)
    result = pool.apply_async(tasks.sleep, (60.0,))
    with _handling(signal.SIGALRM), monkeypatch.context() as patch:
        patch.setattr(_engine.Engine, "kill", interrupted)
        with pytest.raises(Interrupted):
            pool.terminate()
    with pytest.raises(BrokenProcessPool):
        result.get(LIMIT)
    assert eventually(lambda: not pool.stats())


def _handler_of(number: int) -> str:
    return getattr(signal.getsignal(number), "__name__", "")


def test_forked_workers_have_the_handlers_of_their_parent() -> None:
    """Not what stood in for them as they were started."""
    with _handling(signal.SIGUSR1), ProcessPoolExecutor(1, FORK) as executor:
        assert executor.submit(_handler_of, signal.SIGUSR1).result(LIMIT) == "_interrupt"
