"""Typed channels whose calls are interrupted by a signal's handler that raises, where messages may hold endpoints."""

from __future__ import annotations

import msgspec
import pytest

from mp_ipcchan import Sender, channel

from ..conformance._support import LIMIT, F, InThread
from ..conformance.test_semantics import interrupted, no_promise_on_310, receive_interrupted, send_interrupted


class Item(msgspec.Struct):
    number: int
    data: bytes
    reply: Sender[int] | None = None


sizes = pytest.mark.parametrize(("size", "count"), [(8, 30_000), (F + 1, 1000)], ids=["small", "large"])


@no_promise_on_310
@interrupted
@sizes
def test_S14_interrupted_receive_loses_nothing(size: int, count: int) -> None:
    tx, rx = channel(Item)
    received = receive_interrupted(tx, rx, lambda n: Item(n, bytes(size)), count, None if size == 8 else LIMIT)
    assert [one.number for one in received] == list(range(count))
    assert all(one.data == bytes(size) for one in received)


@interrupted
@sizes
def test_S14_interrupted_send_doubles_nothing(size: int, count: int) -> None:
    tx, rx = channel(Item)
    receiving = InThread(lambda: [one.number for one in rx])
    certain = send_interrupted(tx, lambda number: Item(number, bytes(size)), count)
    received = receiving.result()
    rx.close()
    assert sorted(set(certain) - set(received)) == [], "messages were lost"
    assert received == sorted(set(received)), "messages were doubled, or overtook each other"
