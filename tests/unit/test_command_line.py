"""``python -m mp_ipcchan``: what it prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mp_ipcchan


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mp_ipcchan", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_info_names_the_version() -> None:
    done = _run("info")
    assert done.returncode == 0, done.stderr
    assert mp_ipcchan.__version__ in done.stdout
    assert "start methods" in done.stdout


def test_bench_compares_with_the_stdlib() -> None:
    done = _run("bench", "--quick")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    _, blank, head, *lines = done.stdout.splitlines()
    assert not blank
    assert head.split() == ["ours", "stdlib", "ratio"]
    figures = [line.split()[-3:] for line in lines[: lines.index("")]]
    assert len(figures) == 8
    for line in figures:
        assert all(float(figure.replace(",", "")) > 0 for figure in line)


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("info", "--quick")])
def test_what_it_does_not_know_is_refused(arguments: tuple[str, ...]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert "usage: python -m mp_ipcchan" in done.stderr
