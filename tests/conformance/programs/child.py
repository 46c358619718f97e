"""The child's part of the rows between processes: a program, ``child.py FUNCTION ARGUMENT ...``.

The rows that fork call the same functions in a forked child.
"""

from __future__ import annotations

import sys

from mp_ipcchan import channel, connect

LIMIT = 30.0


def send_test_message(name: str) -> None:
    """X01: send a string."""
    connect(name, LIMIT).send("test message")


def send_seven_bytes(name: str) -> None:
    """X02, X03: send seven bytes and end at once."""
    connect(name, LIMIT).send(bytes(range(1, 8)))


def send_without_a_reader(name: str, count: str) -> None:
    """S06: send more than the kernel holds, and end."""
    tx = connect(name, LIMIT)
    for number in range(int(count)):
        tx.send(number)


def transfer_a_sender(name: str) -> None:
    """X04: send a sender away, and answer once something came by it."""
    super_tx = connect(name, LIMIT)
    sub_tx, sub_rx = channel()
    super_tx.send((b"foo", [sub_tx]))
    assert sub_rx.recv(LIMIT) == b"baz"
    super_tx.send((b"bar", []))


def transfer_by_two_servers(name0: str, name2: str) -> None:
    """X05: send a sender by one server, and what came by it to the other."""
    tx1, rx1 = channel()
    connect(name0, LIMIT).send(tx1)
    person = rx1.recv(LIMIT)
    connect(name2, LIMIT).send(person)


def unwrap_a_cookie(name: str) -> None:
    """X06: receive a receiver, from that a receiver, and from that the cookie, which goes back."""
    tx = connect(name, LIMIT)
    sub_tx, sub_rx = channel()
    tx.send(sub_tx)
    rx2 = sub_rx.recv(LIMIT)
    rx1 = rx2.recv(LIMIT)
    tx.send(rx1.recv(LIMIT))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
