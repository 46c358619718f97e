"""Pools and executors of two workers, with tasks so small that only handing them out and back counts."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

from .cases import Case, Entry, per_call, rate

WORKERS = 2


def tiny(number: int) -> int:
    """The task."""
    return number


def _make_ours() -> Any:
    return importlib.import_module("mp_ipcchan").ProcessPoolExecutor(WORKERS)


def _make_pool() -> Any:
    importlib.import_module("mp_ipcchan")
    return multiprocessing.get_context("ipcchan").Pool(WORKERS)


def _make_stdlib() -> Any:
    return ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork"))


def _make_mp_pool() -> Any:
    return multiprocessing.get_context("fork").Pool(WORKERS)


def _make_loky() -> Any:
    return importlib.import_module("loky").ProcessPoolExecutor(WORKERS)


def _make_billiard() -> Any:
    return importlib.import_module("billiard").get_context("fork").Pool(WORKERS)


class _Joblib:
    """Joblib's calls, on the processes that it keeps."""

    def __init__(self) -> None:
        joblib = importlib.import_module("joblib")
        self._parallel, self._delayed = joblib.Parallel(n_jobs=WORKERS), joblib.delayed(tiny)

    def map(self, _: Callable[..., Any], numbers: range) -> Any:
        return self._parallel(map(self._delayed, numbers))

    def __enter__(self) -> Any:
        self._parallel.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._parallel.__exit__(*error)
        # It would keep them for the next call.
        importlib.import_module("joblib.externals.loky").get_reusable_executor().shutdown()


#: Name, maker, module, the column of ratios.
_EXECUTORS = (
    ("ProcessPoolExecutor", _make_ours, "mp_ipcchan", None),
    ("stdlib executor", _make_stdlib, None, "stdlib executor"),
    ("loky", _make_loky, "loky", None),
)
_POOLS = (
    ("ctx.Pool", _make_pool, "mp_ipcchan", None),
    ("mp.Pool", _make_mp_pool, None, "mp.Pool"),
    ("billiard.Pool", _make_billiard, "billiard", None),
)
_JOBLIB = (("joblib", _Joblib, "joblib", None),)

Work = Callable[[Any, int], object]


def _submit(executor: Any, count: int) -> None:
    futures: list[Future[int]] = [executor.submit(tiny, number) for number in range(count)]
    wait(futures)
    if futures[-1].result() != count - 1:
        raise ValueError("a result is wrong")


def _apply_async(pool: Any, count: int) -> None:
    results = [pool.apply_async(tiny, (number,)) for number in range(count)]
    for number, result in enumerate(results):
        if result.get() != number:
            raise ValueError("a result is wrong")


def _map(pool: Any, count: int, **options: int) -> None:
    last = deque(pool.map(tiny, range(count), **options), maxlen=1)
    if last.pop() != count - 1:
        raise ValueError("a result is wrong")


def _ask(pool: Any) -> None:
    if hasattr(pool, "submit"):
        pool.submit(tiny, 1).result()
    elif hasattr(pool, "apply"):
        pool.apply(tiny, (1,))
    else:
        pool.map(tiny, range(1))


@contextmanager
def _warm(make: Callable[[], Any]) -> Iterator[Any]:
    with make() as pool:
        _map(pool, 200)
        yield pool


def _rate(make: Callable[[], Any], work: Work, seconds: float) -> float:
    with _warm(make) as pool:
        return rate(seconds, partial(work, pool), 200)


def _round_trip(make: Callable[[], Any], seconds: float) -> float:
    with _warm(make) as pool:
        return per_call(seconds, partial(_ask, pool))


def _start(make: Callable[[], Any], _seconds: float) -> float:
    """Milliseconds until a new pool has given its first result; what is imported for it is imported before."""
    with make() as pool:
        _ask(pool)
    start = time.perf_counter()
    with make() as pool:
        _ask(pool)
        return (time.perf_counter() - start) * 1e3


def _entries(makers: Any, run: Callable[..., float], *args: object) -> list[Entry]:
    return [Entry(name, partial(run, make, *args), baseline, module) for name, make, module, baseline in makers]


_K, _US, _MS = "k tasks/s", "us", "ms"


def pool_cases() -> list[Case]:
    """Every case; two workers, one function that returns its argument."""

    def case(name: str, title: str, unit: str, entries: list[Entry]) -> Case:
        return Case("pool", name, title, unit, unit != _K, entries)

    every = (*_EXECUTORS, *_POOLS)
    return [
        case("submit", "submit many, wait for all", _K, _entries(_EXECUTORS, _rate, _submit)),
        case("apply_async", "apply_async many, get all", _K, _entries(_POOLS, _rate, _apply_async)),
        case("map-1", "map(chunksize=1)", _K, _entries(every, _rate, partial(_map, chunksize=1))),
        case("map", "map with default chunks", _K, _entries((*every, *_JOBLIB), _rate, _map)),
        case("task", "one task at a time: submit and wait", _US, _entries((*every, *_JOBLIB), _round_trip)),
        case("start", "a new pool, until its first result", _MS, _entries((*every, *_JOBLIB), _start)),
    ]
