"""``python -m benchmarks``: see ``--help``, and README.md for what the figures mean."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from . import report
from .harness import run_shape
from .shapes import SHAPES
from .systems import all_systems


def main() -> int:
    """Run what the command line asks for. The exit status is 1 where a system failed."""
    options = _parse()
    rounds = options.rounds or (2 if options.quick else 5)
    systems = [system for system in all_systems() if not options.system or system.name in options.system]
    results = []
    failed = False
    for shape in SHAPES:
        if options.only and shape.name not in options.only:
            continue
        wanted = replace(shape, seconds=shape.seconds / 5) if options.quick else shape
        outcomes = run_shape(wanted, systems, rounds, options.limit, report.show_progress)
        report.show_progress("")
        print(report.table(shape, outcomes), end="\n\n", flush=True)
        print(report.details(shape, outcomes), end="", file=sys.stderr, flush=True)
        results.append(report.as_json(shape, outcomes))
        failed |= any(outcome.failed for outcome in outcomes)
    if options.json:
        document = {"environment": report.environment(rounds), "results": results}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return int(failed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="mp_ipcchan beside its peers, in one run")
    parser.add_argument("--rounds", type=_positive, help="rounds of each shape (default: 5, with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="short rounds, to see that everything runs")
    shapes = [shape.name for shape in SHAPES]
    parser.add_argument("--only", action="append", choices=shapes, metavar="NAME", help=f"a shape: {', '.join(shapes)}")
    names = [system.name for system in all_systems()]
    parser.add_argument("--system", action="append", choices=names, metavar="NAME", help=f"one of: {', '.join(names)}")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds after which a round is killed (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
