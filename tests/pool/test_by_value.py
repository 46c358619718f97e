"""What goes to workers by value: functions and arguments that they don't know by name; and why something can't."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mp_ipcchan import ProcessPoolExecutor, SerializationError, TaskTimeoutError, WorkerLostError, channel

from . import _tasks as tasks
from ._support import FORK, LIMIT

#: What a main program might define.
LATE = """
import threading

lock = threading.Lock()

class Point:
    def __init__(self, x):
        self.x = x

    def double(self):
        return self.x * 2

def is_point(obj):
    return isinstance(obj, Point) and obj.x

def locked(obj):
    return lock.locked()
"""


@pytest.fixture
def started() -> Iterator[ProcessPoolExecutor]:
    """Its one worker has been started; a second one might be forked when there is more to know."""
    with ProcessPoolExecutor(1, mp_context=FORK) as made:
        assert made.submit(tasks.square, 2).result(LIMIT) == 4
        yield made


@pytest.fixture
def late(started: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``__main__`` has defined since the workers were started."""
    del started
    module = types.ModuleType("not_a_file")
    module.__dict__["__name__"] = "__main__"
    exec(LATE, module.__dict__)
    for name in ("Point", "is_point", "locked"):
        monkeypatch.setattr(sys.modules["__main__"], name, getattr(module, name), raising=False)
    return module


@pytest.fixture
def pool() -> Iterator[Any]:
    with FORK.Pool(2) as made:
        yield made
    made.join()


# -- what the workers don't know -------------------------------------------------------------


def test_argument_of_a_class_defined_after_the_workers_started(started: ProcessPoolExecutor, late: Any) -> None:
    assert started.submit(getattr, late.Point(3), "x").result(LIMIT) == 3
    assert started.submit(late.is_point, late.Point(4)).result(LIMIT) == 4
    assert started.submit(late.Point(5).double).result(LIMIT) == 10
    assert list(started.map(late.is_point, [late.Point(x) for x in range(5)])) == list(range(5))
    assert started.submit(tasks.square, 3).result(LIMIT) == 9


def test_pool_and_classes_defined_after_its_workers_started(pool: Any, late: Any) -> None:
    points = [late.Point(x) for x in range(5)]
    assert pool.apply(late.is_point, (points[3],)) == 3
    assert pool.map(late.is_point, points) == list(range(5))
    assert pool.starmap(late.is_point, [(point,) for point in points]) == list(range(5))
    assert list(pool.imap(late.is_point, points, 2)) == list(range(5))
    assert list(pool.imap(late.is_point, points, None)) == list(range(5))


def test_late_function_with_an_endpoint(started: ProcessPoolExecutor, late: Any) -> None:
    """It is sent once: the endpoint goes with it. The error is the worker's."""
    tx, rx = channel()
    with tx, rx, pytest.raises(AttributeError, match="is_point"):
        started.submit(late.is_point, tx).result(LIMIT)


@pytest.mark.parametrize("chunksize", [None, 3])
def test_late_function_that_cannot_go_by_value(started: ProcessPoolExecutor, late: Any, chunksize: int | None) -> None:
    says = "does not know what the call of locked refers to.*locked can't: TypeError: cannot pickle '_thread.lock'"
    with pytest.raises(SerializationError, match=says) as caught:
        started.submit(late.locked, late.Point(3)).result(LIMIT)
    assert isinstance(caught.value.__cause__, TypeError)
    # Last: a map that fails cancels its other chunks, and a worker that is forked anew for that knows the function.
    with pytest.raises(SerializationError, match=says):
        list(started.map(late.locked, range(3), chunksize=chunksize))


def test_function_that_only_goes_by_name_with_arguments_by_value(
    started: ProcessPoolExecutor, late: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late.locked, "__module__", tasks.__name__)
    monkeypatch.setattr(late.locked, "__qualname__", "square")
    monkeypatch.setattr(tasks, "square", late.locked)
    # By its name they know another; what matters is that it is found, and the arguments are.
    with pytest.raises(TypeError, match="unsupported operand"):
        started.submit(late.locked, lambda: 1).result(LIMIT)
    with pytest.raises(TypeError, match="unsupported operand"):
        list(started.map(late.locked, [lambda: 1]))


# -- what can't go ---------------------------------------------------------------------------


def _ways(executor: ProcessPoolExecutor) -> list[Callable[[Callable[..., Any]], Any]]:
    return [
        lambda function: executor.submit(function, 1).result(LIMIT),
        lambda function: list(executor.map(function, [1, 2])),
        lambda function: list(executor.map(function, [1, 2], chunksize=2)),
    ]


def test_lambda_that_closes_over_what_cannot_be_pickled(forked: ProcessPoolExecutor) -> None:
    """The error tells the cause, not that it is a lambda, since those go."""
    held = threading.Lock()
    for way in _ways(forked):
        with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock' object") as caught:
            way(lambda _: held.locked())
        assert "local object" not in "".join(traceback.format_exception(caught.type, caught.value, caught.tb))
    with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock' object"):
        forked.submit(tasks.echo, lambda: held.locked()).result(LIMIT)


def test_pool_and_a_lambda_that_closes_over_what_cannot_be_pickled(pool: Any) -> None:
    held = threading.Lock()
    for call in (
        lambda function: pool.apply(function, (1,)),
        lambda function: pool.map(function, [1, 2]),
        lambda function: list(pool.imap(function, [1, 2])),
    ):
        with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock' object"):
            call(lambda _: held.locked())


def test_lambda_that_closes_over_an_endpoint(forked: ProcessPoolExecutor) -> None:
    """The error says where it belongs; passed so, it arrives."""
    queue = multiprocessing.get_context("ipcchan").Queue()
    tx, rx = channel()
    with tx, rx:
        for way in _ways(forked):
            with pytest.raises(TypeError, match="Queue objects can't be pickled.*pass them as arguments.*to a task"):
                way(lambda _: queue.put(1))
            with pytest.raises(TypeError, match="Sender objects can't be pickled.*pass them as arguments.*to a task"):
                way(lambda _: tx.send(1))
        forked.submit(lambda queue: queue.put(1), queue).result(LIMIT)
        assert queue.get(timeout=LIMIT) == 1
        # Where it was passed, something else is at fault.
        with pytest.raises((AttributeError, TypeError), match="lambda"):
            forked.submit(tasks.echo, (tx, lambda: 1)).result(LIMIT)
        forked.submit(lambda tx: tx.send(2), tx).result(LIMIT)
        assert rx.recv(LIMIT) == 2
    queue.close()


# -- callables of the user's -----------------------------------------------------------------


@dataclasses.dataclass
class Unhashable:
    """Compared by what is in it, so it has no hash."""

    action: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.action(*args)


def test_callable_without_a_hash(forked: ProcessPoolExecutor, pool: Any) -> None:
    assert forked.submit(Unhashable(lambda x: x + 1), 2).result(LIMIT) == 3
    assert list(forked.map(Unhashable(lambda x: x + 1), range(3))) == [1, 2, 3]
    assert pool.apply(Unhashable(lambda x: x + 1), (2,)) == 3
    # Whose name is told where its worker dies.
    for made in (
        forked.submit(Unhashable(tasks.leave), 3),
        forked.options(timeout=60).submit(Unhashable(tasks.leave), 3),
    ):
        with pytest.raises(WorkerLostError, match="Unhashable"):
            made.result(LIMIT)
    with pytest.raises(TaskTimeoutError, match="Unhashable"):
        forked.options(timeout=0.1).submit(Unhashable(tasks.sleep), 60).result(LIMIT)
    assert forked.submit(tasks.square, 3).result(LIMIT) == 9
