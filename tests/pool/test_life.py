"""An executor among processes: forks, Ctrl-C, the interpreter's end, what it tells of its workers."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor, WorkerStats, channel
from mp_ipcchan._pools._task import Task
from mp_ipcchan._segments import _segment_pool

from . import _tasks as tasks
from ._support import FORK, LIMIT, ROOT, eventually, runs, workers

# -- what it keeps ---------------------------------------------------------------------------


def test_an_idle_parent_gives_memory_back(forked: ProcessPoolExecutor) -> None:
    """Segments of large tasks, and mappings of large results, are not kept while nothing is to be done."""
    data = bytes(1 << 20)
    for _ in range(4):
        assert forked.submit(tasks.echo, data).result(LIMIT) == data
    inlets = [worker.results._open_link().inlet for worker in forked._engine.workers.values()]
    assert not _segment_pool.is_empty()
    assert not all(inlet.segments.is_empty for inlet in inlets)
    assert eventually(_segment_pool.is_empty)
    assert all(inlet.segments.is_empty for inlet in inlets)
    assert forked.submit(tasks.echo, data).result(LIMIT) == data


# -- what it tells ---------------------------------------------------------------------------


def test_stats(executor: ProcessPoolExecutor) -> None:
    assert executor.stats() == []
    for _ in range(3):
        executor.submit(tasks.sleep, 0.05).result(LIMIT)
    assert eventually(lambda: all(one.state == "idle" for one in executor.stats()))
    found = executor.stats()
    assert all(type(one) is WorkerStats for one in found)
    assert {one.pid for one in found} == workers()
    assert sum(one.tasks_done for one in found) == 3
    assert 0.15 <= sum(one.busy_time for one in found) < LIMIT
    assert all(one.memory > 1 << 20 for one in found)
    tx, rx = channel()
    with tx, rx:
        running = executor.submit(tasks.say_and_wait, tx, 60.0)
        pid = rx.recv(LIMIT)
        assert [one.state for one in executor.stats() if one.pid == pid] == ["busy"]
        running.cancel()
    with pytest.raises(AttributeError):
        found[0].pid = 5  # type: ignore[misc]


def test_stats_while_workers_start(start_method: str) -> None:
    context: Any = multiprocessing.get_context(f"ipcchan_{start_method}")
    with ProcessPoolExecutor(1, context, tasks.sleep, (0.3,)) as executor:
        future = executor.submit(tasks.square, 2)
        assert [one.state for one in executor.stats()] == ["starting"]
        assert future.result(LIMIT) == 4


# -- forks -----------------------------------------------------------------------------------


def test_a_forked_child_is_told_to_make_its_own(forked: ProcessPoolExecutor) -> None:
    """And ends by itself, with the executor in its hands; the parent's goes on."""
    assert forked.submit(tasks.square, 2).result(LIMIT) == 4
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with forked:
                forked.submit(tasks.square, 2)
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as file:
        assert f"belongs to process {os.getpid()}" in file.read()
    os.waitpid(pid, 0)
    assert forked.submit(tasks.square, 3).result(LIMIT) == 9


def test_a_forked_child_that_lives_on_keeps_nobody_alive(start_method: str) -> None:
    """Neither the workers, when the executor is shut down, nor their channels."""
    with ProcessPoolExecutor(1, multiprocessing.get_context(f"ipcchan_{start_method}")) as executor:
        executor.submit(tasks.square, 2).result(LIMIT)
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
    try:
        assert not workers()
        assert runs(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_task_that_uses_the_executor_it_runs_in() -> None:
    """Under fork it has inherited it: an error, not a wait without end."""
    global inherited
    with ProcessPoolExecutor(1, FORK) as inherited:
        with pytest.raises(RuntimeError, match="forked child"):
            inherited.submit(_submit_to_inherited).result(LIMIT)


inherited: ProcessPoolExecutor


def _submit_to_inherited() -> int:
    return inherited.submit(tasks.square, 2).result(5)


def test_stock_contexts_stand_for_ours(start_method: str) -> None:
    stock: Any = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(1, stock) as executor:
        assert executor.submit(tasks.square, 3).result(LIMIT) == 9
        with pytest.raises(Exception, match="SIGKILL"):
            executor.submit(tasks.die).result(LIMIT)


def test_nested(executor: ProcessPoolExecutor) -> None:
    assert executor.submit(tasks.nested, 2).result(LIMIT) == sum(x * x for x in range(10))


# -- nobody holds it any more ----------------------------------------------------------------


def test_never_used() -> None:
    executor = ProcessPoolExecutor(2, FORK)
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None


def test_forgotten_with_work_to_do() -> None:
    executor = ProcessPoolExecutor(1, FORK)
    futures = [executor.submit(tasks.sleep, 0.02, x) for x in range(5)]
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None
    assert [future.result(LIMIT) for future in futures] == list(range(5))
    assert eventually(lambda: not workers())


# -- outcomes that don't travel --------------------------------------------------------------


@pytest.mark.parametrize(
    "task", [tasks.raise_shifty, tasks.make_exits_when_pickled, tasks.make_exits_when_unpickled, tasks.raise_awkward]
)
def test_odd_results_and_exceptions_fail_their_own_task(executor: ProcessPoolExecutor, task: Any) -> None:
    failed = executor.submit(task)
    others = [executor.submit(tasks.square, x) for x in range(10)]
    error = failed.exception(LIMIT)
    assert error is not None
    assert error.__cause__ is not None
    assert [future.result(LIMIT) for future in others] == [x * x for x in range(10)]


def test_a_callback_that_raises_anything(forked: ProcessPoolExecutor) -> None:
    def leave(_: object) -> None:
        raise SystemExit(3)

    future = forked.submit(tasks.sleep, 0.05)
    future.add_done_callback(leave)
    assert future.result(LIMIT) is None
    assert forked.submit(tasks.square, 2).result(LIMIT) == 4


# -- programs that end -----------------------------------------------------------------------

_HEAD = """
import multiprocessing, os, signal, sys, time
from mp_ipcchan import ProcessPoolExecutor, channel
from tests.pool import _tasks
"""


@contextmanager
def _program(body: str) -> Iterator[subprocess.Popen[str]]:
    """A program in a process group of its own, which is gone afterwards."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", f"{_HEAD}\nif __name__ == '__main__':\n{lines}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.mark.parametrize("inside", [True, False])
def test_interrupt_of_the_process_group(start_method: str, inside: bool) -> None:
    """Ctrl-C: it ends soon, with one traceback, and nobody is left; in a ``with`` block or not."""
    body = f"""
executor = ProcessPoolExecutor(2, multiprocessing.get_context("ipcchan_{start_method}"))
tx, rx = channel()
def work():
    futures = [executor.submit(_tasks.say_and_wait, tx, 60.0) for _ in range(2)]
    more = [executor.submit(_tasks.square, x) for x in range(100)]
    print(rx.recv(), rx.recv(), flush=True)
    futures[0].result()
if {inside}:
    with executor:
        work()
else:
    work()
"""
    with _program(body) as process:
        assert process.stdout
        pids = [int(pid) for pid in process.stdout.readline().split()]
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert eventually(lambda: not any(map(runs, pids)), 3)


def test_interrupt_while_the_interpreter_waits_at_its_end() -> None:
    body = """
executor = ProcessPoolExecutor(1, multiprocessing.get_context("ipcchan_fork"))
tx, rx = channel()
executor.submit(_tasks.say_and_wait, tx, 60.0)
print(rx.recv(), flush=True)
"""
    with _program(body) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=10)
    assert eventually(lambda: not runs(pid), 3)


def test_interrupts_while_workers_start_print_nothing() -> None:
    """Workers that are just being started know nothing of Ctrl-C yet."""
    body = """
signal.signal(signal.SIGINT, lambda *_: None)
print("ready", flush=True)
for _ in range(10):
    with ProcessPoolExecutor(2, multiprocessing.get_context("ipcchan_fork")) as executor:
        assert executor.submit(_tasks.square, 3).result() == 9
        assert executor.submit(_tasks.square, 3).result() == 9
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("done", flush=True)
"""
    with _program(body) as process:
        assert process.stdout
        process.stdout.readline()
        while process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.002)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "done\n", "")


def test_task_that_comes_when_the_workers_have_been_told_to_end() -> None:
    """Whoever submits it may see too late that the executor is shut down: nobody is given it, and its future ends."""
    with ProcessPoolExecutor(2, FORK) as executor:
        wait([executor.submit(tasks.square, x) for x in range(50)])
        engine = executor._engine
        members = list(engine.workers.values())
        assert len(members) == 2
        for member in members:
            os.kill(member.pid, signal.SIGSTOP)
        try:
            executor.shutdown(wait=False)
            assert eventually(lambda: all(member.tasks.closed for member in members))
            late = Task(tasks.square, (3,), {})
            engine._schedule.pending.append(late)
            members[0].kill()
            assert late.future.result(LIMIT) == 9
        finally:
            members[1].kill()


def test_task_that_comes_when_a_worker_was_told_to_end_as_it_started() -> None:
    """A worker that becomes ready after that is given nothing; the task goes to another, and nothing breaks."""
    go = FORK.Event()
    with ProcessPoolExecutor(1, FORK, initializer=go.wait, initargs=(LIMIT,)) as executor:
        first = executor.submit(tasks.square, 2)
        engine = executor._engine
        [member] = engine.workers.values()
        executor.shutdown(wait=False, cancel_futures=True)
        assert eventually(lambda: member.tasks.closed)
        assert first.cancelled()
        late = Task(tasks.square, (3,), {})
        engine._schedule.pending.append(late)
        go.set()
        assert late.future.result(LIMIT) == 9
