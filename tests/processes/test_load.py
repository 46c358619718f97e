"""Many endpoints, and one endpoint many times: descriptors don't grow where they needn't."""

from __future__ import annotations

from typing import Any

import pytest

from mp_ipcchan import Disconnected, Receiver, Sender, channel

from ..conformance._support import LIMIT, open_descriptors
from ._support import context_of, descriptors_of, started


def keep_what_comes(rx: Receiver[Any], up: Sender[int]) -> None:
    """Keep all that is received; tell how many descriptors are open, once asked for by a number."""
    kept = []
    for message in rx:
        if isinstance(message, int):
            up.send(len(open_descriptors()))
        else:
            kept.append(message)
    for tx in kept[:: len(kept) - 1]:
        tx.send("kept")


def test_resends_of_one_sender(start_method: str) -> None:
    """10,000 copies of one sender, all alive in the other process, take one descriptor there, and none here."""
    tx, rx = channel()
    to_child, moved = channel()
    up_tx, up = channel()
    with rx, up, to_child, started(context_of(start_method), keep_what_comes, moved, up_tx) as child:
        up_tx.close()
        to_child.send(tx)
        to_child.send(0)
        there = up.recv(LIMIT)
        here = len(open_descriptors())
        for number in range(10_000):
            to_child.send(tx, timeout=LIMIT)
            if number % 2000 == 0:
                # Some may be on their way: no more than the kernel takes at once.
                assert descriptors_of(child) < there + 10
        assert len(open_descriptors()) == here
        to_child.send(0)
        assert up.recv(LIMIT) == there
        assert len(open_descriptors()) == here
        tx.close()
        to_child.close()
        assert [rx.recv(LIMIT), rx.recv(LIMIT)] == ["kept", "kept"]
        with pytest.raises(Disconnected):
            rx.recv(LIMIT)


def send_back(rx: Receiver[Any], tx: Sender[Any]) -> None:
    for message in rx:
        tx.send(message)


def test_round_trips_of_one_receiver(start_method: str) -> None:
    """A receiver that moves to and fro 500 times, with what waits in it, costs nothing that stays."""
    to_child, moved = channel()
    copied, back = channel()
    tx, rx = channel()
    with to_child, back, tx, started(context_of(start_method), send_back, moved, copied):
        copied.close()
        here = len(open_descriptors())
        for number in range(500):
            tx.send_many([number, number])
            assert rx.recv(LIMIT) == number
            to_child.send(rx)
            rx = back.recv(LIMIT)
            assert rx.recv(LIMIT) == number
            assert len(open_descriptors()) == here
        to_child.close()
        rx.close()


def answer_by_all(rx: Receiver[Any]) -> None:
    txs, rxs = rx.recv(LIMIT)
    for tx, one in zip(txs, rxs, strict=True):
        tx.send(one.recv(LIMIT) + 1)


def test_thousand_endpoints_in_a_message(start_method: str) -> None:
    """500 senders and 500 receivers in one message to another process, and every one of them works."""
    to_child, moved = channel()
    questions = [channel() for _ in range(500)]
    answers = [channel() for _ in range(500)]
    with to_child, started(context_of(start_method), answer_by_all, moved):
        for number, (tx, _) in enumerate(questions):
            tx.send(number)
        before = len(open_descriptors())
        to_child.send(([tx for tx, _ in answers], [rx for _, rx in questions]))
        for tx, _ in answers:
            tx.close()
        assert len(open_descriptors()) == before - 1000
        for number, (_, rx) in enumerate(answers):
            assert rx.recv(LIMIT) == number + 1
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
    for tx, rx in questions + answers:
        tx.close()
        rx.close()
