"""What the tests of queues and pipes share: processes with an end, and what they do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

from typing_extensions import Self

from mp_ipcchan import JoinableQueue, Queue, SimpleQueue

#: No call of a test waits longer than this (seconds); none that works comes near it.
LIMIT = 30.0
#: More messages than the kernel takes for a queue that nobody reads.
MANY = 100_000
#: Ends the work of a consumer.
STOP = "stop"

AnyQueue: TypeAlias = Queue[Any] | JoinableQueue[Any] | SimpleQueue[Any]


class Crew:
    """Processes of one start method. Leaving the ``with`` block kills those that still run."""

    def __init__(self, method: str = "fork") -> None:
        self._context: Any = multiprocessing.get_context(f"ipcchan_{method}")
        self._processes: list[BaseProcess] = []

    def start(self, target: Callable[..., object], *args: object) -> BaseProcess:
        process: BaseProcess = self._context.Process(target=target, args=args)
        process.start()
        self._processes.append(process)
        return process

    def finish(self, *processes: BaseProcess) -> None:
        """Wait for the end of ``processes``, or of all, which must be a good one."""
        for process in processes or self._processes:
            assert end_of(process) == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(LIMIT)
            process.close()


def end_of(process: BaseProcess) -> int:
    """Wait for a process's end: its exit code, or minus the number of the signal that killed it."""
    assert wait([process.sentinel], LIMIT), f"{process} still runs after {LIMIT} seconds"
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def kill(process: BaseProcess) -> None:
    """Kill a process, and wait until it is gone."""
    process.kill()
    assert end_of(process) == -signal.SIGKILL


def take(queue: AnyQueue) -> Any:
    """The next message, which must come in time."""
    if isinstance(queue, SimpleQueue):
        assert queue._reader.poll(LIMIT), f"nothing came in {LIMIT} seconds"
        return queue.get()
    return queue.get(timeout=LIMIT)


def until(holds: Callable[[], bool], limit: float = LIMIT) -> None:
    """Wait until ``holds()``, which nothing tells of, but fail after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {limit} seconds"
        time.sleep(0.001)


def put_all(queue: AnyQueue, messages: Iterable[object]) -> None:
    for message in messages:
        queue.put(message)


def collect(queue: AnyQueue, results: AnyQueue) -> None:
    """Take messages up to ``STOP``, and put the list of them into ``results``."""
    results.put(list(iter(lambda: take(queue), STOP)))


def pid_of(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


def is_asleep(process: BaseProcess) -> bool:
    """Whether a process waits for something, in the kernel."""
    with open(f"/proc/{pid_of(process)}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def open_count() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))
