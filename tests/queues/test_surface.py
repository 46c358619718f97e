"""Queues behave as the stdlib's do, and do what the stdlib's can't."""

from __future__ import annotations

import multiprocessing
import pickle
import queue as stdlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from multiprocessing import queues
from typing import Any

import pytest

from mp_ipcchan import Full, JoinableQueue, Pipe, Queue, SimpleQueue, bytes_channel, channel
from tests.conformance._support import InThread

from ._support import LIMIT, AnyQueue, Crew, put_all, take, until


def test_what_the_contexts_make(start_method: str) -> None:
    """``isinstance`` finds the stdlib's classes, and ours."""
    context = multiprocessing.get_context(f"ipcchan_{start_method}")
    for made, stock, ours in (
        (context.Queue(3), queues.Queue, Queue),
        (context.JoinableQueue(), queues.JoinableQueue, JoinableQueue),
        (context.SimpleQueue(), queues.SimpleQueue, SimpleQueue),
    ):
        with closing(made):
            assert isinstance(made, ours)
            if ours is not JoinableQueue:
                assert isinstance(made, stock)
            else:
                assert isinstance(made, queues.Queue)


def test_first_in_first_out(any_queue: AnyQueue) -> None:
    messages = [1, "two", b"three", None, [4.0], {"five": 5}, bytes(100_000), Exception]
    put_all(any_queue, messages)
    assert [take(any_queue) for _ in messages] == messages
    assert any_queue.empty()


def test_empty(queue: Queue[int]) -> None:
    at_once: list[Callable[[], object]] = [queue.get_nowait, lambda: queue.get(False), lambda: queue.get(False, LIMIT)]
    for call in at_once:
        start = time.monotonic()
        with pytest.raises(stdlib.Empty):
            call()
        assert time.monotonic() - start < LIMIT / 2
    for call in (lambda: queue.get(timeout=0.1), lambda: queue.get(True, 0.1)):
        start = time.monotonic()
        with pytest.raises(stdlib.Empty):
            call()
        assert time.monotonic() - start >= 0.1
    with pytest.raises(stdlib.Empty):
        queue.get(timeout=-1)


@pytest.mark.parametrize("kind", [Queue, JoinableQueue])
def test_full(kind: type[Queue[int]]) -> None:
    with closing(kind(2)) as queue:
        assert not queue.full()
        put_all(queue, [1, 2])
        assert queue.full()
        at_once: list[Callable[[], object]] = [
            lambda: queue.put_nowait(3),
            lambda: queue.put(3, False),
            lambda: queue.put(3, timeout=-1),
        ]
        for call in at_once:
            with pytest.raises(stdlib.Full):
                call()
        start = time.monotonic()
        with pytest.raises(stdlib.Full):
            queue.put(3, timeout=0.1)
        assert time.monotonic() - start >= 0.1
        assert queue.qsize() == 2
        assert queue.get_nowait() == 1
        assert not queue.full()
        queue.put_nowait(3)
        assert [queue.get_nowait(), queue.get_nowait()] == [2, 3]


def test_put_waits_for_a_slot() -> None:
    with closing(Queue[int](1)) as queue:
        queue.put(1)
        putting = InThread(lambda: queue.put(2, timeout=LIMIT))
        assert take(queue) == 1
        putting.result()
        assert take(queue) == 2


@pytest.mark.parametrize("maxsize", [0, 10])
def test_counts(crew: Crew, maxsize: int) -> None:
    """``qsize`` and ``empty`` see what other processes put and take."""
    with closing(Queue[int](maxsize)) as queue:
        assert queue.empty()
        assert queue.qsize() == 0
        for count in range(1, 6):
            crew.finish(crew.start(queue.put, count))
            assert queue.qsize() == count
            assert not queue.empty()
        crew.finish(crew.start(_take_some, queue, 3))
        assert queue.qsize() == 2
        assert [take(queue), take(queue)] == [4, 5]
        assert queue.empty()


def _take_some(queue: AnyQueue, count: int) -> None:
    for _ in range(count):
        take(queue)


def test_put_many_get_many(queue: Queue[int]) -> None:
    queue.put_many(iter(range(10)))
    assert queue.qsize() == 10
    got = queue.get_many(4, timeout=LIMIT)
    assert 1 <= len(got) <= 4
    while len(got) < 10:
        got += queue.get_many(100, timeout=LIMIT)
    assert got == list(range(10))
    with pytest.raises(stdlib.Empty):
        queue.get_many(1, timeout=0.01)
    for count in 0, -1:
        with pytest.raises(ValueError, match="max_items"):
            queue.get_many(count)
    queue.put_many([])
    assert queue.empty()


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
@pytest.mark.parametrize("make", [lambda: Queue(50), Queue, JoinableQueue], ids=["bounded", "plain", "joinable"])
def test_get_many_of_several_kinds(make: Callable[[], Queue[Any]], at_once: int) -> None:
    """Plain messages, some with descriptors and some in segments, in their order, and as many as asked for."""
    with closing(make()) as queue, closing(Queue[int]()) as inner:
        sent: list[Any] = [1, inner, 2, 3, bytes(200_000), inner, 4, "five"]
        queue.put_many(sent)
        got: list[Any] = []
        while len(got) < len(sent):
            some = queue.get_many(at_once, timeout=LIMIT)
            assert 1 <= len(some) <= at_once
            got += some
        assert queue.qsize() == 0
        for one, other in zip(sent, got, strict=True):
            if one is inner:
                with closing(other):
                    other.put("through it")
                    assert take(inner) == "through it"
            else:
                assert other == one


def _fails_at(number: int) -> Iterator[int]:
    yield from range(number)
    raise KeyError(number)


def test_put_many_that_fails(queue: Queue[Any]) -> None:
    """What came before the failure is in the queue."""
    with pytest.raises(KeyError):
        queue.put_many(_fails_at(3))
    with pytest.raises(TypeError):
        queue.put_many([3, 4, threading.Lock(), 5])
    assert [take(queue) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert queue.empty()


@pytest.mark.parametrize("made", [Queue, JoinableQueue])
@pytest.mark.parametrize(("block", "timeout"), [(False, None), (False, LIMIT), (True, 0.1), (True, -1)])
def test_put_many_without_room(made: type[Queue[int]], block: bool, timeout: float | None) -> None:
    """The error tells what is in the queue and what came next; all of it goes on from there, nothing twice."""
    with closing(made(3)) as queue:
        numbers = iter(range(8))
        start = time.monotonic()
        with pytest.raises(stdlib.Full) as caught:
            queue.put_many(numbers, block, timeout)
        took = time.monotonic() - start
        assert took < LIMIT / 2
        assert took >= (0.1 if timeout == 0.1 else 0)
        assert isinstance(caught.value, Full)
        assert (caught.value.put, caught.value.refused) == (3, 3)
        assert queue.qsize() == 3
        assert [take(queue) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(Full) as again:
            queue.put_many(chain([caught.value.refused], numbers), False)
        assert (again.value.put, again.value.refused) == (3, 6)
        assert [take(queue), take(queue)] == [3, 4]
        queue.put_many(chain([again.value.refused], numbers), block, timeout)
        assert [take(queue) for _ in range(3)] == [5, 6, 7]
        assert queue.qsize() == 0


def test_put_many_waits_for_room() -> None:
    """Its time is for all together, and as long as it isn't over, each gets in when there is room."""
    with closing(Queue[int](2)) as queue:
        putting = InThread(lambda: queue.put_many(range(100), timeout=LIMIT))
        assert [take(queue) for _ in range(100)] == [*range(100)]
        putting.result()

        def slow() -> Iterator[int]:
            yield 0
            time.sleep(0.05)
            # The time is over: these find room, the one behind them none.
            yield from (1, 2)

        with pytest.raises(Full) as caught:
            queue.put_many(slow(), timeout=0.02)
        assert (caught.value.put, caught.value.refused, queue.qsize()) == (2, 2, 2)


def test_put_many_that_is_refused_a_receiver() -> None:
    """It works as before; and the error can be sent, without it."""
    tx, rx = channel()
    with tx, rx, closing(Queue[Any](1)) as queue:
        with pytest.raises(Full) as caught:
            queue.put_many([1, rx], block=False)
        assert caught.value.refused is rx
        there = pickle.loads(pickle.dumps(caught.value))
        assert (type(there), there.args, there.put, there.refused) == (Full, caught.value.args, 1, None)
        tx.send(5)
        assert rx.recv(LIMIT) == 5
        caught.value.refused = None


# -- what can't be pickled -------------------------------------------------------------------


class _Stubborn:
    def __reduce__(self) -> Any:
        raise KeyError("no")


UNPICKLABLE = [(threading.Lock(), TypeError), (_Stubborn(), KeyError), ([1, _Stubborn()], KeyError)]


@pytest.mark.parametrize(("obj", "error"), UNPICKLABLE, ids=["lock", "own error", "inside"])
def test_unpicklable(any_queue: AnyQueue, obj: object, error: type[Exception]) -> None:
    """Raises in ``put`` what pickling raises; the queue goes on, and counts as if nothing had been."""
    any_queue.put(1)
    for _ in range(3):
        with pytest.raises(error):
            any_queue.put(obj)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        any_queue.put(lambda: None)
    any_queue.put(2)
    if isinstance(any_queue, Queue):
        assert any_queue.qsize() == 2
    assert [take(any_queue), take(any_queue)] == [1, 2]
    assert any_queue.empty()
    if isinstance(any_queue, JoinableQueue):
        any_queue.task_done()
        any_queue.task_done()
        InThread(any_queue.join).result()


def test_unpicklable_costs_no_slot() -> None:
    with closing(Queue[Any](2)) as queue:
        for _ in range(5):
            with pytest.raises(TypeError):
                queue.put_nowait(threading.Lock())
        put_all(queue, [1, 2])
        assert queue.full()


class _Poison:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return int, ("poison",)


def test_message_that_cannot_be_unpickled() -> None:
    """Fails its own ``get``; its slot is free then, and the others come."""
    with closing(Queue[Any](2)) as queue:
        for _ in range(5):
            queue.put_nowait(_Poison())
            queue.put_nowait("next")
            with pytest.raises(ValueError, match="poison"):
                queue.get(timeout=LIMIT)
            assert take(queue) == "next"
            assert queue.qsize() == 0


# -- the end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Queue, JoinableQueue])
def test_close(kind: type[Queue[int]]) -> None:
    queue = kind()
    queue.put(1)
    queue.close()
    queue.close()
    for call in (lambda: queue.put(1), lambda: queue.put_nowait(1), queue.get, queue.get_nowait):
        with pytest.raises(ValueError, match="is closed"):
            call()
    queue.join_thread()


def test_join_thread_before_close(queue: Queue[int]) -> None:
    with pytest.raises(AssertionError):
        queue.join_thread()


def test_close_simple_queue() -> None:
    queue = SimpleQueue[int]()
    queue.close()
    with pytest.raises(OSError, match="closed"):
        queue.put(1)
    with pytest.raises(OSError, match="closed"):
        queue.get()


def test_close_here_leaves_the_others_theirs(any_crew: Crew, queue: Queue[int], results: Queue[int]) -> None:
    """Messages go on between the processes that have not closed the queue."""
    child = any_crew.start(_forward, queue, results, 10)
    put_all(queue, range(10))
    queue.close()
    assert [take(results) for _ in range(10)] == list(range(10))
    any_crew.finish(child)


def _forward(queue: AnyQueue, results: AnyQueue, count: int) -> None:
    for _ in range(count):
        results.put(take(queue))


# -- tasks -----------------------------------------------------------------------------------


def test_task_done_too_often(crew: Crew) -> None:
    with closing(JoinableQueue[int]()) as queue:
        with pytest.raises(ValueError, match=r"task_done\(\) called too many times"):
            queue.task_done()
        crew.finish(crew.start(queue.put, 1))
        take(queue)
        queue.task_done()
        with pytest.raises(ValueError, match=r"task_done\(\) called too many times"):
            queue.task_done()
        queue.put(2)
        queue.task_done()
        queue.join()


def test_join_from_threads_and_processes(any_crew: Crew) -> None:
    """All who join return when the last task is done, and not before."""
    with closing(JoinableQueue[int]()) as queue:
        queue.join()
        put_all(queue, range(20))
        joiners = [any_crew.start(queue.join) for _ in range(2)]
        threads = [InThread(queue.join) for _ in range(2)]
        for _ in range(19):
            take(queue)
            queue.task_done()
        assert all(one.exitcode is None for one in joiners)
        assert all(one._thread.is_alive() for one in threads)
        any_crew.finish(any_crew.start(_finish_one, queue))
        for thread in threads:
            thread.result()
        any_crew.finish()


def _finish_one(queue: JoinableQueue[int]) -> None:
    take(queue)
    queue.task_done()


# -- queues travel ---------------------------------------------------------------------------


def test_into_a_queue_of_its_kind(any_queue: AnyQueue) -> None:
    """A queue put into another, and into itself, is the same queue where it comes out."""
    with closing(type(any_queue)()) as inner:
        any_queue.put([inner, any_queue])
        received, itself = take(any_queue)
        with closing(received), closing(itself):
            assert type(received) is type(inner)
            received.put(1)
            assert take(inner) == 1
            inner.put(2)
            assert take(received) == 2
            itself.put(3)
            assert take(any_queue) == 3


def test_into_a_channel_and_a_pipe(any_queue: AnyQueue) -> None:
    tx, rx = channel()
    first, second = Pipe()
    with tx, rx, first, second:
        tx.send(any_queue)
        second.send(rx.recv(LIMIT))
        with closing(first.recv()) as received:
            received.put("through")
            assert take(any_queue) == "through"


def test_to_a_process_that_runs(any_crew: Crew, queue: Queue[Any]) -> None:
    """A bounded queue keeps its counts when it travels."""
    child = any_crew.start(_use_received, queue)
    with closing(JoinableQueue[Any](2)) as inner:
        queue.put(inner)
        assert take(inner) == "from the child"
        inner.task_done()
        # From here on the child puts: no join before its messages are done.
        until(inner.full)
        assert inner.qsize() == 2
        any_crew.finish(child)
        for expected in (1, 2):
            assert take(inner) == expected
            inner.task_done()
        inner.join()


def _use_received(queue: AnyQueue) -> None:
    with closing(take(queue)) as inner:
        assert inner._maxsize == 2
        inner.put("from the child")
        inner.join()
        inner.put(1)
        inner.put(2)
        with pytest.raises(stdlib.Full):
            inner.put_nowait(3)


@pytest.mark.parametrize("kind", [Queue, JoinableQueue, SimpleQueue])
def test_bare_pickle(kind: type[AnyQueue]) -> None:
    with closing(kind()) as queue, pytest.raises((TypeError, RuntimeError)):
        pickle.dumps(queue)


# -- gigabytes -------------------------------------------------------------------------------

THREE_GIB = 3 << 30


@pytest.mark.slow
def test_three_gib_through_a_queue(crew: Crew, queue: Queue[bytes]) -> None:
    """More than one system call writes, and more than 32 bits count."""
    child = crew.start(_put_three_gib, queue)
    got = queue.get(timeout=10 * LIMIT)
    assert len(got) == THREE_GIB
    assert got[:1] == b"a"
    assert got[-1:] == b"z"
    crew.finish(child)


def _put_three_gib(queue: Queue[Any]) -> None:
    data = bytearray(THREE_GIB)
    data[0], data[-1] = b"az"
    queue.put(data)


@pytest.mark.slow
def test_three_gib_through_a_channel(crew: Crew) -> None:
    tx, rx = bytes_channel()
    with rx:
        with tx:
            child = crew.start(_send_three_gib, tx)
        got = rx.recv(10 * LIMIT)
        assert len(got) == THREE_GIB
        assert bytes(got[:1]) == b"a"
        assert bytes(got[-1:]) == b"z"
        crew.finish(child)


def _send_three_gib(tx: Any) -> None:
    data = bytearray(THREE_GIB)
    data[0], data[-1] = b"az"
    tx.send(data)


def test_timeout_that_is_no_number(queue: Queue[int]) -> None:
    tx, rx = channel()
    with tx, rx:
        for call in (queue.get, rx.recv):
            with pytest.raises(ValueError, match="nan"):
                call(timeout=float("nan"))


def test_many_more_than_there_can_be() -> None:
    tx, rx = channel()
    with tx, rx:
        tx.send_many(range(3))
        assert rx.recv_many(2**70) == [0, 1, 2]
        with pytest.raises(TypeError):
            rx.recv_many(1.5)  # type: ignore[arg-type]
