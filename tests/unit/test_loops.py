"""Loops around which a ``try`` or ``with`` holds whatever a signal's handler raises."""

from __future__ import annotations

import ast
import dis
import sys
import types
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

import mp_ipcchan

PACKAGE = Path(mp_ipcchan.__file__).parent
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def test_no_loop_that_a_signal_gets_out_of() -> None:
    """From CPython 3.12 on a jump back behind a condition is covered by no ``try`` or ``with`` around the loop.

    What a signal's handler raises there gets past them: a lock would stay locked. So there are no ``while condition:``.
    """
    assert not [
        f"{path}, line {line}" for path, tree in TREES.items() for line in _conditional_loops(tree, inside=False)
    ]


def _conditional_loops(node: ast.AST, inside: bool) -> list[int]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.While) and inside and not isinstance(child.test, ast.Constant):
            found.append(child.lineno)
        protects = isinstance(child, (ast.Try, ast.With))
        starts_anew = isinstance(child, (ast.FunctionDef, ast.Lambda))
        found += _conditional_loops(child, (inside or protects) and not starts_anew)
    return found


@pytest.mark.skipif(sys.version_info < (3, 13), reason="its compiler covers such jumps, or has others, too")
def test_no_jump_that_a_signal_gets_out_of() -> None:
    """The same, as the compiler sees it: nor loops that end with an ``if``."""
    codes = [compile(tree, str(path), "exec") for path, tree in TREES.items()]
    assert not [*chain.from_iterable(map(_uncovered_jumps, codes))]


def _uncovered_jumps(code: types.CodeType) -> Iterator[str]:
    table = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    steps = list(dis.get_instructions(code))
    handlers = {entry.target for entry in table}
    for step in steps:
        if step.opname == "JUMP_BACKWARD":
            for target in handlers:
                ranges = [(entry.start, entry.end) for entry in table if entry.target == target]
                covered = [any(start <= at < end for start, end in ranges) for at in (step.argval, step.offset)]
                if covered == [True, False] and _restores(steps, target):
                    yield f"{code.co_filename}, {code.co_qualname}, line {step.positions.lineno}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _uncovered_jumps(constant)


def _restores(steps: list[dis.Instruction], target: int) -> bool:
    """Whether the handler there is a ``with``'s, a ``finally`` or for every exception."""
    [at] = [number for number, step in enumerate(steps) if step.offset == target]
    names = [step.opname for step in steps[at : at + 4]]
    return names[0] == "PUSH_EXC_INFO" and ("CHECK_EXC_MATCH" not in names or steps[at + 1].argval == "BaseException")
