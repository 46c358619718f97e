"""Processes and queues for every test of queues and pipes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from mp_ipcchan import JoinableQueue, Queue, SimpleQueue

from ._support import AnyQueue, Crew


@pytest.fixture
def crew() -> Iterator[Crew]:
    """Forked processes."""
    with Crew() as crew:
        yield crew


@pytest.fixture
def any_crew(start_method: str) -> Iterator[Crew]:
    """Processes of each start method."""
    with Crew(start_method) as crew:
        yield crew


def _lend(request: pytest.FixtureRequest, queue: AnyQueue) -> Iterator[AnyQueue]:
    with closing(queue):
        yield queue
    # A queue's counts live as long as the object, which the test runner would hold on to.
    request.node.funcargs.pop(request.fixturename)


@pytest.fixture(params=[Queue, JoinableQueue, SimpleQueue])
def any_queue(request: pytest.FixtureRequest) -> Iterator[AnyQueue]:
    """A queue of each class."""
    yield from _lend(request, request.param())


@pytest.fixture
def queue(request: pytest.FixtureRequest) -> Iterator[AnyQueue]:
    yield from _lend(request, Queue[Any]())


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Iterator[AnyQueue]:
    """Another queue."""
    yield from _lend(request, Queue[Any]())
