"""What the conformance tests share: the payloads that the rows name, threads and processes with an end."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, Union

import pytest

from mp_ipcchan import BytesReceiver, BytesSender, Receiver, Sender, bytes_channel, channel
from mp_ipcchan._message import INLINE_SIZE

T = TypeVar("T")

#: No call of a test waits longer than this (seconds); none that works comes near it.
LIMIT = 30.0
#: The rows' F, the most that goes inside a packet (bytes).
F = INLINE_SIZE
MEDIUM = min(F, 65536)
MIB = 1 << 20

PERSON = ("Patrick Walton", 29)
SEVEN = bytes(range(1, 8))

AnySender = Union[Sender[Any], BytesSender]
AnyReceiver = Union[Receiver[Any], BytesReceiver]
MakePair = Callable[[], tuple[AnySender, AnyReceiver]]

#: For the rows at the level of bytes: on a channel of bytes, and on one of objects.
both_kinds = pytest.mark.parametrize("make_pair", [bytes_channel, channel], ids=["bytes", "typed"])


def pattern(size: int) -> bytes:
    """``size`` bytes, of which byte i is ``i % 251``."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def tagged(size: int, sender: int) -> bytes:
    """``size`` bytes that tell who sent them: byte j is ``j % 13``, and the sender's number in the high half."""
    return (bytes(j | sender << 4 for j in range(13)) * (size // 13 + 1))[:size]


class InThread(Generic[T]):
    """A call that runs in a thread of its own."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Wait for the thread's end; what the call returned, or raises what it raised."""
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), f"{self._call} still runs after {LIMIT} seconds"
        if self._error is not None:
            raise self._error
        return self._results[0]


class Forked:
    """A copy of this process, made by a bare ``os.fork``, that runs a call and ends."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def join(self) -> int:
        """Wait for its end; 0 where the call returned, minus the signal's number where it was killed."""
        pidfd = os.pidfd_open(self.pid)
        try:
            ended, _, _ = select.select([pidfd], [], [], LIMIT)
        finally:
            os.close(pidfd)
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        assert ended, f"the child still ran after {LIMIT} seconds"
        return os.waitstatus_to_exitcode(status)


def attempts() -> Iterator[None]:
    """For a loop that must end by itself: go round until ``LIMIT`` is over, then fail."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        yield
    pytest.fail(f"nothing came of it in {LIMIT} seconds")


def open_descriptors() -> set[int]:
    """The descriptors of this process."""
    # The listing has one of its own, which is gone by the time it is looked up.
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


@contextmanager
def calling_often(handler: Callable[[], object], interval: float = 0.0001) -> Iterator[None]:
    """Call ``handler`` in the main thread, as a signal's handler, every ``interval`` seconds."""
    previous = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
