"""``shutdown``, as ``queue.Queue`` has it from Python 3.13 on, across processes."""

from __future__ import annotations

import queue as stdlib
import time
from contextlib import closing

import pytest

from mp_ipcchan import JoinableQueue, Queue, Receiver, Sender, ShutDown, channel
from tests.conformance._support import InThread

from ._support import LIMIT, MANY, AnyQueue, Crew, is_asleep, put_all, take, until

#: How long (seconds) something that waits for nobody may take on a busy machine.
AT_ONCE = 5.0

both = pytest.mark.parametrize("immediate", [False, True])


def test_is_the_stdlibs_shutdown() -> None:
    assert issubclass(ShutDown, getattr(stdlib, "ShutDown", Exception))


@both
def test_put_after_shutdown(queue: Queue[int], immediate: bool) -> None:
    queue.shutdown(immediate)
    for put in (queue.put, queue.put_nowait, lambda one: queue.put_many([one])):
        with pytest.raises(ShutDown):
            put(1)
    with pytest.raises(ShutDown):
        queue.put(1, timeout=0)
    assert queue.qsize() == 0


@both
def test_get_from_an_empty_queue(queue: Queue[int], immediate: bool) -> None:
    queue.shutdown(immediate)
    for _ in range(3):
        with pytest.raises(ShutDown):
            queue.get()
        with pytest.raises(ShutDown):
            queue.get(timeout=LIMIT)
        with pytest.raises(ShutDown):
            queue.get_nowait()
        with pytest.raises(ShutDown):
            queue.get_many(10)


@pytest.mark.parametrize("count", [1, 10, MANY // 10])
def test_messages_come_before_the_end(queue: Queue[int], count: int) -> None:
    put_all(queue, range(count))
    queue.shutdown()
    assert [take(queue) for _ in range(count)] == list(range(count))
    with pytest.raises(ShutDown):
        queue.get(timeout=LIMIT)


def test_immediate_discards(queue: Queue[int]) -> None:
    put_all(queue, range(MANY // 10))
    queue.shutdown(immediate=True)
    with pytest.raises(ShutDown):
        queue.get(timeout=LIMIT)
    assert queue.empty()
    assert queue.qsize() == 0


def test_immediate_after_graceful(queue: Queue[int]) -> None:
    """Shut down twice: the harder one holds, in either order."""
    put_all(queue, range(10))
    queue.shutdown()
    assert take(queue) == 0
    queue.shutdown(immediate=True)
    queue.shutdown()
    with pytest.raises(ShutDown):
        queue.get(timeout=LIMIT)


# -- across processes ------------------------------------------------------------------------


def _get_until_shut(queue: Queue[int], results: Sender[list[int]], timeout: float | None) -> None:
    got: list[int] = []
    results.send([])
    try:
        while True:
            got.append(queue.get(timeout=timeout))
    except ShutDown:
        results.send(got)


def _put_until_shut(queue: Queue[int], results: Sender[list[int]], timeout: float | None) -> None:
    results.send([])
    try:
        while True:
            queue.put(-1, timeout=timeout)
    except ShutDown:
        results.send([1])


@both
@pytest.mark.parametrize("maxsize", [0, 3])
def test_wakes_those_who_wait_for_messages(any_crew: Crew, immediate: bool, maxsize: int) -> None:
    """Processes blocked in ``get``, with and without a timeout, get ``ShutDown``."""
    tx, rx = channel()
    with closing(Queue[int](maxsize)) as queue, rx:
        with tx:
            children = [any_crew.start(_get_until_shut, queue, tx, timeout) for timeout in (None, None, LIMIT, LIMIT)]
        for _ in children:
            rx.recv(LIMIT)
        until(lambda: all(is_asleep(child) for child in children))
        queue.shutdown(immediate)
        assert [rx.recv(LIMIT) for _ in children] == [[]] * 4
        any_crew.finish()


@both
def test_wakes_those_who_wait_for_a_slot(any_crew: Crew, immediate: bool) -> None:
    """Processes blocked in ``put`` get ``ShutDown``; what they had put before comes, or is discarded."""
    tx, rx = channel()
    with closing(Queue[int](2)) as queue, rx:
        with tx:
            children = [any_crew.start(_put_until_shut, queue, tx, timeout) for timeout in (None, None, LIMIT)]
        for _ in children:
            rx.recv(LIMIT)
        until(queue.full)
        until(lambda: all(is_asleep(child) for child in children))
        queue.shutdown(immediate)
        assert [rx.recv(LIMIT) for _ in children] == [[1]] * 3
        any_crew.finish()
        if not immediate:
            assert [take(queue), take(queue)] == [-1, -1]
        with pytest.raises(ShutDown):
            queue.get(timeout=LIMIT)


def _get_until_shut_down(queue: Queue[int]) -> None:
    with pytest.raises(ShutDown):
        queue.get()


def _shut(queue: Queue[int], immediate: bool) -> None:
    queue.shutdown(immediate)


@both
def test_by_a_child(any_crew: Crew, queue: Queue[int], immediate: bool) -> None:
    """A process shuts the queue down for all others, and ends."""
    getter = InThread(lambda: _get_until_shut_down(queue))
    any_crew.finish(any_crew.start(_shut, queue, immediate))
    getter.result()
    with pytest.raises(ShutDown):
        queue.put(1)


def _put_and_wait(queue: AnyQueue, ready: Sender[None], wait: Receiver[None]) -> None:
    put_all(queue, range(MANY))
    ready.send(None)
    with pytest.raises(EOFError):
        wait.recv(LIMIT)


@pytest.mark.parametrize("readers", [1, 3])
def test_messages_in_anothers_backlog_come_before_the_end(crew: Crew, queue: Queue[int], readers: int) -> None:
    """What a process has put, though the kernel hasn't taken it yet, comes before ``ShutDown``."""
    ready_tx, ready_rx = channel()
    wait_tx, wait_rx = channel()
    tx, rx = channel()
    with ready_rx, wait_tx, rx:
        with ready_tx:
            putter = crew.start(_put_and_wait, queue, ready_tx, wait_rx)
        ready_rx.recv(LIMIT)
        queue.shutdown()
        with tx:
            children = [crew.start(_get_until_shut, queue, tx, None) for _ in range(readers)]
        shares = [share for _ in range(2 * readers) if (share := rx.recv(LIMIT))]
        assert sorted(number for share in shares for number in share) == list(range(MANY))
        assert all(share == sorted(share) for share in shares)
        crew.finish(*children)
        wait_tx.close()
        crew.finish(putter)


@pytest.mark.parametrize("readers", [1, 3])
def test_messages_of_an_ended_process_come_before_the_end(crew: Crew, queue: Queue[int], readers: int) -> None:
    """What a process left when it ended comes before ``ShutDown``, to the readers together."""
    crew.finish(crew.start(put_all, queue, range(MANY)))
    queue.shutdown()
    tx, rx = channel()
    with rx:
        with tx:
            children = [crew.start(_get_until_shut, queue, tx, None) for _ in range(readers)]
        shares = [share for _ in range(2 * readers) if (share := rx.recv(LIMIT))]
        crew.finish(*children)
    assert sorted(number for share in shares for number in share) == list(range(MANY))


def test_killed_process_holds_up_nobody(crew: Crew, queue: Queue[int]) -> None:
    """Messages that died with their process are not waited for."""
    ready_tx, ready_rx = channel()
    wait_tx, wait_rx = channel()
    with ready_rx, wait_tx:
        with ready_tx:
            putter = crew.start(_put_and_wait, queue, ready_tx, wait_rx)
        ready_rx.recv(LIMIT)
        putter.kill()
        queue.shutdown()
        got = 0
        with pytest.raises(ShutDown):
            while True:
                assert queue.get(timeout=LIMIT) == got
                got += 1
        assert 0 < got < MANY


# -- tasks -----------------------------------------------------------------------------------


def test_immediate_ends_join_in_all_processes(any_crew: Crew) -> None:
    """``join`` returns: nobody will ever do what was discarded, wherever it waited."""
    ready_tx, ready_rx = channel()
    wait_tx, wait_rx = channel()
    with closing(JoinableQueue[int]()) as queue, ready_rx, wait_tx:
        with ready_tx:
            any_crew.start(_put_and_wait, queue, ready_tx, wait_rx)
        ready_rx.recv(LIMIT)
        put_all(queue, range(1000))
        joiners = [any_crew.start(queue.join) for _ in range(2)]
        here = InThread(queue.join)
        queue.shutdown(immediate=True)
        start = time.monotonic()
        here.result()
        any_crew.finish(*joiners)
        assert time.monotonic() - start < AT_ONCE
        wait_tx.close()
        any_crew.finish()


def test_graceful_leaves_tasks_to_be_done() -> None:
    with closing(JoinableQueue[int]()) as queue:
        put_all(queue, range(3))
        queue.shutdown()
        joiner = InThread(queue.join)
        for number in range(3):
            assert take(queue) == number
            assert joiner._thread.is_alive()
            queue.task_done()
        joiner.result()


def test_immediate_leaves_tasks_in_hand_to_be_done() -> None:
    """Tasks that somebody has taken are not discarded: ``join`` waits for them, as the stdlib's."""
    with closing(JoinableQueue[int]()) as queue:
        put_all(queue, range(3))
        assert take(queue) == 0
        queue.shutdown(immediate=True)
        joiner = InThread(queue.join)
        joiner._thread.join(0.1)
        assert joiner._thread.is_alive()
        queue.task_done()
        joiner.result()
        with pytest.raises(ValueError, match="task_done"):
            queue.task_done()


def test_empty_wait_is_over_at_its_time(queue: Queue[int], crew: Crew) -> None:
    """While a backlog is on its way, a queue that was shut down is empty at most, and in time."""
    ready_tx, ready_rx = channel()
    wait_tx, wait_rx = channel()
    with ready_rx, wait_tx:
        with ready_tx:
            putter = crew.start(_put_and_wait, queue, ready_tx, wait_rx)
        ready_rx.recv(LIMIT)
        queue.shutdown()
        got: list[int] = []
        start = time.monotonic()
        while len(got) < MANY:
            try:
                got.append(queue.get(timeout=0.01))
            except stdlib.Empty:
                assert time.monotonic() - start < LIMIT
        assert got == list(range(MANY))
        wait_tx.close()
        crew.finish(putter)
