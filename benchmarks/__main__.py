"""``python -m benchmarks``: see ``--help``, and README.md for what the figures mean."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import plots, report, targets
from .cases import Case, run_case
from .harness import Outcome, run_shape
from .operations import operation_cases
from .pools import pool_cases
from .relay import relay_cases
from .shapes import SHAPES, Shape
from .systems import all_systems

#: Tables of which each case takes a line.
_MATRICES = ("operations", "receiver set")


def main() -> int:
    """Run what the command line asks for. The exit status is 1 where a system failed."""
    options = _parse()
    if options.plot:
        _draw(json.loads(options.plot.read_text()), options.svg)
        return 0
    chosen: list[Shape | Case] = [
        one for one in _everything() if not options.only or one.name in options.only or _group(one) in options.only
    ]
    results: list[dict[str, Any]] = []
    failed = False

    def done(one: Shape | Case, outcomes: list[Outcome]) -> None:
        nonlocal failed
        report.show_progress("")
        print(report.details(one, outcomes), end="", file=sys.stderr, flush=True)
        results.append(report.as_json(one, outcomes))
        failed |= any(outcome.failed for outcome in outcomes)
        if options.json:
            # Each time: a run that is stopped leaves what it has.
            options.json.write_text(json.dumps(_document(results, options.rounds), indent=1) + "\n")

    _run_shapes([one for one in chosen if isinstance(one, Shape)], options, done)
    _run_cases([one for one in chosen if isinstance(one, Case)], options, done)
    document = _document(results, options.rounds)
    print(targets.as_text(document["targets"]), flush=True)
    if options.svg:
        _draw(document, options.svg)
    return int(failed)


def _document(results: list[dict[str, Any]], rounds: int | None) -> dict[str, Any]:
    return {
        "environment": report.environment(rounds),
        "results": results,
        "targets": targets.checklist(results),
    }


def _everything() -> list[Shape | Case]:
    return [*SHAPES, *pool_cases(), *relay_cases(), *operation_cases()]


def _group(one: Shape | Case) -> str:
    return one.group if isinstance(one, Case) else "shapes"


Done = Callable[["Shape | Case", list[Outcome]], None]


def _run_shapes(shapes: Sequence[Shape], options: argparse.Namespace, done: Done) -> None:
    systems = [system for system in all_systems() if not options.system or system.name in options.system]
    for shape in shapes:
        rounds = options.rounds or (2 if options.quick else 3 if shape.survey else 5)
        wanted = replace(shape, seconds=shape.seconds / 5) if options.quick else shape
        outcomes = run_shape(wanted, systems, rounds, options.limit, report.show_progress)
        done(shape, outcomes)
        print(report.table(shape, outcomes), end="\n\n", flush=True)


def _run_cases(cases: Sequence[Case], options: argparse.Namespace, done: Done) -> None:
    ran: dict[str, list[tuple[Case, list[Outcome]]]] = {}
    for case in cases:
        entries = [entry for entry in case.entries if not options.system or entry.system in options.system]
        if not entries:
            continue
        wanted = replace(case, entries=entries, seconds=case.seconds / 5 if options.quick else case.seconds)
        outcomes = run_case(wanted, options.rounds or (2 if options.quick else 3), options.limit, report.show_progress)
        done(wanted, outcomes)
        if case.group in _MATRICES:
            ran.setdefault(case.group, []).append((wanted, outcomes))
        else:
            print(report.table(wanted, outcomes), end="\n\n", flush=True)
    for group, results in ran.items():
        print(report.matrix(group, results), end="\n\n", flush=True)


def _draw(document: dict[str, Any], folder: Path) -> None:
    for name, drawing in plots.draw(document).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(drawing)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="mp_ipcchan beside its peers, in one run")
    parser.add_argument("--rounds", type=_positive, help="rounds of each (default: 5 or 3, with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="short rounds, to see that everything runs")
    everything = _everything()
    groups = list(dict.fromkeys(map(_group, everything)))
    parser.add_argument(
        "--only",
        action="append",
        choices=[*groups, *(one.name for one in everything)],
        metavar="NAME",
        help=f"a group ({', '.join(groups)}), a shape ({', '.join(shape.name for shape in SHAPES)}), or a case",
    )
    names = [system.name for system in all_systems()]
    names += [entry.system for one in everything if isinstance(one, Case) for entry in one.entries]
    names = list(dict.fromkeys(names))
    parser.add_argument("--system", action="append", choices=names, metavar="NAME", help=f"one of: {', '.join(names)}")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds after which a round is killed (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="draw the plots there, too")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="only draw what an earlier run has written with --json"
    )
    options = parser.parse_args()
    if options.plot and not options.svg:
        parser.error("--plot needs --svg")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
