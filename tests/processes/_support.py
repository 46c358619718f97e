"""What the tests of processes share: children and programs with an end, and what they have open."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import mp_ipcchan

from ..conformance._support import LIMIT, attempts

SOURCE = Path(mp_ipcchan.__file__).parents[1]

METHODS = ("fork", "spawn", "forkserver")


def context_of(method: str) -> BaseContext:
    """Our context that starts processes so."""
    return multiprocessing.get_context(f"ipcchan_{method}")


@contextmanager
def running(process: BaseProcess) -> Iterator[BaseProcess]:
    """Start ``process``; no process is left after the block, however it ends."""
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


@contextmanager
def started(
    context: BaseContext, target: Callable[..., object], *args: object, **kwargs: object
) -> Iterator[BaseProcess]:
    """A process that calls ``target``, and has done so without an error by the end of the block."""
    process = context.Process(target=target, args=args, kwargs=kwargs)  # type: ignore[attr-defined]
    with running(process):
        yield process
        join(process)


def join(process: BaseProcess, exitcode: int = 0) -> None:
    """Wait until the process has ended, with this exit code."""
    process.join(LIMIT)
    assert process.exitcode == exitcode, f"exit code {process.exitcode}, not {exitcode}"


def kill(process: BaseProcess) -> None:
    """Kill the process, and wait for its death."""
    process.kill()
    join(process, -9)


@contextmanager
def program(path: Path, source: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A running Python program with this source, in a file at ``path``; it is killed where it outlives the block."""
    path.write_text(textwrap.dedent(source))
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen(
        [sys.executable, str(path), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def output_of(path: Path, source: str, *args: str) -> str:
    """What a program prints, which must end well within the limit, and without a word on its stderr."""
    with program(path, source, *args) as process:
        return finish(process)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a program that must end well; what it printed."""
    try:
        out, err = process.communicate(timeout=2 * LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the program did not end:\n{process.communicate()[1]}")
    assert (process.returncode, err) == (0, ""), err
    return out


def descriptors_of(process: BaseProcess) -> int:
    """How many descriptors a child has open."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail where it never does."""
    for _ in attempts():
        if condition():
            return


def nothing(*_: Any) -> None:
    """The target of a process that does nothing."""
