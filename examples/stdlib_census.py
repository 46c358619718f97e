"""Take a census of Python's own standard library with a Pool: the stock one, then the one of mp_ipcchan.

This is a Pool program as people write it. Nothing in it is made for mp_ipcchan but the name of the
context: ``census`` takes any, and ``main`` runs it on both, compares the results and shows the times.

    python stdlib_census.py
    python stdlib_census.py --method spawn --processes 4
"""

import argparse
import ast
import multiprocessing
import platform
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from multiprocessing.context import BaseContext
from pathlib import Path

import mp_ipcchan  # noqa: F401 - registers the "ipcchan" contexts

TOP = 10
#: Most files take a few milliseconds: sent one by one, the way there and back would be part of what is measured.
CHUNK = 8

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Census:
    """What was counted: in one file, or in many, added up."""

    parsed: int = 0
    unparsed: int = 0
    lines: int = 0
    definitions: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    imports: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Census") -> None:
        """Add the counts of ``other`` to these. The order of additions makes no difference."""
        self.parsed += other.parsed
        self.unparsed += other.unparsed
        self.lines += other.lines
        # Not ``+=``, which looks through the whole sum for negative counts each time.
        self.definitions.update(other.definitions)
        self.calls.update(other.calls)
        self.imports.update(other.imports)


# -- In the workers ------------------------------------------------------------------------


def census_of(path: Path) -> Census:
    """The census of one file. A file that doesn't parse counts as such: the library's tests keep some on purpose."""
    source = path.read_bytes()
    try:
        tree = parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Census(unparsed=1)
    result = Census(parsed=1, lines=len(source.splitlines()))
    for node, in_class in nodes(tree):
        count(node, in_class, result)
    return result


def parse(source: bytes) -> ast.Module:
    """The syntax tree of ``source``, given as bytes because they may declare their encoding."""
    with warnings.catch_warnings():
        # Other people's code: its doubtful escape sequences are not news here.
        warnings.simplefilter("ignore")
        return ast.parse(source)


def nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """Each node, and whether a function at its place is a method: in a class, but not in a method of it."""
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, in_class = pending.pop()
        yield node, in_class
        inside = isinstance(node, ast.ClassDef) or (in_class and not isinstance(node, FUNCTION))
        pending.extend((child, inside) for child in ast.iter_child_nodes(node))


def count(node: ast.AST, in_class: bool, result: Census) -> None:
    """Add ``node`` to ``result``, if it is something that we count."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            result.calls[name] += 1
        case ast.ClassDef():
            result.definitions["classes"] += 1
        case ast.FunctionDef():
            result.definitions["methods" if in_class else "functions"] += 1
        case ast.AsyncFunctionDef():
            result.definitions["async methods" if in_class else "async functions"] += 1
        case ast.Import(names=names):
            result.imports.update(top_level(alias.name) for alias in names)
        case ast.ImportFrom(module=str(module), level=0):
            # A relative import (level > 0) stays inside its own package.
            result.imports[top_level(module)] += 1


def top_level(module: str) -> str:
    """``xml`` for ``xml.dom.minidom``."""
    return module.partition(".")[0]


# -- In the parent -------------------------------------------------------------------------


def census(
    ctx: BaseContext, files: Sequence[Path], progress: Callable[[int, int], None], processes: int | None = None
) -> Census:
    """The census of ``files``, counted by a pool of ``ctx``. Calls ``progress(done, total)`` after each file."""
    total = Census()
    with ctx.Pool(processes) as pool:
        for done, part in enumerate(pool.imap_unordered(census_of, files, CHUNK), start=1):
            total.add(part)
            progress(done, len(files))
    return total


class Progress:
    """Shows how far the work is, on standard error.

    On a terminal this is one line, rewritten at every percent. Elsewhere, in a log for one, it is
    a line at every 10 %.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._terminal = sys.stderr.isatty()
        self._step = 0

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total
        step = percent if self._terminal else percent // 10
        if step == self._step:
            return
        self._step = step
        text = f"{self._label}: {done:,} of {total:,} files ({percent} %)"
        if self._terminal:
            print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def stdlib_files() -> list[Path]:
    """The source files of the running interpreter's standard library, without what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return sorted(path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts))


def timed_census(
    label: str, ctx: BaseContext, files: Sequence[Path], processes: int | None = None
) -> tuple[Census, float]:
    """A census with its progress shown, and the seconds that it took, from an empty pool to the last result."""
    start = time.perf_counter()
    result = census(ctx, files, Progress(label), processes)
    return result, time.perf_counter() - start


def differences(one: Census, other: Census) -> list[str]:
    """The names of the counts that aren't the same in both."""
    return [each.name for each in fields(Census) if getattr(one, each.name) != getattr(other, each.name)]


# -- The report ----------------------------------------------------------------------------


def report(result: Census) -> str:
    """The findings, as a table: a column for each kind of count, its sum first and then the most frequent names."""
    columns = [
        column("all definitions", result.definitions),
        column("all calls", result.calls),
        column("all imports", result.imports),
    ]
    blank = cell("", "")
    rows = ["   ".join(cells).rstrip() for cells in zip_longest(*columns, fillvalue=blank)]
    title = (
        f"The standard library of Python {platform.python_version()}: {result.parsed:,} files, {result.lines:,} lines"
        f" ({result.unparsed} more files don't parse)"
    )
    return "\n".join([title, "", *rows])


def column(heading: str, counts: Counter[str]) -> list[str]:
    """The cells of one column. Names with equal counts are in alphabetical order, whatever order they came in."""
    ranking = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [cell(heading, f"{counts.total():,}"), *(cell(name, f"{number:,}") for name, number in ranking[:TOP])]


def cell(name: str, number: str) -> str:
    return f"{name:<18}{number:>9}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Take a census of the standard library with two kinds of Pool.")
    parser.add_argument("--processes", type=int, metavar="N", help="workers in a pool (default: one for each CPU)")
    parser.add_argument(
        "--method",
        choices=multiprocessing.get_all_start_methods(),
        help="how workers start (default: this interpreter's way)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N files only")
    return parser.parse_args()


def main() -> int:
    args = options()
    files = stdlib_files()[: args.limit]
    for path in files:
        path.read_bytes()  # Into the system's cache, or the first run would wait for the disk and the second not.

    expected, stock_time = timed_census("stock", multiprocessing.get_context(args.method), files, args.processes)
    ours = multiprocessing.get_context(f"ipcchan_{args.method}" if args.method else "ipcchan")
    result, our_time = timed_census("ipcchan", ours, files, args.processes)

    unequal = differences(expected, result)
    if unequal:
        print(f"The two pools counted differently: {', '.join(unequal)}.", file=sys.stderr)
        return 1
    print(report(result))
    print(f"\nBoth pools agree. Seconds: stock {stock_time:.2f}, ipcchan {our_time:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
