"""What goes out at the end of a process must never wait: nobody may be there to read."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from mp_ipcchan._message import PLAIN
from mp_ipcchan._transport._carrier import Carrier
from mp_ipcchan._transport._spill import Spill
from mp_ipcchan._transport.unix import SEND_FLAGS, close_all, make_pair


def test_full_carrier_says_so() -> None:
    carrier = Carrier()
    with socket.socket() as some:
        while carrier.add([some.fileno()]):
            assert carrier.count < 1_000_000
    close_all(Carrier.unload_all(carrier.detach()))


def test_last_packet_does_not_wait() -> None:
    """Even where the socket is full up to the raised limit."""
    sending, receiving = make_pair(1 << 22)
    with closing(sending), closing(receiving):
        with pytest.raises(BlockingIOError):
            while True:
                sending.send(PLAIN, SEND_FLAGS)
        spill = Spill.of([PLAIN + b"N."])
        with pytest.raises(BlockingIOError):
            spill.send_last(sending)
        assert spill.left == 1
        spill.close()
