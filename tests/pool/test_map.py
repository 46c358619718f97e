"""Executor.map: read lazily, in order, and whole where the stdlib's would be."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor, WorkerLostError

from . import _tasks as tasks
from ._support import FORK, LIMIT, eventually


class Counting:
    """An iterator without a length that counts what was read of it."""

    def __init__(self, end: int | None = None) -> None:
        self.read = 0
        self._end = end

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.read == self._end:
            raise StopIteration
        self.read += 1
        return self.read - 1


def test_only_the_caller_runs_its_iterators(forked: ProcessPoolExecutor) -> None:
    """A list beside one is not worked off by the pool's thread, which would read both."""
    readers: set[int] = set()

    def numbers() -> Iterator[int]:
        for x in range(3000):
            readers.add(threading.get_ident())
            yield x

    results = forked.map(pow, [2] * 3000, numbers(), chunksize=1)
    forked.submit(tasks.sleep, 0.05).result(LIMIT)
    assert [next(results) for _ in range(100)] == [2**x for x in range(100)]
    assert readers == {threading.get_ident()}
    results.close()  # type: ignore[attr-defined]


def test_read_ahead_is_bounded(forked: ProcessPoolExecutor) -> None:
    numbers = Counting()
    results = forked.map(tasks.square, numbers, chunksize=5)
    assert numbers.read <= 2 * 4 * 5
    assert list(itertools.islice(results, 100)) == [x * x for x in range(100)]
    assert numbers.read <= 100 + 2 * 4 * 5
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [range(300), list(range(300)), iter(range(300)), Counting(300)])
def test_results_that_are_taken_after_the_end(given: Any) -> None:
    """As with the stdlib's: leaving the block runs all, and the results are there afterwards."""
    with ProcessPoolExecutor(2, FORK) as executor:
        results = executor.map(tasks.square, given)
    assert list(results) == [x * x for x in range(300)]


@pytest.mark.parametrize("sized", [True, False])
def test_results_that_nobody_takes(tmp_path: Path, sized: bool) -> None:
    names = [str(x) for x in range(60)]
    with ProcessPoolExecutor(2, FORK) as executor:
        executor.map(tasks.mark, [str(tmp_path)] * 60, names if sized else iter(names))
    assert len(list(tmp_path.iterdir())) == 60


def test_a_list_is_worked_off_before_anybody_looks(forked: ProcessPoolExecutor, tmp_path: Path) -> None:
    results = forked.map(tasks.mark, itertools.repeat(str(tmp_path)), range(100))
    assert eventually(lambda: len(list(tmp_path.iterdir())) == 100)
    assert list(results) == [None] * 100


def test_partly_taken_when_the_executor_ends() -> None:
    with ProcessPoolExecutor(2, FORK) as executor:
        finite = executor.map(tasks.square, range(100))
        endless = executor.map(tasks.square, Counting())
        assert [next(finite), next(finite)] == [0, 1]
        assert next(endless) == 0
    assert list(finite) == [x * x for x in range(2, 100)]
    # What was submitted is there; then it says why there is no more.
    assert next(endless) == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(endless)


@pytest.mark.parametrize("endless", [itertools.count(), itertools.cycle([1]), itertools.repeat(2)])
def test_the_end_of_an_executor_does_not_wait_for_endless_input(endless: Any) -> None:
    with ProcessPoolExecutor(2, FORK) as executor:
        results = executor.map(tasks.square, endless)
    assert next(results) in (0, 1, 4)


def test_buffersize_bounds_also_what_nobody_takes(forked: ProcessPoolExecutor, tmp_path: Path) -> None:
    results = forked.map(tasks.mark, itertools.repeat(str(tmp_path)), range(100), buffersize=7)
    assert eventually(lambda: len(list(tmp_path.iterdir())) == 7)
    assert forked.submit(tasks.square, 2).result(LIMIT) == 4
    assert len(list(tmp_path.iterdir())) == 7
    assert len(list(results)) == 100


def test_leaving_early_stops_what_runs(forked: ProcessPoolExecutor) -> None:
    for result in forked.map(tasks.sleep, [0.0, *[60.0] * 10], range(11)):
        assert result == 0
        break
    assert [future.result(LIMIT) for future in [forked.submit(tasks.square, x) for x in range(4)]] == [0, 1, 4, 9]


def test_what_came_before_a_failure_in_its_chunk_comes(forked: ProcessPoolExecutor) -> None:
    results = forked.map(lambda x: 1 // (5 - x), range(10), chunksize=10)
    assert [next(results) for _ in range(5)] == [0, 0, 0, 0, 1]
    with pytest.raises(ZeroDivisionError) as caught:
        next(results)
    assert "in <lambda>" in str(caught.value.__cause__)
    assert list(results) == []


def test_a_death_loses_its_chunk_alone(forked: ProcessPoolExecutor) -> None:
    results = forked.map(tasks.die_or_square, range(40), [25] * 40, chunksize=10)
    assert [next(results) for _ in range(20)] == [x * x for x in range(20)]
    with pytest.raises(WorkerLostError, match="die_or_square"):
        next(results)


def test_retries_in_map(forked: ProcessPoolExecutor, tmp_path: Path) -> None:
    results = forked.options(retries=1).map(tasks.die_once_at, itertools.repeat(str(tmp_path / "mark")), range(30))
    assert list(results) == list(range(30))


def test_input_that_raises(forked: ProcessPoolExecutor) -> None:
    """Its error comes where the results end; at once where it is the first thing."""

    def numbers(count: int) -> Iterator[int]:
        yield from range(count)
        raise KeyError("no more")

    results = forked.map(tasks.square, numbers(20), chunksize=1)
    got = []
    with pytest.raises(KeyError, match="no more"):
        for result in results:
            got.append(result)  # noqa: PERF402
    assert got == [x * x for x in range(20)]
    with pytest.raises(KeyError, match="no more"):
        forked.map(tasks.square, numbers(0))


def test_input_may_wait_for_results_of_the_same_executor(forked: ProcessPoolExecutor) -> None:
    def numbers() -> Iterator[int]:
        for x in range(20):
            yield forked.submit(tasks.square, x).result(LIMIT)

    assert list(forked.map(tasks.square, numbers())) == [x**4 for x in range(20)]


def test_after_shutdown() -> None:
    executor = ProcessPoolExecutor(1, FORK)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(tasks.square, [1])


def test_buffersize_of_another_type(forked: ProcessPoolExecutor) -> None:
    with pytest.raises(TypeError, match="buffersize must be an integer or None"):
        forked.map(tasks.square, [1], buffersize=2.0)  # type: ignore[arg-type]


def test_function_that_the_workers_do_not_know(forked: ProcessPoolExecutor) -> None:
    """Defined in the main module after they were started, it goes by value, in chunks too."""
    code = (
        "from mp_ipcchan import ProcessPoolExecutor\n"
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, multiprocessing.get_context('ipcchan_fork')) as executor:\n"
        "        executor.submit(abs, 1).result()\n"
        "        def late(x): return x + 1\n"
        "        print(executor.submit(late, 1).result(), list(executor.map(late, range(3))))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert (ended.stdout, ended.stderr) == ("2 [1, 2, 3]\n", "")


def test_interpreter_that_ends_finishes_maps() -> None:
    code = (
        "from mp_ipcchan import ProcessPoolExecutor\n"
        "import multiprocessing, os\n"
        "def tell(x): os.write(1, b'.')\n"
        "if __name__ == '__main__':\n"
        "    executor = ProcessPoolExecutor(2, multiprocessing.get_context('ipcchan_fork'))\n"
        "    executor.map(tell, iter(range(50)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert (ended.stdout, ended.stderr) == ("." * 50, "")


def test_idle_workers_killed_during_map(forked: ProcessPoolExecutor) -> None:
    results = forked.map(tasks.square, Counting(200), chunksize=2)
    got = [next(results) for _ in range(50)]
    assert eventually(lambda: all(one.state == "idle" for one in forked.stats()))
    for one in forked.stats():
        os.kill(one.pid, signal.SIGKILL)
    assert got + list(results) == [x * x for x in range(200)]
