"""What the tests of pools share."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: For what doesn't depend on how workers start.
FORK: Any = multiprocessing.get_context("ipcchan_fork")
#: How long (seconds) anything may take that ends by itself.
LIMIT = 30.0


def workers() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid}


def runs(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        # It ended before this was opened, or before it was read.
        return False


def eventually(condition: Callable[[], bool], limit: float = LIMIT) -> bool:
    """Whether the condition holds within ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
