"""Chunks: several calls of one function as one task, so that function and arguments are pickled once.

How many, the chunks decide that came back: about two milliseconds of work, whatever the calls take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from . import _call

#: How much work (seconds) a chunk is to be.
_TARGET = 0.002
_LARGEST = 1024
#: A chunk is at most so many times as large as the one it was judged by.
_GROWTH = 8


def run_chunk(function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> tuple[list[Any], Any, float]:
    """In a worker: call ``function`` for each of ``calls``, up to the first that fails.

    The results, how the failed one failed (as an outcome's text and exception), and the seconds it took.
    """
    begun = time.perf_counter()
    results: list[Any] = []
    failure = None
    try:
        # One C call runs them all; what was done before a failure stays.
        results.extend(map(function, *zip(*calls, strict=True)) if calls and calls[0] else (function() for _ in calls))
    except BaseException as error:
        failure = _call.describe(error)
    return results, failure, time.perf_counter() - begun


class ChunkSize:
    """How many calls go into the next chunk."""

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self.size = fixed or 1

    def learn(self, calls: int, seconds: float) -> None:
        """A chunk of ``calls`` took ``seconds``."""
        if self._fixed is None and calls:
            fitting = int(_TARGET * calls / max(seconds, 1e-9))
            self.size = max(1, min(fitting, calls * _GROWTH, _LARGEST))
