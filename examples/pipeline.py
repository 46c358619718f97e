"""A pipeline of channels: workers look through Python's standard library and stream back what they find.

Each worker gets one Receiver as its argument. Everything else comes through it: jobs, which carry
the files to look at and the Sender for what is found in them, since a Sender is a value like any other.
All workers send into one channel.

Nobody announces the end. A stream is over when the last Sender of it is gone: the parent closes the
Senders of jobs when all are dealt, so each worker's loop ends; it closes its own Sender of findings,
so only the workers hold any, and the parent's loop ends with the last of them. That includes workers
that are killed, for which a sentinel or a count of expected messages would wait forever.

    python pipeline.py
    python pipeline.py --method spawn --processes 4
"""

import argparse
import ast
import heapq
import multiprocessing
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import cycle
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from textwrap import shorten

from mp_ipcchan import Receiver, Sender, channel

STDLIB = Path(sysconfig.get_path("stdlib"))
TOP = 5
FILES_IN_A_JOB = 20
#: Functions below these sizes are not worth a message.
MANY_LINES = 60
MANY_LEVELS = 5

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
#: Near enough: a ``#`` in a string may be taken for a comment.
REMINDER = re.compile(r"#.*\b(?:TODO|FIXME|XXX)\b.*")


class Kind(Enum):
    """What there is to find. The values are the report's headings."""

    LONG_FUNCTION = "Long functions, by lines"
    DEEP_FUNCTION = "Deep functions, by nested blocks"
    REMINDERS = "Files with TODO, FIXME or XXX comments, by number of them"


@dataclass(frozen=True)
class Finding:
    """What a worker found at ``line`` of ``path``; ``size`` is in the unit of its kind."""

    kind: Kind
    path: Path
    line: int
    name: str
    size: int


@dataclass(frozen=True)
class Job:
    """Files to look through, and where to send what is found in them."""

    files: Sequence[Path]
    findings: Sender[Finding]


# -- In the workers ------------------------------------------------------------------------


def work(jobs: Receiver[Job]) -> None:
    """Do jobs until there are no more. Each finding is on its way before the search goes on."""
    for job in jobs:
        for path in job.files:
            for finding in look_through(path):
                job.findings.send(finding)


def look_through(path: Path) -> Iterator[Finding]:
    """All that is worth telling about one file; nothing, if it is no valid Python (some test data isn't)."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield from reminders(source, path)
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION):
            yield from measure(node, path)


def parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        # Other people's code: its doubtful escape sequences are not news here.
        warnings.simplefilter("ignore")
        return ast.parse(source)


def reminders(source: str, path: Path) -> Iterator[Finding]:
    """One finding for all such comments in the file, if there are any: where the first is, and what it says."""
    found = list(REMINDER.finditer(source))
    if found:
        line = source.count("\n", 0, found[0].start()) + 1
        yield Finding(Kind.REMINDERS, path, line, found[0][0], len(found))


def measure(function: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> Iterator[Finding]:
    """A finding for each respect in which ``function`` is large."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if lines >= MANY_LINES:
        yield Finding(Kind.LONG_FUNCTION, path, function.lineno, function.name, lines)
    levels = nesting(function)
    if levels >= MANY_LEVELS:
        yield Finding(Kind.DEEP_FUNCTION, path, function.lineno, function.name, levels)


def nesting(function: ast.AST) -> int:
    """How many blocks lie inside each other in ``function`` at most, functions and classes in it not included."""
    deepest = 0
    pending = [(function, 0)]
    while pending:
        node, depth = pending.pop()
        deepest = max(deepest, depth)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.expr, ast.ClassDef, *FUNCTION)):
                deeper = isinstance(child, BLOCK) and not is_elif(child, node)
                pending.append((child, depth + deeper))
    return deepest


def is_elif(node: ast.AST, parent: ast.AST) -> bool:
    """An ``elif`` is an ``if`` inside the one before it, but it stands in the same column."""
    return isinstance(node, ast.If) and isinstance(parent, ast.If) and node.col_offset == parent.col_offset


# -- In the parent -------------------------------------------------------------------------


def search(ctx: BaseContext, files: Sequence[Path], processes: int) -> Iterator[Finding]:
    """Let ``processes`` workers look through ``files``, and yield what they find when they find it."""
    sender: Sender[Finding]
    findings: Receiver[Finding]
    sender, findings = channel()
    crew = [start_worker(ctx) for _ in range(processes)]
    deal(files, sender, [jobs for _, jobs in crew])
    sender.close()

    yield from findings

    for worker, _ in crew:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"{worker.name} ended with exit code {worker.exitcode}; some files were not searched")


def start_worker(ctx: BaseContext) -> tuple[BaseProcess, Sender[Job]]:
    """A new worker, and where to send its jobs. The Receiver of them moves into the worker's process."""
    sender: Sender[Job]
    jobs: Receiver[Job]
    sender, jobs = channel()
    # A daemon, so that an error in the parent ends the workers, too.
    worker: BaseProcess = ctx.Process(target=work, args=(jobs,), daemon=True)  # type: ignore[attr-defined]
    worker.start()
    return worker, sender


def deal(files: Sequence[Path], findings: Sender[Finding], workers: Sequence[Sender[Job]]) -> None:
    """Send the files to the workers in turn, and close the workers' channels: there are no more jobs."""
    starts = range(0, len(files), FILES_IN_A_JOB)
    for start, worker in zip(starts, cycle(workers)):
        worker.send(Job(files[start : start + FILES_IN_A_JOB], findings))
    for worker in workers:
        worker.close()


def stdlib_files() -> list[Path]:
    """The source files of the running interpreter's standard library, without what was installed beside it."""
    installed = {"site-packages", "dist-packages"}
    return sorted(path for path in STDLIB.rglob("*.py") if installed.isdisjoint(path.relative_to(STDLIB).parts))


# -- The report ----------------------------------------------------------------------------


def collect(findings: Iterable[Finding]) -> dict[Kind, list[Finding]]:
    """Sort findings by kind as they come in. Each that beats all before it is shown at once, on standard error."""
    found: dict[Kind, list[Finding]] = {kind: [] for kind in Kind}
    records = dict.fromkeys(Kind, 0)
    for finding in findings:
        found[finding.kind].append(finding)
        if finding.size > records[finding.kind]:
            records[finding.kind] = finding.size
            print(f"{finding.kind.value}: {finding.size} at {place(finding)}", file=sys.stderr, flush=True)
    return found


def report(found: dict[Kind, list[Finding]]) -> str:
    """The largest findings of each kind, the same text in whatever order they came in."""
    return "\n\n".join(section(kind, findings) for kind, findings in found.items())


def section(kind: Kind, findings: list[Finding]) -> str:
    largest = heapq.nsmallest(TOP, findings, key=lambda finding: (-finding.size, finding.path, finding.line))
    rows = (f"{finding.size:>6}  {place(finding):<44} {shorten(finding.name, 60)}" for finding in largest)
    return "\n".join([f"{kind.value} ({len(findings):,} found)", *rows])


def place(finding: Finding) -> str:
    return f"{finding.path.relative_to(STDLIB)}:{finding.line}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search the standard library with a pipeline of channels.")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), metavar="N", help="workers (default: one for each CPU)"
    )
    parser.add_argument(
        "--method",
        choices=multiprocessing.get_all_start_methods(),
        help="how workers start (default: this interpreter's way)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N files only")
    return parser.parse_args()


def main() -> None:
    args = options()
    ctx = multiprocessing.get_context(f"ipcchan_{args.method}" if args.method else "ipcchan")
    found = collect(search(ctx, stdlib_files()[: args.limit], args.processes))
    print(report(found))


if __name__ == "__main__":
    main()
