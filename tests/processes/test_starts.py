"""Children are started and collected by several threads, and killed meanwhile: nobody waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import forkserver, util
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from ..conformance._support import InThread
from ._support import LIMIT, context_of, join

ROOT = Path(__file__).parents[2]
#: How long (seconds) a thread that collects a child gives the other one to come between.
_PAUSE = 0.1


class _Pausing:
    """The fork server's words, which one thread reads late: another has come between, if it can."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read = forkserver.read_signed  # type: ignore[attr-defined]
        self.pausing = threading.Event()
        self.go_on = threading.Event()
        self.done = threading.Event()
        #: Whether who reads next lets the other one go first.
        self.yields = False
        monkeypatch.setattr(forkserver, "read_signed", self)
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()
        assert self.pausing.wait(LIMIT)

    def _collect(self) -> None:
        multiprocessing.active_children()
        self.done.set()

    def __call__(self, fd: int) -> Any:
        if threading.current_thread() is self._thread:
            self.pausing.set()
            self.go_on.wait(_PAUSE)
        elif self.yields:
            self.go_on.set()
            assert self.done.wait(LIMIT)
        return self._read(fd)

    def join(self) -> None:
        self.go_on.set()
        self._thread.join()


def _ended(code: int) -> Any:
    process: Any = context_of("forkserver").Process(target=sys.exit, args=(code,))  # type: ignore[attr-defined]
    process.start()
    assert wait([process.sentinel], LIMIT)
    return process


def test_who_collects_a_child_does_not_read_the_pid_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed in between, and its descriptor's number taken by the next: that one's start waited for ever."""
    first = _ended(7)
    number = first.sentinel
    collecting = _Pausing(monkeypatch)

    def replace() -> Any:
        join(first, 7)
        first.close()
        collecting.yields = True
        second: Any = context_of("forkserver").Process(target=os.getpid)  # type: ignore[attr-defined]
        second.start()
        return second

    second = InThread(replace).result()
    collecting.join()
    assert second.sentinel == number
    join(second)
    second.close()


def test_two_who_collect_a_child_have_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be read once: the other found the end of the stream, and took it for the server's death."""
    process = _ended(7)
    collecting = _Pausing(monkeypatch)
    process.join()
    collecting.join()
    assert process.exitcode == 7
    process.close()


def test_child_that_is_killed_before_it_has_read_what_it_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds: whoever starts it is told by its exit code, and doesn't wait for ever."""
    spawn = util.spawnv_passfds

    def start(*args: Any) -> int:
        pid: int = spawn(*args)
        os.kill(pid, signal.SIGKILL)
        return pid

    process: Any = context_of("spawn").Process(target=len, args=(bytes(1 << 20),))  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(util, "spawnv_passfds", start)
        InThread(process.start).result()
    join(process, -signal.SIGKILL)
    process.close()


_PROGRAM = """\
import multiprocessing, os, signal, sys, threading
from multiprocessing import forkserver
from mp_ipcchan import ProcessPoolExecutor, WorkerLostError, channel
from tests.pool import _tasks as tasks

def stopped():
    forkserver.ensure_running()
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGSTOP)
    return server

def killed_as_it_is_asked(executor):
    read, asked = forkserver.read_signed, threading.Event()
    def read_signed(fd):
        asked.set()
        return read(fd)
    forkserver.read_signed = read_signed
    server = stopped()
    found = []
    thread = threading.Thread(target=lambda: found.append(executor.submit(pow, 2, 5).result(30)))
    thread.start()
    assert asked.wait(30)
    os.kill(server, signal.SIGKILL)
    thread.join()
    return found[0]

def killed_before_it_is_asked(executor):
    server = forkserver._forkserver
    ensure_running = server.ensure_running
    def kill():
        ensure_running()
        del server.ensure_running
        os.kill(server._forkserver_pid, signal.SIGKILL)
        os.waitid(os.P_PID, server._forkserver_pid, os.WEXITED | os.WNOWAIT)
    server.ensure_running = kill
    return executor.submit(pow, 2, 5).result(30)

def stopped_as_a_worker_dies(executor):
    tx, rx = channel()
    task = executor.submit(tasks.say_and_wait, tx, 60.0)
    worker = rx.recv(30)
    server = stopped()
    os.kill(worker, signal.SIGKILL)
    error = task.exception(30)
    os.kill(server, signal.SIGCONT)
    assert isinstance(error, WorkerLostError) and error.exitcode is None, error
    return executor.submit(pow, 2, 5).result(30)

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("ipcchan_forkserver")) as executor:
        print(globals()[sys.argv[1]](executor))
"""


@pytest.mark.parametrize("case", ["killed_as_it_is_asked", "killed_before_it_is_asked", "stopped_as_a_worker_dies"])
def test_fork_server_that_is_killed_or_stopped(case: str, tmp_path: Path) -> None:
    """Whatever becomes of it, whoever waits for a task is told, and the pool goes on with another server."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program, case], capture_output=True, text=True, timeout=LIMIT * 2, env=environment
    )
    assert done.stdout == "32\n", done.stderr
