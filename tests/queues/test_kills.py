"""Processes are killed at any instant: at most the message in their hands is lost, and nobody else notices."""

from __future__ import annotations

import os
import queue as stdlib
import random
import signal
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest

from mp_ipcchan import JoinableQueue, Queue, Receiver, Sender, SimpleQueue, channel
from tests.conformance._support import InThread

from ._support import LIMIT, STOP, AnyQueue, Crew, collect, kill, pid_of, put_all, take, until

KILLS = 30
PRODUCERS = 2
CONSUMERS = 3
#: How long (seconds) it may take until a killed process's slots are free again, on a busy machine.
RECOVERY = 5.0

_NUMBER = struct.Struct("<q")


class Log:
    """Numbers that processes write, each in one system call: what was written, no kill can take back."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, number: int) -> None:
        os.write(self._fd, _NUMBER.pack(number))

    def read(self) -> list[int]:
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        return [number for (number,) in _NUMBER.iter_unpack(data)]


@contextmanager
def new_log() -> Iterator[Log]:
    with tempfile.TemporaryFile("ab+", buffering=0) as file:
        yield Log(file.fileno())


@pytest.fixture
def dice() -> random.Random:
    """Random numbers that a failed test can be repeated with."""
    seed = random.randrange(1 << 32)
    print("seed:", seed)
    return random.Random(seed)


def _produce(queue: AnyQueue, numbers: range, go: Receiver[int]) -> None:
    put_all(queue, numbers)
    queue.put(go.recv(LIMIT))
    # A process that ended might have the rest of its messages in one hand.
    with pytest.raises(EOFError):
        go.recv(LIMIT)


def _consume(queue: AnyQueue, log: Log) -> None:
    while (message := queue.get()) != STOP:
        log.write(message)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Queue, {}), (Queue, {"maxsize": 10}), (JoinableQueue, {}), (SimpleQueue, {})],
    ids=["Queue", "bounded", "JoinableQueue", "SimpleQueue"],
)
@pytest.mark.parametrize("count", [100, 15_000], ids=["waiting", "working"])
def test_consumers_killed(crew: Crew, dice: random.Random, kind: Any, options: dict[str, int], count: int) -> None:
    """Killed while they wait in ``get`` or go from one to the next: at most one message per kill is lost."""
    with closing(kind(**options)) as queue, new_log() as log:
        to_producers = []
        for who in range(PRODUCERS):
            tx, rx = channel()
            to_producers.append(tx)
            crew.start(_produce, queue, range(who * count, (who + 1) * count), rx)
        consumers = [crew.start(_consume, queue, log) for _ in range(CONSUMERS)]
        for _ in range(KILLS):
            time.sleep(dice.uniform(0, 0.01))
            kill(consumers.pop(0))
            consumers.append(crew.start(_consume, queue, log))
        for who, tx in enumerate(to_producers, 1):
            tx.send(-who)
        until(lambda: {-1, -2} <= set(log.read()))
        for tx in to_producers:
            tx.close()
        put_all(queue, [STOP] * CONSUMERS)
        crew.finish(*consumers)
        got = [number for number in log.read() if number >= 0]
        assert len(set(got)) == len(got)
        assert PRODUCERS * count - KILLS <= len(got) <= PRODUCERS * count
        queue.put("goes on")
        assert take(queue) == "goes on"
        if options:
            _check_bound(queue, options["maxsize"], KILLS)


def _check_bound(queue: Queue[Any], maxsize: int, kills: int) -> None:
    """An empty queue takes ``maxsize`` messages, soon, and at most one more per kill."""
    deadline = time.monotonic() + RECOVERY
    put = 0
    while put < maxsize:
        try:
            queue.put_nowait(put)
            put += 1
        except stdlib.Full:
            assert time.monotonic() < deadline, f"only {put} messages go into a queue of {maxsize}"
            time.sleep(0.01)
    with pytest.raises(stdlib.Full):
        for _ in range(kills + 1):
            queue.put_nowait(put)
            put += 1


def _has_more_than(log: Log, least: int) -> bool:
    return len(log.read()) > least


@pytest.mark.parametrize("bound", [0, 4000])
def test_consumers_of_an_ended_producer_killed(crew: Crew, dice: random.Random, bound: int) -> None:
    """Killed among the messages that an ended process left behind, each takes one of them along at most."""
    each = 2000
    with closing(Queue[Any](bound)) as queue, new_log() as log:
        for turn in range(KILLS):
            crew.finish(crew.start(put_all, queue, range(turn * each, (turn + 1) * each)))
            consumers = [crew.start(_consume, queue, log) for _ in range(2)]
            # Beyond those that were in the kernel before the process ended.
            until(partial(_has_more_than, log, turn * each + 300 - turn))
            time.sleep(dice.uniform(0, 0.01))
            kill(consumers[0])
            queue.put(STOP)
            crew.finish(consumers[1])
        assert queue.empty()
        got = log.read()
        assert len(set(got)) == len(got)
        assert set(got) <= set(range(KILLS * each))
        assert len(got) >= KILLS * each - KILLS
        if bound:
            # A killed process's slots come back while somebody waits for one.
            put_all(queue, range(bound))


def _blocked_in_get(queue: AnyQueue, ready: Sender[int]) -> None:
    ready.send(os.getpid())
    queue.get()


def test_killed_in_get_loses_nothing(crew: Crew, any_queue: AnyQueue) -> None:
    """Of consumers that wait, each one killed takes nothing along."""
    tx, rx = channel()
    with rx:
        waiting = [crew.start(_blocked_in_get, any_queue, tx) for _ in range(5)]
        tx.close()
        assert {rx.recv(LIMIT) for _ in waiting} == {pid_of(one) for one in waiting}
    for one in waiting:
        kill(one)
    put_all(any_queue, range(1000))
    assert [take(any_queue) for _ in range(1000)] == list(range(1000))


# -- producers -------------------------------------------------------------------------------


def _payload(number: int) -> bytes:
    size = (0, 10, 1000, 60_000, 65_536, 300_000)[number % 6] if number % 50 < 6 else number % 100
    return bytes([number % 251]) * size


def _put_without_end(queue: AnyQueue, who: int) -> None:
    number = 0
    while True:
        queue.put((who, number, _payload(number)))
        number += 1


@pytest.mark.parametrize(
    ("kind", "options"), [(Queue, {}), (Queue, {"maxsize": 10}), (SimpleQueue, {})], ids=["Queue", "bounded", "Simple"]
)
def test_producers_killed(
    crew: Crew, dice: random.Random, results: Queue[Any], kind: Any, options: dict[str, int]
) -> None:
    """Killed in ``put``: what arrives of each is whole, in order, without gaps."""
    with closing(kind(**options)) as queue:
        consumer = crew.start(collect, queue, results)
        producers = [crew.start(_put_without_end, queue, who) for who in range(PRODUCERS)]
        for who in range(PRODUCERS, PRODUCERS + KILLS):
            time.sleep(dice.uniform(0, 0.02))
            kill(producers.pop(0))
            producers.append(crew.start(_put_without_end, queue, who))
        for producer in producers:
            kill(producer)
        queue.put(STOP)
        got = take(results)
        crew.finish(consumer)
        for who in range(PRODUCERS + KILLS):
            numbers = [number for name, number, _ in got if name == who]
            assert numbers == list(range(len(numbers)))
        assert all(payload == _payload(number) for _, number, payload in got)
        if options:
            _check_bound(queue, options["maxsize"], PRODUCERS + KILLS)


# -- maxsize ---------------------------------------------------------------------------------


def _fill(queue: Queue[int], counts: Queue[int]) -> None:
    """Put until the queue has been full a hundred times over."""
    put = full = 0
    while full < 100:
        try:
            queue.put_nowait(put)
            put += 1
        except stdlib.Full:
            full += 1
    counts.put(put)


@pytest.mark.parametrize("maxsize", [1, 7, 1000])
def test_bound_is_strict(any_crew: Crew, results: Queue[int], maxsize: int) -> None:
    """Three processes together put as many as fit, and again as many as were taken."""
    with closing(Queue[int](maxsize)) as queue:
        free = maxsize
        for taken in 1, maxsize // 2, maxsize:
            fillers = [any_crew.start(_fill, queue, results) for _ in range(3)]
            assert sum(take(results) for _ in fillers) == free
            any_crew.finish(*fillers)
            assert queue.full()
            assert queue.qsize() == maxsize
            for _ in range(taken):
                take(queue)
            free = taken


def _put_and_log(queue: Queue[int], log: Log, count: int) -> None:
    for number in range(count):
        while True:
            try:
                queue.put_nowait(number)
                break
            except stdlib.Full:
                continue
        log.write(1)


def _log_and_get(queue: Queue[int], log: Log, count: int) -> None:
    for _ in range(count):
        log.write(-1)
        take(queue)


def test_bound_is_strict_at_every_moment(crew: Crew) -> None:
    """While three processes put and others take, never more than ``maxsize`` are in the queue."""
    maxsize, count = 3, 2000
    with closing(Queue[int](maxsize)) as queue, new_log() as log:
        for _ in range(3):
            crew.start(_put_and_log, queue, log, count)
        for _ in range(2):
            crew.start(_log_and_get, queue, log, 3 * count // 2)
        crew.finish()
        inside = 0
        for step in log.read():
            inside += step
            assert inside <= maxsize
        assert inside == 0
        assert queue.empty()
        _check_bound(queue, maxsize, 0)


def _fill_and_wait(queue: Queue[int], ready: Sender[None], wait: Receiver[None]) -> None:
    put_all(queue, range(queue._maxsize))
    ready.send(None)
    wait.recv(LIMIT)


@pytest.mark.parametrize("kind", [Queue, JoinableQueue])
@pytest.mark.parametrize("how", ["put_nowait", "put with a short timeout", "put with a long timeout", "put"])
def test_slots_of_a_killed_producer_come_back(crew: Crew, kind: type[Queue[int]], how: str) -> None:
    """Messages that a killed process had waiting leave their slots to others, however those put."""
    maxsize = 3000
    ready_tx, ready_rx = channel()
    wait_tx, wait_rx = channel()
    with closing(kind(maxsize)) as queue, ready_rx, wait_tx:
        # Whoever uses a queue for the first time might settle for the dead: not this process.
        _use(queue)
        with ready_tx:
            child = crew.start(_fill_and_wait, queue, ready_tx, wait_rx)
        ready_rx.recv(LIMIT)
        assert queue.full()
        kill(child)
        arrived = 0
        while not queue.empty():
            assert take(queue) == arrived
            arrived += 1
            if isinstance(queue, JoinableQueue):
                queue.task_done()
        assert 0 < arrived < maxsize
        for _ in range(arrived):
            queue.put(-1)
        _put_one(queue, how)
        for _ in range(maxsize - arrived - 1):
            queue.put_nowait(-1)
        with pytest.raises(stdlib.Full):
            queue.put_nowait(-1)
        assert queue.qsize() == maxsize
        assert [take(queue) for _ in range(maxsize)] == [-1] * maxsize


def _use(queue: Queue[int]) -> None:
    queue.put(-1)
    take(queue)
    if isinstance(queue, JoinableQueue):
        queue.task_done()


def _put_one(queue: Queue[int], how: str) -> None:
    deadline = time.monotonic() + RECOVERY
    while True:
        try:
            if how == "put_nowait":
                queue.put_nowait(-1)
            elif how == "put":
                queue.put(-1)
            else:
                queue.put(-1, timeout=0.1 if "short" in how else RECOVERY)
            return
        except stdlib.Full:
            assert time.monotonic() < deadline, f"the queue is still full for {how}"
            time.sleep(0.01)


def _put_and_die(queue: Queue[int]) -> None:
    """Be killed when the kernel has the message, and before that is entered."""
    outlet = queue._writer._link.outlet  # type: ignore[attr-defined]
    send = outlet.send_raw

    def send_and_die(frame: bytes, flags: int) -> int:
        sent: int = send(frame, flags)
        os.kill(os.getpid(), signal.SIGKILL)
        return sent

    outlet.send_raw = send_and_die
    queue.put(1)


@pytest.mark.parametrize("maxsize", [0, 3])
@pytest.mark.parametrize("settled", [False, True])
def test_task_of_a_producer_killed_as_it_put(crew: Crew, maxsize: int, settled: bool) -> None:
    """Whether its message left, its entries don't say: to finish that task is right, before or after it is settled."""
    with closing(JoinableQueue[int](maxsize)) as queue:
        _use(queue)
        child = crew.start(_put_and_die, queue)
        child.join(LIMIT)
        assert child.exitcode == -signal.SIGKILL
        queue.put(2)
        if settled:
            queue._books.ledger.reclaim()
        for number in (1, 2):
            assert take(queue) == number
            queue.task_done()
        queue.join()
        queue._books.ledger.reclaim()
        _use(queue)
        queue.join()
        if maxsize:
            _check_bound(queue, maxsize, 1)


def test_many_producers_killed_with_a_slot(crew: Crew, dice: random.Random) -> None:
    """Killed anywhere between taking a slot and handing the message over: no slot is lost, few come twice."""
    maxsize = 4
    with closing(Queue[Any](maxsize)) as queue:
        _use(queue)
        for who in range(KILLS):
            producer = crew.start(_put_without_end, queue, who)
            end = time.monotonic() + dice.uniform(0, 0.02)
            while time.monotonic() < end:
                try:
                    queue.get(timeout=0.001)
                except stdlib.Empty:
                    continue
            kill(producer)
        while not queue.empty():
            take(queue)
        _check_bound(queue, maxsize, KILLS)


def test_blocked_putter_goes_on_after_another_is_killed(crew: Crew) -> None:
    """Who waits for a slot gets that of a killed process, though nobody takes anything."""
    maxsize = 3000
    ready_tx, ready_rx = channel()
    wait_tx, wait_rx = channel()
    with closing(Queue[int](maxsize)) as queue, ready_rx, wait_tx:
        _use(queue)
        with ready_tx:
            child = crew.start(_fill_and_wait, queue, ready_tx, wait_rx)
        ready_rx.recv(LIMIT)
        putter = InThread(lambda: queue.put(-1, timeout=LIMIT))
        kill(child)
        putter.result()
