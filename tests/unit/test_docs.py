"""The examples in the documentation run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    pytest.param(code, id=f"{name}-{number}")
    for name in ("README.md", "docs/guide.md", "docs/mux.md", "docs/trust.md")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str, tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(code)
    command = [sys.executable, "-W", "error", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, cwd=tmp_path)


def test_example_of_a_router_loses_nothing(tmp_path: Path) -> None:
    """Leaving the block ends the routes at once."""
    (code,) = (str(one.values[0]) for one in EXAMPLES if "Router()" in str(one.values[0]))
    program = tmp_path / "example.py"
    program.write_text("for _ in range(200):\n" + textwrap.indent(code, "    "))
    ran = subprocess.run([sys.executable, str(program)], check=True, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "1\n" * 200


def test_examples_pass_a_strict_type_checker(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"example{number}.py").write_text(str(example.values[0]))
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path / 'cache'}", "--config-file=", "."]
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
