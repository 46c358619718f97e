"""Chunks: several calls of one function as one task, so that function and arguments are pickled once.

How many, the chunks decide that came back: so many as take a certain time, whatever the calls take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import starmap
from typing import Any

from . import _call

#: How much work (seconds) a chunk is to be.
_TARGET = 0.002
_LARGEST = 1024
#: A chunk is at most so many times as large as the one it was judged by.
_GROWTH = 8
#: A worker that has spent so much longer on calls than they were to take (seconds) gives back what it has not begun.
_BUDGET = 0.005


@_call.runner
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


@_call.runner
def run_units(
    function: Callable[..., Any], items: Sequence[Any], unit: int, star: bool
) -> tuple[list[Any], Any, int, float]:
    """In a worker: call ``function`` for each of ``items``, ``unit`` by ``unit``.

    A call that fails ends its unit, not the others. Where they take longer than foreseen it stops early: others may
    be idle. The results, the first failure, how many items were dealt with, and the seconds it took.
    """
    begun = time.perf_counter()
    results: list[Any] = []
    failure = None
    done = 0
    each = starmap if star else map
    for at in range(0, len(items), unit):
        part = items[at : at + unit]
        try:
            results.extend(each(function, part))
        except BaseException as error:
            failure = failure or _call.describe(error)
        done = at + len(part)
        if time.perf_counter() - begun > _BUDGET:
            break
    return results, failure, done, time.perf_counter() - begun


@_call.runner
def run_each(function: Callable[..., Any], items: Sequence[Any]) -> tuple[list[tuple[bool, Any]], float]:
    """In a worker: call ``function`` for each of ``items``; whether each succeeded, with its result or failure."""
    begun = time.perf_counter()
    outcomes: list[tuple[bool, Any]] = []
    for item in items:
        try:
            outcomes.append((True, function(item)))
        except BaseException as error:
            outcomes.append((False, _call.describe(error)))
    return outcomes, time.perf_counter() - begun


@_call.runner
def run_whole(function: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
    """In a worker: the results of ``function`` for all of ``items``, or the first exception."""
    return list(map(function, items))


class ChunkSize:
    """How many calls go into the next chunk: so many as take ``target`` seconds, at most ``largest``."""

    def __init__(
        self, fixed: int | None = None, *, target: float = _TARGET, largest: int = _LARGEST, growth: int = _GROWTH
    ) -> None:
        self._fixed = fixed
        self._target = target
        self._largest = largest
        self._growth = growth
        self.size = fixed or 1

    def learn(self, calls: int, seconds: float) -> None:
        """A chunk of ``calls`` took ``seconds``."""
        if self._fixed is None and calls:
            fitting = int(self._target * calls / max(seconds, 1e-9))
            self.size = max(1, min(fitting, calls * self._growth, self._largest))
