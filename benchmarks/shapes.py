"""What is measured: who sends what to whom, how much of it, and in which unit the result is given."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

KiB = 1 << 10
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
    #: Whether the messages are the numbers from 0 on, each of which the consumer checks.
    numbered: bool = False

    def messages(self, count: int) -> Iterable[Any]:
        """What a producer sends."""
        return range(count) if self.numbered else repeat(self.build(), count)


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
    #: Whether only the systems that matter most run, to keep the whole short.
    survey: bool = False
    #: Whether the payload is one buffer, so that copying it is a floor.
    buffer: bool = False

    @property
    def one_to_one(self) -> bool:
        return self.producers == self.consumers == 1

    @property
    def small(self) -> bool:
        """Whether a message is so small that the calls are what it costs."""
        return self.payload.nbytes < KiB

    @property
    def large(self) -> bool:
        """Whether a message is so large that only few may wait in memory."""
        return self.payload.nbytes >= MiB

    @property
    def unit(self) -> str:
        return "us per round trip" if self.round_trip else "GiB/s" if self.in_bytes else "k msg/s"

    @property
    def in_bytes(self) -> bool:
        """Whether bytes a second say more than messages a second."""
        return self.payload.nbytes >= 64 * KiB

    @property
    def lower_is_better(self) -> bool:
        return self.round_trip

    def figure(self, count: int, elapsed: float) -> float:
        """The result, in ``unit``, where ``count`` messages took ``elapsed`` seconds."""
        if self.round_trip:
            return elapsed / count * 1e6
        if self.in_bytes:
            return count * self.payload.nbytes / elapsed / GiB
        return count / elapsed / 1e3


_TUPLE = ("task", 17, 3.5)


def _build_tuple() -> Any:
    return _TUPLE


def _check_equal(build: Callable[[], Any], item: Any) -> None:
    expected = build()
    if item != expected:
        raise ValueError(f"sent {expected!r}, received {item!r}"[:500])


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


_LAYERS, _LAYER = 20, 100 * KiB


def _build_arrays() -> Any:
    return {f"layer{number}": _build_array(_LAYER) for number in range(_LAYERS)}


def _check_arrays(item: Any) -> None:
    if len(item) != _LAYERS:
        raise ValueError(f"sent {_LAYERS} arrays, received {len(item)}")
    for array in item.values():
        _check_array(_LAYER, array)


def _build_bytes(nbytes: int) -> bytes:
    return bytes([1]) + bytes(nbytes - 2) + bytes([3])


def _check_bytes(nbytes: int, item: Any) -> None:
    if len(item) != nbytes or item[0] != 1 or item[-1] != 3:
        raise ValueError(f"received {len(item)} bytes that are not the {nbytes} that were sent")


def _bytes(nbytes: int) -> Payload:
    return Payload(nbytes, partial(_build_bytes, nbytes), partial(_check_bytes, nbytes), check_each=True)


def _build_lists() -> Any:
    return [[[number, str(number), [number / 2]] for number in range(10)] for _ in range(10)]


@dataclass
class _Point:
    x: float
    y: float


@dataclass
class _Track:
    name: str
    points: list[_Point]
    closed: bool


def _build_tracks() -> Any:
    return [_Track(f"track {number}", [_Point(number, -number) for _ in range(4)], closed=True) for number in range(5)]


def _objects(nbytes: int, build: Callable[[], Any]) -> Payload:
    return Payload(nbytes, build, partial(_check_equal, build))


def _check_number(_: Any) -> None:
    """Each is checked as it comes."""


def _size_name(nbytes: int) -> str:
    for unit, size in (("MiB", MiB), ("KiB", KiB)):
        if nbytes >= size:
            return f"{nbytes // size}{unit}"
    return f"{nbytes}B"


_SMALL = _objects(64, _build_tuple)
#: Pickled, what they have.
_LISTS, _TRACKS = _objects(4 * KiB, _build_lists), _objects(900, _build_tracks)

SHAPES = (
    Shape("one-way", "1 producer to 1 consumer, a tuple of 3", _SMALL, seconds=0.25, least=20_000),
    Shape("round-trip", "ping-pong, a tuple of 3", _SMALL, seconds=0.25, least=5_000, round_trip=True),
    Shape("4-to-1", "4 producers to 1 consumer, a tuple of 3", _SMALL, 0.3, 20_000, producers=4),
    Shape("1-to-4", "1 producer to 4 consumers, a tuple of 3", _SMALL, 0.3, 20_000, consumers=4),
    Shape("4-to-4", "4 producers to 4 consumers, a tuple of 3", _SMALL, 0.3, 20_000, producers=4, consumers=4),
    Shape(
        "stream",
        "1 producer to 1 consumer, numbers, whose order is checked",
        Payload(16, int, _check_number, numbered=True),
        0.25,
        20_000,
        survey=True,
    ),
    Shape("lists", "1 producer to 1 consumer, lists of lists (4 KiB pickled)", _LISTS, 0.25, 1_000, survey=True),
    Shape("dataclasses", "1 producer to 1 consumer, 5 dataclasses with 20 in them", _TRACKS, 0.25, 1_000, survey=True),
    Shape("array-64KiB", "1 producer to 1 consumer, a numpy array of 64 KiB", _array(64 * KiB), 0.3, 500, buffer=True),
    Shape("array-1MiB", "1 producer to 1 consumer, a numpy array of 1 MiB", _array(MiB), 0.4, 100, buffer=True),
    # One message takes some peers 0.3 s.
    Shape("array-64MiB", "1 producer to 1 consumer, a numpy array of 64 MiB", _array(64 * MiB), 0.4, 2, buffer=True),
    Shape(
        "arrays",
        "1 producer to 1 consumer, a dict of 20 arrays of 100 KiB",
        Payload(_LAYERS * _LAYER, _build_arrays, _check_arrays, check_each=True, module="numpy"),
        0.4,
        50,
    ),
    *(
        Shape(
            f"bytes-{_size_name(nbytes)}",
            f"1 producer to 1 consumer, bytes, {_size_name(nbytes)}",
            _bytes(nbytes),
            0.2,
            max(1, min(5_000, 32 * MiB // nbytes)),
            warm_up=4 if nbytes < 16 * MiB else 1,
            survey=True,
            buffer=nbytes >= 64 * KiB,
        )
        for nbytes in (8, KiB, 16 * KiB, 128 * KiB, MiB, 16 * MiB, 256 * MiB)
    ),
)
