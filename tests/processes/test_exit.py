"""A process that ends with unread messages ends at once, and nothing is lost."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from mp_ipcchan import Disconnected, OneShotServer, Pipe, Queue, Sender, SimpleQueue, channel

from ..conformance._support import LIMIT, InThread, pattern
from ._support import context_of, finish, join, program, running

COUNT = 100_000
BIG = pattern(200_000)


class Quit(Exception):
    pass


def return_(_: Sender[Any]) -> None: ...


def close_and_return(tx: Sender[Any]) -> None:
    tx.close()


def sys_exit(_: Sender[Any]) -> None:
    sys.exit(3)


def raise_(_: Sender[Any]) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (the traceback is expected)
    raise Quit


ENDS = pytest.mark.parametrize(
    ("end", "exitcode"),
    [(return_, 0), (close_and_return, 0), (sys_exit, 3), (raise_, 1)],
    ids=lambda one: getattr(one, "__name__", None),
)


def send_numbers(end: Any, tx: Sender[Any]) -> None:
    for number in range(COUNT):
        tx.send(number)
    end(tx)


@ENDS
def test_child_ends_with_a_backlog(end: Any, exitcode: int, start_method: str) -> None:
    """100,000 messages that nobody reads: the child ends, is joined, and all arrive, in order."""
    tx, rx = channel()
    process = context_of(start_method).Process(target=send_numbers, args=(end, tx))  # type: ignore[attr-defined]
    with rx, running(process):
        tx.close()
        join(process, exitcode)
        assert list(rx) == list(range(COUNT))


def send_all_kinds(channels: list[Sender[Any]], inner: Sender[Any]) -> None:
    for tx in channels:
        for number in range(2000):
            tx.send(number)
            if number % 500 == 0:
                tx.send((BIG, inner))


def test_backlogs_of_all_kinds(start_method: str) -> None:
    """On several channels, large messages and endpoints among the small ones."""
    channels = [channel() for _ in range(5)]
    inner, inner_rx = channel()
    process = context_of(start_method).Process(  # type: ignore[attr-defined]
        target=send_all_kinds, args=([tx for tx, _ in channels], inner)
    )
    with running(process), inner_rx:
        for tx, _ in channels:
            tx.close()
        inner.close()
        join(process)
        for _, rx in channels:
            with rx:
                for number in range(2000):
                    assert rx.recv(LIMIT) == number
                    if number % 500 == 0:
                        big, came = rx.recv(LIMIT)
                        with came:
                            came.send(number)
                        assert big == BIG
                        assert inner_rx.recv(LIMIT) == number
                with pytest.raises(Disconnected):
                    rx.recv(LIMIT)
        with pytest.raises(Disconnected):
            inner_rx.recv(LIMIT)


def put_numbers(queue: Queue[int]) -> None:
    for number in range(COUNT):
        queue.put(number)


def test_queue(start_method: str) -> None:
    """The same with a queue: joining before reading is no deadlock."""
    queue: Queue[int] = Queue()
    process = context_of(start_method).Process(target=put_numbers, args=(queue,))  # type: ignore[attr-defined]
    with running(process):
        join(process)
        assert [queue.get(timeout=LIMIT) for _ in range(COUNT)] == list(range(COUNT))
        assert queue.empty()
    queue.close()


def send_to_each_other(rx: Any, tx: Sender[Any]) -> None:
    """End with a backlog for the parent, and unread messages from it."""
    assert rx.recv(LIMIT) == 0
    for number in range(COUNT):
        tx.send(number)


def test_with_messages_unread_on_both_sides(start_method: str) -> None:
    """What the child hasn't read does no harm to what it has sent."""
    tx, moved = channel()
    copied, rx = channel()
    for number in range(100):
        tx.send(number)
    process = context_of(start_method).Process(target=send_to_each_other, args=(moved, copied))  # type: ignore[attr-defined]
    with tx, rx, running(process):
        copied.close()
        join(process)
        assert list(rx) == list(range(COUNT))


PROGRAM = """
import os, sys, threading
from mp_ipcchan import connect
count, end = int(sys.argv[2]), sys.argv[3]
tx = connect(sys.argv[1], 30)
tx.send("hello")
for number in range(count):
    tx.send(number)
print("sent")
if end == "exit":
    sys.exit(3)
elif end == "raise":
    raise SystemExit("with a message")
elif end == "error":
    sys.stderr.close()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    raise ValueError
elif end == "close":
    tx.close()
elif end == "delete":
    del tx
elif end == "thread":
    threading.Thread(target=lambda: tx.send_many(range(count, count + 10)), daemon=False).start()
"""


@pytest.mark.parametrize(
    ("end", "exitcode"),
    [("return", 0), ("exit", 3), ("raise", 1), ("error", 1), ("close", 0), ("delete", 0), ("thread", 0)],
)
def test_main_program(end: str, exitcode: int, tmp_path: Path) -> None:
    """A program that is nobody's child, as multiprocessing knows it, ends as well and as fast."""
    with OneShotServer() as server, program(tmp_path / "program.py", PROGRAM, server.name, str(COUNT), end) as process:
        rx, first = server.accept(LIMIT)
        with rx:
            assert first == "hello"
            assert process.wait(LIMIT) == exitcode
            assert list(rx) == list(range(COUNT + 10 * (end == "thread")))


def test_nobody_left_to_read(tmp_path: Path) -> None:
    """The backlog of a program whose reader is gone keeps it from nothing."""
    source = """
    from mp_ipcchan import ReceiverGone, channel
    tx, rx = channel()
    for number in range(20_000):
        tx.send(number)
    rx.close()
    """
    with program(tmp_path / "program.py", source) as process:
        finish(process)


def test_reader_in_the_same_process(tmp_path: Path) -> None:
    """Nor does that of a program that holds both ends."""
    source = """
    from mp_ipcchan import channel
    tx, rx = channel()
    for number in range(20_000):
        tx.send(number)
    """
    with program(tmp_path / "program.py", source) as process:
        finish(process)


def test_reader_waits_during_the_end(start_method: str) -> None:
    """A reader that is already waiting gets everything, too."""
    tx, rx = channel()
    process = context_of(start_method).Process(target=send_numbers, args=(return_, tx))  # type: ignore[attr-defined]
    with rx, running(process):
        tx.close()
        reader = InThread(lambda: list(rx))
        assert reader.result() == list(range(COUNT))
        join(process)


@pytest.mark.parametrize("make", ["Queue", "JoinableQueue", "SimpleQueue", "Pipe", "channel", "Mux.pair"])
def test_globals_of_a_main_module_are_collected_without_a_warning(make: str, tmp_path: Path) -> None:
    """Whatever is open at the end, and in whatever order the interpreter finalizes it, ``-X dev`` has no complaint."""
    path = tmp_path / "program.py"
    # The function makes a cycle of the module's globals.
    path.write_text(f"import mp_ipcchan\nmade = mp_ipcchan.{make}()\ndef function(): ...\n")
    command = [sys.executable, "-X", "dev", "-W", "error", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT)
    assert (ended.stdout, ended.stderr) == ("", "")


def test_endpoints_in_a_cycle_are_collected_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (channel, Pipe, Queue, SimpleQueue, lambda: channel(int)):
            cycle: list[Any] = [make()]
            cycle.append(cycle)
            del cycle
            gc.collect()
