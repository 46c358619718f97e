"""Runs one of the programs beside this in a session of its own, so that nothing of it is left when it has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

#: How long (seconds) one run may take.
LIMIT = 900


def run(program: str, *args: str) -> dict[str, Any]:
    """Its report, which is the last line that it prints, and in ``"err"`` what it says on standard error."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, str(Path(__file__).parent / program), *args]
    # Not pipes: a process that it leaves behind would hold them open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            ended = process.wait(LIMIT) is not None
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        out.seek(0)
        err.seek(0)
        lines, said = out.read().splitlines(), err.read()
    if not ended:
        pytest.fail(f"the run did not end:\n{said[-5000:]}")
    assert lines, said[-5000:]
    report: dict[str, Any] = json.loads(lines[-1])
    report["err"] = said
    return report
