"""What the tests of segments share: arrays that tell their number, and a look at what a sender keeps."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mp_ipcchan import Receiver, Sender

from ..processes._support import context_of, started

Array: TypeAlias = "npt.NDArray[np.uint64]"

KIB, MIB = 1 << 10, 1 << 20


def array(number: int, size: int) -> Array:
    """An array of ``size`` bytes whose every item depends on its place and on ``number``."""
    return np.arange(size // 8, dtype=np.uint64) * np.uint64(7919) + np.uint64(number)


def check(received: Array, number: int, size: int) -> None:
    assert received.nbytes == size
    assert np.array_equal(received, array(number, size)), f"array {number} did not arrive right"


def kept(tx: Sender[Any]) -> list[int]:
    """How much each segment takes that a sender keeps (bytes)."""
    return tx._open_link().outlet.segments.kept


def mapped(rx: Receiver[Any]) -> bool:
    """Whether a receiver keeps segments mapped."""
    return not rx._open_link().inlet.segments.is_empty


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_memory_of(pid: int | str) -> int:
    """How much shared memory a process has touched in its mappings (bytes)."""
    with open(f"/proc/{pid}/status") as file:
        [line] = [line for line in file if line.startswith("RssShmem")]
    return int(line.split()[1]) * KIB


def leave_address_space(size: int) -> None:
    """Let this process have so much more memory (bytes), and no more."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * mmap.PAGESIZE + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


NOBODY = 65534
_PR_SET_DUMPABLE = 4


def _limited(run: Callable[..., None], limits: dict[int, int], user: bool, args: tuple[Any, ...]) -> None:
    if user and os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        # As a program that this user has started: else /proc is closed to it.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    run(*args)


def in_child(run: Callable[..., None], limits: dict[int, int], *args: Any, user: bool = False) -> None:
    """Call ``run`` in a process with these limits, as another user than root where ``user``; it must end well."""
    with started(context_of("fork"), _limited, run, limits, user, args):
        pass
