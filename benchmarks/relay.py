"""One large array that goes from hand to hand: through two processes, and back."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from .cases import Case, Entry
from .shapes import GiB


def _array() -> Any:
    return importlib.import_module("numpy").full(GiB // 8, 1.0)


def _read_only() -> Any:
    array = _array()
    array.flags.writeable = False
    return array


def _memory() -> Any:
    return importlib.import_module("mp_ipcchan").SharedMemory.from_bytes(_array())


def _look(received: Any) -> None:
    """Each process reads a bit of it."""
    array = received.array("f8") if hasattr(received, "array") else received
    if array[0] != 1.0 or array[-1] != 1.0:
        raise ValueError("received something else than was sent")


def _pass_on(source: Any, target: Any) -> None:
    # The first says that this process is up.
    target.put(source.get())
    received = source.get()
    _look(received)
    target.put(received)


def _relay(build: Callable[[], Any], _seconds: float) -> float:
    importlib.import_module("mp_ipcchan")
    context: Any = multiprocessing.get_context("ipcchan")
    # First: the processes find numpy imported.
    sent = build()
    queues = [context.Queue() for _ in range(3)]
    processes = [context.Process(target=_pass_on, args=(queues[at], queues[at + 1]), daemon=True) for at in range(2)]
    for process in processes:
        process.start()
    queues[0].put(None)
    queues[2].get()
    start = time.perf_counter()
    queues[0].put(sent)
    _look(queues[2].get())
    elapsed = time.perf_counter() - start
    for process in processes:
        process.join()
    return elapsed * 1e3


def relay_cases() -> list[Case]:
    """Every case."""
    # Not the stdlib's queue: that takes some 10 s, and 6 GiB of memory.
    builds = {"array": _array, "read-only array": _read_only, "SharedMemory": _memory}
    entries = [
        Entry(name, partial(_relay, build), "array" if build is _array else None, "numpy")
        for name, build in builds.items()
    ]
    return [Case("relay", "relay-1GiB", "1 GiB through two other processes and back", "ms", True, entries)]
