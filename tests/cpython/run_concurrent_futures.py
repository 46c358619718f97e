"""Runs CPython's own tests of ProcessPoolExecutor, as shipped with this interpreter, on mp_ipcchan.

    python run_concurrent_futures.py METHOD [--stock | --executor] [--only ID ...] [--skip END ...]

METHOD is "fork", "spawn" or "forkserver": the test classes of that method run. Prints unittest's
report, and as its last line a JSON object with the ids of the tests that ran, were skipped, and
failed. The stdlib's executor runs them on our context; with ``--executor`` ours does. ``--stock`` runs the
same without us, to tell which failures are this machine's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import sys
import unittest
from collections.abc import Iterator

METHODS = ("fork", "spawn", "forkserver")


def check_ours(method: str) -> None:
    """Stop the process, loudly, where the tests would not be testing us."""
    import mp_ipcchan

    mp_ipcchan.install(f"ipcchan_{method}")
    for context in (multiprocessing.get_context(), *map(multiprocessing.get_context, METHODS)):
        queue: object = context.SimpleQueue()
        if type(queue) is not mp_ipcchan.SimpleQueue or not type(context).__module__.startswith("mp_ipcchan"):
            sys.exit(f"{context!r} makes {queue!r}")


def replace_executor() -> None:
    """Have the tests, which take it from there, test our executor."""
    import concurrent.futures.process

    import mp_ipcchan

    for module in (concurrent.futures, concurrent.futures.process):
        module.ProcessPoolExecutor = mp_ipcchan.ProcessPoolExecutor  # type: ignore[assignment,misc]


def check_executor(chosen: list[unittest.TestCase]) -> None:
    """Stop the process where a test has another executor."""
    import mp_ipcchan

    kinds = {case.executor_type for case in chosen if hasattr(case, "executor_type")}
    if kinds != {mp_ipcchan.ProcessPoolExecutor}:
        sys.exit(f"the tests have {kinds}")


def module_names() -> list[str]:
    """The one module of tests, or those of the package that it became."""
    root = importlib.import_module("test.test_concurrent_futures")
    inside = [f"{root.__name__}.{one.name}" for one in pkgutil.iter_modules(getattr(root, "__path__", ()))]
    return [name for name in inside if ".test_" in name.removeprefix(root.__name__)] or [root.__name__]


def cases(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from cases(one)
        else:
            yield one


def is_of(case: unittest.TestCase, method: str) -> bool:
    """Whether the class of ``case`` runs the process pool by this method; "Fork" is the start of "Forkserver", too."""
    name = type(case).__name__
    prefixes = sorted((f"ProcessPool{one.capitalize()}" for one in METHODS), key=len)
    return [one for one in prefixes if name.startswith(one)][-1:] == [f"ProcessPool{method.capitalize()}"]


class Result(unittest.TextTestResult):
    """Remembers the ids of the tests that ran."""

    ran: list[str]

    def startTest(self, test: unittest.TestCase) -> None:
        if not hasattr(self, "ran"):
            self.ran = []
        self.ran.append(test.id())
        super().startTest(test)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--executor", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--skip", nargs="*", default=[], help="ends of ids")
    options = parser.parse_args()
    if not options.stock:
        check_ours(options.method)
    if options.executor:
        replace_executor()
    found = cases(unittest.defaultTestLoader.loadTestsFromNames(module_names()))
    chosen = [case for case in found if is_of(case, options.method) and (not options.only or case.id() in options.only)]
    chosen = [case for case in chosen if not case.id().endswith(tuple(options.skip))]
    if options.executor and not options.only:
        check_executor(chosen)
    runner = unittest.TextTestRunner(resultclass=Result, verbosity=2)  # type: ignore[arg-type]
    result = runner.run(unittest.TestSuite(chosen))
    failed = sorted({case.id() for case, _ in (*result.failures, *result.errors)})
    report = {
        "ran": getattr(result, "ran", []),
        "skipped": sorted(case.id() for case, _ in result.skipped),
        "failed": failed,
    }
    # Some tests print, and leave their line unended.
    print("\n" + json.dumps(report))
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
