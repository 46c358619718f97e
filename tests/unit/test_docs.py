"""The examples in the documentation run as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys
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
