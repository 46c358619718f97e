"""What the tests of muxes share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mp_ipcchan import Mux, Receiver, Sender

from ..conformance._support import LIMIT

#: More than a window and the kernel's buffer take.
MANY = 5000


@contextmanager
def both_ends() -> Iterator[tuple[Mux, Mux]]:
    """A mux whose ends are both in this process."""
    left, right = Mux.pair()
    with left, right:
        yield left, right


def moved(left: Mux, right: Mux, end: Any) -> Any:
    """``end``, once it went from ``left`` to ``right``."""
    left.tx.send(end)
    return right.rx.recv(LIMIT)


def crossing(left: Mux, right: Mux) -> tuple[Sender[Any], Receiver[Any]]:
    """A channel from ``left`` to ``right``."""
    tx, rx = left.channel()
    return tx, moved(left, right, rx)
