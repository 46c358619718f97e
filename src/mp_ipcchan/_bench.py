"""``python -m mp_ipcchan bench``: this machine's figures beside the stdlib's, in half a minute.

Needs nothing but the package. ``benchmarks/`` in the repository measures more, and other libraries too.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from ._channel import channel
from ._pools._executor import ProcessPoolExecutor as OurExecutor

_ROUNDS = 5
_WORKERS = 2
_SMALL = ("task", 17, 3.5)
_LARGE = bytearray(1 << 20)

# Children are forked by the stdlib's context, for both sides alike.
_stock = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class _Line:
    """What is measured: ours and the stdlib's way to do it, each of which takes a count and returns seconds."""

    title: str
    unit: str
    ours: Callable[[int], float]
    stock: Callable[[int], float]
    count: int
    #: The figure for so many in so many seconds.
    figure: Callable[[int, float], float]


def report(quick: bool = False) -> str:
    """Measure all, and say how it compares. ``quick``: with so few messages that the figures mean little."""
    rows = [("", "", "ours", "stdlib", "ratio")]
    for line in _lines():
        count = max(2, line.count // 50) if quick else line.count
        ours, stock, ratios = _measure(line, count, 1 if quick else _ROUNDS)
        rows.append((line.title, line.unit, _number(ours), _number(stock), f"{ratios:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join((title.ljust(widths[0]), unit.ljust(widths[1]), *map(str.rjust, figures, widths[2:])))
        for title, unit, *figures in rows
    ]
    where = (
        f"CPython {platform.python_version()}, {platform.system()} {platform.release()}, {os.cpu_count()} processors"
    )
    return "\n".join(
        (where, "", *table, "", "ratio: how many times as fast as the stdlib's, the median of interleaved rounds")
    )


def _measure(line: _Line, count: int, rounds: int) -> tuple[float, float, float]:
    """Medians of both figures, and of the speed of ours as a multiple of the other's, round by round."""
    pairs = [(line.ours(count), line.stock(count)) for _ in range(rounds)]
    ours, stock = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return line.figure(count, ours), line.figure(count, stock), statistics.median(two / one for one, two in pairs)


def _lines() -> list[_Line]:
    context = multiprocessing.get_context("ipcchan")

    def one_way(title: str, ours: _Way, stock: _Way) -> _Line:
        ends = partial(_one_way, ours, _SMALL), partial(_one_way, stock, _SMALL)
        return _Line(title, "k msg/s", *ends, 25_000, _thousands)

    return [
        one_way("channel beside SimpleQueue, small tuple", _of_channel, partial(_of_queue, _stock.SimpleQueue)),
        one_way("  send_many, recv_many", _of_channel_many, partial(_of_queue, _stock.SimpleQueue)),
        one_way("Queue, small tuple", partial(_of_queue, context.Queue), partial(_of_queue, _stock.Queue)),
        one_way("Pipe, small tuple", partial(_of_pipe, context), partial(_of_pipe, _stock)),
        _Line(
            "Pipe, there and back",
            "us",
            partial(_round_trip, context),
            partial(_round_trip, _stock),
            3_000,
            lambda count, seconds: seconds / count * 1e6,
        ),
        _Line(
            "Queue, buffers of 1 MiB",
            "GiB/s",
            partial(_one_way, partial(_of_queue, context.Queue), _LARGE),
            partial(_one_way, partial(_of_queue, _stock.Queue), _LARGE),
            100,
            lambda count, seconds: count * len(_LARGE) / seconds / (1 << 30),
        ),
        _Line(
            "executor, tiny tasks",
            "k tasks/s",
            partial(_submit, OurExecutor),
            partial(_submit, partial(ProcessPoolExecutor, mp_context=_stock)),
            2_000,
            _thousands,
        ),
        _Line("Pool.map, chunksize=1", "k tasks/s", partial(_map, context), partial(_map, _stock), 3_000, _thousands),
    ]


def _thousands(count: int, seconds: float) -> float:
    return count / seconds / 1e3


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# -- messages ----------------------------------------------------------------------------------

#: Sends objects; receives at least one of at most so many, and says how many; closes what was made.
_Way = Callable[[], tuple[Callable[[Iterable[Any]], None], Callable[[int], int], Sequence[Any]]]


def _each(put: Callable[[Any], object], objs: Iterable[Any]) -> None:
    for obj in objs:
        put(obj)


def _all(get: Callable[[], Any], most: int) -> int:
    for _ in repeat(None, most):
        get()
    return most


def _of_queue(factory: Callable[[], Any]) -> Any:
    queue = factory()
    return partial(_each, queue.put), partial(_all, queue.get), (queue,)


def _of_pipe(context: Any) -> Any:
    reader, writer = context.Pipe(duplex=False)
    return partial(_each, writer.send), partial(_all, reader.recv), (reader, writer)


def _of_channel() -> Any:
    sender, receiver = channel()
    return partial(_each, sender.send), partial(_all, receiver.recv), (sender, receiver)


def _of_channel_many() -> Any:
    sender, receiver = channel()
    return sender.send_many, lambda most: len(receiver.recv_many(most)), (sender, receiver)


def _one_way(way: _Way, obj: Any, count: int) -> float:
    """Seconds from the moment the other process may send until everything is here."""
    send, receive, ends = way()
    ready, go = _stock.Pipe()

    def produce() -> None:
        send([obj])
        go.recv()
        send(repeat(obj, count))
        # What it has put and the kernel not taken goes on as it was; the end of a process is another way.
        go.recv()

    process = _stock.Process(target=produce)
    process.start()
    receive(1)
    start = time.perf_counter()
    ready.send(None)
    missing = count
    while missing:
        missing -= receive(missing)
    elapsed = time.perf_counter() - start
    ready.send(None)
    process.join()
    for end in (*ends, ready, go):
        end.close()
    return elapsed


def _round_trip(context: Any, count: int) -> float:
    left, right = context.Pipe()

    def answer() -> None:
        for _ in range(count + 1):
            right.send(right.recv())

    process = _stock.Process(target=answer)
    process.start()
    left.send(_SMALL)
    left.recv()
    start = time.perf_counter()
    for _ in repeat(None, count):
        left.send(_SMALL)
        left.recv()
    elapsed = time.perf_counter() - start
    process.join()
    left.close()
    right.close()
    return elapsed


# -- tasks -------------------------------------------------------------------------------------


def _submit(make: Callable[[int], Executor], count: int) -> float:
    with make(_WORKERS) as executor:
        wait([executor.submit(abs, number) for number in range(100)])
        start = time.perf_counter()
        wait([executor.submit(abs, number) for number in range(count)])
        return time.perf_counter() - start


def _map(context: Any, count: int) -> float:
    with context.Pool(_WORKERS) as pool:
        pool.map(abs, range(100), chunksize=1)
        start = time.perf_counter()
        pool.map(abs, range(count), chunksize=1)
        return time.perf_counter() - start
