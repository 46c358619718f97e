"""Typed channels whose calls are interrupted by a signal's handler that raises."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest

from mp_ipcchan import Disconnected, Sender, channel

from ..conformance._support import LIMIT, F, InThread, attempts, calling_often
from ..conformance.test_semantics import Interrupted, Interrupter, collect, interrupted


class Flat(msgspec.Struct):
    number: int
    data: bytes


class Carrying(Flat):
    reply: Sender[int] | None = None


kinds = pytest.mark.parametrize("of", [Flat, Carrying])
sizes = pytest.mark.parametrize(("size", "count"), [(8, 30_000), (F + 1, 1000)], ids=["small", "large"])


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="3.10 runs handlers between any two bytecodes: see docs/architecture.md"
)
@interrupted
@kinds
@sizes
def test_S14_interrupted_receive_loses_nothing(of: Any, size: int, count: int) -> None:
    """A handler that raises in the middle of receiving, decoding included, costs no message and doubles none."""
    tx, rx = channel(of)

    def send_all() -> None:
        with tx:
            for number in range(count):
                tx.send(of(number, bytes(size)), timeout=None if size == 8 else LIMIT)

    received: list[Any] = []
    interrupt = Interrupter()
    with rx:
        sending = InThread(send_all)
        with calling_often(interrupt):
            for _ in attempts():
                try:
                    # No loop in here: the jump back to its start is not covered by ``except``.
                    interrupt.armed = True
                    collect(received, rx.recv, LIMIT)
                    interrupt.armed = False
                except Interrupted:
                    pass
                except Disconnected:
                    interrupt.armed = False
                    break
        sending.result()
    assert [one.number for one in received] == list(range(count))
    assert all(one.data == bytes(size) for one in received)


@interrupted
@kinds
@sizes
def test_S14_interrupted_send_doubles_nothing(of: Any, size: int, count: int) -> None:
    """A handler that raises in the middle of sending, checking included, costs at most the message being sent."""
    tx, rx = channel(of)
    receiving = InThread(lambda: [one.number for one in rx])
    sent: list[None] = []
    certain: list[int] = []
    interrupt = Interrupter()
    with tx, calling_often(interrupt):
        for number in range(count):
            sent.clear()
            message = of(number, bytes(size))
            try:
                interrupt.armed = True
                collect(sent, tx.send, message)
                interrupt.armed = False
            except Interrupted:
                pass
            if sent:
                certain.append(number)
    received = receiving.result()
    rx.close()
    assert sorted(set(certain) - set(received)) == [], "messages were lost"
    assert received == sorted(set(received)), "messages were doubled, or overtook each other"
