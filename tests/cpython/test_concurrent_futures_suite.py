"""CPython's own tests of ProcessPoolExecutor pass: the stdlib's on our contexts, and ours in its place."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from ._run import run

#: Tests of the stdlib's executor that ours means to differ from, and why: by their class's and their own name's end.
DEVIATIONS = {
    "DeadlockTest.test_error_at_task_unpickle": "a task that can't be unpickled is to break the pool; here it fails",
    "DeadlockTest.test_exit_at_task_unpickle": "a task whose unpickling exits is to break the pool; here it fails",
    "DeadlockTest.test_error_during_result_unpickle_in_result_handler": "such a result is to break the pool, too",
    "DeadlockTest.test_exit_during_result_unpickle_in_result_handler": "such a result is to break the pool, too",
    "DeadlockTest.test_shutdown_deadlock_pickle": "reads the private _executor_manager_thread",
    "FailingInitializerTest.test_initializer": "reads the private _broken",
    "ProcessPoolExecutorTest.test_killed_child": "reads the private _processes, and demands that one death breaks all",
    "ProcessPoolExecutorTest.test_max_tasks_per_child": (
        "demands that max_tasks_per_child is refused under fork, and reads _processes"
    ),
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": "reads the private _mp_context",
    "ProcessPoolExecutorTest.test_max_tasks_early_shutdown": "reads the private _processes",
    "ProcessPoolExecutorTest.test_python_finalization_error": (
        "makes the start of the second thread fail, which is the stdlib's queue's, and expects a broken pool"
    ),
    "ProcessPoolExecutorTest.test_idle_process_reuse_one": "reads the private _processes",
    "ProcessPoolExecutorTest.test_idle_process_reuse_multiple": "reads the private _processes",
    "ProcessPoolExecutorTest.test_saturation": "reads the private _processes",
    "ShutdownTest.test_cancel_futures": (
        "expects that some tasks run at once; ours gives none to a worker that is still starting, so all are cancelled"
    ),
    "ShutdownTest.test_context_manager_shutdown": "reads the private _processes",
    "ShutdownTest.test_del_shutdown": "reads the private _executor_manager_thread",
    "ShutdownTest.test_processes_terminate": "reads the private _processes",
    "ShutdownTest.test_shutdown_no_wait": "reads the private _processes",
}


def _is_shipped() -> bool:
    try:
        return importlib.util.find_spec("test.test_concurrent_futures") is not None
    except ModuleNotFoundError:  # there is no ``test`` at all
        return False


def _run(method: str, *options: str) -> dict[str, Any]:
    return run("run_concurrent_futures.py", method, *options)


@pytest.mark.cpython
@pytest.mark.skipif(not _is_shipped(), reason="this interpreter was built without test.test_concurrent_futures")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_suite_passes(method: str) -> None:
    report = _run(method)
    assert len(report["ran"]) - len(report["skipped"]) > 50, report["err"][-5000:]
    _judge(method, report, report["failed"])


@pytest.mark.cpython
@pytest.mark.skipif(not _is_shipped(), reason="this interpreter was built without test.test_concurrent_futures")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_suite_passes_on_our_executor(method: str) -> None:
    # Not run at all: where they fail half-way, they leave executors that nobody shuts down.
    report = _run(method, "--executor", "--skip", *DEVIATIONS)
    assert len(report["ran"]) - len(report["skipped"]) > 35, report["err"][-5000:]
    _judge(method, report, report["failed"])


def _judge(method: str, report: dict[str, Any], unexpected: list[str]) -> None:
    """Fail where a test fails that the stock method passes; others say nothing about us."""
    if unexpected:
        stock = _run(method, "--stock", "--only", *unexpected)
        unexpected = [one for one in unexpected if one not in stock["failed"]]
    assert not unexpected, report["err"][-20000:]
