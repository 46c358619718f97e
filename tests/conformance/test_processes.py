"""Conformance 2.4, and the rows of 2.3 about one-shot servers: processes that meet by a name.

Each test is named after its row. The child's part is in ``programs/child.py``; "spawn" runs it as a program of
its own, "fork" in a child of the ``ipcchan_fork`` context.
"""

from __future__ import annotations

import time

import pytest

from mp_ipcchan import Disconnected, OneShotServer, Sender, channel, connect

from ._support import LIMIT, PERSON, SEVEN, InThread, StartChild, fork, spawn
from .programs import child

both_starts = pytest.mark.parametrize("start", [spawn, fork], ids=["spawn", "fork"])


def send_seven_bytes_to(name: str) -> None:
    with connect(name, LIMIT) as tx:
        tx.send(SEVEN)


def test_P24_server_accept_first() -> None:
    """The server waits; a client that connects 30 ms later is accepted, with its first message."""

    def come_late(name: str) -> None:
        time.sleep(0.030)
        send_seven_bytes_to(name)

    with OneShotServer() as server:
        client = InThread(come_late, server.name)
        rx, first = server.accept(LIMIT)
        with rx:
            assert first == SEVEN
        client.result()


def test_P25_server_connect_first() -> None:
    """A client that connects, sends and leaves before the server looks is accepted, with its first message."""
    with OneShotServer() as server:
        send_seven_bytes_to(server.name)
        rx, first = server.accept(LIMIT)
        with rx:
            assert first == SEVEN
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)


def test_X01_spawn_one_shot_server_client() -> None:
    """A program that gets the name as an argument sends a string and ends well."""
    with OneShotServer() as server, spawn(child.send_test_message, server.name) as program:
        rx, message = server.accept(LIMIT)
        with rx:
            assert message == "test message"
        assert program.join() == 0


def check_cross_process(start: StartChild) -> None:
    """Seven bytes of a child that is dead by then are received."""
    with OneShotServer() as server, start(child.send_seven_bytes, server.name) as process:
        assert process.join() == 0
        rx, message = server.accept(LIMIT)
        with rx:
            assert message == SEVEN
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)


def test_X02_cross_process_spawn() -> None:
    """A program connects, sends seven bytes and ends; they are received though it is dead."""
    check_cross_process(spawn)


def test_X03_cross_process_fork() -> None:
    """A forked child connects, sends seven bytes and ends; they are received though it is dead."""
    check_cross_process(fork)


@both_starts
def test_X04_cross_process_sender_transfer(start: StartChild) -> None:
    """The child sends "foo" and a sender; what goes back by it makes the child send "bar"."""
    with OneShotServer() as server, start(child.transfer_a_sender, server.name) as process:
        super_rx, (data, [sub_tx]) = server.accept(LIMIT)
        with super_rx, sub_tx:
            assert data == b"foo"
            assert isinstance(sub_tx, Sender)
            sub_tx.send(b"baz")
            assert super_rx.recv(LIMIT) == (b"bar", [])
        assert process.join() == 0


@both_starts
def test_X05_cross_process_embedded_senders(start: StartChild) -> None:
    """The child sends a sender to one server; the person that goes back by it arrives at the other."""
    with (
        OneShotServer() as server0,
        OneShotServer() as server2,
        start(child.transfer_by_two_servers, server0.name, server2.name) as process,
    ):
        rx0, tx1 = server0.accept(LIMIT)
        with rx0, tx1:
            tx1.send(PERSON)
            rx2, person = server2.accept(LIMIT)
            with rx2:
                assert person == PERSON
        assert process.join() == 0


@both_starts
def test_X06_cross_process_two_step_transfer(start: StartChild) -> None:
    """A cookie in a channel, whose receiver is in a second channel, whose receiver goes to the child, comes back."""
    cookie = b"cookie"
    tx1, rx1 = channel()
    tx2, rx2 = channel()
    tx1.send(cookie)
    tx2.send(rx1)
    with tx1, tx2, OneShotServer() as server, start(child.unwrap_a_cookie, server.name) as process:
        rx, tx_to_child = server.accept(LIMIT)
        with rx, tx_to_child:
            tx_to_child.send(rx2)
            assert rx.recv(LIMIT) == cookie
            assert process.join() == 0
            with pytest.raises(Disconnected):
                rx.recv(LIMIT)
