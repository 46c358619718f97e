"""``ctx.Pool``: the stdlib's surface, on workers that nothing hangs."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import multiprocessing.pool
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import Pool, SerializationError, TaskTimeoutError, WorkerLostError, install, uninstall

from ..conformance._support import InThread
from . import _tasks as tasks
from ._support import FORK, LIMIT, ROOT, eventually, runs


@pytest.fixture
def pool(context: Any) -> Iterator[Any]:
    """Of each start method."""
    with context.Pool(2) as made:
        yield made
    made.join()


@pytest.fixture
def forked() -> Iterator[Any]:
    """For what doesn't depend on how workers start."""
    with FORK.Pool(2) as made:
        yield made
    made.join()


# -- workers die (each start method) ---------------------------------------------------------


def test_worker_killed_in_a_task(pool: Any) -> None:
    """Of 40 tasks the one that was killed fails; the others are right, and the pool goes on."""
    results = [pool.apply_async(tasks.square_or_die, (x,)) for x in range(40)]
    with pytest.raises(WorkerLostError, match="square_or_die") as caught:
        results[10].get(LIMIT)
    assert caught.value.signal == "SIGKILL"
    assert [one.get(LIMIT) for x, one in enumerate(results) if x != 10] == [x * x for x in range(40) if x != 10]
    assert pool.map(tasks.square, range(10)) == [x * x for x in range(10)]


def test_worker_killed_in_imap(pool: Any) -> None:
    iterator = pool.imap(tasks.square_or_die, range(20))
    got: list[Any] = []
    for _ in range(20):
        try:
            got.append(iterator.next(LIMIT))
        except WorkerLostError:
            got.append("lost")
    assert got == ["lost" if x == 10 else x * x for x in range(20)]
    with pytest.raises(StopIteration):
        next(iterator)


def test_worker_killed_in_map(forked: Any) -> None:
    with pytest.raises(WorkerLostError, match="die_at_three"):
        forked.map(tasks.die_at_three, range(10), chunksize=1)
    assert forked.map(tasks.square, range(3)) == [0, 1, 4]


def test_idle_workers_killed(pool: Any) -> None:
    pool.map(tasks.square, range(10))
    before = [worker.pid for worker in pool._pool]
    assert len(before) == 2
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert [pool.apply_async(tasks.square, (x,)).get(LIMIT) for x in range(8)] == [x * x for x in range(8)]


def test_exception_that_cannot_be_unpickled(pool: Any) -> None:
    failed = pool.apply_async(tasks.raise_awkward)
    others = [pool.apply_async(tasks.square, (x,)) for x in range(8)]
    with pytest.raises(SerializationError) as caught:
        failed.get(LIMIT)
    assert "Awkward: one two" in str(caught.value.__cause__)
    assert [one.get(LIMIT) for one in others] == [x * x for x in range(8)]


def test_lambda_and_closure(pool: Any) -> None:
    offset = 10
    assert pool.apply(lambda x: x + offset, (1,)) == 11
    assert pool.map(lambda x: x + offset, range(100)) == list(range(10, 110))
    assert list(pool.imap(lambda x: x + offset, range(3))) == [10, 11, 12]
    assert list(pool.imap(lambda x: x + offset, range(3), chunksize=2)) == [10, 11, 12]
    assert pool.starmap(lambda x, y: x + y, [(1, 2), (3, 4)]) == [3, 7]


def test_pool_in_a_task(pool: Any) -> None:
    assert pool.apply(tasks.nested_pool, (2,)) == sum(x * x for x in range(10))
    assert pool.apply(tasks.nested, (1,)) == sum(x * x for x in range(10))


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_endless_input(pool: Any, method: str) -> None:
    read = []

    def numbers() -> Iterator[int]:
        for x in itertools.count():
            read.append(x)
            yield x

    iterator = getattr(pool, method)(tasks.square, numbers())
    got = list(itertools.islice(iterator, 100))
    assert len(got) == 100
    if method == "imap":
        assert got == [x * x for x in range(100)]
    # How far ahead depends on how long tasks take; never further than this.
    assert len(read) <= 100 + 3 * 2 * 256 + 1


def test_leaving_ends_an_endless_map(context: Any) -> None:
    with context.Pool(2) as pool:
        result = pool.map_async(tasks.square, itertools.count())
        pool.apply(tasks.square, (1,))
    with pytest.raises(BrokenProcessPool, match="terminated"):
        result.get(LIMIT)
    pool.join()


def test_interrupt_of_the_process_group(start_method: str) -> None:
    """Ctrl-C while the parent waits: it ends soon, with one traceback, and no worker is left."""
    code = (
        "import multiprocessing, time\n"
        "from tests.pool import _tasks\n"
        "if __name__ == '__main__':\n"
        f"    with multiprocessing.get_context('ipcchan_{start_method}').Pool(2) as pool:\n"
        "        pids = pool.map(_tasks.pid_after, [0.1] * 4, chunksize=1)\n"
        "        print(*pids, flush=True)\n"
        "        pool.map(time.sleep, [60] * 4)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=True,
    ) as parent:  # fmt: skip
        assert parent.stdout
        assert parent.stderr
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        os.killpg(parent.pid, signal.SIGINT)
        errors = parent.stderr.read()
        parent.wait(LIMIT)
    assert errors.count("Traceback") == 1, errors
    assert errors.strip().endswith("KeyboardInterrupt")
    assert not [pid for pid in pids if runs(pid)]


def test_no_orphans_when_the_parent_is_killed(start_method: str) -> None:
    code = (
        "import multiprocessing, time\n"
        "from tests.pool import _tasks\n"
        "if __name__ == '__main__':\n"
        f"    pool = multiprocessing.get_context('ipcchan_{start_method}').Pool(2)\n"
        "    pids = pool.map(_tasks.pid_after, [0.1] * 4, chunksize=1)\n"
        "    pool.map_async(time.sleep, [60] * 4)\n"
        "    print(*pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        parent.kill()
    assert eventually(lambda: not any(map(runs, pids)), 3)


def test_initializer(context: Any) -> None:
    with context.Pool(2, tasks.initialize, ("ready",)) as pool:
        assert set(pool.map(tasks.echo, ["x"])) == {"x"}
        assert {pool.apply(tasks.get_state) for _ in range(5)} == {"ready"}
    pool.join()


def test_initializer_that_always_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with FORK.Pool(2, tasks.fail_to_initialize) as pool:
        with pytest.raises(BrokenProcessPool, match="no database"):
            pool.apply_async(tasks.square, (1,)).get(LIMIT)
        with pytest.raises(BrokenProcessPool, match="no database"):
            pool.map(tasks.square, itertools.count())
        with pytest.raises(BrokenProcessPool, match="no database"):
            list(pool.imap(tasks.square, itertools.count()))
    pool.join()
    capfd.readouterr()


def test_worker_that_does_not_heed_sigterm(forked: Any) -> None:
    """terminate ends it all the same."""
    forked.apply_async(_ignore_and_sleep)
    forked.apply(tasks.pid_after, (0.1,))


def _ignore_and_sleep() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so, and those that were started before it are gone."""
    started = []

    def start(self: Any) -> Any:
        if started:
            raise BlockingIOError("no more processes")
        started.append(self)
        return original(self)

    original = type(FORK).Process.start
    monkeypatch.setattr(type(FORK).Process, "start", start)
    with pytest.raises(BlockingIOError, match="no more processes"):
        FORK.Pool(3)
    assert started
    assert started[0] not in multiprocessing.active_children()


# -- the stdlib's surface --------------------------------------------------------------------


def test_it_is_a_pool_of_the_stdlib_and_ours(forked: Any) -> None:
    assert type(forked) is Pool
    assert isinstance(forked, multiprocessing.pool.Pool)
    assert repr(forked) == "<mp_ipcchan.Pool state=RUN pool_size=2>"
    assert isinstance(forked.apply_async(tasks.square, (1,)), multiprocessing.pool.AsyncResult)
    assert isinstance(forked.map_async(tasks.square, [1]), multiprocessing.pool.MapResult)
    assert isinstance(forked.imap(tasks.square, [1]), multiprocessing.pool.IMapIterator)
    assert isinstance(forked.imap_unordered(tasks.square, [1]), multiprocessing.pool.IMapUnorderedIterator)
    workers = {child.pid for child in multiprocessing.active_children()}
    assert {worker.pid for worker in forked._pool} <= workers
    assert not any(worker.daemon for worker in forked._pool)
    assert all(worker.name.startswith("ForkPoolWorker-") for worker in forked._pool)
    with pytest.raises(NotImplementedError, match="cannot be passed between processes"):
        pickle.dumps(forked)


def test_install_makes_it_everybodys_pool() -> None:
    install("ipcchan_fork")
    try:
        with multiprocessing.Pool(1) as pool:
            assert type(pool) is Pool
        with multiprocessing.get_context("spawn").Pool(1) as other:
            assert type(other) is Pool
    finally:
        uninstall()
    pool.join()
    other.join()


def test_apply(forked: Any) -> None:
    assert forked.apply(tasks.add, (1,), {"y": 2}) == 3
    assert forked.apply(tasks.add, [1, 2]) == 3
    with pytest.raises(ValueError, match="what happened") as caught:
        forked.apply(tasks.fail, ("what happened",))
    assert type(caught.value.__cause__) is multiprocessing.pool.RemoteTraceback  # type: ignore[attr-defined]
    assert "raise ValueError(message)" in str(caught.value.__cause__)


def test_result_surface(forked: Any) -> None:
    slow = forked.apply_async(tasks.sleep, (0.3, "end"))
    assert not slow.ready()
    with pytest.raises(ValueError, match="not ready"):
        slow.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        slow.get(timeout=0.01)
    slow.wait(0.01)
    slow.wait()
    assert (slow.ready(), slow.successful(), slow.get(), slow.get(0)) == (True, True, "end", "end")
    failed = forked.apply_async(tasks.fail, ("x",))
    failed.wait()
    assert not failed.successful()
    for _ in range(2):
        with pytest.raises(ValueError, match="x"):
            failed.get()


def test_results_are_awaited_by_many_threads(forked: Any) -> None:
    result = forked.apply_async(tasks.sleep, (0.2, 7))
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(result.get(LIMIT))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert got == [7] * 5


def test_callbacks(forked: Any) -> None:
    """They are called before anybody who waits goes on; one that raises harms nobody else."""
    came: list[Any] = []
    forked.apply_async(tasks.square, (3,), callback=came.append, error_callback=came.append).wait(LIMIT)
    forked.map_async(tasks.square, [1, 2], callback=came.append).wait(LIMIT)
    forked.starmap_async(tasks.add, [(1, 2)], callback=came.append).wait(LIMIT)
    forked.apply_async(tasks.fail, ("x",), callback=came.append, error_callback=came.append).wait(LIMIT)
    assert came[:3] == [9, [1, 4], [3]]
    assert isinstance(came[3], ValueError)
    again = forked.apply_async(tasks.square, (2,), callback=lambda _: forked.apply_async(tasks.square, (1,)))
    assert again.get(LIMIT) == 4


def test_callback_that_raises(forked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))
    assert forked.apply_async(tasks.square, (2,), callback=lambda _: 1 // 0).get(LIMIT) == 4
    assert isinstance(seen[0], ZeroDivisionError)
    assert forked.apply(tasks.square, (3,)) == 9


@pytest.mark.parametrize("chunksize", [None, 1, 7, 1000])
def test_map(forked: Any, chunksize: int | None) -> None:
    expected = [x * x for x in range(300)]
    assert forked.map(tasks.square, range(300), chunksize) == expected
    assert forked.map(tasks.square, iter(range(300)), chunksize) == expected
    assert forked.map_async(tasks.square, (x for x in range(300)), chunksize).get(LIMIT) == expected
    assert forked.starmap(pow, ((x, 2) for x in range(300)), chunksize) == expected
    assert forked.starmap_async(pow, [(x, 2) for x in range(300)], chunksize).get(LIMIT) == expected
    assert list(forked.imap(tasks.square, range(300), chunksize)) == expected
    assert list(forked.imap(tasks.square, (x for x in range(300)), chunksize)) == expected
    assert sorted(forked.imap_unordered(tasks.square, range(300), chunksize)) == expected


@pytest.mark.parametrize("empty", [[], range(0), iter(())])
def test_nothing_to_map(forked: Any, empty: Any) -> None:
    assert forked.map(tasks.square, empty) == []
    assert forked.map_async(tasks.square, empty, 3).get(LIMIT) == []
    assert list(forked.imap(tasks.square, empty)) == []
    assert list(forked.imap_unordered(tasks.square, empty, 2)) == []


def test_large_map(forked: Any) -> None:
    """Chunks grow; results that don't fit a packet travel otherwise."""
    for _ in range(2):
        assert forked.map(tasks.square, range(100_000)) == [x * x for x in range(100_000)]
    blocks = [bytes([x]) * 300_000 for x in range(20)]
    assert forked.map(tasks.echo, blocks) == blocks


def test_unequal_tasks_are_shared(forked: Any) -> None:
    """After many short ones, long ones don't all wait behind each other in one worker."""
    forked.map(tasks.echo, range(20_000))
    pids = [pid for pid, _ in forked.starmap(tasks.sleep_and_tell, [(0.02, x) for x in range(20)])]
    assert min(pids.count(pid) for pid in set(pids)) >= 5
    assert len(set(pids)) == 2


@pytest.mark.parametrize("chunksize", [None, 1, 2])
def test_map_whose_function_raises(forked: Any, chunksize: int | None, tmp_path: Path) -> None:
    """The rest is run all the same."""
    names = [str(tmp_path / str(x)) for x in range(6)]
    names[2] = names[0]
    with pytest.raises(FileExistsError):
        forked.map(tasks.touch, names, chunksize)
    assert len(list(tmp_path.iterdir())) >= (5 if chunksize == 1 else 4)


def test_imap_whose_function_raises(forked: Any) -> None:
    for chunksize in (1, None):
        iterator = forked.imap(tasks.raise_at_three, range(6), chunksize)
        assert [next(iterator) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="item 3"):
            next(iterator)
        assert list(iterator) == [4, 5]
    # As in the stdlib's, a chunk of given size fails as one.
    iterator = forked.imap(tasks.raise_at_three, range(6), 2)
    assert [next(iterator) for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="item 3"):
        next(iterator)


def _failing(good: int) -> Iterator[int]:
    yield from range(good)
    raise KeyError("input")


@pytest.mark.parametrize("chunksize", [None, 1, 2])
def test_input_that_raises(forked: Any, chunksize: int | None) -> None:
    for good in (0, 3, 200):
        # The items are fit for either: else a call may fail before the input does.
        for run, items in ((forked.map, _failing(good)), (forked.starmap, zip(_failing(good), strict=True))):
            with pytest.raises(KeyError, match="input") as caught:
                run(tasks.echo, items, chunksize)
            assert caught.value.__cause__ is None
        with pytest.raises(KeyError, match="input"):
            forked.map_async(tasks.square, _failing(good), chunksize).get(LIMIT)
        ordered = forked.imap(tasks.square, _failing(good), chunksize)
        whole = good // (chunksize or 1) * (chunksize or 1)
        assert [next(ordered) for _ in range(whole)] == [x * x for x in range(whole)]
        with pytest.raises(KeyError, match="input"):
            next(ordered)
        with pytest.raises(StopIteration):
            next(ordered)
        with pytest.raises(KeyError, match="input"):
            list(forked.imap_unordered(tasks.square, _failing(good), chunksize))


def test_input_that_is_none(forked: Any) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        forked.map(tasks.square, 5)
    with pytest.raises(TypeError, match="not iterable"):
        next(forked.imap(tasks.square, 5))


def test_input_that_waits_for_results(forked: Any) -> None:
    """imap reads it in a thread of its own: what it yields may depend on what came out."""
    todo: queue.Queue[int | None] = queue.Queue()
    todo.put(1)
    got = []
    for result in forked.imap_unordered(tasks.square, iter(todo.get, None)):
        got.append(result)
        todo.put(result + 1 if result < 1000 else None)
    assert got == [1, 4, 25, 676, 458329]


def test_imap_timeout(forked: Any) -> None:
    iterator = forked.imap(tasks.sleep, [0.3])
    with pytest.raises(multiprocessing.TimeoutError):
        iterator.next(timeout=0.01)
    assert iterator.next(LIMIT) is None


@pytest.mark.parametrize("keep", [True, False])
def test_imap_whose_results_nobody_takes(keep: bool, tmp_path: Path) -> None:
    """close and join run all of it, as the stdlib does, whether or not the iterator is still there."""
    pool = FORK.Pool(2)
    names = [str(tmp_path / str(x)) for x in range(3000)]
    kept = [pool.imap(tasks.touch, iter(names)) if keep else None]
    if not keep:
        pool.imap_unordered(tasks.touch, iter(names))
    pool.close()
    pool.join()
    assert len(list(tmp_path.iterdir())) == 3000
    if kept[0] is not None:
        assert len(list(kept[0])) == 3000


def test_what_cannot_be_pickled(forked: Any) -> None:
    class A:
        def __reduce__(self) -> Any:
            raise RuntimeError("cannot pickle")

    with pytest.raises(RuntimeError, match="cannot pickle"):
        forked.map(tasks.echo, [A()] * 10)
    with pytest.raises(RuntimeError, match="cannot pickle"):
        forked.apply(tasks.echo, (A(),))
    iterator = forked.imap(tasks.echo, [1, A(), 3])
    assert next(iterator) == 1
    with pytest.raises(RuntimeError, match="cannot pickle"):
        next(iterator)
    assert next(iterator) == 3
    with pytest.raises(multiprocessing.pool.MaybeEncodingError, match="Error sending result: '<unlocked"):  # type: ignore[attr-defined]
        forked.apply(tasks.make_unpicklable)
    assert forked.apply(tasks.square, (2,)) == 4


def test_function_defined_after_the_workers_started(forked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They don't know its name; it goes by value."""
    import types

    module = types.ModuleType("not_a_file")
    exec("def late(x): return x + 1", module.__dict__)
    module.late.__module__ = "__main__"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules["__main__"], "late", module.late, raising=False)  # type: ignore[attr-defined]
    late = module.late  # type: ignore[attr-defined]
    assert forked.apply(late, (1,)) == 2
    assert forked.map(late, range(50)) == list(range(1, 51))
    assert list(forked.imap(late, range(5), None)) == list(range(1, 6))


def test_closed_pool(forked: Any) -> None:
    pending = forked.apply_async(tasks.sleep, (0.1, 5))
    with pytest.raises(ValueError, match="Pool is still running"):
        forked.join()
    forked.close()
    for refused in (
        lambda: forked.apply(tasks.square, (1,)),
        lambda: forked.apply_async(tasks.square, (1,)),
        lambda: forked.map(tasks.square, [1]),
        lambda: forked.map_async(tasks.square, [1]),
        lambda: forked.starmap(tasks.square, [(1,)]),
        lambda: forked.starmap_async(tasks.square, [(1,)]),
        lambda: forked.imap(tasks.square, [1]),
        lambda: forked.imap_unordered(tasks.square, [1]),
        forked.__enter__,
    ):
        with pytest.raises(ValueError, match="Pool not running"):
            refused()
    forked.join()
    assert pending.get(0) == 5
    assert forked._pool == []


def test_close_finishes_what_is_still_to_be_read() -> None:
    pool = FORK.Pool(2)
    result = pool.map_async(tasks.square, (x for x in range(5000)))
    pool.close()
    pool.join()
    assert result.get(0) == [x * x for x in range(5000)]


def test_terminate_ends_everything(forked: Any) -> None:
    results = [forked.apply_async(tasks.sleep, (60.0,)) for _ in range(10)]
    stream = forked.imap(tasks.sleep, [60.0] * 10)
    forked.terminate()
    forked.join()
    for result in results:
        with pytest.raises(BrokenProcessPool, match="the pool was terminated"):
            result.get(LIMIT)
    with pytest.raises(BrokenProcessPool, match="the pool was terminated"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    forked.terminate()


def test_forgotten_pool_warns_and_ends() -> None:
    pools = [FORK.Pool(1)]
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        pools.clear()


def test_pool_whose_result_is_awaited_is_not_forgotten() -> None:
    with pytest.warns(ResourceWarning):  # noqa: PT031
        result = FORK.Pool(1).apply_async(tasks.sleep, (0.2, 1))
        gc.collect()
        assert result.get(LIMIT) == 1
        gc.collect()


def test_interpreter_that_ends_drops_the_rest() -> None:
    """As with the stdlib's: an unclosed pool doesn't keep the program."""
    code = (
        "import mp_ipcchan, multiprocessing, time\n"
        "if __name__ == '__main__':\n"
        "    pool = multiprocessing.get_context('ipcchan').Pool(2)\n"
        "    pool.map_async(time.sleep, [60] * 10)\n"
        "    print('end')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert (ended.stdout, ended.stderr) == ("end\n", "")


def test_results_are_not_kept(forked: Any) -> None:
    """Neither items nor results stay after they were handed over."""

    items = [_Weak() for _ in range(10)]
    refs = [weakref.ref(item) for item in items]
    forked.map(tasks.echo, items)
    forked.apply(tasks.echo, (items[0],))
    del items
    assert eventually(lambda: gc.collect() >= 0 and all(ref() is None for ref in refs))


class _Weak:
    pass


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"processes": 0}, ValueError, "Number of processes must be at least 1"),
        ({"processes": -1}, ValueError, "Number of processes must be at least 1"),
        ({"initializer": 1}, TypeError, "initializer must be a callable"),
        ({"maxtasksperchild": 0}, ValueError, "maxtasksperchild must be a positive int or None"),
        ({"maxtasksperchild": 1.5}, ValueError, "maxtasksperchild must be a positive int or None"),
        ({"task_timeout": 0}, ValueError, "task_timeout"),
        ({"retries": -1}, ValueError, "retries"),
        ({"engine": 5}, TypeError, "engine must be a concurrent.futures.Executor, not int"),
    ],
)
def test_arguments_that_make_no_sense(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FORK.Pool(**wrong)


@pytest.mark.parametrize("method", ["map", "starmap", "map_async", "starmap_async", "imap", "imap_unordered"])
@pytest.mark.parametrize("chunksize", [0, -1])
def test_chunksize_that_makes_no_sense(method: str, chunksize: int, forked: Any) -> None:
    with pytest.raises(ValueError, match=r"Chunksize must be 1\+"):
        getattr(forked, method)(tasks.square, [1], chunksize)


# -- beyond the stdlib's ---------------------------------------------------------------------


def test_workers_are_replaced_after_their_tasks(context: Any) -> None:
    with context.Pool(1, maxtasksperchild=3) as pool:
        pids = [pool.apply(os.getpid) for _ in range(9)]
        assert pool.map(tasks.square, range(30)) == [x * x for x in range(30)]
    pool.join()
    assert [len(list(group)) for _, group in itertools.groupby(pids)] == [3, 3, 3]


def test_task_timeout() -> None:
    with FORK.Pool(2, task_timeout=0.3) as pool:
        with pytest.raises(TaskTimeoutError, match=r"sleep took longer than 0\.3 seconds"):
            pool.apply(tasks.sleep, (60.0,))
        # The time is each call's.
        assert pool.map(tasks.sleep, [0.1] * 10) == [None] * 10
        with pytest.raises(TaskTimeoutError):
            pool.map(tasks.sleep, [0.0, 60.0, 0.0])
        iterator = pool.imap(tasks.sleep, [0.0, 60.0, 0.0])
        assert next(iterator) is None
        with pytest.raises(TaskTimeoutError):
            next(iterator)
        assert next(iterator) is None
    pool.join()


def test_retries(tmp_path: Path) -> None:
    with FORK.Pool(2, retries=1) as pool:
        assert pool.apply(_die_once, (str(tmp_path / "one"),)) == "second"
        assert pool.map(_die_once, [str(tmp_path / "two"), str(tmp_path / "three")]) == ["second"] * 2
        with pytest.raises(WorkerLostError):
            pool.apply(tasks.leave, (1,))
    pool.join()


def _die_once(path: str) -> str:
    if os.path.exists(path):
        return "second"
    tasks.touch(path)
    tasks.die()
    return "never"


def test_stats(forked: Any) -> None:
    forked.map(tasks.square, range(100), 1)
    stats = forked.stats()
    assert {one.pid for one in stats} == {worker.pid for worker in forked._pool}
    assert sum(one.tasks_done for one in stats) >= 1


def test_in_a_forked_child_it_says_so(forked: Any) -> None:
    """It has no workers there; nobody waits for ever."""
    forked.apply(tasks.square, (1,))
    reader, writer = FORK.Pipe()

    def use() -> None:
        try:
            writer.send(forked.apply_async(tasks.square, (1,)).get(LIMIT))
        except RuntimeError as error:
            writer.send(str(error))

    child = FORK.Process(target=use)
    child.start()
    assert "belongs to process" in reader.recv()
    child.join()
    # The child's end took nothing of it along.
    assert forked.apply(tasks.square, (2,)) == 4
    reader.close()
    writer.close()


def test_endpoints_travel_in_tasks(forked: Any) -> None:
    from mp_ipcchan import channel

    tx, rx = channel()
    with tx, rx:
        forked.apply(tasks.send_through, (tx, [1, 2]))
        assert rx.recv(LIMIT) == [1, 2]
        forked.starmap(tasks.send_through, [(tx, x) for x in range(5)])
        assert sorted(rx.recv(LIMIT) for _ in range(5)) == list(range(5))


@pytest.mark.parametrize("call", ["map", "imap", "imap_unordered"])
def test_interrupted_calls_leave_nothing_to_wait_for(forked: Any, call: str) -> None:
    """Ctrl-C while they wait: the pool goes on, and its end comes."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(3):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                deque(getattr(forked, call)(tasks.sleep, [0.2] * 4), maxlen=0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert forked.map(tasks.square, range(5)) == [0, 1, 4, 9, 16]
    forked.close()
    InThread(forked.join).result()


def test_arguments_that_are_none(forked: Any) -> None:
    """``get`` raises, as in the stdlib, and there is nothing to wait for at the end."""
    with pytest.raises(TypeError):
        forked.apply_async(abs, 5).get(LIMIT)
    forked.close()
    InThread(forked.join).result()
