"""ProcessPoolExecutor: no worker's death, and nothing that a task does, hangs or breaks it."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import (
    Future,
    ProcessPoolExecutor,
    SerializationError,
    TaskTimeoutError,
    WorkerLostError,
    channel,
    get_reusable_executor,
)

from . import _tasks as tasks
from ._support import FORK, LIMIT, ROOT, eventually, runs, workers

# -- results and failures --------------------------------------------------------------------


def test_submit(executor: ProcessPoolExecutor) -> None:
    futures = [executor.submit(tasks.square, x) for x in range(200)]
    assert [future.result(LIMIT) for future in futures] == [x * x for x in range(200)]
    assert all(isinstance(future, Future) for future in futures)


def test_tasks_run_in_children(executor: ProcessPoolExecutor) -> None:
    pid = executor.submit(os.getpid).result(LIMIT)
    assert pid != os.getpid()
    assert pid in workers()


def test_exception_with_the_traceback_of_the_worker(executor: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match="what happened") as caught:
        executor.submit(tasks.fail, "what happened").result(LIMIT)
    assert "raise ValueError(message)" in str(caught.value.__cause__)


def test_sys_exit_is_an_exception_like_others(executor: ProcessPoolExecutor) -> None:
    with pytest.raises(SystemExit):
        executor.submit(tasks.end_interpreter, 3).result(LIMIT)
    assert executor.submit(tasks.square, 2).result(LIMIT) == 4


def test_lambda_and_closure(executor: ProcessPoolExecutor) -> None:
    offset = 10
    assert executor.submit(lambda x: x + offset, 1).result(LIMIT) == 11
    assert list(executor.map(lambda x: x + offset, range(3))) == [10, 11, 12]


def test_large_arguments_and_results(executor: ProcessPoolExecutor) -> None:
    data = os.urandom(5_000_000)
    assert executor.submit(tasks.echo, data).result(LIMIT) == data


def test_endpoints_travel_in_tasks(executor: ProcessPoolExecutor) -> None:
    tx, rx = channel()
    with tx, rx:
        executor.submit(tasks.send_through, tx, [1, 2]).result(LIMIT)
        assert rx.recv(LIMIT) == [1, 2]


def test_what_cannot_be_pickled_fails_its_own_task(executor: ProcessPoolExecutor) -> None:
    with pytest.raises(TypeError, match="pickle"):
        executor.submit(tasks.echo, threading.Lock()).result(LIMIT)
    with pytest.raises(TypeError, match="pickle"):
        executor.submit(tasks.make_unpicklable).result(LIMIT)
    with pytest.raises(SerializationError, match="make_undecodable"):
        executor.submit(tasks.make_undecodable).result(LIMIT)
    assert executor.submit(tasks.square, 2).result(LIMIT) == 4


@pytest.mark.parametrize(("task", "text"), [(tasks.raise_awkward, "one two"), (tasks.raise_unpicklable, "text of it")])
def test_exception_that_cannot_travel(executor: ProcessPoolExecutor, task: Any, text: str) -> None:
    """It fails its own task, and its traceback arrives."""
    failed = executor.submit(task)
    others = [executor.submit(tasks.square, x) for x in range(8)]
    with pytest.raises(SerializationError) as caught:
        failed.result(LIMIT)
    assert text in str(caught.value.__cause__)
    assert [future.result(LIMIT) for future in others] == [x * x for x in range(8)]


# -- workers die -----------------------------------------------------------------------------


def test_worker_killed_in_a_task(executor: ProcessPoolExecutor) -> None:
    """Of 40 tasks the one that was killed fails; the 39 others are right, and the pool goes on."""
    futures = [executor.submit(tasks.die_or_square, x, 10) for x in range(40)]
    with pytest.raises(WorkerLostError) as caught:
        futures[10].result(LIMIT)
    assert (caught.value.signal, caught.value.exitcode) == ("SIGKILL", -signal.SIGKILL)
    assert "die_or_square" in str(caught.value)
    assert [future.result(LIMIT) for x, future in enumerate(futures) if x != 10] == [
        x * x for x in range(40) if x != 10
    ]
    assert executor.submit(tasks.square, 3).result(LIMIT) == 9
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.pid, again.signal, str(again)) == (caught.value.pid, "SIGKILL", str(caught.value))


def test_worker_that_exits(executor: ProcessPoolExecutor) -> None:
    with pytest.raises(WorkerLostError, match="exit code 7") as caught:
        executor.submit(tasks.leave, 7).result(LIMIT)
    assert caught.value.signal is None
    assert isinstance(caught.value, BrokenProcessPool)


def test_idle_workers_killed(executor: ProcessPoolExecutor) -> None:
    before = {future.result(LIMIT) for future in [executor.submit(tasks.pid_after, 0.05) for _ in range(4)]}
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    futures = [executor.submit(tasks.square, x) for x in range(8)]
    assert [future.result(LIMIT) for future in futures] == [x * x for x in range(8)]


def test_worker_killed_while_it_sends_a_large_result(forked: ProcessPoolExecutor) -> None:
    dice = random.Random(5)
    for _ in range(10):
        pid = forked.submit(os.getpid).result(LIMIT)
        future = forked.submit(bytes, 50_000_000)
        time.sleep(dice.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        try:
            assert len(future.result(LIMIT)) == 50_000_000
        except WorkerLostError:
            pass


def test_retries(executor: ProcessPoolExecutor, tmp_path: Path) -> None:
    """A task whose worker died is run again as often as was asked for; a task that always kills ends."""
    tx, rx = channel()
    with tx, rx:
        with pytest.raises(WorkerLostError):
            executor.options(retries=2).submit(tasks.leave, 1).result(LIMIT)
        flag = tmp_path / "was here"
        assert executor.options(retries=1).submit(_die_once, str(flag)).result(LIMIT) == "second"


def _die_once(path: str) -> str:
    if os.path.exists(path):
        return "second"
    with open(path, "w"):
        pass
    tasks.die()
    return "never"


def test_initializer(context: Any) -> None:
    with ProcessPoolExecutor(2, context, tasks.initialize, ("ready",)) as executor:
        assert {executor.submit(tasks.get_state).result(LIMIT) for _ in range(10)} == {"ready"}


@pytest.mark.parametrize("initializer", [tasks.fail_to_initialize, tasks.die])
def test_initializer_that_always_fails(context: Any, initializer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(2, context, initializer) as executor:
        with pytest.raises(BrokenProcessPool, match="no database|before they were ready"):
            executor.submit(tasks.square, 1).result(LIMIT)
        with pytest.raises(BrokenProcessPool):
            executor.submit(tasks.square, 1)
    capfd.readouterr()


def test_no_orphans_when_the_parent_is_killed(start_method: str) -> None:
    """Workers end within three seconds, in the middle of a task too."""
    code = (
        "import multiprocessing, os, sys, time\n"
        "from mp_ipcchan import ProcessPoolExecutor\n"
        "from tests.pool import _tasks\n"
        "if __name__ == '__main__':\n"
        f"    executor = ProcessPoolExecutor(2, multiprocessing.get_context('ipcchan_{start_method}'))\n"
        "    pids = {f.result() for f in [executor.submit(_tasks.pid_after, 0.1) for _ in range(4)]}\n"
        "    executor.submit(time.sleep, 60)\n"
        "    print(*pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        parent.kill()
    assert eventually(lambda: not any(map(runs, pids)), 3)


# -- cancelling and time ---------------------------------------------------------------------


def test_cancel_a_running_task(executor: ProcessPoolExecutor) -> None:
    tx, rx = channel()
    with tx, rx:
        future = executor.submit(tasks.say_and_wait, tx, 60.0)
        pid = rx.recv(LIMIT)
        assert future.running()
        assert future.cancel()
        assert future.cancelled()
        with pytest.raises(CancelledError):
            future.result(0)
        assert wait([future], 1).done == {future}
        assert executor.submit(tasks.square, 5).result(LIMIT) == 25
        assert eventually(lambda: not runs(pid))
        assert future.cancel()


def test_cancel_a_waiting_task(forked: ProcessPoolExecutor) -> None:
    blockers = [forked.submit(tasks.sleep, 0.2) for _ in range(2)]
    waiting = forked.submit(tasks.square, 1)
    assert waiting.cancel()
    assert next(as_completed([waiting], 1)) is waiting
    for blocker in blockers:
        blocker.result(LIMIT)
    assert not blockers[0].cancel()


def test_timeout_of_a_task(executor: ProcessPoolExecutor) -> None:
    with pytest.raises(TaskTimeoutError, match=r"sleep took longer than 0\.1 seconds"):
        executor.options(timeout=0.1).submit(tasks.sleep, 60.0).result(LIMIT)
    quick = executor.options(timeout=LIMIT).submit(tasks.square, 2)
    assert quick.result(LIMIT) == 4


def test_time_waiting_does_not_count(forked: ProcessPoolExecutor) -> None:
    view = forked.options(timeout=0.5)
    futures = [view.submit(tasks.sleep, 0.2, x) for x in range(8)]
    assert [future.result(LIMIT) for future in futures] == list(range(8))


@pytest.mark.parametrize("options", [{"retries": -1}, {"timeout": 0}])
def test_options_that_make_no_sense(forked: ProcessPoolExecutor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        forked.options(**options)


def test_nothing_waits_behind_a_long_task(forked: ProcessPoolExecutor) -> None:
    """Short tasks are given several at a time; a long one among them does not keep the others."""
    for future in [forked.submit(tasks.square, x) for x in range(2000)]:
        future.result(LIMIT)
    long = forked.submit(tasks.sleep, 5.0)
    begun = time.monotonic()
    short = [forked.submit(tasks.square, x) for x in range(500)]
    for future in short:
        future.result(LIMIT)
    assert time.monotonic() - begun < 4
    assert not long.done()
    long.cancel()


# -- map -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_map(executor: ProcessPoolExecutor, chunksize: int | None) -> None:
    got = list(executor.map(pow, range(300), itertools.repeat(2), chunksize=chunksize))
    assert got == [x**2 for x in range(300)]


def test_map_of_endless_input(executor: ProcessPoolExecutor) -> None:
    read = []

    def numbers() -> Any:
        for x in itertools.count():
            read.append(x)
            yield x

    results = executor.map(tasks.square, numbers(), buffersize=10)
    assert list(itertools.islice(results, 1000)) == [x * x for x in range(1000)]
    assert len(read) <= 1011
    results.close()  # type: ignore[attr-defined]


def test_map_ends_at_the_first_failure(executor: ProcessPoolExecutor) -> None:
    results = executor.map(lambda x: 1 // (3 - x), range(10))
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_timeout(forked: ProcessPoolExecutor) -> None:
    # On 3.10 not yet the builtin of that name.
    with pytest.raises(concurrent.futures.TimeoutError):
        list(forked.map(tasks.sleep, [0.0, 60.0], timeout=0.3))


@pytest.mark.parametrize("wrong", [{"chunksize": 0}, {"buffersize": 0}])
def test_map_with_nonsense(forked: ProcessPoolExecutor, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        forked.map(tasks.square, [1], **wrong)  # type: ignore[arg-type]


# -- the end ---------------------------------------------------------------------------------


def test_workers_are_replaced_after_their_tasks(context: Any) -> None:
    with ProcessPoolExecutor(1, context, max_tasks_per_child=3) as executor:
        pids = [executor.submit(os.getpid).result(LIMIT) for _ in range(9)]
    assert [len(list(group)) for _, group in itertools.groupby(pids)] == [3, 3, 3]


def test_shutdown_waits_for_what_was_submitted(context: Any) -> None:
    executor = ProcessPoolExecutor(2, context)
    futures = [executor.submit(tasks.sleep, 0.05, x) for x in range(6)]
    executor.shutdown()
    assert [future.result(0) for future in futures] == list(range(6))
    with pytest.raises(RuntimeError):
        executor.submit(tasks.square, 1)


def test_shutdown_cancels_what_waits(forked: ProcessPoolExecutor) -> None:
    futures = [forked.submit(tasks.sleep, 0.1, x) for x in range(20)]
    while not futures[0].running():
        time.sleep(0.001)
    forked.shutdown(cancel_futures=True)
    assert all(future.done() for future in futures)
    assert any(future.cancelled() for future in futures)
    assert futures[0].result(0) == 0


@pytest.mark.parametrize("way", ["terminate_workers", "kill_workers"])
def test_workers_ended(executor: ProcessPoolExecutor, way: str) -> None:
    future = executor.submit(tasks.sleep, 60.0)
    getattr(executor, way)()
    with pytest.raises(BrokenProcessPool):
        future.result(LIMIT)
    with pytest.raises(BrokenProcessPool):
        executor.submit(tasks.square, 1)


def test_forgotten_executor_ends() -> None:
    executor = ProcessPoolExecutor(1, FORK)
    future = executor.submit(tasks.square, 4)
    del executor
    assert future.result(LIMIT) == 16


def test_interpreter_that_ends_does_the_rest_first() -> None:
    code = (
        "from mp_ipcchan import ProcessPoolExecutor\n"
        "import time\n"
        "if __name__ == '__main__':\n"
        "    ProcessPoolExecutor(2).submit(time.sleep, 0.2).add_done_callback(lambda f: print('done', f.result()))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert (ended.stdout, ended.stderr) == ("done None\n", "")


def test_submit_from_many_threads(forked: ProcessPoolExecutor) -> None:
    results: list[int] = []

    def submit() -> None:
        futures = [forked.submit(tasks.square, x) for x in range(200)]
        results.extend(future.result(LIMIT) for future in futures)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(results) == sorted([x * x for x in range(200)] * 8)


def test_callback_that_submits(forked: ProcessPoolExecutor) -> None:
    second: list[Future[int]] = []
    came = threading.Event()

    def on_done(_: object) -> None:
        second.append(forked.submit(tasks.square, 6))
        came.set()

    forked.submit(tasks.square, 5).add_done_callback(on_done)
    assert came.wait(LIMIT)
    assert second[0].result(LIMIT) == 36


def test_reusable_executor() -> None:
    first = get_reusable_executor(1)
    try:
        assert get_reusable_executor(1) is first
        with pytest.raises(WorkerLostError):
            first.submit(tasks.die).result(LIMIT)
        assert get_reusable_executor(1) is first
        second = get_reusable_executor(2)
        assert second is not first
        assert second.submit(tasks.square, 2).result(LIMIT) == 4
        second.kill_workers()
        assert get_reusable_executor(2) is not second
    finally:
        second.shutdown()
        get_reusable_executor(2).shutdown()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"max_workers": 0}, ValueError),
        ({"initializer": 1}, TypeError),
        ({"max_tasks_per_child": 0}, ValueError),
        ({"max_memory_per_child": 0}, ValueError),
        ({"max_memory_per_child": 1.5}, TypeError),
    ],
)
def test_arguments_that_make_no_sense(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ProcessPoolExecutor(**wrong)


@pytest.mark.parametrize("timeout", [2**31 / 1000, float("inf")])
def test_timeout_beyond_what_the_kernel_counts(forked: ProcessPoolExecutor, timeout: float) -> None:
    assert forked.options(timeout=timeout).submit(tasks.square, 3).result(LIMIT) == 9


def test_what_brings_endpoints_is_not_run_again(forked: ProcessPoolExecutor) -> None:
    """They went with the worker; the error says so."""
    tx, rx = channel()
    with tx, rx, pytest.raises(WorkerLostError, match="not run again.*endpoints"):
        forked.options(retries=2).submit(_die_with, tx).result(LIMIT)


def _die_with(tx: Any) -> None:
    tasks.die()
