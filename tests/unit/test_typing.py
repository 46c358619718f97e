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

SERVERS = """
import typing
import mp_ipcchan
from typing_extensions import assert_type

server = mp_ipcchan.Server("@name", type=int)
assert_type(server, mp_ipcchan.Server[int])
assert_type(server.accept(), tuple[mp_ipcchan.Receiver[int], int])
for receiver, first in server:
    assert_type(first, int)
async def accept() -> None:
    assert_type(await server.accept_async(), tuple[mp_ipcchan.Receiver[int], int])
    async for receiver, first in server:
        assert_type(receiver, mp_ipcchan.Receiver[int])
assert_type(mp_ipcchan.OneShotServer(type=str).accept(timeout=1), tuple[mp_ipcchan.Receiver[str], str])
assert_type(mp_ipcchan.connect("@name", 3, type=int), mp_ipcchan.Sender[int])
# Unions, which are no classes, and pickles.
assert_type(mp_ipcchan.connect("@name", type=typing.Union[int, str]), mp_ipcchan.Sender[typing.Any])
assert_type(mp_ipcchan.Server(type=typing.Union[int, str]).accept()[1], typing.Any)
assert_type(mp_ipcchan.connect("@name"), mp_ipcchan.Sender[typing.Any])
assert_type(mp_ipcchan.OneShotServer().accept(), tuple[mp_ipcchan.Receiver[typing.Any], typing.Any])
def serve(server: mp_ipcchan.Server, one_shot: mp_ipcchan.OneShotServer) -> None:
    server.close()
"""
WRONG_SERVERS = ("mp_ipcchan.connect('@name', type=int).send('')", "server.accept()[1].upper()")


@pytest.mark.parametrize(("right", "wrong"), [(PROGRAM, WRONG), (SERVERS, WRONG_SERVERS)], ids=["contexts", "servers"])
def test_programs(right: str, wrong: tuple[str, ...], tmp_path: Path) -> None:
    """A context of ours is one of the stdlib's and has ours; servers know their type; what is wrong is found."""
    program = tmp_path / "program.py"
    program.write_text(right + "\n".join(wrong))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(program)]
    environment = {**os.environ, "MYPYPATH": str(Path(mp_ipcchan.__file__).parents[1])}
    checked = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    errors = [line for line in checked.stdout.splitlines() if "error:" in line]
    first = right.count("\n") + 1
    assert [int(line.split(":")[1]) for line in errors] == [first + number for number in range(len(wrong))], errors
