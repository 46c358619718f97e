"""``progress=True``: a bar of tqdm's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor

from . import _tasks as tasks
from ._support import FORK

tqdm = pytest.importorskip("tqdm")


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that were made."""
    import tqdm.auto

    made: list[Any] = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[misc,type-arg]
        # No thread that watches over bars.
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    return made


@pytest.fixture
def pool() -> Iterator[Any]:
    with FORK.Pool(2) as made:
        yield made
    made.join()


@pytest.mark.parametrize("sized", [True, False])
def test_pool(pool: Any, bars: list[Any], sized: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def items(of: Any) -> Any:
        return of if sized else iter(of)

    squares = [x * x for x in range(200)]
    assert pool.map(tasks.square, items(range(200)), progress=True) == squares
    assert pool.starmap(pow, items([(x, 2) for x in range(200)]), progress=True) == squares
    assert list(pool.imap(tasks.square, items(range(200)), progress=True)) == squares
    assert sorted(pool.imap_unordered(tasks.square, items(range(200)), progress=True)) == squares
    assert [bar.n for bar in bars] == [200] * 4
    assert [bar.total for bar in bars] == [200 if sized else None] * 4
    assert all(bar.disable or bar.fp for bar in bars)
    assert "200" in capsys.readouterr().err


def test_bar_of_a_map_that_fails(pool: Any, bars: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="item 3"):
        pool.map(tasks.raise_at_three, range(10), progress=True)
    iterator = pool.imap(tasks.raise_at_three, range(5), progress=True)
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(iterator)
    assert list(iterator) == [4]
    assert bars[1].n == 5
    capsys.readouterr()


def test_executor(bars: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(2, FORK) as executor:
        assert list(executor.map(tasks.square, range(100), progress=True)) == [x * x for x in range(100)]
        assert list(executor.map(tasks.add, range(10), iter(range(10)), progress=True)) == list(range(0, 20, 2))
    assert [(bar.n, bar.total) for bar in bars] == [(100, 100), (10, 10)]
    capsys.readouterr()


def test_tqdm_is_not_installed(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    for run in (pool.map, pool.starmap, pool.imap, pool.imap_unordered):
        with pytest.raises(ImportError, match=r"progress=True needs tqdm; install mp_ipcchan\[progress\]"):
            run(tasks.square, [1], progress=True)
    assert pool.map(tasks.square, [1]) == [1]
