"""Cases: what one process can time by itself (a pool's tasks, making a channel), as shapes are for several.

A case runs in a child of its own, which is killed, with all its children, if it isn't done in time. Systems are
interleaved, and what comes of it is an ``Outcome`` as with shapes.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection

from .harness import Outcome, RoundError

_fork = multiprocessing.get_context("fork")


class SkipCaseError(Exception):
    """Raised by an entry that can't run here, with the reason."""


@dataclass(frozen=True)
class Entry:
    """How one system does it: ``run(seconds)`` measures for about so long, and gives the figure."""

    system: str
    run: Callable[[float], float]
    baseline: str | None = None
    module: str | None = None


@dataclass(frozen=True)
class Case:
    """What is to be done; ``group`` is the table that it is in."""

    group: str
    name: str
    title: str
    unit: str
    lower_is_better: bool
    entries: Sequence[Entry]
    #: How long a round should take.
    seconds: float = 0.3


def run_case(case: Case, rounds: int, limit: float, progress: Callable[[str], None]) -> list[Outcome]:
    """Measure every entry, interleaved."""
    outcomes = [Outcome(entry.system, entry.baseline, unit=case.unit) for entry in case.entries]
    for number in range(1, rounds + 1):
        for entry, outcome in zip(case.entries, outcomes, strict=True):
            if entry.module and find_spec(entry.module.partition(".")[0]) is None:
                outcome.skipped = f"{entry.module} is not installed"
            if outcome.skipped or outcome.failed:
                continue
            progress(f"{case.name}: round {number} of {rounds}, {entry.system}")
            try:
                outcome.figures.append(_in_child(entry, case.seconds, limit))
            except SkipCaseError as reason:
                outcome.skipped = str(reason)
            except RoundError as failure:
                outcome.failed, outcome.detail = f"in round {number}: {failure}", failure.detail
    return outcomes


def _in_child(entry: Entry, seconds: float, limit: float) -> float:
    ours, theirs = _fork.Pipe(duplex=False)
    # Not a daemon: it may have children.
    process = _fork.Process(target=_run, args=(entry, seconds, limit, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            raise RoundError(f"not done after {limit:.0f} s")
        report = ours.recv()
        process.join(limit)
    except EOFError:
        process.join(limit)
        raise RoundError(f"died, exit code {process.exitcode}") from None
    finally:
        ours.close()
        # Its children, too: it leads a group of its own.
        with contextlib.suppress(ProcessLookupError):
            if process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        process.close()
    if isinstance(report, Exception):
        raise report
    return float(report)


def _run(entry: Entry, seconds: float, limit: float, line: Connection) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(math.ceil(limit) + 5)
    report: float | Exception
    try:
        report = entry.run(seconds)
    except SkipCaseError as reason:
        report = reason
    except Exception as error:
        report = RoundError(traceback.format_exception_only(error)[-1].strip(), traceback.format_exc())
    line.send(report)


def per_call(seconds: float, call: Callable[[], object], batch: int = 1) -> float:
    """How long one of the ``batch`` things that ``call`` does takes (microseconds), measured for about ``seconds``."""
    call()
    done = 0
    start = time.perf_counter()
    while True:
        call()
        done += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / done / batch * 1e6


def rate(seconds: float, work: Callable[[int], object], count: int) -> float:
    """How many thousand a second ``work(count)`` does, with as many at once as take about ``seconds``."""
    work(count)
    while True:
        start = time.perf_counter()
        work(count)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds / 2:
            return count / elapsed / 1e3
        count = math.ceil(count * min(8.0, seconds / elapsed))
