"""What users write has the types that it should have, as mypy sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mp_ipcchan

pytest.importorskip("mypy")

PROGRAM = """
import mp_ipcchan
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing_extensions import assert_type

context = mp_ipcchan.get_context()
assert_type(context, mp_ipcchan.Context)
stock: BaseContext = mp_ipcchan.get_context("spawn")
with context.Pool(2, task_timeout=1.5, retries=2) as pool:
    assert_type(pool.map(len, ["a"]), list[int])
    pool.stats()
queue: mp_ipcchan.Queue[int] = context.Queue(3)
queue.put_many([1, 2])
assert_type(queue.get_many(2), list[int])
context.JoinableQueue().task_done()
context.SimpleQueue().put(1)
left, right = context.Pipe()
assert_type(left, mp_ipcchan.Connection)
process = context.Process(target=print, args=(1,), daemon=True)
process.start()
with context.Lock():
    context.Event().set()
context.Manager().dict()
context.Value("i", 1)
ProcessPoolExecutor(mp_context=context)
"""
WRONG = ("context.Pool(task_timout=1)", "context.Queue('3')", "mp_ipcchan.get_context(3)", "context.Pipe().send(1)")


def test_contexts(tmp_path: Path) -> None:
    """A context of ours is one of the stdlib's and has what is ours; what is wrong is found."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "\n".join(WRONG))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(program)]
    environment = {**os.environ, "MYPYPATH": str(Path(mp_ipcchan.__file__).parents[1])}
    checked = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    errors = [line for line in checked.stdout.splitlines() if "error:" in line]
    first = PROGRAM.count("\n") + 1
    assert [int(line.split(":")[1]) for line in errors] == [first + number for number in range(len(WRONG))], errors
