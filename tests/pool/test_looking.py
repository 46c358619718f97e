"""Who waits for a short task takes its outcome, where that comes at once; all else is the thread's."""

from __future__ import annotations

import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any, ClassVar

import pytest

from mp_ipcchan import ProcessPoolExecutor, SerializationError, WorkerLostError, channel
from mp_ipcchan._pools import _looking
from mp_ipcchan._pools._looking import Looking

from ..conformance._support import InThread
from . import _tasks as tasks
from ._support import FORK, LIMIT, eventually


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was taken so. Everybody looks, however long it takes."""
    found: list[object] = []
    take = Looking._take_outcome

    def spy(self: Any, key: Any, worker: Any, task: Any, future: Any) -> None:
        take(self, key, worker, task, future)
        if future.done() and key is not None and not self._schedule.lanes[key].given:
            found.append(future._result)

    monkeypatch.setattr(_looking, "_LOOK", LIMIT)
    monkeypatch.setattr(_looking, "_SHORT", math.inf)
    monkeypatch.setattr(Looking, "_judge", lambda *_: None)
    monkeypatch.setattr(Looking, "_take_outcome", spy)
    return found


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def executor(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context(f"ipcchan_{request.param}")
    with ProcessPoolExecutor(2, context) as executor:
        assert list(executor.map(tasks.square, range(50), chunksize=1)) == [x * x for x in range(50)]
        yield executor


def test_who_waits_takes_it(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    """Not each: a worker may be faster than its parent comes to look."""
    until = time.monotonic() + LIMIT
    while len(taken) < 20 and time.monotonic() < until:
        assert executor.submit(tasks.square, 3).result(LIMIT) == 9
    assert set(taken) == {9}
    assert sum(stats.tasks_done for stats in executor.stats()) >= 70


def test_what_failed_is_the_thread_s(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    for x in range(30):
        with pytest.raises(ValueError, match=f"number {x}"):
            executor.submit(tasks.fail, f"number {x}").result(LIMIT)
    assert not taken


def test_worker_that_dies_while_somebody_looks(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    for x in range(5):
        with pytest.raises(WorkerLostError):
            executor.submit(tasks.die).result(LIMIT)
        assert executor.submit(tasks.square, x).result(LIMIT) == x * x


class Unpickled:
    """Tells in which threads it was."""

    threads: ClassVar[list[str]] = []

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def __setstate__(self, state: Any) -> None:
        self.threads.append(threading.current_thread().name)
        if state["error"] is not None:
            raise state["error"]


def make_unpickled(error: BaseException | None) -> Unpickled:
    return Unpickled(error)


@pytest.mark.parametrize("error", [None, ValueError("no"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_code_of_the_user_s_runs_in_the_thread(
    executor: ProcessPoolExecutor, taken: list[object], error: BaseException | None
) -> None:
    """Once, and whatever it raises is the task's error."""
    Unpickled.threads.clear()
    for number in range(1, 21):
        future = executor.submit(make_unpickled, error)
        if error is None:
            assert isinstance(future.result(LIMIT), Unpickled)
        else:
            with pytest.raises(SerializationError, match="can't be unpickled"):
                future.result(LIMIT)
        assert Unpickled.threads == ["mp_ipcchan-pool"] * number
    assert not taken


def test_large_results_come_another_way(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    for size in (1, 5000, 300_000, 3, 5_000_000, 4):
        assert executor.submit(tasks.echo, bytes(size)).result(LIMIT) == bytes(size)


def test_callbacks_run_once(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    called: list[int] = []
    for x in range(100):
        future = executor.submit(tasks.square, x)
        future.add_done_callback(lambda future: called.append(future.result()))
        assert future.result(LIMIT) == x * x
    assert executor.submit(tasks.square, 100).result(LIMIT) == 10_000
    InThread(executor.shutdown).result()
    assert sorted(called) == [x * x for x in range(100)]


def test_several_threads(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    def ask(first: int) -> None:
        for x in range(first, first + 100):
            assert executor.submit(tasks.square, x).result(LIMIT) == x * x

    threads = [InThread(ask, 100 * number) for number in range(4)]
    for thread in threads:
        thread.result()


def test_two_wait_for_the_same(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    for x in range(100):
        future = executor.submit(tasks.square, x)
        other = InThread(future.result, LIMIT)
        assert future.result(LIMIT) == other.result() == x * x


def test_what_was_logged_comes_before(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tests.looking")
    logger.addHandler(handler)
    try:
        for x in range(50):
            executor.submit(tasks.log, "tests.looking", logging.WARNING, "number %d", x).result(LIMIT)
            assert records[-1] == f"number {x}"
    finally:
        logger.removeHandler(handler)


def test_who_looks_waits_for_no_longer_than_asked(executor: ProcessPoolExecutor, taken: list[object]) -> None:
    """Others' outcomes come meanwhile, too, though nobody wakes the thread."""
    go_tx, go_rx = channel()
    with go_tx:
        first = executor.submit(tasks.receive_from, go_rx)
        looks = InThread(first.result, LIMIT)
        for x in range(100):
            assert executor.submit(tasks.square, x).result(LIMIT) == x * x
        go_tx.send("done")
        assert looks.result() == "done"


class _Polling:
    """An epoll that tells whether somebody waits."""

    def __init__(self, epoll: Any) -> None:
        self._epoll = epoll
        self.waiting = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def poll(self, *args: Any) -> Any:
        self.waiting = True
        try:
            return self._epoll.poll(*args)
        finally:
            self.waiting = False


def test_handlers_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks may be kept from telling the thread to go on: it looks by itself then."""
    stop = Looking._stop_looking
    strike = False

    def struck(self: Any, commons: Any) -> None:
        if strike:
            assert eventually(lambda: epoll.waiting)
            commons.is_awake()
            raise KeyboardInterrupt
        stop(self, commons)

    monkeypatch.setattr(Looking, "_stop_looking", struck)
    monkeypatch.setattr(_looking, "_SHORT", math.inf)
    monkeypatch.setattr(Looking, "_judge", lambda *_: None)
    go_tx, go_rx = channel()
    with go_tx, ProcessPoolExecutor(2, FORK) as executor:
        assert executor.submit(tasks.square, 2).result(LIMIT) == 4
        commons: Any = executor._engine._commons
        commons.epoll = epoll = _Polling(commons.epoll)
        waits = executor.submit(tasks.receive_from, go_rx)
        assert executor.submit(tasks.square, 3).result(LIMIT) == 9
        strike = True
        with pytest.raises(KeyboardInterrupt):
            while True:
                executor.submit(tasks.square, 3).result(LIMIT)
        strike = False
        go_tx.send("done")
        assert wait([waits], LIMIT).done
        assert waits.result() == "done"
