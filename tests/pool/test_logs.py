"""What comes along with tasks: log records, warnings, context variables."""

from __future__ import annotations

import contextvars
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor, channel
from mp_ipcchan._pools import _variables

from . import _tasks as tasks
from ._support import FORK, LIMIT, ROOT

NAME = "tests.pool.quiet"


@pytest.fixture
def quiet() -> Iterator[logging.Logger]:
    """A logger of the tests' own, as it was before."""
    logger = logging.getLogger(NAME)
    yield logger
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()
    logger.propagate = True


def test_records_reach_the_parents_handlers(executor: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    """They are there when the result is."""
    executor.submit(tasks.log, "some.module", logging.WARNING, "it took %d s", 5).result(LIMIT)
    (record,) = [one for one in caplog.records if one.name == "some.module"]
    assert (record.getMessage(), record.levelname, record.args) == ("it took 5 s", "WARNING", (5,))
    assert record.process != os.getpid()
    assert record.funcName == "log"


def test_levels_are_the_parents(executor: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture, quiet: Any) -> None:
    """Also when they change while workers run."""

    def logged() -> list[str]:
        caplog.clear()
        for level in (logging.DEBUG, logging.INFO, logging.ERROR):
            executor.submit(tasks.log, NAME, level, logging.getLevelName(level)).result(LIMIT)
        return [record.message for record in caplog.records]

    assert logged() == ["ERROR"]
    with caplog.at_level(logging.INFO):
        assert logged() == ["INFO", "ERROR"]
        with caplog.at_level(logging.DEBUG, NAME):
            assert logged() == ["DEBUG", "INFO", "ERROR"]
        quiet.setLevel(logging.CRITICAL)
        assert logged() == []
        quiet.setLevel(logging.NOTSET)
    assert logged() == ["ERROR"]
    logging.disable(logging.CRITICAL)
    try:
        assert logged() == []
    finally:
        logging.disable(logging.NOTSET)


def test_handlers_are_called_once(start_method: str, quiet: logging.Logger) -> None:
    """Forked workers have inherited them; those that don't propagate have handlers, too."""
    heard: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(f"{record.getMessage()} {os.getpid()}")

    quiet.addHandler(Listening())
    quiet.propagate = False
    with ProcessPoolExecutor(1, multiprocessing.get_context(f"ipcchan_{start_method}")) as executor:
        executor.submit(tasks.log, NAME, logging.ERROR, "once").result(LIMIT)
    assert heard == [f"once {os.getpid()}"]


def test_tracebacks_and_what_cannot_be_pickled(forked: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    forked.submit(tasks.log_exception, NAME).result(LIMIT)
    assert "KeyError: 'lost'" in caplog.text
    forked.submit(tasks.log_unpicklable, NAME).result(LIMIT)
    assert "a lock: <unlocked" in caplog.records[-1].message
    assert "lock object" in caplog.records[-1].lock  # type: ignore[attr-defined]


def test_a_handler_that_raises_or_submits(forked: ProcessPoolExecutor, quiet: logging.Logger) -> None:
    """It is the user's, and hurts nobody: not the pool, nor the task."""
    seen: list[Any] = []

    class Meddling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(forked.submit(tasks.square, 3))
            raise SystemExit(record.getMessage())

    quiet.addHandler(Meddling())
    quiet.propagate = False
    assert forked.submit(tasks.log, NAME, logging.ERROR, "x").result(LIMIT) is None
    assert seen[0].result(LIMIT) == 9


def test_records_of_a_nested_pool_and_of_a_task_that_dies(
    forked: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    forked.submit(tasks.log_nested, NAME).result(LIMIT)
    assert [record.message for record in caplog.records if record.name == NAME] == ["from below"]
    assert forked.submit(tasks.log_and_die, NAME).exception(LIMIT)
    assert caplog.records[-1].message == "last words"


def test_many_records_lose_none(forked: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    futures = [forked.submit(tasks.log, NAME, logging.ERROR, "%d", x) for x in range(1000)]
    for future in futures:
        future.result(LIMIT)
    assert sorted(record.args[0] for record in caplog.records) == list(range(1000))  # type: ignore[index]


def test_warnings_reach_the_parent() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Started here: a worker has the filters of its parent only if it is forked from it.
        with ProcessPoolExecutor(1, FORK) as forked:
            forked.submit(tasks.warn, "old").result(LIMIT)
        # From 3.12 on there is one of a fork beside a thread.
        (warned,) = [one for one in caught if str(one.message) == "old"]
        assert warned.category is DeprecationWarning
        assert warned.filename.endswith("_tasks.py")


def test_nothing_is_printed_twice() -> None:
    """A program that logs to stderr, at the parent's formats and nowhere else."""
    code = (
        "import logging, multiprocessing\n"
        "from mp_ipcchan import ProcessPoolExecutor\n"
        "from tests.pool import _tasks\n"
        "logging.basicConfig(level=logging.INFO, format='%(name)s %(message)s')\n"
        "if __name__ == '__main__':\n"
        "    for way in ('fork', 'spawn', 'forkserver'):\n"
        "        with ProcessPoolExecutor(1, multiprocessing.get_context(f'ipcchan_{way}')) as executor:\n"
        "            executor.submit(_tasks.log, way, logging.INFO, 'said').result()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    assert (ended.returncode, ended.stderr.splitlines()) == (0, ["fork said", "spawn said", "forkserver said"])


# -- context variables -----------------------------------------------------------------------


def test_context_variables_reach_the_task(executor: ProcessPoolExecutor) -> None:
    assert executor.submit(tasks.get_request_id).result(LIMIT) == "none"
    token = tasks.request_id.set(["r", 1])
    try:
        assert executor.submit(tasks.get_request_id).result(LIMIT) == ["r", 1]
        assert list(executor.map(lambda _: tasks.get_request_id(), range(3))) == [["r", 1]] * 3
    finally:
        tasks.request_id.reset(token)
    assert executor.submit(tasks.get_request_id).result(LIMIT) == "none"


def test_each_thread_has_its_own(forked: ProcessPoolExecutor) -> None:
    got: dict[int, Any] = {}

    def ask(number: int) -> None:
        tasks.request_id.set(number)
        got[number] = [forked.submit(tasks.get_request_id).result(LIMIT) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert got == {number: [number] * 20 for number in range(4)}


def test_a_forked_worker_has_none_of_whoever_started_it() -> None:
    token = tasks.request_id.set("the first")
    with ProcessPoolExecutor(1, FORK) as executor:
        assert executor.submit(tasks.get_request_id).result(LIMIT) == "the first"
        tasks.request_id.reset(token)
        assert executor.submit(tasks.get_request_id).result(LIMIT) == "none"


def test_values_that_cannot_travel_stay(forked: ProcessPoolExecutor) -> None:
    token = tasks.request_id.set(threading.Lock())
    try:
        assert forked.submit(tasks.get_request_id).result(LIMIT) == "none"
    finally:
        tasks.request_id.reset(token)


def test_channels_still_travel_beside_them(forked: ProcessPoolExecutor) -> None:
    tx, rx = channel()
    token = tasks.request_id.set("r")
    try:
        with tx, rx:
            forked.submit(tasks.send_through, tx, "x").result(LIMIT)
            assert rx.recv(LIMIT) == "x"
    finally:
        tasks.request_id.reset(token)


def test_which_loop_runs_is_nothing_to_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """anyio refuses to run where this variable says that a loop does."""
    module = types.ModuleType("sniffio")
    module.current = contextvars.ContextVar("current")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sniffio", module)

    def ask() -> Any:
        module.current.set("asyncio")
        tasks.request_id.set("r")
        return _variables.current()

    assert contextvars.Context().run(ask) == ((tasks.__name__, "request_id", "r"),)
    assert contextvars.Context().run(_variables.current) is None
