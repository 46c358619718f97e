"""Every method of a Pool, in a program that prints the same wherever it runs.

    python pool_tour.py                                  # the stock context
    python pool_tour.py --context ipcchan                # mp_ipcchan's workers
    MP_IPCCHAN_ENGINE=dask://host:port python pool_tour.py --context ipcchan      # a Dask cluster

It factors numbers and counts words: small work, so that what is to be seen is the Pool.
"""

import argparse
import math
import multiprocessing
import threading
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from multiprocessing.pool import Pool
from typing import Any

import mp_ipcchan  # noqa: F401 - registers the "ipcchan" contexts

TEXT = """
the mill turns while the river runs and the river runs while the snow melts
the miller sleeps while the mill turns and the snow melts while the miller sleeps
""".strip()

#: Set by the initializer, in each worker.
separator = "?"


# -- In the workers ------------------------------------------------------------------------


def set_separator(value: str) -> None:
    global separator
    separator = value


def factors(number: int) -> list[int]:
    """The prime factors of ``number``, in order."""
    if number < 1:
        raise ValueError(f"{number} has no prime factors")
    found = []
    divisor = 2
    while number > 1:
        if divisor * divisor > number:
            divisor = number
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found


def shown(number: int) -> str:
    return f"{number} = {separator.join(map(str, factors(number))) or '1'}"


def count_words(line: str, longest: int) -> Counter[str]:
    return Counter(word for word in line.split() if len(word) <= longest)


def power(base: int, exponent: int, *, modulus: int | None = None) -> int:
    return pow(base, exponent, modulus)


# -- In the parent -------------------------------------------------------------------------


def tour(pool: Pool) -> Iterator[str]:
    """What each method does, line by line."""
    yield f"apply: {pool.apply(power, (3, 5))} {pool.apply(power, (3, 50), {'modulus': 1000})}"
    yield f"map: {pool.map(shown, range(90, 96))}"
    yield f"map, chunks of 7: {sum(pool.map(math.isqrt, range(1000), 7))}"
    counts = pool.starmap(count_words, [(line, 5) for line in TEXT.splitlines()])
    yield f"starmap: {sorted(sum(counts, Counter()).items())}"
    yield f"imap: {list(pool.imap(factors, (2**n - 1 for n in range(8, 14))))}"
    yield f"imap, chunks of 3: {list(pool.imap(math.isqrt, range(0, 200, 13), 3))}"
    yield f"imap_unordered: {sorted(pool.imap_unordered(shown, [64, 81, 100]))}"
    yield from waiting(pool)
    yield from failing(pool)


def waiting(pool: Pool) -> Iterator[str]:
    """Results that are there later."""
    heard: list[Any] = []
    called = threading.Semaphore(0)

    def hear(value: Any) -> None:
        heard.append(value)
        called.release()

    one = pool.apply_async(power, (2, 100), callback=hear)
    called.acquire()
    many = pool.map_async(factors, [12, 13, 14], callback=hear)
    called.acquire()
    pairs = pool.starmap_async(power, [(2, 3), (3, 2)], callback=hear)
    called.acquire()
    for result in (one, many, pairs):
        result.wait()
    yield f"async: {one.get()} {many.get(10)} {pairs.get()}"
    yield f"ready, successful: {one.ready()} {many.successful()}"
    yield f"called back: {heard == [one.get(), many.get(), pairs.get()]}"
    results = pool.imap(factors, [10, 11])
    yield f"next: {next(results)} {results.next(timeout=10)}"


def failing(pool: Pool) -> Iterator[str]:
    """What a task raises is raised where its result is asked for; the other tasks are done."""
    heard: list[BaseException] = []
    result = pool.apply_async(factors, (0,), error_callback=heard.append)
    for name, run in (
        ("apply_async", result.get),
        ("map", lambda: pool.map(factors, [4, -4, 6], 1)),
        ("starmap", lambda: pool.starmap(power, [(2, 2), (2, "x")], 1)),
    ):
        try:
            run()
        except (ValueError, TypeError) as error:
            yield f"{name} raises {type(error).__name__}: {error} (from a {type(error.__cause__).__name__})"
    yield f"successful: {result.successful()}, called back with {heard}"
    results = pool.imap(factors, [8, 0, 9])
    seen: list[Any] = []
    while True:
        try:
            seen.append(next(results))
        except StopIteration:
            break
        except ValueError as error:
            seen.append(str(error))
    yield f"imap: {seen}"


def ending(ctx: BaseContext) -> Iterator[str]:
    """close, join and terminate."""
    pool = ctx.Pool(2)
    result = pool.map_async(factors, range(1, 200))
    pool.close()
    pool.join()
    yield f"after close and join: {len(result.get())} results"
    for refused in (pool.apply, pool.map_async):
        try:
            refused(factors, [5])
        except ValueError as error:
            yield f"then: {error}"
    pool = ctx.Pool(2)
    try:
        pool.join()
    except ValueError as error:
        yield f"join before close: {error}"
    pool.terminate()
    pool.join()
    yield "terminated"


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method of a Pool.")
    parser.add_argument(
        "--context", default=None, help="a name for multiprocessing.get_context (default: the stock one)"
    )
    args = parser.parse_args()
    ctx = multiprocessing.get_context(args.context)
    with ctx.Pool(2, set_separator, (" x ",)) as pool:
        for line in tour(pool):
            print(line)
    for line in ending(ctx):
        print(line)


if __name__ == "__main__":
    main()
