"""A mux between processes: started in every way, killed, ended with a backlog, forked."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from mp_ipcchan import Disconnected, EndpointClosed, Mux, Receiver, ReceiverGone, Sender, channel
from mp_ipcchan._lanes import _switchboard
from mp_ipcchan._lanes._lane import Head

from ..conformance._support import LIMIT, attempts, bare_fork, pattern
from ..processes._support import context_of, join, kill, running, started
from ._support import MANY, both_ends, crossing

LANES = 6
#: More than the window of a channel.
EACH = 1500


def echo(mux: Mux) -> None:
    """Answer each request where it says, then where the requests say, until they end."""
    with mux:
        for requests, answers in mux.rx:
            with requests, answers:
                for request in requests:
                    answers.send(request)


def test_started_with_a_mux(start_method: str) -> None:
    left, right = Mux.pair()
    with left, started(context_of(start_method), echo, right):
        assert right.closed
        for number in range(LANES):
            tx, rx = left.channel()
            answers_tx, answers_rx = left.channel()
            left.tx.send((rx, answers_tx))
            answers_tx.close()
            tx.send_many(range(number, number + 100))
            tx.close()
            assert list(answers_rx) == list(range(number, number + 100))
            answers_rx.close()
        left.tx.close()


def flood(mux: Mux, how: str) -> None:
    """Send on many channels what nobody reads yet, and end."""
    lanes = [mux.channel() for _ in range(LANES)]
    for tx, rx in lanes:
        mux.tx.send(rx)
        for number in range(EACH):
            tx.send(number)
        tx.send(pattern(100_000))
    tx, rx = channel()
    with tx, rx:
        tx.send("through the socket of a channel")
        lanes[0][0].send(rx)
    if how == "close":
        mux.close()
        for tx, _ in lanes:
            tx.close()
    elif how == "wait":
        signal.pause()


@pytest.mark.parametrize("how", ["return", "close"])
def test_process_ends_with_a_backlog(start_method: str, how: str) -> None:
    """It ends though nobody reads, and everything arrives: each channel's in order, then its end."""
    left, right = Mux.pair()
    process = context_of(start_method).Process(target=flood, args=(right, how))  # type: ignore[attr-defined]
    with left, running(process):
        join(process)
        for number in range(LANES):
            rx = left.rx.recv(LIMIT)
            got = list(rx)
            if number == 0:
                with got.pop() as through:
                    assert through.recv(LIMIT) == "through the socket of a channel"
            assert got == [*range(EACH), pattern(100_000)]
            rx.close()
        with pytest.raises(Disconnected):
            left.rx.recv(LIMIT)


def test_killed_process_ends_all_its_channels() -> None:
    """After what had come; and who sends to it hears of it."""
    left, right = Mux.pair()
    process = context_of("fork").Process(target=_hold_many, args=(right,))  # type: ignore[attr-defined]
    with left, running(process):
        held = [left.rx.recv(LIMIT) for _ in range(LANES)]
        # A receiver is there before what waited in it has followed.
        assert left.rx.recv(LIMIT) == "all sent"
        kill(process)
        for number, (tx, rx) in enumerate(held):
            assert list(rx) == [number]
            with pytest.raises(ReceiverGone):
                for _ in attempts():
                    tx.send(1)
            tx.close()
            rx.close()
        with pytest.raises(Disconnected):
            left.rx.recv(LIMIT)
        with pytest.raises(ReceiverGone):
            for _ in attempts():
                left.tx.send(1)


def _hold_many(mux: Mux) -> None:
    held = []
    for number in range(LANES):
        out_tx, out_rx = mux.channel()
        in_tx, in_rx = mux.channel()
        out_tx.send(number)
        mux.tx.send((in_tx, out_rx))
        held += [out_tx, in_rx]
    mux.tx.send("all sent")
    signal.pause()


def test_killed_while_it_floods() -> None:
    """What came before the death is whole and in order, channel by channel; then all of them end."""
    left, right = Mux.pair()
    process = context_of("fork").Process(target=flood, args=(right, "wait"))  # type: ignore[attr-defined]
    with left, running(process):
        receivers = [left.rx.recv(LIMIT) for _ in range(LANES)]
        assert receivers[-1].recv(LIMIT) == 0
        kill(process)
        for rx in receivers:
            got = list(rx)
            first = 1 if rx is receivers[-1] else 0
            for end in (one for one in got if isinstance(one, Receiver)):
                end.close()
            numbers = [one for one in got if isinstance(one, int)]
            assert numbers == list(range(first, first + len(numbers)))
            rx.close()


def add_one(rx: Receiver[int], tx: Sender[int]) -> None:
    for number in rx:
        tx.send(number + 1)


def test_ends_passed_to_a_third_process(start_method: str) -> None:
    """As arguments, whose process the mux doesn't reach: there they are on a channel of their own."""
    with both_ends() as (left, right):
        tx, rx = crossing(left, right)
        back_tx, back_rx = crossing(right, left)
        tx.send(0)
        with started(context_of(start_method), add_one, rx, back_tx):
            assert rx.closed
            back_tx.close()
            for number in range(1, MANY):
                tx.send(number)
            tx.close()
            assert list(back_rx) == list(range(1, MANY + 1))
        back_rx.close()


def send_all(tx: Sender[int]) -> None:
    for number in range(MANY):
        tx.send(number)


def test_sender_passed_to_a_third_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver, which is here, and the thread that bridges both look for what comes: one after the other."""
    feed = Head.feed
    alone: list[bool] = []

    def note_and_feed(*args: Any) -> None:
        alone.append(_switchboard.lock._is_owned())  # type: ignore[attr-defined]
        feed(*args)

    monkeypatch.setattr(Head, "feed", note_and_feed)
    with both_ends() as (left, _):
        tx, rx = left.channel()
        with rx, started(context_of("fork"), send_all, tx):
            tx.close()
            assert list(rx) == list(range(MANY))
    assert all(alone)


def test_third_process_is_killed() -> None:
    with both_ends() as (left, right):
        tx, rx = crossing(left, right)
        back_tx, back_rx = crossing(right, left)
        process = context_of("fork").Process(target=add_one, args=(rx, back_tx))  # type: ignore[attr-defined]
        with running(process):
            back_tx.close()
            tx.send(1)
            assert back_rx.recv(LIMIT) == 2
            kill(process)
            with pytest.raises(Disconnected):
                back_rx.recv(LIMIT)
            with pytest.raises(ReceiverGone):
                for _ in attempts():
                    tx.send(1)
        tx.close()
        back_rx.close()


def test_failed_start_gives_the_ends_back() -> None:
    with both_ends() as (left, right):
        tx, rx = crossing(left, right)
        tx.send(1)
        process = context_of("spawn").Process(target=add_one, args=(rx, lambda: None))  # type: ignore[attr-defined]
        with pytest.raises(Exception, match="lambda"):
            process.start()
        assert rx.recv(LIMIT) == 1
        tx.close()
        rx.close()


def test_forked_child_has_no_part_in_it() -> None:
    """Its copies are closed, and don't keep the socket open when the process is killed that has it."""
    left, right = Mux.pair()
    process = context_of("fork").Process(target=_fork_and_wait, args=(right,))  # type: ignore[attr-defined]
    with left, running(process):
        grandchild = left.rx.recv(LIMIT)
        assert left.rx.recv(LIMIT) == "from the parent"
        # Not joined before the grandchild has ended: that holds what ``join`` waits for.
        process.kill()
        with pytest.raises(Disconnected):
            left.rx.recv(LIMIT)
        os.kill(grandchild, signal.SIGKILL)
        join(process, -signal.SIGKILL)


def _fork_and_wait(mux: Mux) -> None:
    tx, rx = mux.channel()
    told_rx, told_tx = os.pipe()

    def check() -> None:
        # Should the test fail, nobody kills this process.
        signal.alarm(int(LIMIT))
        for use in (lambda: mux.channel(), lambda: tx.send(1), lambda: mux.tx.send(1)):
            with pytest.raises(EndpointClosed):
                use()
        os.write(told_tx, b"x")
        signal.pause()

    pid = bare_fork(check).pid
    assert os.read(told_rx, 1)
    tx.send("still ours")
    assert rx.recv(LIMIT) == "still ours"
    mux.tx.send(pid)
    mux.tx.send("from the parent")
    signal.pause()
