"""What the conformance tests share: the payloads that the rows name, threads and processes with an end."""

from __future__ import annotations

import multiprocessing
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, TypeAlias, TypeVar

import pytest
from typing_extensions import Self

from mp_ipcchan import BytesReceiver, BytesSender, Receiver, Sender, bytes_channel, channel
from mp_ipcchan._message import INLINE_SIZE

from .programs import child

T = TypeVar("T")

#: No call of a test waits longer than this (seconds); none that works comes near it.
LIMIT = 30.0
#: The rows' F, the most that goes inside a packet (bytes).
F = INLINE_SIZE
MEDIUM = min(F, 65536)
MIB = 1 << 20

PERSON = ("Patrick Walton", 29)
SEVEN = bytes(range(1, 8))

AnySender: TypeAlias = "Sender[Any] | BytesSender"
AnyReceiver: TypeAlias = "Receiver[Any] | BytesReceiver"
MakePair: TypeAlias = Callable[[], tuple[AnySender, AnyReceiver]]

#: For the rows at the level of bytes: on a channel of bytes, and on one of objects.
both_kinds = pytest.mark.parametrize("make_pair", [bytes_channel, channel], ids=["bytes", "typed"])
#: And on one whose messages are checked against a type.
all_kinds = pytest.mark.parametrize(
    "make_pair", [bytes_channel, channel, lambda: channel(bytes)], ids=["bytes", "typed", "checked"]
)


def pattern(size: int) -> bytes:
    """``size`` bytes, of which byte i is ``i % 251``."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def tagged(size: int, sender: int) -> bytes:
    """``size`` bytes that tell who sent them: byte j is ``j % 13``, and the sender's number in the high half."""
    return (bytes(j | sender << 4 for j in range(13)) * (size // 13 + 1))[:size]


class InThread(Generic[T]):
    """A call that runs in a thread of its own."""

    def __init__(self, call: Callable[..., T], *args: object) -> None:
        self._call = call
        self._args = args
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call(*self._args))
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Wait for the thread's end; what the call returned, or raises what it raised."""
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), f"{self._call} still runs after {LIMIT} seconds"
        if self._error is not None:
            raise self._error
        return self._results[0]


class Child:
    """A process with an end. Leaving the ``with`` block kills it, if the test hasn't joined it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended = False

    def join(self) -> int:
        """Wait for its end: its exit code, or minus the number of the signal that killed it."""
        pidfd = os.pidfd_open(self.pid)
        try:
            in_time, _, _ = select.select([pidfd], [], [], LIMIT)
        finally:
            os.close(pidfd)
        assert in_time, f"the child still runs after {LIMIT} seconds"
        return self._reap()

    def _reap(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self._ended = True
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self.kill()
            self._reap()


StartChild: TypeAlias = Callable[..., Child]


def bare_fork(call: Callable[[], object]) -> Child:
    """A copy of this process, made by ``os.fork``, that runs a call and ends; 0 where it returned."""
    pid = os.fork()
    if pid:
        return Child(pid)
    code = 1
    try:
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class _Forked(Child):
    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        super().__init__(process.pid)
        self._process = process

    def _reap(self) -> int:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        self._ended = True
        return code


def fork(function: Callable[..., object], *args: object) -> Child:
    """A forked child that calls ``function``, started by our context."""
    process: BaseProcess = multiprocessing.get_context("ipcchan_fork").Process(  # type: ignore[attr-defined]
        target=function, args=args
    )
    process.start()
    return _Forked(process)


class _Spawned(Child):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(process.pid)
        self._process = process

    def _reap(self) -> int:
        code = self._process.wait()
        self._ended = True
        return code


def spawn(function: Callable[..., object], *args: str) -> Child:
    """A program of its own that calls ``function``, which is one of ``programs.child``."""
    assert child.__file__ is not None
    # Wherever this process found the library, the program finds it, too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, child.__file__, function.__name__, *args]
    return _Spawned(subprocess.Popen(command, env=environment))


def attempts() -> Iterator[None]:
    """For a loop that must end by itself: go round until ``LIMIT`` is over, then fail."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        yield
    pytest.fail(f"nothing came of it in {LIMIT} seconds")


def repeat(call: Callable[..., object], *args: object) -> None:
    """Call again and again, until that raises what the caller waits for."""
    for _ in attempts():
        call(*args)


def open_descriptors() -> set[int]:
    """The descriptors of this process."""
    # The listing has one of its own, which is gone by the time it is looked up.
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


@contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """Let this process open only so many more descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = open_descriptors()
    lowest_free = [fd for fd in range(max(used) + descriptors + 2) if fd not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free[descriptors], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Interrupted(BaseException):
    """Raised by a signal's handler, wherever the main thread is, as KeyboardInterrupt is by Ctrl-C."""


class Interrupter:
    """A signal's handler that raises, once each time it was armed; not in a finaliser."""

    armed = False

    def __call__(self) -> None:
        if self.armed and not finalising(sys._getframe()):
            self.armed = False
            raise Interrupted


def finalising(frame: FrameType | None) -> bool:
    """Whether ``frame`` was called by a finaliser. What is raised in one, nobody hears; what it closes stays open."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


#: Where the handler raises in a finaliser of the stdlib's, Python can do no more than say so.
interrupted = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextmanager
def calling_often(handler: Callable[[], object], interval: float = 0.001) -> Iterator[None]:
    """Call ``handler`` in the main thread, as a signal's handler, every ``interval`` seconds; never within itself."""
    busy = False

    def handle(*_: object) -> None:
        nonlocal busy
        if not busy:
            busy = True
            try:
                handler()
            finally:
                busy = False

    previous = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
