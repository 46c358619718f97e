"""What this library wants to reach, held against a run. Never a test: what a figure is depends on the machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """How ``ours`` in one case is to compare with ``theirs`` (in the same one, or in ``beside``).

    The ratio is that of the figures; at least, or at most, ``wanted``.
    """

    case: str
    ours: str
    theirs: str
    wanted: float
    at_most: bool = False
    beside: str | None = None
    #: The difference is meant, not the ratio.
    difference: bool = False

    @property
    def text(self) -> str:
        where = f"{self.case}: {self.ours}"
        bound = "at most" if self.at_most else "at least"
        other = f"{self.theirs} ({self.beside})" if self.beside else self.theirs
        if self.difference:
            return f"{where}, {bound} {self.wanted:g} ms over {other}"
        return f"{where}, {bound} {self.wanted:g} x {other}"


TARGETS = (
    Target("one-way", "channel", "mp.SimpleQueue", 3.0),
    Target("one-way", "channel", "mp.Queue", 2.0),
    Target("one-way", "channel", "pyzmq PUSH/PULL", 1.0),
    Target("one-way", "channel (many)", "pyzmq PUSH/PULL", 1.3),
    Target("one-way", "ctx.SimpleQueue", "mp.SimpleQueue", 2.0),
    Target("one-way", "ctx.Queue", "mp.Queue", 2.2),
    Target("one-way", "ctx.Pipe", "mp.Pipe", 1.5),
    Target("4-to-4", "ctx.Queue", "mp.Queue", 3.0),
    Target("round-trip", "channel", "mp.Pipe", 0.75, at_most=True),
    Target("round-trip", "ctx.Pipe", "mp.Pipe", 0.75, at_most=True),
    Target("round-trip", "channel", "C loop", 1.25, at_most=True),
    Target("array-64KiB", "ctx.Queue", "mp.Queue", 3.0),
    Target("array-1MiB", "ctx.Queue", "mp.Queue", 12.0),
    Target("array-1MiB", "ctx.Queue", "memcpy", 0.3),
    Target("array-64MiB", "ctx.Queue", "mp.Queue", 10.0),
    Target("array-64MiB", "ctx.Queue", "memcpy", 0.8),
    Target("arrays", "ctx.Queue", "mp.Queue", 8.0),
    Target("submit", "ProcessPoolExecutor", "stdlib executor", 8.0),
    Target("apply_async", "ctx.Pool", "mp.Pool", 2.5),
    Target("map-1", "ctx.Pool", "mp.Pool", 2.5),
    Target("map", "ctx.Pool", "mp.Pool", 1.0),
    Target("task", "ProcessPoolExecutor", "stdlib executor", 0.5, at_most=True),
    Target("start", "ctx.Pool", "mp.Pool", 1.0, at_most=True),
    Target("meet", "Server", "mp.Listener", 1.0, at_most=True),
    Target("meet_others", "Server", "mp.Listener", 1.0, at_most=True),
    Target("select_1_of_10000", "ReceiverSet", "ReceiverSet", 2.0, at_most=True, beside="select_1_of_10"),
    Target("import", "mp_ipcchan", "multiprocessing.pool", 25.0, at_most=True, difference=True),
)


def checklist(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what came of it: the figure, and whether it was met (None: it was not measured)."""
    figures = {
        (result["shape"], system["system"]): system["figures"]
        for result in results
        for system in result["systems"]
        if system["status"] == "ok"
    }
    checked = []
    for target in TARGETS:
        ours = figures.get((target.case, target.ours))
        theirs = figures.get((target.beside or target.case, target.theirs))
        figure = None
        if ours and theirs:
            # Round by round: both met the same noise.
            pairs = zip(ours, theirs, strict=False)
            figure = statistics.median(one - other if target.difference else one / other for one, other in pairs)
        met = None if figure is None else figure <= target.wanted if target.at_most else figure >= target.wanted
        checked.append({"target": target.text, "wanted": target.wanted, "figure": figure, "met": met})
    return checked


def as_text(checked: Sequence[dict[str, Any]]) -> str:
    """For people."""
    measured = [one for one in checked if one["met"] is not None]
    width = max((len(one["target"]) for one in measured), default=0)
    lines = [
        f"{one['target'].ljust(width)}  {one['figure']:7.2f}  {'met' if one['met'] else 'not met'}" for one in measured
    ]
    if len(measured) < len(checked):
        lines.append(f"({len(checked) - len(measured)} more were not measured)")
    return "\n".join(["targets, and the figure of this run", "", *lines])
