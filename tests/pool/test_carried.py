"""What tasks carry is given up with them, and is in no process that they don't go to."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from mp_ipcchan import Disconnected, Full, ProcessPoolExecutor, Receiver, channel

from . import _tasks as tasks
from ._support import FORK, LIMIT, eventually


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _has_ended(rx: Receiver[Any]) -> None:
    with pytest.raises(Disconnected):
        rx.recv(LIMIT)


def test_first_task_of_an_executor() -> None:
    """Its worker is forked while it waits."""
    tx, rx = channel()
    with ProcessPoolExecutor(1, FORK) as executor, tx, rx:
        executor.submit(tasks.send_through, tx, 1).result(LIMIT)
        assert rx.recv(LIMIT) == 1
        tx.close()
        _has_ended(rx)


def test_worker_that_is_started_while_a_task_waits() -> None:
    go_tx, go_rx = channel()
    tx, rx = channel()
    with ProcessPoolExecutor(2, FORK) as executor, go_tx, tx, rx:
        assert executor.submit(tasks.square, 2).result(LIMIT) == 4
        waits = executor.submit(tasks.receive_from, go_rx)
        # Starts the second worker, and goes to either of them.
        executor.submit(tasks.send_through, tx, 1).result(LIMIT)
        assert rx.recv(LIMIT) == 1
        tx.close()
        _has_ended(rx)
        go_tx.send("done")
        assert waits.result(LIMIT) == "done"


def test_worker_that_is_replaced_while_a_task_waits() -> None:
    tx, rx = channel()
    with ProcessPoolExecutor(1, FORK) as executor, tx, rx:
        assert executor.submit(tasks.square, 2).result(LIMIT) == 4
        dies = executor.submit(tasks.die)
        sends = executor.submit(tasks.send_through, tx, 1)
        tx.close()
        assert dies.exception(LIMIT) is not None
        sends.result(LIMIT)
        assert rx.recv(LIMIT) == 1
        _has_ended(rx)


@pytest.mark.parametrize("waiting", ["send_async", "put"])
def test_process_that_is_forked_while_a_message_waits(waiting: str) -> None:
    """Whoever sends it, and wherever it waits."""
    go_tx, go_rx = channel()
    tx, rx = channel()
    queue = FORK.Queue(1)
    queue.put(None)
    full_tx, full_rx = channel()
    with pytest.raises(Full):
        while True:
            full_tx.try_send(None)

    def send() -> None:
        if waiting == "put":
            queue.put(tx)
        else:
            asyncio.run(full_tx.send_async(tx))

    before = tx._open_link()._uses
    thread = threading.Thread(target=send)
    thread.start()
    assert eventually(lambda: tx._open_link()._uses > before)
    process = FORK.Process(target=tasks.receive_from, args=(go_rx,))
    process.start()
    with full_tx, full_rx, rx, go_tx:
        tx.close()
        if waiting == "put":
            assert queue.get(timeout=LIMIT) is None
            queue.get(timeout=LIMIT).close()
        else:
            while (received := full_rx.recv(LIMIT)) is None:
                pass
            received.close()
        thread.join(LIMIT)
        # The process still runs.
        _has_ended(rx)
        go_tx.send(None)
        process.join(LIMIT)
        assert process.exitcode == 0
    queue.close()


@pytest.mark.parametrize("how", ["cancel", "kill_workers", "shutdown"])
def test_what_never_began_is_given_up(how: str) -> None:
    """At once, not when the garbage collector comes by: who waits for the end of a channel makes no garbage."""
    go_tx, go_rx = channel()
    tx, rx = channel()
    moved_tx, moved_rx = channel()
    with _without_collector(), ProcessPoolExecutor(1, FORK) as executor, go_tx, rx, moved_tx:
        assert executor.submit(tasks.square, 2).result(LIMIT) == 4
        first: Future[Any] = executor.submit(tasks.receive_from, go_rx)
        second = executor.submit(tasks.send_through, tx, 1)
        third = executor.submit(tasks.receive_from, moved_rx)
        tx.close()
        if how == "cancel":
            assert second.cancel()
            assert third.cancel()
        elif how == "kill_workers":
            executor.kill_workers()
        else:
            executor.shutdown(wait=False, cancel_futures=True)
        _has_ended(rx)
        # What moved is back with who sent it.
        assert eventually(lambda: not moved_rx.closed)
        moved_tx.send("still there")
        assert moved_rx.recv(LIMIT) == "still there"
        moved_rx.close()
        if how != "kill_workers":
            go_tx.send("done")
            assert first.result(LIMIT) == "done"


def test_pool_that_is_terminated_gives_up_what_waits() -> None:
    tx, rx = channel()
    with _without_collector(), rx:
        pool = multiprocessing.get_context("ipcchan_fork").Pool(1)
        running = pool.apply_async(tasks.sleep, (60,))
        waiting = pool.apply_async(tasks.send_through, (tx, 1))
        tx.close()
        pool.terminate()
        pool.join()
        _has_ended(rx)
        assert running.ready()
        assert waiting.ready()
