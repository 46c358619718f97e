"""Executors of every start method, which leave nothing behind."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor

from ._support import FORK


@pytest.fixture
def context(start_method: str) -> Any:
    return multiprocessing.get_context(f"ipcchan_{start_method}")


@pytest.fixture
def executor(context: Any) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=context) as made:
        yield made


@pytest.fixture
def forked() -> Iterator[ProcessPoolExecutor]:
    """For what doesn't depend on how workers start."""
    with ProcessPoolExecutor(2, mp_context=FORK) as made:
        yield made
