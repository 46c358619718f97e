"""Messages on a mux that there is no memory for where they come."""

from __future__ import annotations

from typing import Any

import pytest

from mp_ipcchan import Disconnected, Mux, Receiver, ReceiverGone, Sender, channel

from ..conformance._support import LIMIT
from ..processes._support import context_of, started
from ..segments._support import MIB, leave_address_space

BIG = 64 * MIB
#: More than a window has room for.
TIMES = 6
DROPPED = r"a message of 67\d{6} bytes was dropped"


def _recv(rx: Receiver[Any]) -> None:
    rx.recv(LIMIT)


def _recv_many(rx: Receiver[Any]) -> None:
    rx.recv_many(2, LIMIT)


def _receive(mux: Mux, take: Any, small_first: bool) -> None:
    with mux:
        large, small = mux.rx.recv(LIMIT), mux.rx.recv(LIMIT)
        leave_address_space(BIG // 2)
        for number in range(TIMES):
            if small_first:
                # Whoever waits hands out what comes for others, too.
                assert small.recv(LIMIT) == number
            with pytest.raises(MemoryError, match=DROPPED):
                take(large)
            assert large.recv(LIMIT) == number
            if not small_first:
                assert small.recv(LIMIT) == number
        large.close()
        small.close()


@pytest.mark.parametrize("small_first", [False, True])
@pytest.mark.parametrize("take", [_recv, _recv_many])
def test_a_receiver_hears_of_its_own(take: Any, small_first: bool) -> None:
    """It alone; and who sends to it may send as much as before, however often that happens."""
    left, right = Mux.pair()
    with left, started(context_of("spawn"), _receive, right, take, small_first):
        (large, large_rx), (small, small_rx) = left.channel(), left.channel()
        left.tx.send_many([large_rx, small_rx])
        with large, small:
            for number in range(TIMES):
                large.send(bytes(BIG), LIMIT)
                large.send(number, LIMIT)
                small.send(number, LIMIT)


def _lose_ends(mux: Mux) -> None:
    with mux:
        leave_address_space(BIG // 2)
        with pytest.raises(MemoryError, match=DROPPED):
            mux.rx.recv(LIMIT)
        assert mux.rx.recv(LIMIT) == "the next"


def test_ends_in_a_message_that_is_dropped() -> None:
    """They end with it: nobody waits for what can't come, or sends what can't be received."""
    left, right = Mux.pair()
    with left, started(context_of("spawn"), _lose_ends, right):
        (tx, gone_rx), (gone_tx, rx) = left.channel(), left.channel()
        with tx, rx:
            left.tx.send((bytes(BIG), gone_rx, gone_tx))
            gone_tx.close()
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
            with pytest.raises(ReceiverGone):
                while True:
                    tx.send(bytes(1000), LIMIT)
            left.tx.send("the next")


def _pass_on(mux: Mux, ready: Sender[str]) -> None:
    with mux, ready:
        rx, elsewhere = mux.rx.recv(LIMIT)
        with elsewhere:
            elsewhere.send(rx)
        leave_address_space(BIG // 2)
        ready.send("ready")
        assert mux.rx.recv(LIMIT) == "end"


def test_a_receiver_that_has_gone_on() -> None:
    """Where its messages only come through, one is dropped, and the next ones go on."""
    left, right = Mux.pair()
    ready_tx, ready_rx = channel()
    elsewhere_tx, elsewhere_rx = channel()
    with left, elsewhere_rx, ready_rx, started(context_of("spawn"), _pass_on, right, ready_tx):
        ready_tx.close()
        tx, rx = left.channel()
        with tx:
            left.tx.send((rx, elsewhere_tx))
            elsewhere_tx.close()
            assert ready_rx.recv(LIMIT) == "ready"
            with elsewhere_rx.recv(LIMIT) as gone_on:
                for number in range(TIMES):
                    tx.send(bytes(BIG), LIMIT)
                    tx.send(number, LIMIT)
                assert [gone_on.recv(LIMIT) for _ in range(TIMES)] == list(range(TIMES))
        left.tx.send("end")
