"""What the kernel doesn't take waits in the process, and a process that ends hands it on at once, all of it."""

from __future__ import annotations

import array
import os
import queue as stdlib
import resource
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from multiprocessing import connection
from typing import Any

import pytest

from mp_ipcchan import Fd, JoinableQueue, Queue, Receiver, Sender, SimpleQueue, channel
from mp_ipcchan._queues._ends import Ends

from ._support import LIMIT, MANY, STOP, AnyQueue, Crew, collect, end_of, is_asleep, kill, put_all, take, until

READERS = 4


def test_one_thread_puts_all_before_it_takes_any(any_queue: AnyQueue) -> None:
    """``put`` never waits for a taker, and the order stays."""
    put_all(any_queue, range(MANY))
    assert [take(any_queue) for _ in range(MANY)] == list(range(MANY))


def test_one_thread_sends_all_before_it_receives_any() -> None:
    """As the queues', of a channel."""
    tx, rx = channel()
    with tx, rx:
        for number in range(MANY):
            tx.send(number)
        assert [rx.recv(LIMIT) for _ in range(MANY)] == list(range(MANY))


@pytest.mark.parametrize("reads", [True, False], ids=["at once", "at the end"])
def test_threads_in_a_burst_keep_their_order_each(reads: bool) -> None:
    """They append behind what waits without a lock, while the process's thread and the others take it away."""
    threads, each = 4, 20_000
    tx, rx = channel()
    begin = threading.Barrier(threads + 1)
    received: list[tuple[int, int]] = []

    def send(thread: int) -> None:
        begin.wait(LIMIT)
        for number in range(each):
            tx.send((thread, number))

    with tx, rx:
        senders = [threading.Thread(target=send, args=(thread,)) for thread in range(threads)]
        for sender in senders:
            sender.start()
        begin.wait(LIMIT)
        if not reads:
            for sender in senders:
                sender.join()
        received += [rx.recv(LIMIT) for _ in range(threads * each)]
        for sender in senders:
            sender.join()
    for thread in range(threads):
        assert [number for by, number in received if by == thread] == [*range(each)]


@pytest.mark.parametrize("burst", [300, 1_000, 5_000])
def test_rest_of_a_burst_arrives_by_itself(burst: int) -> None:
    """A sender in a burst sends in packs. What it has left behind when it stops arrives without another call."""
    tx, rx = channel()
    received: list[int] = []
    reader = threading.Thread(target=lambda: received.extend(rx.recv(LIMIT) for _ in range(burst)))
    with tx, rx:
        reader.start()
        for number in range(burst):
            tx.send(number)
        reader.join()
        assert received == list(range(burst))


def test_try_send_after_a_burst() -> None:
    """Where the kernel has room again, what a burst has left behind is no reason to refuse."""
    tx, rx = channel()
    with tx, rx:
        for number in range(2_000):
            tx.send(number)
        assert [rx.recv(LIMIT) for _ in range(2_000)] == list(range(2_000))
        tx.try_send(2_000)
        assert rx.recv(LIMIT) == 2_000


def test_put_many_goes_on_behind_what_waits(queue: Queue[int]) -> None:
    """``put_many`` and ``get_many`` keep the order beside ``put`` and ``get``."""
    half = MANY // 2
    queue.put_many(range(half))
    put_all(queue, range(half, MANY))
    assert queue.qsize() == MANY
    got: list[int] = []
    while len(got) < MANY:
        got += queue.get_many(1000, timeout=LIMIT)
    assert got == list(range(MANY))
    assert queue.qsize() == 0


def test_child_with_unread_messages_ends_at_once(any_crew: Crew, any_queue: AnyQueue) -> None:
    """Joined first, read later: nothing is missing and the order is kept."""
    any_crew.finish(any_crew.start(put_all, any_queue, range(MANY)))
    assert [take(any_queue) for _ in range(MANY)] == list(range(MANY))


def test_ended_child_and_this_process_share_a_queue(crew: Crew, queue: Queue[tuple[str, int]]) -> None:
    """What is put after the child's end comes behind all that the child has put."""
    messages = [(who, number) for who in ("child", "parent") for number in range(MANY)]
    crew.finish(crew.start(put_all, queue, messages[:MANY]))
    put_all(queue, messages[MANY:])
    assert [take(queue) for _ in messages] == messages


@pytest.mark.parametrize("count", [500, 2000, MANY])
def test_mark_put_after_the_end_of_a_child_comes_last(crew: Crew, any_queue: AnyQueue, count: int) -> None:
    """Join the producer, put a mark, take up to the mark: nothing is missed, in this process or another."""
    consumers: list[Callable[..., object]] = [lambda call, *args: call(*args), crew.start]
    for consume in consumers:
        crew.finish(crew.start(put_all, any_queue, range(count)))
        any_queue.put(STOP)
        with closing(Queue[list[int]]()) as results:
            consume(collect, any_queue, results)
            assert take(results) == list(range(count))


def _put_in_a_thread(queue: AnyQueue, ended: Receiver[None]) -> None:
    threading.Thread(target=_put_beyond_the_end, args=(queue, ended)).start()


def _put_beyond_the_end(queue: AnyQueue, ended: Receiver[None]) -> None:
    put_all(queue, range(2000))
    ended.recv(LIMIT)
    put_all(queue, range(2000, 4000))


def test_thread_that_puts_while_its_process_ends(crew: Crew, any_queue: AnyQueue) -> None:
    """A process waits for its threads after its target has returned; what they put keeps its order."""
    tx, rx = channel()
    with tx:
        child = crew.start(_put_in_a_thread, any_queue, rx)
        got = [take(any_queue) for _ in range(1000)]
        tx.send(None)
        crew.finish(child)
    assert got + [take(any_queue) for _ in range(3000)] == list(range(4000))


def test_many_children_end_with_unread_messages(crew: Crew, queue: Queue[tuple[int, int]]) -> None:
    """Several rests of ended processes wait at a time."""
    crew.finish(*(crew.start(put_all, queue, [(who, number) for number in range(5000)]) for who in range(10)))
    got = [take(queue) for _ in range(50_000)]
    for who in range(10):
        assert [number for name, number in got if name == who] == list(range(5000))
    assert queue.qsize() == 0


@pytest.mark.parametrize("kind", [Queue, SimpleQueue])
def test_several_readers_share_the_rest(crew: Crew, results: Queue[list[int]], kind: type[AnyQueue]) -> None:
    """Each message of an ended process comes to exactly one of several readers."""
    with closing(kind()) as queue:
        crew.finish(crew.start(put_all, queue, [*range(MANY), *[STOP] * READERS]))
        readers = [crew.start(collect, queue, results) for _ in range(READERS)]
        shares = [take(results) for _ in readers]
        crew.finish(*readers)
        assert all(share == sorted(share) for share in shares)
        assert sorted(number for share in shares for number in share) == list(range(MANY))


def _take_one(queue: Queue[int], results: Queue[int]) -> None:
    results.put(take(queue))


def _announce_and_take(queue: Queue[Any], used: bool, about_to: Sender[None], results: Queue[Any]) -> None:
    if used:
        with pytest.raises(stdlib.Empty):
            queue.get_nowait()
    about_to.send(None)
    results.put(queue.get())


@pytest.mark.parametrize("used", [False, True])
def test_reader_that_slept_through_the_end_of_a_child(
    crew: Crew, queue: Queue[Any], results: Queue[Any], monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    """It went to sleep when another had the child's last packet in its hands: what wakes it is newer than that."""
    count = 2000
    put_in_front = Ends._put_in_front
    tx, rx = channel()
    readers = []

    def put_in_front_late(*args: Any) -> None:
        monkeypatch.undo()
        readers.append(crew.start(_announce_and_take, queue, used, tx, results))
        tx.close()
        rx.recv(LIMIT)
        until(partial(is_asleep, readers[0]))
        put_in_front(*args)

    with rx:
        crew.finish(crew.start(put_all, queue, range(count)))
        monkeypatch.setattr(Ends, "_put_in_front", put_in_front_late)
        got = []
        while not readers:
            got.append(take(queue))
        queue.put(STOP)
        crew.finish(*readers)
        other = take(results)
        assert other != STOP
        while (message := take(queue)) != STOP:
            got.append(message)
        assert sorted([*got, other]) == list(range(count))
        assert queue.qsize() == 0


@pytest.mark.parametrize("kind", [Queue, SimpleQueue])
def test_readers_asleep_take_part(
    crew: Crew, results: Queue[int], monkeypatch: pytest.MonkeyPatch, kind: type[AnyQueue]
) -> None:
    """They went to sleep when another had the child's last packet in its hands, and nothing else is put."""
    count = 2000
    put_in_front = Ends._put_in_front
    tx, rx = channel()
    readers = []

    def put_in_front_late(*args: Any) -> None:
        monkeypatch.undo()
        readers.extend(crew.start(_announce_and_take, queue, False, tx, results) for _ in range(READERS))
        tx.close()
        for reader in readers:
            rx.recv(LIMIT)
            until(partial(is_asleep, reader))
        put_in_front(*args)

    with closing(kind()) as queue, rx:
        crew.finish(crew.start(put_all, queue, range(count)))
        monkeypatch.setattr(Ends, "_put_in_front", put_in_front_late)
        got = []
        while not readers:
            got.append(take(queue))
        crew.finish(*readers)
        got += [take(results) for _ in readers]
        got += [take(queue) for _ in range(count - len(got))]
        assert sorted(got) == list(range(count))


def test_readers_that_take_one_and_end(crew: Crew, queue: Queue[int], results: Queue[int]) -> None:
    """A reader that takes the first of an ended process's messages leaves the others to others."""
    crew.finish(crew.start(put_all, queue, range(2000)))
    for _ in range(5):
        crew.finish(*(crew.start(_take_one, queue, results) for _ in range(4)))
    taken = [take(results) for _ in range(20)]
    rest = [take(queue) for _ in range(2000 - 20)]
    assert sorted(taken + rest) == list(range(2000))


def _put_after_close(queue: Queue[Any]) -> None:
    put_all(queue, range(MANY))
    queue.close()
    queue.join_thread()


def test_join_thread_does_not_wait_for_a_reader(any_crew: Crew, queue: Queue[int]) -> None:
    """``close`` and ``join_thread`` hand the messages over at once."""
    any_crew.finish(any_crew.start(_put_after_close, queue))
    assert [take(queue) for _ in range(MANY)] == list(range(MANY))


def _put_and_cancel(queue: Queue[Any]) -> None:
    put_all(queue, range(MANY))
    queue.cancel_join_thread()


def test_cancel_join_thread_loses_nothing(crew: Crew, queue: Queue[int]) -> None:
    crew.finish(crew.start(_put_and_cancel, queue))
    assert [take(queue) for _ in range(MANY)] == list(range(MANY))


def _put_into_received(box: Queue[Any], done: Sender[None]) -> None:
    put_all(take(box), range(MANY))
    done.send(None)


def test_queue_that_travelled_outlives_its_sender(any_crew: Crew, queue: Queue[Any], results: Queue[int]) -> None:
    """The same through a queue that the child got in a message."""
    tx, rx = channel()
    with rx:
        with tx:
            queue.put(results)
            child = any_crew.start(_put_into_received, queue, tx)
        rx.recv(LIMIT)
        any_crew.finish(child)
        assert [take(results) for _ in range(MANY)] == list(range(MANY))


def _send_all(tx: Sender[int]) -> None:
    for number in range(MANY):
        tx.send(number)


def test_channel_of_an_ended_child(any_crew: Crew) -> None:
    """As the queues', of a channel: all that it sent, then the end."""
    tx, rx = channel()
    with rx:
        with tx:
            child = any_crew.start(_send_all, tx)
        any_crew.finish(child)
        assert list(rx) == list(range(MANY))


# -- messages that carry something -----------------------------------------------------------


def _put_senders(queue: AnyQueue, tx: Sender[int], count: int) -> None:
    for number in range(count):
        queue.put((number, tx if number % 2 else tx.clone()))


def _put_files(queue: AnyQueue, count: int) -> None:
    for number in range(count):
        reading, writing = os.pipe()
        os.write(writing, b"%d" % number)
        os.close(writing)
        with open(reading, "rb") as file:
            queue.put((number, Fd(file)))


@pytest.mark.parametrize("kind", [Queue, SimpleQueue])
def test_unread_senders_of_an_ended_child(crew: Crew, kind: type[AnyQueue]) -> None:
    """Senders that nobody received before their process ended work."""
    count = 400
    tx, rx = channel()
    with rx, closing(kind()) as queue:
        with tx:
            crew.finish(crew.start(_put_senders, queue, tx, count))
        for expected in range(count):
            number, sender = take(queue)
            assert number == expected
            with sender:
                sender.send(number)
        assert list(rx) == list(range(count))


def test_more_unread_senders_than_descriptors(crew: Crew, queue: Queue[Any]) -> None:
    """A process that ends with more senders in its messages than it may have descriptors loses none."""
    count = 2 * 1024
    tx, rx = channel()
    with rx:
        with tx:
            crew.finish(crew.start(_with_descriptors, 1024, _put_senders, queue, tx, count))
        for expected in range(count):
            number, sender = take(queue)
            assert number == expected
            sender.close()
        with pytest.raises(EOFError):
            rx.recv(LIMIT)


def _with_descriptors(most: int, call: Any, *args: object) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    call(*args)


def _check_senders(queue: Queue[Any], results: Queue[Any], count: int) -> None:
    for expected in range(count):
        number, sender = take(queue)
        assert number == expected
        sender.send(number)
        sender.close()
    results.put("all")


def test_unread_senders_come_to_a_process_with_few_descriptors(
    crew: Crew, queue: Queue[Any], results: Queue[str]
) -> None:
    """One that takes them one by one needs no more descriptors than for one."""
    count = 600
    tx, rx = channel()
    with rx:
        with tx:
            crew.finish(crew.start(_put_senders, queue, tx, count))
        crew.finish(crew.start(_with_descriptors, 256, _check_senders, queue, results, count))
        assert take(results) == "all"
        assert list(rx) == list(range(count))


def test_unread_files_of_an_ended_child(crew: Crew, queue: Queue[Any]) -> None:
    """Open files arrive, each the right one."""
    count = 200
    crew.finish(crew.start(_put_files, queue, count))
    for expected in range(count):
        number, fd = take(queue)
        assert number == expected
        with os.fdopen(fd.detach(), "rb") as file:
            assert file.read() == b"%d" % number


def _check_files(queue: Queue[Any], results: Queue[list[int]]) -> None:
    seen = []
    while (message := take(queue)) != STOP:
        number, fd = message
        with os.fdopen(fd.detach(), "rb") as file:
            assert file.read() == b"%d" % number
        seen.append(number)
    results.put(seen)


def test_several_readers_share_files_of_an_ended_child(
    crew: Crew, queue: Queue[Any], results: Queue[list[int]]
) -> None:
    """Each message comes with its own file, whoever takes it."""
    count = 2000
    crew.finish(crew.start(_put_files, queue, count))
    readers = [crew.start(_check_files, queue, results) for _ in range(READERS)]
    put_all(queue, [STOP] * READERS)
    shares = [take(results) for _ in readers]
    crew.finish(*readers)
    assert sorted(number for share in shares for number in share) == list(range(count))


def test_message_of_an_ended_child_with_more_files_than_a_packet_takes(crew: Crew, queue: Queue[Any]) -> None:
    """Some hundred descriptors in one message, between others."""
    crew.finish(crew.start(_put_groups_of_files, queue))
    for turn in range(200):
        number, fds = take(queue)
        assert number == turn
        for at, fd in enumerate(fds):
            with os.fdopen(fd.detach(), "rb") as file:
                assert file.read() == b"%d" % at
        assert len(fds) == (300 if turn % 100 == 99 else turn % 3)


def _put_groups_of_files(queue: AnyQueue) -> None:
    for turn in range(200):
        fds = []
        for number in range(300 if turn % 100 == 99 else turn % 3):
            reading, writing = os.pipe()
            os.write(writing, b"%d" % number)
            os.close(writing)
            fds.append(Fd(reading))
            os.close(reading)
        queue.put((turn, fds))


SIZES = [0, 1, 60_000, 65_500, 65_536, 70_000, 1 << 20, 5 << 20]


def _put_large(queue: AnyQueue) -> None:
    for turn in range(5):
        for size in SIZES:
            queue.put((turn, bytes([turn]) * size))
            queue.put((turn, array.array("B", bytes([turn]) * size)))


@pytest.mark.parametrize("kind", [Queue, SimpleQueue])
def test_unread_large_messages_of_an_ended_child(crew: Crew, kind: type[AnyQueue]) -> None:
    """Small and large ones, bytes and arrays, in order and whole."""
    with closing(kind()) as queue:
        crew.finish(crew.start(_put_large, queue))
        for turn in range(5):
            for size in SIZES:
                assert take(queue) == (turn, bytes([turn]) * size)
                assert take(queue) == (turn, array.array("B", bytes([turn]) * size))


def test_unread_numpy_arrays_of_an_ended_child(crew: Crew, queue: Queue[Any]) -> None:
    """Arrays arrive writable."""
    numpy = pytest.importorskip("numpy")
    crew.finish(crew.start(put_all, queue, [numpy.full(size, size) for size in (0, 10, 10_000, 1_000_000) * 100]))
    for size in (0, 10, 10_000, 1_000_000) * 100:
        got = take(queue)
        assert got.shape == (size,)
        assert (got == size).all()
        got[:] = 0


# -- a process that doesn't end by itself ----------------------------------------------------


def _put_and_wait(queue: AnyQueue, ready: Sender[None], wait: Receiver[None]) -> None:
    put_all(queue, range(MANY))
    ready.send(None)
    wait.recv(LIMIT)


def test_killed_child_leaves_a_gapless_beginning(crew: Crew, queue: Queue[int]) -> None:
    """Of a process that is killed with unread messages, the first ones arrive, in order; the others are gone."""
    ready_tx, ready_rx = channel()
    wait_tx, wait_rx = channel()
    with ready_rx, wait_tx:
        with ready_tx:
            child = crew.start(_put_and_wait, queue, ready_tx, wait_rx)
        ready_rx.recv(LIMIT)
        kill(child)
    got = []
    while not queue.empty():
        got.append(take(queue))
    assert 0 < len(got) < MANY
    assert got == list(range(len(got)))
    queue.put(-1)
    assert take(queue) == -1


def test_reader_of_an_ended_child_waits_on_the_connection(crew: Crew, queue: Queue[int]) -> None:
    """``multiprocessing.connection.wait`` sees every message of an ended process."""
    crew.finish(crew.start(put_all, queue, range(3000)))
    for number in range(3000):
        assert connection.wait([queue._reader], LIMIT) == [queue._reader]
        assert queue.get_nowait() == number
    assert not connection.wait([queue._reader], 0)


def test_child_of_a_child(crew: Crew, queue: Queue[int]) -> None:
    """A forked process doesn't send what its parent has waiting."""
    put_all(queue, range(MANY))
    child = crew.start(put_all, queue, ["child"])
    got = [take(queue) for _ in range(MANY + 1)]
    assert end_of(child) == 0
    assert sorted(got, key=str) == sorted([*range(MANY), "child"], key=str)
    assert [one for one in got if one != "child"] == list(range(MANY))
    until(queue.empty)


def test_joinable_counts_the_rest(crew: Crew) -> None:
    """``join`` waits for the messages of an ended process, too."""
    with closing(JoinableQueue[int]()) as queue:
        crew.finish(crew.start(put_all, queue, range(MANY)))
        worker = crew.start(_work_off, queue, MANY)
        queue.join()
        assert queue.qsize() == 0
        crew.finish(worker)


def _work_off(queue: JoinableQueue[int], count: int) -> None:
    for _ in range(count):
        take(queue)
        queue.task_done()
