"""What is measured: who sends what to whom, how much of it, and in which unit the result is given."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

MiB = 1 << 20
GiB = 1 << 30


@dataclass(frozen=True)
class Payload:
    """One message: how a producer makes it and how a consumer uses it."""

    nbytes: int
    build: Callable[[], Any]
    #: Raises ``ValueError`` where the object isn't what ``build`` made.
    check: Callable[[Any], None]
    #: Whether every message is checked, and not just the last. Transports may hand out memory that was
    #: never mapped, so an array counts as received when its ends were read; for a tuple of some
    #: hundred nanoseconds the check would be much of what is measured.
    check_each: bool = False
    module: str | None = None


@dataclass(frozen=True)
class Shape:
    """A traffic pattern. Round trips have one client and one server, whatever ``producers`` says."""

    name: str
    title: str
    payload: Payload
    #: How long a round should take, so that the noise of starting and stopping doesn't matter.
    seconds: float
    #: The fewest messages (or round trips) a round may have.
    least: int
    producers: int = 1
    consumers: int = 1
    round_trip: bool = False
    #: How many messages each pair of a producer and a consumer exchanges before a round.
    warm_up: int = 4

    @property
    def one_to_one(self) -> bool:
        return self.producers == self.consumers == 1

    @property
    def large(self) -> bool:
        """Whether a message is so large that only few may wait in memory."""
        return self.payload.nbytes >= MiB

    @property
    def unit(self) -> str:
        return "us per round trip" if self.round_trip else "GiB/s" if self.large else "k msg/s"

    @property
    def lower_is_better(self) -> bool:
        return self.round_trip

    def figure(self, count: int, elapsed: float) -> float:
        """The result, in ``unit``, where ``count`` messages took ``elapsed`` seconds."""
        if self.round_trip:
            return elapsed / count * 1e6
        if self.large:
            return count * self.payload.nbytes / elapsed / GiB
        return count / elapsed / 1e3


_TUPLE = ("task", 17, 3.5)


def _build_tuple() -> Any:
    return _TUPLE


def _check_tuple(item: Any) -> None:
    if item != _TUPLE:
        raise ValueError(f"sent {_TUPLE!r}, received {item!r}")


def _build_array(nbytes: int) -> Any:
    numpy = importlib.import_module("numpy")
    array = numpy.full(nbytes // 8, 2.0)
    array[0], array[-1] = 1.0, 3.0
    return array


def _check_array(nbytes: int, item: Any) -> None:
    if item.nbytes != nbytes or item[0] != 1.0 or item[-1] != 3.0:
        raise ValueError(f"received an array of {item.nbytes} bytes that is not the one of {nbytes} that was sent")


def _array(nbytes: int) -> Payload:
    return Payload(
        nbytes, partial(_build_array, nbytes), partial(_check_array, nbytes), check_each=True, module="numpy"
    )


_SMALL = Payload(64, _build_tuple, _check_tuple)

SHAPES = (
    Shape("one-way", "1 producer to 1 consumer, a tuple of 3", _SMALL, seconds=0.25, least=20_000),
    Shape("round-trip", "ping-pong, a tuple of 3", _SMALL, seconds=0.25, least=5_000, round_trip=True),
    Shape("4-to-4", "4 producers to 4 consumers, a tuple of 3", _SMALL, 0.3, 20_000, producers=4, consumers=4),
    Shape("array-1MiB", "1 producer to 1 consumer, a numpy array of 1 MiB", _array(MiB), seconds=0.5, least=100),
    # One message takes some peers 0.3 s.
    Shape("array-64MiB", "1 producer to 1 consumer, a numpy array of 64 MiB", _array(64 * MiB), 0.5, 2, warm_up=1),
)
