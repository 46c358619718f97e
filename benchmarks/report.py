"""Outcomes as tables to read and as JSON to keep."""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from typing import Any

from .cases import Case
from .harness import Outcome
from .shapes import MiB, Shape

_PACKAGES = ("mp_ipcchan", "numpy", "faster-fifo", "pyzmq", "loky", "billiard", "joblib", "torch")


def baselines(shape: Shape | Case, outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    """The systems that others are compared with, by the names of their columns.

    Where several share a name (the socket types of pyzmq), the fastest in this shape is taken.
    """
    fastest = min if shape.lower_is_better else max
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.baseline and outcome.figures and not outcome.failed:
            groups.setdefault(outcome.baseline, []).append(outcome)
    return {
        name: fastest(group, key=lambda outcome: statistics.median(outcome.figures)) for name, group in groups.items()
    }


def ratios(shape: Shape | Case, outcome: Outcome, base: Outcome) -> list[float]:
    """How many times as fast as ``base``, round by round: both met the same noise in a round."""
    pairs = zip(outcome.figures, base.figures, strict=True)
    return [theirs / ours if shape.lower_is_better else ours / theirs for ours, theirs in pairs]


def table(shape: Shape | Case, outcomes: Sequence[Outcome]) -> str:
    """The table of one shape, with what went wrong below it."""
    bases = baselines(shape, outcomes)
    extras = ["CPU us"] if isinstance(shape, Shape) else []
    if isinstance(shape, Shape) and shape.in_bytes:
        extras += ["sender MiB", "receiver MiB"]
    rows = [["system", "median", "min - max", *extras, *(f"x {name}" for name in bases)]]
    for outcome in outcomes:
        if outcome.failed or outcome.skipped:
            rows.append([outcome.system, "failed" if outcome.failed else "skipped"])
            continue
        low, high = min(outcome.figures), max(outcome.figures)
        row = [outcome.system, _number(statistics.median(outcome.figures)), f"{_number(low)} - {_number(high)}"]
        if extras:
            row.append(_number(statistics.median(outcome.cpu)))
        if len(extras) > 1:
            row += [_number(statistics.median(grown) / MiB) for grown in zip(*outcome.memory, strict=True)]
        row += [f"{statistics.median(ratios(shape, outcome, base)):.2f}" for base in bases.values()]
        rows.append(row)
    notes = [f"{outcome.system} failed {outcome.failed}" for outcome in outcomes if outcome.failed]
    for reason in dict.fromkeys(outcome.skipped for outcome in outcomes if outcome.skipped):
        absent = ", ".join(outcome.system for outcome in outcomes if outcome.skipped == reason)
        notes.append(f"skipped, {reason}: {absent}")
    notes += [f"x {name}: beside {base.system}" for name, base in bases.items() if base.system != name]
    better = "lower" if shape.lower_is_better else "higher"
    lines = [f"{shape.name}: {shape.title}; {shape.unit}, {better} is better", "", *_aligned(rows)]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines)


def matrix(group: str, results: Sequence[tuple[Case, list[Outcome]]]) -> str:
    """A table of many cases, of which each takes a line: ours, with its spread, beside the stdlib's."""
    rows = [["case", "unit", "ours", "median", "min - max", "beside", "median", "min - max", "ratio"]]
    notes = []
    for case, outcomes in results:
        row = [case.name, case.unit]
        for outcome in outcomes[:2]:
            row.append(outcome.system)
            if outcome.failed or outcome.skipped:
                notes.append(f"{case.name}, {outcome.system}: {outcome.failed or outcome.skipped}")
                row += ["failed" if outcome.failed else "skipped", ""]
            else:
                row.append(_number(statistics.median(outcome.figures)))
                row.append(f"{_number(min(outcome.figures))} - {_number(max(outcome.figures))}")
        pair = [outcome for outcome in outcomes[:2] if outcome.figures and not outcome.failed]
        if len(pair) == 2:
            row.append(f"{statistics.median(ratios(case, *pair)):.2f}")
        rows.append(row)
    lines = [f"{group}: lower is better; the ratio is how many times as fast ours is", "", *_aligned(rows)]
    return "\n".join([*lines, "", *notes] if notes else lines)


def details(shape: Shape | Case, outcomes: Iterable[Outcome]) -> str:
    """Where the systems that failed did so."""
    return "\n".join(
        f"{shape.name}, {outcome.system} failed {outcome.failed}\n{outcome.detail}"
        for outcome in outcomes
        if outcome.failed
    )


def show_progress(line: str) -> None:
    """Show ``line`` in place of the one before, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows as Markdown: a table in a terminal, and in whatever it is pasted into."""
    rows = [row + [""] * (len(rows[0]) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])

    def line(row: list[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *numbers])} |"

    return [line(row) for row in rows]


def environment(rounds: int | None) -> dict[str, Any]:
    """What the figures depend on, apart from what else ran on the machine."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{sys.platform} {platform.release()} {platform.machine()}",
        "cpus": cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "rounds": rounds,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_json(shape: Shape | Case, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All of a shape's results: every round, not just the medians."""
    bases = baselines(shape, outcomes)
    return {
        "shape": shape.name,
        "group": shape.group if isinstance(shape, Case) else "shapes",
        "title": shape.title,
        "unit": shape.unit,
        "lower_is_better": shape.lower_is_better,
        "baselines": {name: base.system for name, base in bases.items()},
        "systems": [_outcome_as_json(shape, outcome, bases) for outcome in outcomes],
    }


def _outcome_as_json(shape: Shape, outcome: Outcome, bases: dict[str, Outcome]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "system": outcome.system,
        "status": "skipped" if outcome.skipped else "failed" if outcome.failed else "ok",
        "reason": outcome.skipped or outcome.failed,
        "detail": outcome.detail,
        "count": outcome.count,
        "figures": outcome.figures,
        "cpu_us": outcome.cpu,
        "grown_bytes": outcome.memory,
    }
    if result["status"] == "ok":
        result |= _summary(outcome.figures)
        result["ratios"] = {name: _summary(ratios(shape, outcome, base)) for name, base in bases.items()}
    return result


def _summary(figures: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}
