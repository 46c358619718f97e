"""CPython's own tests of concurrent.futures.ProcessPoolExecutor pass on our contexts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).parent / "run_concurrent_futures.py"
#: How long (seconds) one run may take.
LIMIT = 900


def _is_shipped() -> bool:
    try:
        return importlib.util.find_spec("test.test_concurrent_futures") is not None
    except ModuleNotFoundError:  # there is no ``test`` at all
        return False


def _run(method: str, *options: str) -> dict[str, Any]:
    """One run; its report. The child processes are in a session of their own, so that none outlives it unseen."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen(
        [sys.executable, str(RUNNER), method, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"the run did not end:\n{err[-5000:]}")
    lines = out.splitlines()
    assert lines, err[-5000:]
    report: dict[str, Any] = json.loads(lines[-1])
    report["err"] = err
    return report


@pytest.mark.cpython
@pytest.mark.skipif(not _is_shipped(), reason="this interpreter was built without test.test_concurrent_futures")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_suite_passes(method: str) -> None:
    report = _run(method)
    assert len(report["ran"]) - len(report["skipped"]) > 50, report["err"][-5000:]
    unexpected = report["failed"]
    if unexpected:
        # A test that the stock method fails as well says nothing about us.
        stock = _run(method, "--stock", "--only", *unexpected)
        unexpected = [one for one in unexpected if one not in stock["failed"]]
    assert not unexpected, report["err"][-20000:]
