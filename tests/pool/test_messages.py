"""What the errors of pools say."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor, SerializationError, TaskTimeoutError, WorkerLostError

from . import _tasks as tasks
from ._support import FORK, LIMIT, ROOT


def test_time_limit_of_a_chunk(forked: ProcessPoolExecutor) -> None:
    """The time is the chunk's; no call of it has taken longer."""
    view = forked.options(timeout=0.2)
    with pytest.raises(TaskTimeoutError, match=r"^a chunk of calls of sleep took longer than 0\.2 seconds"):
        list(view.map(time.sleep, [0.15] * 3, chunksize=3))
    with pytest.raises(TaskTimeoutError, match=r"^sleep took longer than 0\.2 seconds"):
        list(view.map(time.sleep, [60]))


@pytest.mark.parametrize("call", ["map", "imap"])
def test_time_limit_of_a_chunk_of_a_pool(call: str) -> None:
    with FORK.Pool(1, task_timeout=0.2) as pool:
        with pytest.raises(TaskTimeoutError, match=r"^a chunk of calls of sleep took longer than 0\.2 seconds"):
            list(getattr(pool, call)(time.sleep, [0.15] * 3, chunksize=3))
        with pytest.raises(TaskTimeoutError, match=r"^sleep took longer than 0\.2 seconds"):
            list(getattr(pool, call)(time.sleep, [60]))
    pool.join()


def test_hint_of_a_task_that_was_retried(forked: ProcessPoolExecutor) -> None:
    with pytest.raises(WorkerLostError, match=r"while it ran leave \(run 3 times, as its workers died\)"):
        forked.options(retries=2).submit(tasks.leave, 1).result(LIMIT)
    with pytest.raises(WorkerLostError, match="while it ran leave; the pool goes on"):
        forked.submit(tasks.leave, 1).result(LIMIT)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (tasks.raise_awkward, r"can't be unpickled \(.*\): .*Awkward: one two$"),
        (tasks.raise_unpicklable, "can't be pickled: .*: text of it$"),
    ],
)
def test_exception_that_cannot_travel(forked: ProcessPoolExecutor, task: Any, says: str) -> None:
    with pytest.raises(SerializationError, match=says):
        forked.submit(task).result(LIMIT)
    with pytest.raises(SerializationError, match=says):
        list(forked.map(lambda _: task(), range(2)))


def _raise_verbosely() -> None:
    try:
        raise ValueError("Traceback (most recent call last):\n  the first")
    except ValueError as error:
        raise tasks.Unpicklable("line one\n  line two") from error


def test_exception_of_several_lines_that_cannot_travel(forked: ProcessPoolExecutor) -> None:
    with pytest.raises(SerializationError, match="Unpicklable: line one$"):
        forked.submit(_raise_verbosely).result(LIMIT)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_result_that_cannot_be_pickled(forked: ProcessPoolExecutor) -> None:
    """It is pickle's exception, as with the stdlib's executor; a note says what it is about."""
    with pytest.raises(TypeError) as caught:
        forked.submit(tasks.make_unpicklable).result(LIMIT)
    (note,) = caught.value.__notes__  # type: ignore[attr-defined, unused-ignore]
    assert note.startswith("the result of make_unpicklable can't be pickled: <unlocked")
    with pytest.raises(TypeError) as caught:
        list(forked.map(lambda _: tasks.make_unpicklable(), range(2), chunksize=2))
    assert "the result of a chunk of calls of " in caught.value.__notes__[0]  # type: ignore[attr-defined, unused-ignore]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"retries": "x"}, "retries is how often.*not 'x'"),
        ({"retries": 1.5}, r"retries is how often.*not 1\.5"),
        ({"timeout": "x"}, "timeout is a number of seconds, or None, not 'x'"),
    ],
)
def test_options_of_the_wrong_type(forked: ProcessPoolExecutor, options: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        forked.options(**options)
    if "timeout" in options:
        options = {"task_timeout": options["timeout"]}
    with pytest.raises(TypeError, match=says):
        FORK.Pool(1, **options)


def test_progress_that_is_a_function(forked: ProcessPoolExecutor) -> None:
    with pytest.raises(TypeError, match="progress=True shows a bar"):
        forked.map(tasks.square, [1], progress=print)  # type: ignore[arg-type]
    with FORK.Pool(1) as pool:
        for call in (pool.map, pool.starmap, pool.imap, pool.imap_unordered):
            with pytest.raises(TypeError, match="progress=True shows a bar"):
                call(tasks.square, [1], progress=print)
    pool.join()


@pytest.mark.parametrize(
    ("given", "says"), [("fork", "'fork'"), ("ipcchan_spawn", "'ipcchan_spawn'"), ("spam", "'spawn'")]
)
def test_context_that_is_a_name(given: str, says: str) -> None:
    with pytest.raises(TypeError, match=rf"such as multiprocessing\.get_context\({says}\) gives, not '{given}'"):
        ProcessPoolExecutor(1, mp_context=given)


UNGUARDED = """
import mp_ipcchan
with mp_ipcchan.get_context("spawn").Pool(1) as pool:
    pool.map(abs, [1])
"""


def test_program_without_a_guard(tmp_path: Path) -> None:
    """Under spawn each worker imports it, and begins by starting workers; the error tells what is missing."""
    program = tmp_path / "unguarded.py"
    program.write_text(UNGUARDED)
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=4 * LIMIT, cwd=ROOT)
    assert "ended before they were ready, exit code 1: what they died of" in ended.stderr
    assert ended.stderr.rstrip().endswith('under if __name__ == "__main__": alone')


def test_workers_that_die_in_forks() -> None:
    """There nothing is imported."""
    with ProcessPoolExecutor(1, mp_context=FORK, initializer=tasks.leave, initargs=(3,)) as executor:
        with pytest.raises(BrokenProcessPool, match="exit code 3: what they died of.*is on standard error$"):
            executor.submit(tasks.square, 2).result(LIMIT)
