"""Stopping work: cancelled futures, time limits, and what happens to the innocent."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import threading
import time
from concurrent.futures import CancelledError, as_completed, wait
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import Future, ProcessPoolExecutor, TaskTimeoutError, channel

from . import _tasks as tasks
from ._support import FORK, LIMIT, eventually, runs


def _train(executor: ProcessPoolExecutor) -> None:
    """Let it learn that tasks are short, so that it hands out many at a time."""
    for future in [executor.submit(tasks.square, x) for x in range(500)]:
        future.result(LIMIT)


def test_callbacks_and_waiters_hear_of_it(forked: ProcessPoolExecutor) -> None:
    tx, rx = channel()
    heard: list[bool] = []
    with tx, rx:
        future = forked.submit(tasks.say_and_wait, tx, 60.0)
        future.add_done_callback(lambda one: heard.append(one.cancelled()))
        rx.recv(LIMIT)
        waiter = threading.Thread(target=lambda: wait([future]))
        waiter.start()
        assert future.cancel()
        assert heard == [True]
        waiter.join(LIMIT)
        assert not waiter.is_alive()
        assert list(as_completed([future])) == [future]
        with pytest.raises(CancelledError):
            future.exception(0)


def test_those_behind_a_cancelled_one_run_once(tmp_path: Path) -> None:
    """Tasks that wait with the worker of the one that is stopped are run elsewhere, none twice."""
    with ProcessPoolExecutor(1, FORK) as executor:
        for _ in range(3):
            _train(executor)
            tx, rx = channel()
            with tx, rx:
                running = executor.submit(tasks.say_and_wait, tx, 60.0)
                behind = [executor.submit(tasks.square, x) for x in range(100)]
                rx.recv(LIMIT)
                assert running.cancel()
                assert [future.result(LIMIT) for future in behind] == [x * x for x in range(100)]


def test_one_that_waits_behind_another_is_never_begun(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, FORK) as executor:
        _train(executor)
        pid = executor.submit(os.getpid).result(LIMIT)
        tx, rx = channel()
        with tx, rx:
            running = executor.submit(tasks.say_and_wait, tx, 0.3)
            behind = [executor.submit(tasks.mark, str(tmp_path), x) for x in range(20)]
            rx.recv(LIMIT)
            assert behind[7].cancel()
            assert running.result(LIMIT) is None
            for x, future in enumerate(behind):
                if x != 7:
                    future.result(LIMIT)
        assert {path.name for path in tmp_path.iterdir()} == {str(x) for x in range(20) if x != 7}
        assert executor.submit(os.getpid).result(LIMIT) == pid


def test_cancelling_at_random_hurts_nobody_else() -> None:
    """Whatever a task is doing when it is cancelled, all others end well."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    with ProcessPoolExecutor(2, FORK) as executor:
        futures = [executor.submit(tasks.sleep, dice.choice([0, 0, 0.002]), x) for x in range(600)]
        victims = dice.sample(range(600), 60)
        cancelled = set()
        for victim in victims:
            time.sleep(dice.uniform(0, 0.004))
            if futures[victim].cancel():
                cancelled.add(victim)
        for x, future in enumerate(futures):
            if x in cancelled:
                assert future.cancelled()
            else:
                assert future.result(LIMIT) == x


def test_endpoints_of_those_behind_are_not_lost() -> None:
    """A receiver moves with its task, which therefore waits behind none that may be stopped."""
    with ProcessPoolExecutor(1, FORK) as executor:
        _train(executor)
        tx, rx = channel()
        inner_tx, inner_rx = channel()
        silent_tx, silent_rx = channel()
        with tx, rx, inner_tx, silent_tx:
            running = executor.submit(tasks.say_and_wait, tx, 60.0)
            behind = [executor.submit(tasks.square, x) for x in range(5)]
            carrying = executor.submit(tasks.receive_from, inner_rx)
            late = executor.options(timeout=0.3).submit(tasks.receive_from, silent_rx)
            inner_tx.send("arrived")
            rx.recv(LIMIT)
            assert running.cancel()
            assert carrying.result(LIMIT) == "arrived"
            assert [future.result(LIMIT) for future in behind] == [x * x for x in range(5)]
            assert isinstance(late.exception(LIMIT), TaskTimeoutError)


def test_many_that_wait_are_cancelled_at_once(forked: ProcessPoolExecutor) -> None:
    blockers = [forked.submit(tasks.sleep, 60.0) for _ in range(2)]
    assert eventually(lambda: all(blocker.running() for blocker in blockers))
    waiting = [forked.submit(tasks.square, x) for x in range(20000)]
    assert all(future.cancel() for future in waiting)
    assert all(blocker.cancel() for blocker in blockers)
    assert forked.submit(tasks.square, 3).result(LIMIT) == 9


def test_a_finished_one_is_not_cancelled(forked: ProcessPoolExecutor) -> None:
    future = forked.submit(tasks.square, 3)
    assert future.result(LIMIT) == 9
    assert not future.cancel()
    assert (future.done(), future.cancelled(), future.running()) == (True, False, False)


def test_a_kept_future_keeps_no_arguments(forked: ProcessPoolExecutor) -> None:
    import weakref

    argument = tasks.Argument()
    gone = weakref.ref(argument)
    future = forked.submit(tasks.echo, argument)
    del argument
    future.result(LIMIT)
    assert eventually(lambda: gone() is None)
    assert future.done()


# -- time ------------------------------------------------------------------------------------


def test_time_limit_hurts_nobody_else(start_method: str) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context(f"ipcchan_{start_method}")) as executor:
        executor.submit(tasks.square, 1).result(LIMIT)
        late = executor.options(timeout=0.2).submit(tasks.sleep, 60.0)
        others = [executor.submit(tasks.square, x) for x in range(50)]
        with pytest.raises(TaskTimeoutError, match=r"sleep took longer than 0\.2 seconds") as caught:
            late.result(LIMIT)
        assert isinstance(caught.value, TimeoutError)
        assert [future.result(LIMIT) for future in others] == [x * x for x in range(50)]


def test_time_limit_in_map_is_each_calls(forked: ProcessPoolExecutor) -> None:
    """All together take longer than the limit; the first that does so by itself fails."""
    results = forked.options(timeout=0.5).map(tasks.sleep, [0.2] * 6 + [60.0], range(7))
    assert [next(results) for _ in range(6)] == list(range(6))
    with pytest.raises(TaskTimeoutError, match="sleep"):
        next(results)


def test_options_are_a_view(forked: ProcessPoolExecutor) -> None:
    view = forked.options(timeout=LIMIT, retries=1)
    with view as entered:
        assert list(entered.map(tasks.square, range(5))) == [0, 1, 4, 9, 16]
        assert entered.submit(tasks.square, 5).result(LIMIT) == 25
        assert [type(one).__name__ for one in entered.stats()] == ["WorkerStats"] * len(forked.stats())
    with pytest.raises(RuntimeError, match="after shutdown"):
        forked.submit(tasks.square, 1)
    with ProcessPoolExecutor(1, FORK) as other:
        running = other.submit(tasks.sleep, 60.0)
        other.options(retries=1).kill_workers()
        assert running.exception(LIMIT)


# -- asyncio ---------------------------------------------------------------------------------


def test_a_cancelled_await_stops_the_work(executor: ProcessPoolExecutor) -> None:
    tx, rx = channel()

    async def main() -> int:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(executor, tasks.say_and_wait, tx, 60.0)
        pid = int(await loop.run_in_executor(None, rx.recv, LIMIT))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(work, 0.01)
        assert await loop.run_in_executor(executor, tasks.square, 7) == 49
        return pid

    with tx, rx:
        pid = asyncio.run(main())
    assert eventually(lambda: not runs(pid))


@pytest.mark.skipif(not hasattr(asyncio, "TaskGroup"), reason="came with Python 3.11")
def test_a_task_group_that_fails_stops_the_work(forked: ProcessPoolExecutor) -> None:
    tx, rx = channel()
    pids: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def work() -> None:
            await loop.run_in_executor(forked, tasks.say_and_wait, tx, 60.0)

        async def fail() -> None:
            pids.append(await loop.run_in_executor(None, rx.recv, LIMIT))
            raise ValueError("no more")

        async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined]
            group.create_task(work())
            group.create_task(fail())

    with tx, rx, pytest.raises(BaseException, match="unhandled errors"):
        asyncio.run(main())
    assert eventually(lambda: not runs(pids[0]))


# -- the future by itself --------------------------------------------------------------------


def test_future_behaves_as_the_stdlibs() -> None:
    future: Future[int] = Future()
    heard: list[Any] = []
    future.add_done_callback(heard.append)
    assert (future.running(), future.done()) == (False, False)
    assert "pending" in repr(future)
    assert future.set_running_or_notify_cancel()
    assert future.running()
    future.set_result(5)
    assert (future.result(), future.exception(), heard) == (5, None, [future])
    with pytest.raises(Exception, match="FINISHED"):
        future.set_result(6)
    young: Future[int] = Future()
    young.set_result(1)
    with pytest.raises(Exception, match="FINISHED"):
        young.set_result(2)
    assert young.result() == 1
    failed: Future[int] = Future()
    failed.set_exception(KeyError("x"))
    with pytest.raises(KeyError):
        failed.result()
    with pytest.raises(TimeoutError if hasattr(asyncio, "TaskGroup") else Exception):
        Future().result(0.01)


def test_waiting_and_ending_at_once() -> None:
    """Somebody may begin to wait just while the result comes: nobody waits for ever."""
    for _ in range(2000):
        future: Future[int] = Future()
        waiter = threading.Thread(target=lambda one=future: one.result(LIMIT))
        waiter.start()
        future.set_running_or_notify_cancel()
        future.set_result(1)
        waiter.join(LIMIT)
        assert not waiter.is_alive()
