"""``ctx.Pool(engine=...)`` and ``MP_IPCCHAN_ENGINE``: the same Pool on any executor."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures import ProcessPoolExecutor as StdlibExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor, TaskTimeoutError, WorkerLostError

from . import _tasks as tasks
from ._support import FORK, ROOT, eventually

LIMIT = 60.0
TOUR = ROOT / "examples" / "pool_tour.py"


@pytest.fixture(params=[ThreadPoolExecutor, StdlibExecutor, ProcessPoolExecutor])
def engine(request: pytest.FixtureRequest) -> Iterator[Executor]:
    options = {} if request.param is ThreadPoolExecutor else {"mp_context": multiprocessing.get_context("fork")}
    with request.param(2, **options) as executor:
        yield executor


@pytest.fixture
def pool(engine: Executor) -> Iterator[Any]:
    with FORK.Pool(engine=engine) as made:
        yield made
    made.join()


def test_results(pool: Any) -> None:
    assert repr(pool) == "<mp_ipcchan.Pool state=RUN pool_size=2>"
    assert pool.apply(tasks.add, (1,), {"y": 2}) == 3
    expected = [x * x for x in range(300)]
    for chunksize in (None, 1, 7):
        assert pool.map(tasks.square, range(300), chunksize) == expected
        assert pool.map_async(tasks.square, iter(range(300)), chunksize).get(LIMIT) == expected
        assert pool.starmap(pow, [(x, 2) for x in range(300)], chunksize) == expected
        assert list(pool.imap(tasks.square, range(300), chunksize)) == expected
        assert sorted(pool.imap_unordered(tasks.square, iter(range(300)), chunksize)) == expected
    assert list(itertools.islice(pool.imap(tasks.square, itertools.count()), 50)) == expected[:50]
    assert pool.map(lambda x: x + 1, range(5)) == [1, 2, 3, 4, 5]


def test_stats(pool: Any, engine: Executor) -> None:
    """Of workers of ours; nothing is known of others'."""
    pool.map(tasks.square, range(10))
    assert eventually(lambda: all(one.state == "idle" for one in pool.stats()))
    assert bool(pool.stats()) == isinstance(engine, ProcessPoolExecutor)


def test_failures(pool: Any) -> None:
    with pytest.raises(ValueError, match="what happened"):
        pool.apply(tasks.fail, ("what happened",))
    with pytest.raises(ValueError, match="item 3"):
        pool.map(tasks.raise_at_three, range(10), 1)
    iterator = pool.imap(tasks.raise_at_three, range(6))
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(iterator)
    assert list(iterator) == [4, 5]
    heard: list[BaseException] = []
    result = pool.apply_async(tasks.fail, ("x",), error_callback=heard.append)
    result.wait(LIMIT)
    assert [str(one) for one in heard] == ["x"]


def test_what_strangers_cannot_do_by_themselves() -> None:
    """Lambdas, the remote traceback, and results that can't be pickled: as with workers of our own."""
    with StdlibExecutor(1, multiprocessing.get_context("fork")) as executor, FORK.Pool(engine=executor) as pool:
        offset = 3
        assert pool.apply(lambda x: x + offset, (1,)) == 4
        with pytest.raises(ValueError, match="x") as caught:
            pool.apply(tasks.fail, ("x",))
        assert type(caught.value.__cause__) is multiprocessing.pool.RemoteTraceback  # type: ignore[attr-defined]
        assert "raise ValueError(message)" in str(caught.value.__cause__)
        with pytest.raises(multiprocessing.pool.MaybeEncodingError, match="Error sending result"):  # type: ignore[attr-defined]
            pool.apply(tasks.make_unpicklable)
        with pytest.raises(Exception, match="can't be unpickled"):
            pool.apply(tasks.raise_awkward)
        with pytest.raises(TypeError, match="pickle"):
            pool.apply(tasks.echo, (threading.Lock(),))
        assert pool.apply(tasks.square, (3,)) == 9


def test_initializer(engine: Executor) -> None:
    """It runs once in each process that works for the pool, ahead of its first task."""
    if isinstance(engine, ThreadPoolExecutor):
        before = tasks.state
    with FORK.Pool(None, tasks.initialize, ("set",), engine=engine) as pool:
        assert {pool.apply(tasks.get_state) for _ in range(6)} == {"set"}
    pool.join()
    if isinstance(engine, ThreadPoolExecutor):
        tasks.state = before


def test_executor_outlives_the_pool(engine: Executor) -> None:
    pool = FORK.Pool(engine=engine)
    result = pool.map_async(tasks.square, iter(range(200)))
    iterator = pool.imap(tasks.square, iter(range(500)))
    pool.close()
    with pytest.raises(ValueError, match="Pool not running"):
        pool.apply(tasks.square, (1,))
    pool.join()
    assert result.get(0) == [x * x for x in range(200)]
    assert list(iterator) == [x * x for x in range(500)]
    assert engine.submit(tasks.square, 3).result(LIMIT) == 9


def test_leaving_ends_an_endless_map(engine: Executor) -> None:
    with FORK.Pool(engine=engine) as pool:
        result = pool.map_async(tasks.square, itertools.count())
        pool.apply(tasks.square, (1,))
    with pytest.raises(BrokenProcessPool, match="the pool was terminated"):
        result.get(LIMIT)
    pool.join()
    assert engine.submit(tasks.square, 3).result(LIMIT) == 9


def test_broken_executor() -> None:
    """What the stdlib's executor makes of a death ends a map, and hangs nothing."""
    with StdlibExecutor(1, multiprocessing.get_context("fork")) as executor, FORK.Pool(engine=executor) as pool:
        with pytest.raises(BrokenProcessPool):
            pool.apply(tasks.die)
        with pytest.raises(BrokenProcessPool):
            pool.map(tasks.square, itertools.count())
        with pytest.raises(BrokenProcessPool):
            list(pool.imap(tasks.square, itertools.count()))


def test_limits_need_an_executor_that_can_stop_tasks(engine: Executor, tmp_path: Path) -> None:
    if not isinstance(engine, ProcessPoolExecutor):
        for options in ({"task_timeout": 1.0}, {"retries": 1}):
            with pytest.raises(ValueError, match="task_timeout and retries need workers that can be stopped"):
                FORK.Pool(engine=engine, **options)
        return
    with FORK.Pool(engine=engine, task_timeout=0.3) as pool:
        with pytest.raises(TaskTimeoutError):
            pool.apply(tasks.sleep, (60.0,))
    with FORK.Pool(engine=engine, retries=1) as pool:
        with pytest.raises(WorkerLostError):
            pool.apply(tasks.leave, (1,))
        assert pool.apply(tasks.square, (2,)) == 4


def test_maxtasksperchild_is_not_for_others() -> None:
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(ValueError, match="maxtasksperchild needs workers of the pool's own"):
            FORK.Pool(engine=executor, maxtasksperchild=3)


class _Client:
    """As Dask's: no executor, though it has a ``submit``, but one gives one."""

    def submit(self) -> None: ...

    def get_executor(self) -> None: ...


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ("dask://127.0.0.1:8786", "not str; .*MP_IPCCHAN_ENGINE=dask://host:port.*executor"),
        (ThreadPoolExecutor, "ThreadPoolExecutor is a class"),
        (_Client(), r"not _Client; .*get_executor\(\)"),
        (3, "not int$"),
    ],
)
def test_what_is_no_engine(engine: Any, text: str) -> None:
    """The error says what to give in its place."""
    with pytest.raises(TypeError, match=text):
        FORK.Pool(1, engine=engine)


# -- the environment's engine ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("ray://127.0.0.1:1", "there is no engine 'ray'; use dask://host:port"),
        ("127.0.0.1:8786", "use dask://host:port"),
        ("dask://", "does not name a scheduler"),
        ("dask://somewhere", "does not name a scheduler"),
        ("dask://somewhere:port", "does not name a scheduler"),
        ("dask://somewhere:1/path", "does not name a scheduler"),
    ],
)
def test_url_that_makes_no_sense(url: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_IPCCHAN_ENGINE", url)
    with pytest.raises(ValueError, match=text):
        FORK.Pool(1)


def test_dask_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_IPCCHAN_ENGINE", "dask://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"needs Dask; install mp_ipcchan\[dask\]"):
        FORK.Pool(1)


def _tour(*options: str, **environment: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(TOUR), *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


@pytest.fixture(scope="module")
def expected() -> str:
    """What the tour prints with the stock Pool."""
    return _tour("--context", "fork")


def test_tour(start_method: str, expected: str) -> None:
    assert _tour("--context", f"ipcchan_{start_method}") == expected
    assert len(expected.splitlines()) > 15


needs_dask = pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is not installed")

_CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None, silence_logs=50
    ) as cluster:
        print(cluster.scheduler_address.replace("tcp", "dask"), flush=True)
        sys.stdin.read()
"""

_CHECKS = """
import itertools, multiprocessing, os, sys
from distributed import Client
import mp_ipcchan
from tests.pool import _tasks

def twice(x):
    return 2 * x

if __name__ == "__main__":
    with Client(sys.argv[1].replace("dask", "tcp"), set_as_default=False) as client:
        with multiprocessing.get_context("ipcchan").Pool(engine=client.get_executor()) as pool:
            print(pool)
            # Equal calls are calls all the same.
            pids = [pool.apply(os.getpid) for _ in range(3)] + pool.map(_tasks.pid_after, [0.05] * 8, 1)
            print(os.getpid() not in pids, len(set(pids)) == 2)
            print(pool.map(twice, range(5)), pool.map(lambda x: x + 1, range(100))[-1])
            print(list(itertools.islice(pool.imap(twice, itertools.count()), 5)))
            for task in (_tasks.raise_awkward, _tasks.make_unpicklable, _tasks.raise_unpicklable):
                try:
                    pool.apply(task)
                except Exception as error:
                    print(type(error).__name__)
        pool.join()
        print(client.submit(twice, 4).result())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Dask cluster of two processes: the address of its scheduler. In a process of its own, with all its threads."""
    with subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdin
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address.startswith("dask://"), "the cluster did not start"
        yield address
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT)
        process.kill()


@needs_dask
def test_tour_on_dask(cluster: str, expected: str) -> None:
    """An unchanged program, initializer of its main module included."""
    assert _tour("--context", "ipcchan_fork", MP_IPCCHAN_ENGINE=cluster) == expected


@needs_dask
def test_dask_executor(cluster: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _CHECKS, cluster],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "<mp_ipcchan.Pool state=RUN pool_size=2>",
        "True True",
        "[0, 2, 4, 6, 8] 100",
        "[0, 2, 4, 6, 8]",
        "SerializationError",
        "MaybeEncodingError",
        "SerializationError",
        "8",
    ]


@needs_dask
def test_nobody_answers() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        code = (
            "import multiprocessing, mp_ipcchan, mp_ipcchan._pools._engine_url as url\n"
            "url._PATIENCE = 0.5\n"
            "try:\n"
            "    multiprocessing.get_context('ipcchan').Pool(1)\n"
            "except ConnectionError as error:\n"
            "    print(error)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MP_IPCCHAN_ENGINE": f"dask://127.0.0.1:{port}"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=True,
        )
    assert f"dask://127.0.0.1:{port}': no scheduler answers there" in ended.stdout, ended.stderr
