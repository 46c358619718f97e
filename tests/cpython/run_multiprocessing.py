"""Runs CPython's own multiprocessing tests, as shipped with this interpreter, on mp_ipcchan.

    python run_multiprocessing.py METHOD [--stock] [--only ID ...] [--skip ID ...]

METHOD is "fork", "spawn" or "forkserver". Prints unittest's report, and as its last line a JSON object
with the ids of the tests that ran, were skipped, and failed. ``--stock`` runs the same without us, to
tell which failures are this machine's.

Spawned children import this file as their main module, so what is at its top level holds in them too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.queues
import os
import sys
import unittest
from typing import Any

STOCK = "--stock" in sys.argv

if not STOCK:
    import mp_ipcchan

    if __name__ == "__main__":
        mp_ipcchan.install(f"ipcchan_{sys.argv[1]}")


def check_ours() -> None:
    """Stop the process, loudly, where the tests would not be testing us."""
    import mp_ipcchan

    context = multiprocessing.get_context()
    reader, _ = multiprocessing.Pipe()
    made: tuple[Any, ...] = (
        reader,
        multiprocessing.Queue(),
        multiprocessing.JoinableQueue(),
        multiprocessing.SimpleQueue(),
    )
    expected = (mp_ipcchan.Connection, mp_ipcchan.Queue, mp_ipcchan.JoinableQueue, mp_ipcchan.SimpleQueue)
    if not type(context).__module__.startswith("mp_ipcchan"):
        sys.exit(f"the default context is {context!r}")
    if not all(type(one) is cls for one, cls in zip(made, expected, strict=True)):
        sys.exit(f"the factories make {made!r}")
    with multiprocessing.Pool(1) as pool:
        in_child = pool.apply(_kind_of_pool)
    if type(pool) is not mp_ipcchan.Pool or in_child != _kind_of_pool():
        sys.exit(f"the pool is {pool!r}, and that of a child {in_child}")
    if multiprocessing.get_start_method() != type(context).__name__.removesuffix("Context").lower():
        sys.exit(f"the start method is {multiprocessing.get_start_method()} in {context!r}")


def _kind_of_pool() -> str:
    with multiprocessing.Pool(1) as pool:
        return repr(type(pool))


def _check_forked() -> None:
    if not type(multiprocessing.get_context()).__module__.startswith("mp_ipcchan"):
        os.write(2, b"a forked child has a stock context\n")
        os._exit(97)


if not STOCK and __name__ != "__mp_main__":
    check_ours()
    os.register_at_fork(after_in_child=_check_forked)

# It takes the factories when it is imported.
import test._test_multiprocessing as suite  # type: ignore[import-not-found]  # noqa: E402

# How long (seconds) they give others to get somewhere. On a busy machine that is too short at times, and a test
# that finds so waits forever for threads that nobody notifies any more.
suite.DELTA = 0.3

suite.install_tests_in_module_dict(globals(), sys.argv[1] if len(sys.argv) > 1 else "fork")


class _Result(unittest.TextTestResult):
    """Remembers the ids of the tests that ran."""

    ran: list[str]

    def startTest(self, test: unittest.TestCase) -> None:
        if not hasattr(self, "ran"):
            self.ran = []
        self.ran.append(_short(test))
        super().startTest(test)


def _short(test: unittest.TestCase) -> str:
    return test.id().removeprefix("__main__.")


def _cases(suite_: unittest.TestSuite) -> list[unittest.TestCase]:
    cases: list[unittest.TestCase] = []
    for one in suite_:
        cases += _cases(one) if isinstance(one, unittest.TestSuite) else [one]
    return cases


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=("fork", "spawn", "forkserver"))
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--skip", nargs="*", default=[])
    options = parser.parse_args()
    cases = _cases(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]))
    chosen = [
        case
        for case in cases
        if _short(case) not in options.skip and (not options.only or _short(case) in options.only)
    ]
    result = unittest.TextTestRunner(
        resultclass=_Result,  # type: ignore[arg-type]
        verbosity=2,
    ).run(unittest.TestSuite(chosen))
    failed = sorted(
        {_short(case) for case, _ in (*result.failures, *result.errors) if isinstance(case, unittest.TestCase)}
    )
    report = {
        "ran": getattr(result, "ran", []),
        "skipped": sorted(_short(case) for case, _ in result.skipped),
        "failed": failed,
        "sound": len(failed) == len(result.failures) + len(result.errors),
    }
    print(json.dumps(report))
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
