"""Segments among processes that are forked, killed and replaced: what arrives is right, and nothing piles up."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from mp_ipcchan import Queue, Receiver, Sender, channel
from mp_ipcchan._segments import _segment_pool

from ..conformance._support import LIMIT
from ..processes._support import context_of, eventually, kill, running, started
from ._support import KIB, MIB, Array, array, check, descriptors, kept, shared_memory_of


def _free(tx: Sender[Any]) -> int:
    """How many of the sender's segments nobody has a lease on."""
    segments = [one for one in tx._open_link().outlet.segments._kept if one.claim_if_free()]
    for one in segments:
        one.claim.release()
    return len(segments)


@pytest.fixture(autouse=True)
def _no_idling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_segment_pool, "IDLE_AFTER", 1e6)


def _hold(rx: Receiver[Any], answers: Sender[Any], count: int) -> None:
    held = [rx.recv(LIMIT) for _ in range(count)]
    for number, received in enumerate(held):
        check(received, number, MIB)
    answers.send("held")
    rx.recv(4 * LIMIT)


def test_killed_reader_frees_what_it_held(start_method: str) -> None:
    """Arrays in a reader's hands are leased, whatever else it does; its death ends that."""
    tx, rx = channel()
    answers_tx, answers = channel()
    process: Any = context_of(start_method)
    with tx, rx, answers_tx, answers:
        with running(process.Process(target=_hold, args=(rx, answers_tx, 5))) as reader:
            for number in range(5):
                tx.send(array(number, MIB))
            assert answers.recv(LIMIT) == "held"
            assert (len(kept(tx)), _free(tx)) == (5, 0)
            kill(reader)
            eventually(lambda: _free(tx) == 5)


def _send_and_stay(tx: Sender[Any], answers: Sender[Any], stay: Receiver[Any], count: int) -> None:
    for number in range(count):
        # With a limit of time it returns when the kernel has it.
        tx.send(array(number, 200 * KIB), timeout=LIMIT)
    answers.send("sent")
    stay.recv(4 * LIMIT)


def test_killed_sender_loses_nothing_sent(start_method: str) -> None:
    """What a sender had sent before it was killed is whole, read before or after, though it kept the segments."""
    tx, rx = channel()
    stay_tx, stay = channel()
    answers_tx, answers = channel()
    process: Any = context_of(start_method)
    with tx, rx, stay_tx, stay, answers_tx, answers:
        with running(process.Process(target=_send_and_stay, args=(tx, answers_tx, stay, 50))) as sender:
            tx.close()
            early = [rx.recv(LIMIT) for _ in range(25)]
            late = [rx.recv(LIMIT) for _ in range(15)]
            assert answers.recv(LIMIT) == "sent"
            kill(sender)
            late += [rx.recv(LIMIT) for _ in range(10)]
        with pytest.raises(EOFError):
            rx.recv(LIMIT)
        for number, received in enumerate(early + late):
            check(received, number, 200 * KIB)


def test_array_held_across_a_fork() -> None:
    """The lease lasts until parent and child have both let go; the child has dropped the pool that it inherited."""
    tx, rx = channel()
    with tx, rx:
        tx.send(array(0, MIB))
        check(rx.recv(LIMIT), 0, MIB)
        tx.send(array(1, MIB))
        received = rx.recv(LIMIT)
        assert len(kept(tx)) == 1
        answer, answering = os.pipe()
        wake, waking = os.pipe()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.close(waking)
                assert _segment_pool.is_empty()
                assert not kept(tx)
                os.write(answering, b"1")
                assert os.read(wake, 1) == b""
                check(received, 1, MIB)
                # Used by the child, the channel gets segments of its own.
                tx.send(array(2, MIB))
                status = 0
            finally:
                os._exit(status)
        os.close(wake)
        assert os.read(answer, 1) == b"1"
        del received
        for number in range(3, 20):
            assert _free(tx) == len(kept(tx)) - 1
            tx.send(array(number, MIB))
            check(rx.recv(LIMIT), number, MIB)
        os.close(waking)
        _, status = os.waitpid(pid, 0)
        assert status == 0
        os.close(answer)
        os.close(answering)
        check(rx.recv(LIMIT), 2, MIB)
        assert _free(tx) == len(kept(tx))


def _send_on(rx: Receiver[Any], answers: Sender[Any]) -> None:
    for number in range(5):
        held = rx.recv(LIMIT)
        check(held, number, MIB)
        held[:] = 7
        answers.send(held)
        held[:] = 9
        answers.send("changed")


def test_received_and_sent_on_is_copied() -> None:
    """A writable array that is sent on belongs to its next reader alone, whatever the one before does to it."""
    tx, rx = channel()
    answers_tx, answers = channel()
    with tx, rx, answers_tx, answers:
        with started(context_of("fork"), _send_on, rx, answers_tx):
            for number in range(5):
                tx.send(array(number, MIB))
                received = answers.recv(LIMIT)
                assert answers.recv(LIMIT) == "changed"
                assert (received == 7).all()


def _end_with_arrays_unread(tx: Sender[Any], count: int) -> None:
    for number in range(count):
        tx.send(array(number, 100 * KIB))


def test_end_with_arrays_unread(start_method: str) -> None:
    """A process ends at once, more sent than the kernel takes; part comes in segments, the rest in the last packet."""
    tx, rx = channel()
    with rx:
        with started(context_of(start_method), _end_with_arrays_unread, tx, 300):
            tx.close()
        for number in range(300):
            check(rx.recv(LIMIT), number, 100 * KIB)


def _consume(queue: Queue[Any], done: Queue[int], size: int, window: int) -> None:
    """Check every array when it is let go of, which is in random order, of ``window`` held."""
    choose = random.Random(os.getpid())
    held: list[tuple[int, Array]] = []
    while True:
        message = queue.get()
        if message is not None:
            held.append(message)
        while held and (message is None or len(held) > window):
            number, received = held.pop(choose.randrange(len(held)))
            check(received, number, size)
        if message is None:
            break
        done.put(message[0])


class _Consumers:
    """Four processes; those that are killed are replaced."""

    def __init__(self, *args: Any) -> None:
        self._start: Callable[[], BaseProcess] = lambda: self._started(*args)
        self.running = [self._start() for _ in range(4)]

    @staticmethod
    def _started(*args: Any) -> BaseProcess:
        context: Any = context_of("fork")
        process: BaseProcess = context.Process(target=_consume, args=args)
        process.start()
        return process

    def replace(self, at: int) -> None:
        assert self.running[at].is_alive(), f"a consumer ended with exit code {self.running[at].exitcode}"
        kill(self.running[at])
        self.running[at].close()
        self.running[at] = self._start()

    def join(self) -> None:
        for process in self.running:
            assert wait([process.sentinel], LIMIT)
            process.join()
            assert process.exitcode == 0

    def close(self) -> None:
        for process in self.running:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            process.close()


def check_kill_storm(count: int, size: int, window: int, every: int) -> None:
    choose = random.Random(5)
    queue: Queue[Any] = Queue(8)
    done: Queue[int] = Queue()
    consumers = _Consumers(queue, done, size, window)
    killed = 0
    seen: list[int] = []
    try:
        payload = array(0, size)
        before = None
        for number in range(count):
            queue.put((number, payload), timeout=LIMIT)
            payload += 1
            if choose.randrange(every) == 0:
                consumers.replace(choose.randrange(4))
                killed += 1
            while not done.empty():
                seen += done.get_many(1000, LIMIT)
            if number == count // 4:
                before = descriptors(), sum(queue._writer._link.outlet.segments.kept)
        assert before is not None
        assert descriptors() <= before[0] + 16
        assert sum(queue._writer._link.outlet.segments.kept) <= 16 * 2 * size
        for process in consumers.running:
            # What it holds, has been sent, and keeps mapped; not what has gone through it.
            assert shared_memory_of(process.pid or 0) <= (window + 1 + 64) * 2 * size + 64 * MIB
        for _ in range(4):
            queue.put(None, timeout=LIMIT)
        consumers.join()
        while not done.empty():
            seen += done.get_many(1000, LIMIT)
    finally:
        consumers.close()
        queue.close()
        done.close()
    assert len(set(seen)) == len(seen)
    # A killed consumer takes at most the message along that it was taking, and its report of the one before.
    assert len(seen) >= count - 2 * killed
    assert killed > 0


@pytest.mark.parametrize("window", [0, 20], ids=["dropped", "held"])
def test_consumers_killed_at_random(window: int) -> None:
    """Consumers are killed and replaced while arrays go through a queue: each that arrives is right, nothing grows."""
    check_kill_storm(400, 128 * KIB, window, every=25)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 20], ids=["dropped", "held"])
def test_100_000_arrays_and_consumers_killed_at_random(window: int) -> None:
    """The same with 100,000 arrays of 1 MiB."""
    check_kill_storm(100_000, MIB, window, every=500)
